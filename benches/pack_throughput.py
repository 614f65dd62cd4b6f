"""End to end: files in, shards on disk, on a mixture like the paper's with a vocabulary of 128,000.

An example is one datapoint on every side: one oracle prompt with its answer, one layer, its placeholders aligned. The peer
`reference` is tests/reference.py: transformers, one object per example, written as lines of JSON. The peer `library` is
benches/library.py.
Before anything is timed, every datapoint of the reference's sample and all ids of the library's are compared with ours.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from dataclasses import replace
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

import corpus
import measure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
SETTINGS: dict[str, Any] = {"read_depths": [0.25, 0.5, 0.75], "layers_per_example": "one"}
LAYERS = {"num_layers": 48, "read_layers": [12, 24, 36]}


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--examples", type=int, help="size of the mixture; 1,000,000, or 20,000 with --quick")
    parser.add_argument("--family", choices=["qwen", "gemma"], action="append", help="whose tokenizers; both")
    parser.add_argument("--repeats", type=int, help="fresh processes of which the best counts; 3, or 1 with --quick")
    parser.add_argument("--limit", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.examples = args.examples or (20_000 if args.quick else 1_000_000)
    args.repeats = args.repeats or (1 if args.quick else 3)
    if args.child:
        work = {"ours": pack_ours, "reference": build_reference}[args.child]
        print(json.dumps(work(args)))
        return
    rows = []
    for family in args.family or ["qwen", "gemma"]:
        with tempfile.TemporaryDirectory(dir=corpus.cache_folder(), prefix=".pack-") as folder:
            rows += Comparison(family, args, Path(folder)).rows()
    measure.tell(rows, as_json=args.json)


# --- Ours and the reference, each in a process of its own ------------------------------------------------------------


def pack_ours(args: argparse.Namespace) -> dict[str, Any]:
    """Pack the whole mixture as `ao-pack` does."""
    from ao.config import parse_recipe
    from ao.pack import pack

    folder, sources = corpus.mixture(args.examples)
    model = {"name": str(corpus.model(args.family[0]))}
    recipe = parse_recipe({"model": model, "data": {"sources": sources, **SETTINGS}})
    summary, figures = measure.timed(lambda: pack(recipe, root=folder, out=args.out))
    manifest = hashlib.sha256((args.out / "manifest.json").read_bytes()).hexdigest()
    return {
        "examples": summary["datapoints"],
        "bytes": measure.folder_bytes(args.out),
        "manifest": manifest,
        **figures,
    }


def build_reference(args: argparse.Namespace) -> dict[str, Any]:
    """Build the reference's sample, an object per example, and write it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # it encodes one text at a time
    import reference

    family = args.family[0]
    made = reference.Reference(corpus.model(family), end_of_turn=corpus.END_OF_TURN[family])
    args.out.mkdir()
    of = heads(args.examples, args.limit)  # most of what is read for them is not needed, so it is not timed

    def work() -> int:
        datapoints = []
        for source, example in expanded(of):
            try:
                datapoints += made.build(reference.Settings(**LAYERS), source, example)
            except reference.Dropped:
                continue
        write_lines(args.out / "datapoints.jsonl", map(vars, datapoints))
        return len(datapoints)

    count, figures = measure.timed(work)
    return {"examples": count, "bytes": measure.folder_bytes(args.out), **figures}


def heads(examples: int, limit: int) -> list[tuple[dict[str, Any], list[Any]]]:
    """The sources with the first rows of their files, for about `limit` examples; ids are those of the whole mixture."""
    import reference

    from ao.config import parse_recipe, to_dict

    folder, sources = corpus.mixture(examples)
    recipe = parse_recipe({"data": {"sources": sources}})
    share = min(limit / examples, 1)
    found = []
    for source in map(to_dict, recipe.data.sources):
        if source["kind"] == "latentqa":
            source["qa"] = json.loads((folder / source["path"] / "qa.json").read_bytes())
            tables = reference.read_tables(source, folder)
            tables = [replace(table, rows=table.rows[: ceil(len(table.rows) * share)]) for table in tables]
        else:
            path = folder / source["path"]
            with path.open("rb") as file:
                total = sum(1 for _ in file)
                file.seek(0)
                tables = [reference.Table(source["name"], list(map(json.loads, islice(file, ceil(total * share)))))]
        found.append((source, tables))
    return found


