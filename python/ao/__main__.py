"""`python -m ao` and `torchrun -m ao`: the command line."""

from ao.cli import main

if __name__ == "__main__":
    main()
