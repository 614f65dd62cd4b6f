"""The demo: a world, a small target that knows it, and an oracle that reads the target."""
