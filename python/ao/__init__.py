"""Activation Oracles: language models that read another model's activations and answer in plain language."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ao.oracle import Activations, Answer, Oracle

__all__ = ["Activations", "Answer", "Oracle", "__version__"]


def __getattr__(name: str) -> object:
    """Resolve the public names on first use: importing `ao` itself loads neither torch nor the extension."""
    if name in ("Activations", "Answer", "Oracle"):
        from ao import oracle

        return getattr(oracle, name)
    if name == "__version__":
        from importlib.metadata import version

        return version("activation-oracles")
    raise AttributeError(f"module 'ao' has no attribute {name!r}")
