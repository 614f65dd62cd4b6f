"""Sources: files of one format each, read into Examples (dicts as `docs/design.md` describes them)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ao.config import ClassificationSource, ContextPredictionSource, LatentQASource, RecordsSource, SourceConfig
from ao.sources import classification, context_prediction, latentqa, records

Example = dict[str, Any]


def examples(config: SourceConfig, *, seed: int, root: Path, drops: Counter[str] | None = None) -> Iterator[Example]:
    """The Examples of a source, in file order; every draw is keyed by seed and id, so none depends on another.

    Args:
        config: The source.
        seed: Keys the draws.
        root: Folder that a relative `config.path` is taken from.
        drops: Counts what is left out, by reason.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file has another layout than its format; names file, entry and key.
    """
    path = root / config.path
    if not path.exists():
        raise FileNotFoundError(
            f"source {config.name!r}: {path} does not exist; its path is taken from the recipe's folder"
        )
    drops = Counter() if drops is None else drops
    match config:
        case LatentQASource():
            return latentqa.examples(config, seed=seed, path=path, drops=drops)
        case ClassificationSource():
            return classification.examples(config, seed=seed, path=path)
        case ContextPredictionSource():
            return context_prediction.examples(config, seed=seed, path=path)
        case RecordsSource():
            return records.examples(config, seed=seed, path=path)
