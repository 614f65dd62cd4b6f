"""Ranks with a replica in 4 bits each: how long these take to load from a checkpoint, and collecting with them, in one run.

A checkpoint of a shape is written once, with random weights and the demo's tokenizer. Each number of ranks loads it twice,
first with nothing kept: one of several may read the original then, none of them the second time, and all hold the numbers of
a rank by itself, which keeps nothing. Then they take turns at the same contexts, every position at three layers, and the
caches must be the same bytes. `--blocks 10` makes a large shape's checkpoint small enough for a small disk.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

import ao.replica
import corpus
import measure
from ao.collect.run import collect
from ao.collect.wanted import every_position
from ao.config import ModelConfig
from ao.distributed import launch, ranks
from ao.models.load import FOUR_BIT, load_model, resolve_device
from ao.prompt import model_folder
from collect_throughput import drawn
from shapes import SHAPES, built

UNITS = 32
"""Of a pass: as many for each number of ranks up to 8, and small enough for the last ones to end together."""


def main() -> None:
    parser = measure.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, help="what is written: cpu, or tiny with --quick")
    parser.add_argument("--blocks", type=int, help="fewer than the shape's")
    parser.add_argument("--precision", choices=FOUR_BIT, default="nf4", help="of the replicas")
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks beside one; 2, 4 and 8 as devices allow")
    parser.add_argument("--tokens", type=int, help="context tokens of a pass; a tenth with --quick")
    parser.add_argument("--turns", type=int, help="passes of each number of ranks")
    args = parser.parse_args()
    if args.child:
        print(json.dumps(run(json.loads(args.child))))
        return
    shape = SHAPES[args.shape or ("tiny" if args.quick else "cpu")]
    counts = measure.rank_counts(args.ranks, torch.cuda.device_count() or 2)
    # A rank alone has no more threads than beside the others: what is measured is one device against several.
    threads = max(1, len(os.sched_getaffinity(0)) // counts[-1])
    settings = shape.settings
    if args.blocks:
        settings = {**settings, "num_hidden_layers": args.blocks}
        settings.pop("layer_types", None)  # of all its blocks
    with tempfile.TemporaryDirectory(dir=corpus.cache_folder(), prefix=".scaling-") as folder:
        common = {
            "threads": threads, "model": f"{folder}/model", "precision": args.precision, "settings": settings,
            "tokens": (args.tokens or shape.tokens) // (10 if args.quick else 1),
        }  # fmt: skip
        save(settings, Path(folder, "model"))
        size = measure.folder_bytes(Path(folder, "model"))
        own = {count: {"ranks": count, "kept": f"{folder}/kept-{count}"} for count in counts}
        loads = {count: asked(common, what="load", **task) for count, task in own.items()}
        require_one_reader(loads)
        speed: dict[int, list[float]] = {count: [] for count in counts}
        for _ in range(args.turns or (1 if args.quick else 2)):
            for count, task in own.items():
                record = asked(common, what="collect", out=f"{folder}/cache-{count}", **task)
                speed[count].append(record["tokens_per_second"])
            caches = [files(Path(folder, f"cache-{count}")) for count in counts]
            if caches.count(caches[0]) != len(caches):
                raise SystemExit("the caches of different numbers of ranks differ")
    rows = []
    for count in counts:
        first, again = (load["seconds"] for load in loads[count])
        peers = {"one_rank": loads[1][0]["seconds"]} if count > 1 else {}
        note = f"{size / 1e6:,.0f} MB of bf16 to {args.precision}; {again:.3g} when all has been read before"
        rows.append(measure.row(f"load/ranks_{count}", "s", first, peers=peers, more_is_better=False, note=note))
    for count in counts:
        tokens = statistics.median(speed[count])
        peers = {"one_rank": statistics.median(speed[1])} if count > 1 else {}
        note = f"{measure.median_and_spread(speed[count])}; the same bytes"
        rows.append(
            measure.row(f"collect/ranks_{count}", "tokens/s", tokens, peers=peers, more_is_better=True, note=note)
        )
    measure.tell(rows, as_json=args.json)


def asked(common: dict[str, Any], **task: Any) -> Any:
    """A task in a process of its own, which loads the other ranks."""
    print(task, file=sys.stderr, flush=True)
    return measure.child(__file__, "--child", json.dumps(common | task))


def require_one_reader(loads: Mapping[int, Sequence[Mapping[str, Any]]]) -> None:
    """Stop unless all replicas are the same and no load of several ranks read the original more often than it must."""
    digests = {digest for of_count in loads.values() for load in of_count for digest in load["digests"]}
    if len(digests) != 1:
        raise SystemExit(f"replicas differ: {loads}")
    for count, of_count in loads.items():
        readers, expected = [load["readers"] for load in of_count], [1, 1] if count == 1 else [1, 0]
        if readers != expected:
            raise SystemExit(f"{count} ranks: {readers} of them read the original at two loads, expected {expected}")


def files(folder: Path) -> dict[str, str]:
    """Digests of a cache's files; the picture's title is the folder's name."""
    found = sorted(file for file in folder.iterdir() if file.suffix != ".png")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


