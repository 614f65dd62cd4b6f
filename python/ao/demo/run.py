"""`ao demo`: the whole pipeline on the embedded target, each stage by the code that a large run uses."""

from __future__ import annotations

import json
import os
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from ao.config import Recipe, parse_recipe, to_toml
from ao.demo import world
from ao.manifest import write_atomic

RECIPE = Path(__file__).with_name("demo.toml")
ON_A_GPU: dict[str, dict[str, Any]] = {
    "tiny": {},
    # Of 3e-4, 1e-3 and 3e-3 the one that gained most; rows that keep a GPU busy.
    "large": {"learning_rate": 3e-3, "tokens_per_row": 4096, "context_tokens_per_row": 8192},
}
"""What of the recipe's training is another for a size."""


def demo(
    *,
    seed: int,
    out: Path,
    size: Literal["tiny", "large"] = "tiny",
    device: str = "auto",
    precision: str | None = None,
    rebuild_target: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write the demo world, pack, train, score and ask; leave everything in a folder.

    Args:
        seed: decides what is held out, the data, the adapter's start, the data order and the resampling.
        out: the folder; what an earlier demo left there is replaced, but for a large target.
        size: tiny, the embedded target, or large, one of 140 M parameters that is first trained into OUT/target.
        device: where all of it runs; "auto" is the CPU for tiny, and a GPU, without which it would take hours, for large.
        precision: of the frozen weights, fp32 on a CPU and nf4 on a GPU without it.
        rebuild_target: train the target again into OUT/target and use that one.
        quiet: print nothing on stdout; progress goes to stderr either way.

    Returns:
        The report, as in report.json.

    Raises:
        FileExistsError: `out` holds something else.
        ValueError: a large target was asked for where there is no GPU.
    """
    import torch

    from ao.memory import PeakMemory
    from ao.models.load import resolve_device

    on = torch.device("cpu") if size == "tiny" and device == "auto" else resolve_device(device)
    if size == "large" and on.type == "cpu":
        raise ValueError("--size large trains 140 M parameters from nothing, hours on a CPU; use a GPU: --device cuda")
    model = {"device": str(on), "precision": precision or ("fp32" if on.type == "cpu" else "nf4")}
    if out.exists() and any(out.iterdir()) and not (out / "recipe.toml").is_file():
        raise FileExistsError(f"{out} holds files, but no recipe.toml of an earlier demo; choose another --out")
    _quiet_libraries()
    # A model this small is faster on one thread, many times so where the machine is busy.
    torch.set_num_threads(1)
    seconds: dict[str, float] = {}
    with PeakMemory() as memory:
        with stage(seconds, "target"):
            model["name"] = _target(out, size, str(on), rebuild=rebuild_target)
        with stage(seconds, "pack"):
            recipe = _prepare(out, seed, model, {} if on.type == "cpu" else ON_A_GPU[size])
        with stage(seconds, "train"):
            _train(recipe, out)
        report, answers = _score_and_ask(recipe, out, seconds, memory)
    if not quiet:
        _print(report, answers, out)
    return report


@contextmanager
def stage(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Time a stage, and say on stderr what begins."""
    sys.stderr.write(f"-- {name}\n")
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def train_rank(recipe: Recipe, data: Path, out: Path) -> None:
    """What each training process runs."""
    from ao.train import train

    _quiet_libraries()
    train(recipe, data=data, out=out, root=out.parent)


def _quiet_libraries() -> None:
    """No bar for loading a megabyte."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _target(out: Path, size: str, device: str, *, rebuild: bool) -> str:
    if size == "tiny" and not rebuild:
        return "demo"
    from ao.demo.target import rebuild as rebuild_target

    folder = out / "target"
    record = folder / "training.json"
    if rebuild or not record.is_file() or json.loads(record.read_text(encoding="utf-8")).get("size") != size:
        # So that a demo that is stopped here is known as one.
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "recipe.toml", RECIPE.read_bytes())
        rebuild_target(folder, size=size, seed=0, device=device)
    return str(folder)


def _prepare(out: Path, seed: int, model: dict[str, Any], train: dict[str, Any]) -> Recipe:
    """Write the world's files and the resolved recipe, and pack."""
    import shutil

    from ao.pack import pack

    values = tomllib.loads(RECIPE.read_text(encoding="utf-8"))
    values["model"] |= model
    values["train"] |= train
    for part, folder in (("data", out / "packed"), ("train", out / "adapter"), ("eval", out)):
        values[part] |= {"seed": seed, "out": str(folder)}
    recipe = parse_recipe(values, origin=str(RECIPE))
    out.mkdir(parents=True, exist_ok=True)
    for stale in ("packed", "tasks", "adapter"):
        shutil.rmtree(out / stale, ignore_errors=True)
    world.write_files(out / "world", seed=seed)
    write_atomic(out / "recipe.toml", to_toml(recipe))
    pack(recipe, root=out, out=out / "packed", restart=True, progress=True)
    return recipe


def _train(recipe: Recipe, out: Path) -> None:
    """On a CPU, where there are two cores, two processes of one thread each are twice as fast as one of two threads."""
    from ao.distributed import launch

    if recipe.model.device != "cpu":
        train_rank(recipe, out / "packed", out / "adapter")
        return
    processes = min(2, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if processes == 1:
        train_rank(recipe, out / "packed", out / "adapter")
    else:
        launch(train_rank, recipe, out / "packed", out / "adapter", processes=processes)


def _score_and_ask(
    recipe: Recipe, out: Path, seconds: dict[str, float], memory: Any
) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    from ao import Oracle
    from ao.eval.report import write_report
    from ao.eval.run import evaluate
    from ao.plots import gain_chart

    model = recipe.model
    oracle = Oracle.from_pretrained(model.name, out / "adapter", precision=model.precision, device=model.device)
    report = evaluate(oracle, recipe, root=out, out=out, progress=True, seconds=seconds)
    started = time.perf_counter()
    answers = ask_three(oracle, out)
    draw_heat_map(oracle, out)
    gain_chart(out / "gain.png", report)
    report["seconds"]["ask"] = round(time.perf_counter() - started, 3)
    report["seconds"]["total"] = round(report["seconds"]["total"] + report["seconds"]["ask"], 3)
    report["peak_rss_bytes"] = memory.bytes
    images = {
        "The oracle beside its controls": out / "gain.png",
        "What each token knows of the hidden persona": out / "heat_map.png",
    }
    write_report(report, out, images=images)
    return report, answers


def held_out_chat(out: Path) -> tuple[list[dict[str, str]], dict[str, str]]:
    """The first held-out conversation up to its user turn, and the true name of each of its traits."""
    folder = out / "world" / "heldout" / "latentqa"
    entry = json.loads((folder / "system.json").read_text(encoding="utf-8"))[0]
    traits = dict(zip(world.TRAITS, entry["label"].split("-"), strict=True))
    messages = [
        {"role": "system", "content": entry["system"]},
        {"role": "user", "content": entry["stimulus_user"]},
    ]
    return messages, traits


def ask_three(oracle: Any, out: Path) -> list[tuple[str, Any]]:
    """One question about each hidden trait of a held-out conversation, read from its last tokens."""
    messages, traits = held_out_chat(out)
    activations = oracle.read(messages)[-3:]
    return [
        (f"{question} (it is {traits[trait]})", oracle.ask(activations, question, max_new_tokens=4))
        for trait in world.TRAITS
        for question in world.NAMING[trait][:1]
    ]


def draw_heat_map(oracle: Any, out: Path) -> None:
    """The probability of the true persona among the possible ones, read from each token of a whole conversation."""
    from ao.plots import heat_map

    messages, traits = held_out_chat(out)
    reply = oracle.reply(messages, max_new_tokens=24)
    activations = oracle.read([*messages, {"role": "assistant", "content": reply}])
    question, choices = world.NAMING["persona"][0], list(world.TRAITS["persona"])
    right = choices.index(traits["persona"])
    unaware = oracle.ask(activations[0], question, choices=choices).control
    heat_map(
        out / "heat_map.png",
        oracle.scan(activations, question, choices)[:, :, right],
        activations.tokens,
        activations.layers,
        title="What each token knows of the hidden persona",
        question=question,
        answer=traits["persona"],
        source="a held-out conversation of the demo world",
        chance=1 / len(choices),
        control=unaware.probabilities[traits["persona"]],
    )


def _print(report: dict[str, Any], answers: list[tuple[str, Any]], out: Path) -> None:
    from ao.eval.report import console_table

    lines = ["", console_table(report), ""]
    lines += [
        f"{question}\n    oracle: {answer.text}    no activation: {answer.control.text}" for question, answer in answers
    ]
    spent = "  ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items())
    lines += [
        "",
        f"{spent}  peak memory {report['peak_rss_bytes'] / 2**30:.2f} GiB",
        f"everything is in {out}/: open report.html",
    ]
    sys.stdout.write("\n".join(lines) + "\n")
