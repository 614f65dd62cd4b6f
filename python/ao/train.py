"""Training the oracle's adapter: look ahead for activations, inject, answer loss, step.

The loop is here; its parts are in `ao.training`.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ao.cache import ActivationCache, contract_of
from ao.config import Recipe, TrainConfig, to_dict
from ao.distributed import Ranks, ranks
from ao.manifest import finite, read_manifest
from ao.models import arch as archs
from ao.models.fused import fuse
from ao.models.load import resolve_device
from ao.plan import Plan, PlanSettings
from ao.prompt import fingerprints
from ao.replica import load_replica
from ao.selftest import check_model
from ao.shards import Datapoint, PackedDataset, Part
from ao.training.heldout import HeldOut, share_of, split
from ao.training.identity import identity_of, require_same_run, tell_changes, versions
from ao.training.lookahead import LookAhead, looked_ahead
from ao.training.meter import Meter
from ao.training.record import as_followed, write_run
from ao.training.selftest import check_learner
from ao.training.state import (
    BEST,
    RECORD,
    clear,
    found_in,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from ao.training.step import Learner, Underway, learning_rate, settled
from ao.training.tracking import Log, new_id, require_trackers

log = logging.getLogger(__name__)

REPEATED = 5.0
"""Seconds within which another signal is the same one again."""


def train(
    recipe: Recipe,
    *,
    data: str | Path,
    out: str | Path,
    resume: bool = False,
    restart: bool = False,
    root: str | Path = ".",
    progress: bool = True,
) -> dict[str, Any]:
    """Train an adapter on a packed data set and write it to a folder.

    Under torchrun every process calls this with the same arguments; each holds a replica and takes its share of every
    step's datapoints, whose order is the same for any number of ranks.

    Args:
        recipe: the recipe.
        data: the packed data set.
        out: folder of the adapter; checkpoints and log.jsonl lie there, too.
        resume: go on from the last checkpoint in `out`; do nothing where the run is finished, begin where there is none.
        restart: begin anew where `out` holds an unfinished run; what it left goes when the first step is done.
        root: folder that relative source paths of the recipe are taken from; the recipe beside the adapter leads to them.
        progress: show a progress bar on stderr.

    Returns:
        The training record, also written to `training.json`: losses, seconds, counts, versions.

    Raises:
        FileExistsError: `out` holds something else than an adapter, or an unfinished run.
        KeyboardInterrupt: a signal stopped the run; a checkpoint was saved first.
        RuntimeError: a self-test failed, or the gradient was not finite in more than a tenth of the steps.
        ValueError: the data set was packed for another tokenizer, template or target, or reads what cannot be collected;
            or the checkpoint is of another run.
    """
    config, data, out = recipe.train, Path(data), Path(out)
    with ranks(resolve_device(recipe.model.device)) as here, _signals(here) as asked:
        found = found_in(out, resume=resume, restart=restart)
        dataset = PackedDataset.open(data, verify=here.first)
        dataset.require(**fingerprints(recipe.model))
        dataset.require_base()
        identity = identity_of(recipe, dataset)
        if found is not None and found.name == RECORD:
            record = read_manifest(found)
            require_same_run(found, record, identity)
            return {**record, "first_rank": here.first}
        run = _Run(new_id(out))
        if found is not None:
            saved = read_manifest(found / "run.json")
            changes = require_same_run(found, saved, identity)
            if here.first:
                tell_changes(found, saved, changes, ranks=here.world)
            run = _Run(**{name: saved[name] for name in ("id", "step", "losses", "best_step", "best_loss", "meter")})
            run.ran_on = saved.get("ran_on", [saved["ranks"]])
        if run.ran_on[-1:] != [here.world]:
            run.ran_on.append(here.world)
        # What can be wrong with the settings is found before the model is loaded.
        require_trackers(config.track)
        followed = as_followed(recipe, dataset, out, root=Path(root))
        training, held_out = split(dataset, config.held_out, seed=config.seed)
        _plan(training, config, here)
        cache = None
        if config.cache is not None:
            cache = ActivationCache.open(config.cache, contract=contract_of(recipe.model))
        model, target = _loaded(recipe, here, dataset)
        learner = Learner.of(model, config, here)
        if here.first and progress and learner.recompute.blocks(config.tokens_per_row):
            tqdm.write(f"recompute {learner.recompute}", file=sys.stderr)
        if found is not None:
            load_checkpoint(found, learner)
        write = partial(write_run, recipe, learner, dataset, root=Path(root))
        record = _loop(followed, learner, target, cache, training, held_out, identity, run, asked, out, write, progress)
        if here.first:
            write(record, out)
        return {**record, "first_rank": here.first}


@dataclass
class _Run:
    """How far a run is."""

    id: str
    """Of this run alone, also where another one goes to the same folder; trackers know it by this."""
    step: int = 0
    losses: list[float | None] = field(default_factory=list)
    best_step: int | None = None
    best_loss: float | None = None
    meter: dict[str, Any] | None = None
    ran_on: list[int] = field(default_factory=list)
    """Numbers of ranks, one behind the other."""


def _loop(
    recipe: Recipe,
    learner: Learner,
    target: PreTrainedModel,
    cache: ActivationCache | None,
    training: Part,
    held_out: Part,
    identity: dict[str, Any],
    run: _Run,
    asked: threading.Event,
    out: Path,
    write: Callable[[Mapping[str, Any], Path], None],
    progress: bool,
) -> dict[str, Any]:
    """The training loop; returns the record."""
    config, here = recipe.train, learner.here
    target_arch = archs.find(target)
    deepest = max(max(layers) for layers in training.dataset.layer_combinations)
    meter = Meter(learner.arch, target_arch, deepest=deepest, devices=learner.devices)
    if run.meter is not None:
        meter.resume(run.meter)
    losses = run.losses
    padded = not learner.arch.attention_only
    bar = tqdm(total=config.steps, initial=run.step, desc="train", unit="step", disable=not (progress and here.first))
    stopping = threading.Event()
    scores: HeldOut | None = None
    last_scored: dict[str, Any] | None = None

    def looking(points: list[Datapoint], stream: torch.cuda.Stream | None = None) -> LookAhead:
        timing = partial(meter.timing, "target")
        progress = meter.add_contexts
        return LookAhead(target, target_arch, points, config, cache, progress=progress, stream=stream, timing=timing)

    def launched() -> Iterator[tuple[int, Underway]]:
        """The steps, each with how many are done behind it."""
        coming = meter.waiting(windows(training, config, here, padded, run.step))
        ahead = looked_ahead(coming, lambda window: looking(_points(window[1]), learner.aside))
        for index, ((first, window), vectors, advance) in enumerate(ahead):
            if index == 0:
                if shown := _points(window)[:4]:
                    check_learner(learner, shown, vectors)
                # What came before the first step says nothing of how long steps take.
                bar.unpause()
            for step, rows in enumerate(window, first):
                if step < run.step:
                    continue  # its contexts are run all the same, so that the window's rows are what they were
                advance()
                # -- one step: this rank's datapoints, in rows of a token budget --
                contexts, rate = meter.take_contexts(), learning_rate(step, config)
                yield step + 1, learner.step(rows, vectors, rate, context_tokens=contexts, stop=asked.is_set())
                if stopping.is_set():
                    return

    def is_scored(done: int) -> bool:
        return scores is not None and (done % config.eval_every == 0 or done == config.steps)

    def is_looked_at(done: int) -> bool:
        """Whether the adapter as it is behind this step goes somewhere, so that the next one must wait."""
        return is_scored(done) or bool(config.save_every and done % config.save_every == 0)

    def save(step: int) -> None:
        with meter.timing("save"):
            state = {
                "id": run.id,
                "identity": identity,
                "versions": versions(),
                "step": step,
                "losses": losses,
                "best_step": run.best_step,
                "best_loss": run.best_loss,
                "meter": meter.state(),
                "ran_on": run.ran_on,
            }
            save_checkpoint(out, learner, state)
            if here.first:
                prune(out, keep=config.keep, best=run.best_step)
            here.wait()

    def record() -> dict[str, Any]:
        state = meter.state()
        seconds = state["seconds"]
        return {
            "steps": len(losses),
            "identity": identity,
            "ranks": here.world,
            "ran_on": list(run.ran_on),
            "versions": versions(),
            "losses": list(losses),
            "held_out": last_scored,
            "best_held_out": None if run.best_step is None else {"step": run.best_step, "loss": run.best_loss},
            "recompute": str(learner.recompute),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            **state["counts"],
            "examples_per_second": round(state["counts"]["examples"] / seconds["total"], 2),
        }

    with (
        Log(out, config.track, run=run.id, config=to_dict(recipe), step=run.step, active=here.first) as lines,
        learner.ready(),
        bar,
    ):
        if len(held_out):
            points, donors = share_of(held_out, here)
            vectors = looking([*points, *donors]).vectors()
            scores = HeldOut(points, donors, vectors, tokens_per_row=config.tokens_per_row, packed=not padded)
        done = saved = run.step
        for done, result in settled(launched(), is_looked_at, runs_ahead=learner.runs_ahead):
            meter.step(result)
            if result.skipped:
                _require_finite(meter.counts["skipped_steps"], done, config.steps)
            if done == 1 and here.first:
                # A start that fails leaves what an earlier run made; a later --resume must not take that for this one's.
                clear(out)
            losses.append(finite(result.loss))
            bar.update()
            line: dict[str, Any] = {}
            if is_scored(done) or done % config.log_every == 0 or done == config.steps:
                norm, rate = finite(result.gradient_norm), learning_rate(done - 1, config)
                line = {"loss": losses[-1], "gradient_norm": norm, "learning_rate": rate}
                line |= meter.line(ranks=here.world)
                bar.set_postfix(loss=f"{result.loss:.3f}")
                log.debug("step %d loss %.4f gradient norm %.3g", done, result.loss, result.gradient_norm)
            best = False
            if scores is not None and is_scored(done):
                with meter.timing("eval"):
                    scored = scores.score(learner)
                line |= scored
                last_scored = {"step": done, "datapoints": len(held_out), **scored}
                loss = scored["held_out_loss"]
                best = loss is not None and (run.best_loss is None or loss < run.best_loss)
                if best:
                    run.best_step, run.best_loss = done, loss
                    if here.first:
                        write(record(), out / BEST)
            if line:
                lines.write(done, line)
            if config.save_every and (best or done % config.save_every == 0) and done < config.steps:
                save(done)
                saved = done
            if result.stop:
                stopping.set()
        if done < config.steps:
            if saved < done:
                save(done)
            if here.first:
                log.warning("stopped after %d of %d steps; --resume goes on from there", done, config.steps)
            raise KeyboardInterrupt
    return record()


def _points(window: list[list[list[Datapoint]]]) -> list[Datapoint]:
    return [point for rows in window for points in rows for point in points]


def _require_finite(skipped: int, done: int, steps: int) -> None:
    """Tell of a step whose gradient was not finite; more of them than a tenth of all steps end the run."""
    log.warning("step %d: the gradient is not finite, so nothing moved", done)
    if skipped > steps // 10:
        raise RuntimeError(
            f"train: the gradient was not finite in {skipped} of the first {done} of {steps} steps; "
            "lower train.learning_rate or use a wider precision"
        )


def windows(
    dataset: PackedDataset | Part, config: TrainConfig, here: Ranks, padded: bool = False, start: int = 0
) -> Iterator[tuple[int, list[list[list[Datapoint]]]]]:
    """This rank's datapoints by window, step and row, epoch after epoch until the steps are done.

    Args:
        dataset: what is trained on.
        config: the steps and their rows.
        here: the rank.
        padded: rows are rectangles, not sequences joined.
        start: steps that are done already; the first window is the one that holds this step, from its beginning on.

    Yields:
        The number of the window's first step, and the window.
    """
    done = epoch = 0
    while done < config.steps:
        plan = _plan(dataset, config, here, padded, epoch)
        if start < done + len(plan):
            first = max(0, start - done) // config.window * config.window
            for window in plan.windows(first, end=config.steps - done, rank=here.rank):
                yield done + first, [[[dataset[index] for index in row.tolist()] for row in rows] for rows in window]
                first += len(window)
        done += len(plan)
        epoch += 1


def _plan(
    dataset: PackedDataset | Part, config: TrainConfig, here: Ranks, padded: bool = False, epoch: int = 0
) -> Plan:
    """One epoch's steps, of which there must be one."""
    settings = PlanSettings(
        tokens_per_row=config.tokens_per_row,
        examples_per_step=None if config.tokens_per_step else config.examples_per_step,
        tokens_per_step=config.tokens_per_step,
        padded=padded,
        longer_alone=True,
        window=config.window,
        ranks=here.world,
        seed=config.seed,
        epoch=epoch,
    )
    plan = Plan.make(dataset, settings)
    if len(plan) == 0:
        per_step = "examples_per_step" if config.tokens_per_step is None else "tokens_per_step"
        raise ValueError(
            f"the data set holds {len(dataset)} datapoints, fewer than train.{per_step} = {getattr(config, per_step)}"
        )
    return plan


