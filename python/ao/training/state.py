"""Checkpoints of a run: all that the next step depends on, in safetensors and JSON.

A checkpoint is a folder `step-NNNNNN` below OUT/checkpoints, there whole or not at all. The first rank writes the adapter's
weights and the optimizer's states, every rank its random state.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize

from ao.manifest import canonical_json, read_manifest, sync_folder, write_atomic
from ao.training.step import Learner

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
RECORD = "training.json"
BEST = "best"
"""Folder of the adapter as it was at its best held-out loss."""
_NAME = re.compile(r"step-(\d{6,})")


def save_checkpoint(out: Path, learner: Learner, run: Mapping[str, Any]) -> Path:
    """Write a checkpoint; every rank calls this.

    Args:
        out: the run's folder.
        learner: what is trained.
        run: what `load_checkpoint` gives back: JSON with the number of steps done under "step".
    """
    folder = out / FOLDER / f"step-{run['step']:06d}"
    partial = folder.with_name(folder.name + ".partial")
    here = learner.here
    if here.first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    here.wait()
    write_atomic(partial / f"random-{here.rank}.safetensors", serialize(_random_state(learner.devices)))
    if here.first:
        state = _flat(learner.optimizer.state_dict()["state"].get(0, {}))
        numbers = {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}
        tensors = {
            f"optimizer.{name}": value.detach().cpu().clone() for name, value in state.items() if name not in numbers
        }
        tensors["weights"] = learner.weights.detach().cpu().clone()
        write_atomic(partial / "state.safetensors", serialize(tensors))
        write_atomic(partial / "run.json", canonical_json({**run, "ranks": here.world, "optimizer": numbers}))
    here.wait()
    if here.first:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync_folder(folder.parent)
    here.wait()
    return folder


def load_checkpoint(folder: Path, learner: Learner) -> dict[str, Any]:
    """Put a learner into the state of a checkpoint, and give back what was saved with it.

    A rank that was not there when it was written keeps its random state.

    Raises:
        ValueError: it was written by an adapter of another size.
    """
    run = read_manifest(folder / "run.json")
    here = learner.here
    tensors = load_file(folder / "state.safetensors")
    weights = tensors.pop("weights")
    if weights.shape != learner.weights.shape:
        raise ValueError(
            f"{folder}: holds an adapter of {weights.numel()} weights, expected {learner.weights.numel()}; the recipe or "
            "the base changed"
        )
    with torch.no_grad():
        learner.weights.copy_(weights)
    state = {name.removeprefix("optimizer."): value for name, value in tensors.items()} | run.pop("optimizer")
    if state:
        groups = learner.optimizer.state_dict()["param_groups"]
        learner.optimizer.load_state_dict({"state": {0: _nested(state)}, "param_groups": groups})
    if here.rank >= run["ranks"]:
        return run
    random = load_file(folder / f"random-{here.rank}.safetensors")
    torch.set_rng_state(random["cpu"])
    states = {_of_device(device, learner.devices): device for device in learner.devices if device.type == "cuda"}
    for name, device in states.items():
        if name in random:
            torch.cuda.set_rng_state(random[name], device)
    if (saved := set(random) - {"cpu"}) != set(states):
        log.warning(
            "%s: written on %s, and goes on on %s: dropout draws other units than it would have",
            folder, sorted(saved) or "the CPU", sorted(states) or "the CPU",
        )  # fmt: skip
    return run


def checkpoints(out: Path) -> list[Path]:
    """The whole checkpoints of a run, by steps done."""
    found = [path for path in (out / FOLDER).glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def found_in(out: Path, *, resume: bool, restart: bool) -> Path | None:
    """What a run goes on from: a checkpoint, or the record of a finished one; None to begin.

    Raises:
        FileExistsError: the folder holds something else than an adapter, or an unfinished run that is not to be resumed.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose another --out")
    is_adapter, saved = (out / "adapter_config.json").is_file(), checkpoints(out)
    is_run = (out / "log.jsonl").is_file() or (out / FOLDER).is_dir()
    if out.exists() and any(out.iterdir()) and not (is_adapter or is_run):
        raise FileExistsError(f"{out} holds files that are no adapter; choose another --out")
    if resume and (out / RECORD).is_file():
        return out / RECORD
    if resume and saved:
        return saved[-1]
    if saved and not (out / RECORD).is_file() and not restart:
        raise FileExistsError(
            f"{out} holds an unfinished run of {len(saved)} checkpoints; --resume goes on with it, --restart removes it"
        )
    return None


def clear(out: Path) -> None:
    """Remove what an earlier run in the folder could be resumed from, its end and its best adapter."""
    (out / RECORD).unlink(missing_ok=True)
    for folder in (FOLDER, BEST):
        shutil.rmtree(out / folder, ignore_errors=True)


def prune(out: Path, *, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the last ones, the best one, and the latest of all."""
    found = checkpoints(out)
    kept = {*found[len(found) - max(1, keep) :], out / FOLDER / f"step-{best or 0:06d}"}
    for path in found:
        if path not in kept:
            shutil.rmtree(path)


def _flat(state: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """An optimizer's state by path: some keep a dictionary in it."""
    found = {}
    for name, value in state.items():
        found |= _flat(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        inner = nested
        for parent in parents:
            inner = inner.setdefault(parent, {})
        inner[name] = value
    return nested


def _random_state(devices: Sequence[torch.device]) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    for device in devices:
        if device.type == "cuda":
            state[_of_device(device, devices)] = torch.cuda.get_rng_state(device)
    return state


def _of_device(device: torch.device, devices: Sequence[torch.device]) -> str:
    """Its name in a checkpoint, which another GPU may go on with: that of its place among those of the base."""
    return f"cuda.{devices.index(device)}"
