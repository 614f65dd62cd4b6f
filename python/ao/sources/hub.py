"""Hugging Face data sets: streamed from the Hub, or from a folder that `save_to_disk` wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ao.config import SourceConfig
from ao.sources.columns import Columns, plain, spelled
from ao.sources.table import Table

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

SHUFFLE_BUFFER = 10_000
"""Rows that a stream's shuffle draws from, where not all rows are read."""
PARQUET_COPY = "refs/convert/parquet"
"""Branch on which the Hub keeps data sets converted to Parquet."""
ROWS = 1000
"""Rows of a batch."""

_LOCAL = (
    "Without a network use a copy: `datasets.load_dataset(...).save_to_disk(FOLDER)` where there is one, then "
    'path = "FOLDER" instead of dataset'
)


def is_saved(path: Path) -> bool:
    """Whether a folder is what `save_to_disk` writes of a data set, or of several splits."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def hub_table(config: SourceConfig, *, columns: Columns, seed: int, limit: int | None) -> Table:
    """A split of a data set on the Hub, streamed; with a limit the first rows of its shuffle, keyed by the seed.

    Raises:
        FileNotFoundError: there is no such data set or split, or its terms must be accepted; says how.
        ConnectionError: the Hub cannot be reached.
        ValueError: a column is missing.
    """
    split = config.split or "train"
    where = f"{config.dataset} ({', '.join(filter(None, (config.subset, split, config.revision)))})"
    commit = _commit(config)
    stream = _load(config, split, commit, where)
    features = dict(stream.features or {})
    names = list(stream.column_names or features or next(iter(stream.take(1)), {}))
    chosen = columns.chosen(names, where=where)
    classes = getattr(features.get(columns.label or ""), "names", None)

    def batches() -> Iterator[tuple[pa.RecordBatch, int]]:
        rows = stream.select_columns(chosen)
        if limit is not None:
            rows = rows.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER).take(limit)
        found = rows.with_format("arrow").iter(batch_size=ROWS)
        num_rows = 0
        try:
            for batch, first_row in _record_batches(found, columns, classes, where=where):
                yield batch, first_row
                num_rows += batch.num_rows
        except Exception as error:
            if not _is_of_the_network(error):
                raise
            raise ConnectionError(
                f"source {config.name!r}: data set {where}: the stream broke off after {num_rows} rows ({error}); try again "
                f"with --resume. {_LOCAL}"
            ) from None

    named = {
        "dataset": config.dataset,
        "subset": config.subset,
        "split": split,
        "revision": config.revision,
        "fingerprint": commit,
    }
    return Table(
        described={"prefix": config.name, "origin": where, "unit": "row"},
        batches=batches,
        dataset={key: value for key, value in named.items() if value},
        words=None if classes is None else tuple(classes),
    )


def saved_table(config: SourceConfig, *, path: Path, columns: Columns) -> Table:
    """A data set from a folder that `save_to_disk` wrote.

    Raises:
        ValueError: it has no such split, or a column is missing.
    """
    from datasets import Dataset, load_from_disk

    loaded = load_from_disk(str(path))
    if not isinstance(loaded, Dataset):
        split = config.split or "train"
        if split not in loaded:
            raise ValueError(f"source {config.name!r}: {path} has no split {split!r}, only {sorted(loaded)}; name one")
        loaded = loaded[split]
        path = path / split
    saved: Dataset = loaded
    chosen = columns.chosen(saved.column_names, where=str(path))
    classes = getattr(saved.features.get(columns.label or ""), "names", None)

    def batches() -> Iterator[tuple[pa.RecordBatch, int]]:
        found = saved.select_columns(chosen).with_format("arrow").iter(ROWS)
        return _record_batches(found, columns, classes, where=str(path))

    return Table(
        described={"prefix": config.name, "origin": str(path), "unit": "row"},
        batches=batches,
        files=tuple(sorted(path.glob("*.arrow"))),
        words=None if classes is None else tuple(classes),
    )


def _record_batches(
    found: Iterator[Any], columns: Columns, classes: list[str] | None, *, where: str
) -> Iterator[tuple[pa.RecordBatch, int]]:
    first_row = 0
    for table in found:
        # A shuffled stream gives a chunk for each row.
        for batch in plain(table, columns, where=where).combine_chunks().to_batches():
            yield batch if classes is None else spelled(batch, str(columns.label), classes), first_row
            first_row += batch.num_rows


def _commit(config: SourceConfig) -> str | None:
    """The commit that the revision is now, so that every pass reads the same; None where the Hub does not tell."""
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(str(config.dataset), revision=config.revision).sha
    except Exception as error:
        if not _is_of_the_network(error):
            raise
        return None  # Loading it fails next, with what there is to say.


def _is_of_the_network(error: Exception) -> bool:
    """Whether the Hub, or the way there, failed. The client's HTTP library goes by different names."""
    return isinstance(error, OSError) or any(kind.__module__.startswith("httpx") for kind in type(error).__mro__)


def _load(config: SourceConfig, split: str, commit: str | None, where: str) -> IterableDataset:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    name = f"source {config.name!r}: data set {where}"
    # The branch with the Hub's own Parquet copies has a folder for each subset, and no list of them.
    is_copy = config.revision == PARQUET_COPY
    try:
        return datasets.load_dataset(
            str(config.dataset),
            None if is_copy else config.subset,
            data_dir=config.subset if is_copy else None,
            split=split,
            revision=commit or config.revision,
            streaming=True,
        )
    except DatasetNotFoundError as error:
        if "gated" in str(error).lower():
            raise FileNotFoundError(
                f"{name} is gated. Open its page on the Hub, log in and accept its terms; then log in here with "
                f"`hf auth login` (or set HF_TOKEN). {_LOCAL}. The Hub says: {error}"
            ) from None
        raise FileNotFoundError(
            f"{name}: the Hub knows none of this name, or it is private; check the name, and for a private one log in "
            f"with `hf auth login`. {_LOCAL}. The Hub says: {error}"
        ) from None
    except ConnectionError as error:
        raise ConnectionError(f"{name}: the Hub cannot be reached ({error}). {_LOCAL}") from None
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise ValueError(
            f'{name} is a script, which is not run; the Hub keeps a copy as Parquet: revision = "{PARQUET_COPY}", with '
            "the folder there as subset"
        ) from None
    except ValueError as error:
        # An unknown subset or split; the library lists those that there are.
        raise ValueError(f"{name}: {error}") from None