def save(settings: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint of random weights."""
    on_gpu = torch.cuda.is_available()
    model = built(settings, "bf16", torch.device("cuda" if on_gpu else "cpu"))
    model.save_pretrained(folder, max_shard_size="3GB")
    demo = model_folder("demo", None)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(demo / name, folder)
    del model
    if on_gpu:
        torch.cuda.empty_cache()


def loading(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of two loads: seconds until every rank has its replica, how many read the original, and digests of the replicas."""
    config, read, loads = config_of(task), [], []

    def reading(config: ModelConfig, **options: str) -> PreTrainedModel:
        read.append(config.name)
        return load_model(config, **options)

    ao.replica.load_model = reading
    with ranks(resolve_device(config.device)) as here:
        for _ in range(2):
            read.clear()
            here.wait()
            started = time.perf_counter()
            model = ao.replica.load_replica(config, here)
            here.wait()
            seconds = time.perf_counter() - started
            own = (config.name in read, digest_of(model))
            del model
            gc.collect()  # 4-bit layers and their weights refer to each other
            each: list[Any] = [own] * here.world
            if here.world > 1:
                dist.all_gather_object(each, own)
            readers, digests = sum(was for was, _ in each), [digest for _, digest in each]
            loads.append({"seconds": seconds, "readers": readers, "digests": digests})
    return loads


def digest_of(model: PreTrainedModel) -> str:
    """Of all numbers of a model, quantization's included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def collecting(task: Mapping[str, Any]) -> dict[str, Any]:
    """Collect every position at 25, 50 and 75 % of the depth, from nothing; the record."""
    shutil.rmtree(task["out"], ignore_errors=True)
    blocks = task["settings"]["num_hidden_layers"]
    contexts = drawn(task["tokens"], vocab=task["settings"]["vocab_size"])
    units = every_position(contexts, [blocks * part // 4 for part in (1, 2, 3)], unit_tokens=task["tokens"] // UNITS)
    return collect(config_of(task), units, out=task["out"])


def config_of(task: Mapping[str, Any]) -> ModelConfig:
    return ModelConfig(name=task["model"], precision=task["precision"])


TASKS: dict[str, Callable[[Mapping[str, Any]], Any]] = {"load": loading, "collect": collecting}


def run(task: dict[str, Any]) -> Any:
    """A task's work on its ranks."""
    torch.set_num_threads(task["threads"])
    os.environ["AO_CACHE"] = task["kept"]
    work = TASKS[task["what"]]
    return launch(work, task, processes=task["ranks"]) if task["ranks"] > 1 else work(task)


if __name__ == "__main__":
    main()
