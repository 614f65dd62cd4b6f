"""Opening a packed set of a million datapoints, the memory that packing takes, and rows at random.

The peer `reference` keeps its data as the published code does: a list of dicts of pydantic objects in a file of torch's,
rebuilt into objects at every start. It holds 50,000 datapoints, ours a million: the ratios are of whole files, not per
datapoint. Every datapoint of the reference equals ours before the clock starts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

import corpus
import measure
from pack_throughput import pack_ours


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--examples", type=int, help="size of the set; 1,000,000, or 20,000 with --quick")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--family", action="append", default=["qwen"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.examples = args.examples or (20_000 if args.quick else 1_000_000)
    if args.child:
        children = {"pack": pack_ours, "open": open_ours, "reference": load_reference}
        print(json.dumps(children[args.child](args)))
        return
    with tempfile.TemporaryDirectory(dir=corpus.cache_folder(), prefix=".open-") as folder:
        measure.tell(compare(args, Path(folder)), as_json=args.json)


def compare(args: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Pack a tenth and the whole, then open the whole and the reference's file."""
    corpus.model("qwen")
    packs = {}
    for examples in (args.examples // 10, args.examples):
        corpus.mixture(examples)
        options = ("--examples", examples, "--out", folder / f"packed-{examples}")
        packs[examples] = measure.child(__file__, "--child", "pack", *options)
    small, large = packs.values()
    packed = folder / f"packed-{args.examples}"
    held = write_reference(packed, folder, 2_000 if args.quick else 50_000)

    def opened(which: str, repeats: int) -> dict[str, Any]:
        runs = [
            measure.child(__file__, "--child", which, "--out", packed if which == "open" else folder)
            for _ in range(repeats)
        ]
        return {name: statistics.median(run[name] for run in runs) for name in runs[0]}

    mine = opened("open", 2 if args.quick else 7)
    reference = opened("reference", 1 if args.quick else 2)
    about = f"{large['examples']} datapoints; the reference holds {held}; medians over fresh processes, files cached"

    def row(what: str, unit: str, name: str, scale: float, note: str = "") -> dict[str, Any]:
        peers = {"reference": scale * reference[name]}
        return measure.row(f"pack/{what}", unit, scale * mine[name], peers=peers, more_is_better=False, note=note)

    return [
        row("open", "ms", "seconds", 1e3, about),
        row("open_lengths", "ms", "lengths_seconds", 1e3, "also the lengths of all, which maps and checks every shard"),
        row("open_memory", "MB", "private_bytes", 1e-6, "its own, after both; mapped files do not count"),
        row("random_row", "us", "row_seconds", 1e6),
        measure.row(
            "pack/peak_memory",
            "MB",
            large["peak_rss_bytes"] / 1e6,
            more_is_better=False,
            note=f"resident, while packing {large['examples']} datapoints; {small['peak_rss_bytes'] / 1e6:.0f} MB for "
            f"{small['examples']}",
        ),
    ]


# --- Children --------------------------------------------------------------------------------------------------------


def open_ours(args: argparse.Namespace) -> dict[str, float]:
    """Open the set and read rows at random, every array of each."""
    from ao.shards import PackedDataset

    return loaded(lambda: PackedDataset.open(args.out), lambda data: data.lengths)


def load_reference(args: argparse.Namespace) -> dict[str, float]:
    """What every rank of the published code does at its start."""
    import torch

    model = pydantic_model()

    def load() -> list[Any]:
        return [model.model_validate(each) for each in torch.load(args.out / "reference.pt", weights_only=True)["data"]]

    return loaded(load)


def loaded(load: Any, lengths: Any = lambda data: [len(row.input_ids) for row in data]) -> dict[str, float]:
    """Time and memory until there are data, until all lengths are known, and for a row."""
    own = measure.private_bytes()
    started = time.perf_counter()
    data = load()
    seconds = time.perf_counter() - started
    found = lengths(data)
    lengths_seconds = time.perf_counter() - started
    if len(found) != len(data):
        raise SystemExit(f"{len(found)} lengths of {len(data)} datapoints")
    grown = max(measure.private_bytes() - own, 1)
    figures = {"seconds": seconds, "lengths_seconds": lengths_seconds, "private_bytes": grown}
    return figures | {"row_seconds": row_seconds(data)}


def row_seconds(data: Any) -> float:
    """Median time to get a random datapoint and the ends of its arrays."""
    times = []
    for index in np.random.default_rng(0).integers(len(data), size=3000).tolist():
        started = time.perf_counter()
        row = data[index]
        for array in (row.input_ids, row.placeholders, row.layers, row.context_ids, row.read_positions):
            array[-1]
        times.append(time.perf_counter() - started)
    return statistics.median(times)


# --- The reference's file ---------------------------------------------------------------------------------------------


def pydantic_model() -> Any:
    """A datapoint as the published code holds it."""
    from pydantic import create_model

    lists = ("input_ids", "placeholders", "layers", "context_ids", "read_positions")
    texts = ("id", "source", "question", "answer", "kind")
    types: dict[str, Any] = dict.fromkeys(lists, (list[int], ...)) | dict.fromkeys(texts, (str, ...))
    return create_model("Datapoint", **types, answer_start=(int, ...), meta=(dict[str, Any], ...))


def write_reference(packed: Path, folder: Path, count: int) -> int:
    """Write `count` datapoints, evenly drawn from ours, as the reference keeps them; they are read back and compared."""
    import reference
    import torch

    from ao.shards import PackedDataset

    data = PackedDataset.open(packed)
    chosen = [data[index] for index in np.linspace(0, len(data) - 1, min(count, len(data)), dtype=int).tolist()]
    names = [field.name for field in fields(reference.Datapoint)]
    plain = [
        {name: value.tolist() if isinstance(value := getattr(row, name), np.ndarray) else value for name in names}
        for row in chosen
    ]
    model = pydantic_model()
    torch.save({"data": [model(**row).model_dump() for row in plain]}, folder / "reference.pt")
    if torch.load(folder / "reference.pt", weights_only=True)["data"] != plain:
        raise SystemExit("the reference's file does not hold our datapoints")
    return len(plain)


if __name__ == "__main__":
    main()