def expanded(of: list[tuple[dict[str, Any], list[Any]]]) -> list[tuple[dict[str, Any], Any]]:
    """Each example with its source."""
    import reference

    return [(source, example) for source, tables in of for example in reference.examples(source, tables, seed=0)]


# --- The comparison --------------------------------------------------------------------------------------------------


class Comparison:
    """One tokenizer: equality first, then times."""

    def __init__(self, family: str, args: argparse.Namespace, folder: Path) -> None:
        self.family, self.args, self.folder = family, args, folder
        self.limits = {"reference": 600, "library": 5_000} if args.quick else {"reference": 4_000, "library": 100_000}
        corpus.model(family)
        corpus.mixture(args.examples)

    def rows(self) -> list[dict[str, Any]]:
        manifest, described = self.prove()
        repeats = self.args.repeats
        ours = [self.run("ours") for _ in range(repeats)]
        if {each["manifest"] for each in ours} != {manifest}:
            raise SystemExit("ours: not every run made the same manifest")
        runs = {
            "reference": [self.run("reference") for _ in range(min(repeats, 2))],
            "library": [self.run_library(contexts=False) for _ in range(repeats)],
            "library_with_contexts": [self.run_library(contexts=True) for _ in range(repeats)],
        }
        best = {name: min(each, key=lambda run: run["seconds"]) for name, each in runs.items()}
        mine = min(ours, key=lambda run: run["seconds"])
        seconds = measure.median_and_spread([run["seconds"] for run in ours])
        counts = ", ".join(f"{name} over {run['examples']}" for name, run in best.items())
        notes = {
            "end_to_end": f"an example is one datapoint. {described}. Best of {repeats} fresh processes each; ours "
            f"{seconds} s over {mine['examples']}, {counts}, of the same files. The library is given layer, number of "
            "positions, question and answer ready made and finds no read spans; without contexts it does nothing for "
            "them, with contexts it tokenizes each text once. Templates are shaped like the models' own",
            "cpu": "user and system, all threads",
            "disk": "ours and the reference's lines hold contexts and texts; the library's files ids, labels, positions",
        }

        def row(what: str, unit: str, of: Any, *, more_is_better: bool = False) -> dict[str, Any]:
            peers = {name: of(run) for name, run in best.items()}
            name = f"pack/{what}/{self.family}"
            return measure.row(name, unit, of(mine), peers=peers, more_is_better=more_is_better, note=notes[what])

        return [
            row("end_to_end", "examples/s", lambda run: run["examples"] / run["seconds"], more_is_better=True),
            row("cpu", "CPU s/100k examples", lambda run: 1e5 * run["cpu_seconds"] / run["examples"]),
            row("disk", "bytes/example", lambda run: run["bytes"] / run["examples"]),
        ]

    def run(self, which: str, out: str = "again") -> dict[str, Any]:
        """One run of ours or of the reference; what it writes in `again` goes."""
        shutil.rmtree(self.folder / "again", ignore_errors=True)
        options = ["--family", self.family, "--examples", self.args.examples, "--limit", self.limits["reference"]]
        return measure.child(__file__, "--child", which, *options, "--out", self.folder / out)

    def run_library(self, *, contexts: bool) -> dict[str, Any]:
        """One run of the library's pipeline."""
        shutil.rmtree(self.folder / "again", ignore_errors=True)
        options = ["--model", corpus.model(self.family), "--end-of-turn", corpus.END_OF_TURN[self.family]]
        options += ["--examples", self.folder / "examples.jsonl", "--out", self.folder / "again"]
        options += ["--contexts", self.folder / "contexts.jsonl"] if contexts else []
        for requirement in ("tokenizers==1.0.0rc3", "lightbinpack==0.1.1"):
            options += ["--path", corpus.peer(requirement)]
        return measure.child(str(ROOT / "benches" / "library.py"), *options)

    def prove(self) -> tuple[str, str]:
        """Compare the peers' output with ours, and write what the library reads; the manifest's hash, the realised mix."""
        from ao.shards import PackedDataset

        packing = self.run("ours", "packed")
        packed = PackedDataset.open(self.folder / "packed", verify=True)
        where, sources = {}, []
        for index, datapoint in enumerate(packed):
            where[datapoint.id] = index
            sources.append(datapoint.source)

        self.run("reference")
        lines = (self.folder / "again/datapoints.jsonl").read_text().splitlines()
        expected = {each["id"]: each for each in map(json.loads, lines)}
        for _, example in expanded(heads(self.args.examples, self.limits["reference"])):
            if (example.id in where) != (example.id in expected):
                raise SystemExit(f"{example.id}: only one of ours and the reference keeps it")
        for name, wanted in expected.items():
            for field, value in wanted.items():
                found = getattr(packed[where[name]], field)
                if (found.tolist() if isinstance(found, np.ndarray) else found) != value:
                    raise SystemExit(f"{name}: {field} is not the reference's")

        asked = [
            (each, where[each.id])
            for _, each in expanded(heads(self.args.examples, self.limits["library"]))
            if each.id in where
        ]
        contexts = {each.unit: each.context for each, _ in asked}
        write_lines(self.folder / "contexts.jsonl", contexts.values())
        chosen = [packed[index] for _, index in asked]
        lines = ((int(each.layers[0]), len(each.layers), each.question, each.answer) for each in chosen)
        write_lines(self.folder / "examples.jsonl", lines)
        self.run_library(contexts=True)
        numbers = {unit: number for number, unit in enumerate(contexts)}
        require_library(self.folder / "again", chosen, [numbers[each.unit] for each, _ in asked])
        return packing["manifest"], realised(packed, sources)