def _loaded(recipe: Recipe, here: Ranks, dataset: PackedDataset) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The base and the target, which may be one model, checked on a few contexts."""
    model = load_replica(recipe.model, here)
    target = load_replica(recipe.model, here, which="target") if recipe.model.target else model
    widths = [archs.find(each).d_model for each in (model, target)]
    if widths[0] != widths[1]:
        raise ValueError(
            f"model.target {recipe.model.target!r}: its activations have d_model {widths[1]}, but the base "
            f"{recipe.model.name!r} takes {widths[0]}; choose a target of the base's width"
        )
    contexts = [dataset[index].context_ids for index in range(min(4, len(dataset)))]
    for each in {id(model): model, id(target): target}.values():
        fuse(each, compiled=recipe.train.compile)
        check_model(each, archs.find(each), contexts)
    return model, target


@contextmanager
def _signals(here: Ranks) -> Iterator[threading.Event]:
    """Inside, SIGINT or SIGTERM asks the run to stop after the next step or two; another one some seconds later stops it at once."""
    asked, first = threading.Event(), [0.0]
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        # Launchers and schedulers often send the same signal twice at once.
        if asked.is_set() and time.monotonic() - first[0] > REPEATED:
            raise KeyboardInterrupt
        if not asked.is_set():
            first[0] = time.monotonic()
            if here.first:
                log.warning(
                    "asked to stop: the run saves and ends after the next step or two; to end it at once, ask again"
                )
        asked.set()

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