def require_library(folder: Path, chosen: list[Any], numbers: list[int]) -> None:
    """Stop unless the library's ids, labels and contexts are ours; it does not cut its contexts."""
    contexts = ragged(folder, "contexts", "ids")
    together = zip(chosen, ragged(folder, "tokens", "ids"), ragged(folder, "tokens", "labels"), numbers, strict=True)
    for ours, ids, labels, number in together:
        labelled = np.where(np.arange(len(ids)) < ours.answer_start, -100, ids)
        context = contexts[number][: len(ours.context_ids)]
        for name, found, wanted in [
            ("ids", ids, ours.input_ids),
            ("labels", labels, labelled),
            ("context ids", context, ours.context_ids),
        ]:
            if not np.array_equal(found, wanted):
                raise SystemExit(f"{ours.id}: the library's {name} are not ours: {found} and {wanted}")


def write_lines(path: Path, rows: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def ragged(folder: Path, kind: str, name: str) -> list[np.ndarray]:
    """The rows of an array that the library wrote."""
    from safetensors.numpy import load_file

    found = []
    for path in sorted(folder.glob(f"{kind}-*.safetensors")):
        arrays = load_file(path)
        found += np.split(arrays[name], arrays["offsets"][1:-1])
    return found


def realised(packed: Any, sources: list[str]) -> str:
    """What the mixture came to."""
    families = {"texts": "context prediction", "chats": "context prediction", "latentqa": "LatentQA"}
    kind = np.array([families.get(source, "classification") for source in sources])
    of_input, of_context = packed.lengths, packed.context_lengths
    parts = [
        f"{name} {1000 * mine.mean():.0f} ({of_input[mine].mean():.0f} and {of_context[mine].mean():.0f})"
        for name in ("context prediction", "classification", "LatentQA")
        if (mine := kind == name).any()
    ]
    stored = packed.manifest["counts"]["context_tokens"] / of_context.sum()
    return (
        f"Realised per 1000, with mean tokens of input and context: {', '.join(parts)}; all ({of_input.mean():.1f} and "
        f"{of_context.mean():.1f}); {100 * stored:.1f} % of the context tokens are stored, the others shared"
    )


if __name__ == "__main__":
    main()
