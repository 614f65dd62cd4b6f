"""Training the oracle's adapter: look ahead for activations, inject, answer loss, step.

Shapes: P vectors of a window, D d_model.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from ao.batch import lay_out, layout
from ao.checkpoint import OracleConfig
from ao.config import Recipe, TrainConfig, to_toml
from ao.distributed import Ranks, ranks
from ao.injection import Injector
from ao.loss import answer_loss, labels_of
from ao.manifest import write_atomic
from ao.models import arch as archs
from ao.models.adapters import add_adapter, as_oracle, save_adapter
from ao.models.load import adamw8bit, enable_recompute, fuse_norms, load_model, resolve_device
from ao.plan import Plan, PlanSettings
from ao.prompt import fingerprints, framer
from ao.residuals import Read, read_vectors
from ao.selftest import check_model
from ao.shards import Datapoint, PackedDataset

log = logging.getLogger(__name__)


def train(recipe: Recipe, *, data: str | Path, out: str | Path, progress: bool = True) -> dict[str, Any]:
    """Train an adapter on a packed data set and write it to a folder.

    Under torchrun every process calls this with the same arguments; each holds a replica and takes its share of every
    step's datapoints, whose order is the same for any number of ranks.

    Returns:
        The training record, also written to `training.json`: losses, seconds, counts, versions.

    Raises:
        FileExistsError: `out` holds something else than an adapter.
        ValueError: the data set was packed for another tokenizer, template or target, or reads what cannot be collected.
    """
    config, data, out = recipe.train, Path(data), Path(out)
    torch.manual_seed(config.seed)
    with ranks(resolve_device(recipe.model.device)) as here:
        require_free(out)
        dataset = PackedDataset.open(data, verify=here.first)
        dataset.require(**fingerprints(recipe.model))
        dataset.require_base()
        placed = replace(recipe.model, device=str(here.device))
        model = load_model(placed)
        target = load_model(placed, which="target") if recipe.model.target else model
        for each in {id(model): model, id(target): target}.values():
            fuse_norms(each)
            check_model(each, archs.find(each), [dataset[index].context_ids for index in range(min(4, len(dataset)))])
        arch, target_arch = archs.find(model), archs.find(target)
        peft = add_adapter(model, rank=config.rank, alpha=config.alpha, dropout=config.dropout)
        # Every rank begins with the same adapter, and from here on drops units of its own.
        torch.manual_seed(config.seed + here.rank)
        injector = Injector(
            arch.layers,
            layer=config.injection_layer,
            rule=config.injection,
            scale=config.injection_scale,
            rescale=config.rescale,
        )
        if config.recompute:
            enable_recompute(model)
        model.train()
        optimizer, flat_gradient = setup_optimizer(peft, config)
        record = loop(
            model, arch, target, target_arch, injector, optimizer, flat_gradient, dataset, config, here, out, progress
        )
        if here.first:
            write(recipe, peft, arch, dataset, record, out)
        return {**record, "first_rank": here.first}


def require_free(out: Path) -> None:
    """Refuse a folder that holds something else than an earlier adapter."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose another --out")
    if out.exists() and any(out.iterdir()) and not (out / "adapter_config.json").is_file():
        raise FileExistsError(f"{out} holds files that are no adapter; choose another --out")


def loop(
    model: PreTrainedModel,
    arch: archs.Arch,
    target: PreTrainedModel,
    target_arch: archs.Arch,
    injector: Injector,
    optimizer: torch.optim.Optimizer,
    flat_gradient: torch.Tensor,
    dataset: PackedDataset,
    config: TrainConfig,
    here: Ranks,
    out: Path,
    progress: bool,
) -> dict[str, Any]:
    """The training loop; returns the record."""
    started = time.perf_counter()
    losses: list[float | None] = []
    seconds = {"target": 0.0, "steps": 0.0}
    totals = {"examples": 0, "input_tokens": 0, "answer_tokens": 0, "skipped_steps": 0}
    step = 0
    bar = tqdm(total=config.steps, desc="train", unit="step", disable=not (progress and here.first))
    times = (1, 2) if config.recompute else (1,)
    with bar, layout(model, arch), as_oracle(model):
        for window in windows(dataset, config, here, not arch.attention_only):
            clock = time.perf_counter()
            coming = [point for rows in window for points in rows for point in points]
            vectors = look_ahead(target, target_arch, coming, config)
            seconds["target"] += time.perf_counter() - clock
            clock = time.perf_counter()
            for rows in window:
                # -- one step: this rank's datapoints, in rows of a token budget --
                rate = learning_rate(step, config)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                flat_gradient.zero_()
                # loss sum, answer tokens, input tokens, examples: summed over ranks with the gradient
                sums = torch.zeros(4, dtype=torch.float64, device=here.device)
                for points in rows:
                    sequences = [point.input_ids for point in points]
                    batch = lay_out(sequences, packed=arch.attention_only, device=here.device)
                    labels = labels_of(batch, sequences, [point.answer_start for point in points])
                    places = np.concatenate(
                        [start + point.placeholders for start, point in zip(batch.starts, points, strict=True)]
                    )
                    vectors_KD = torch.cat([vectors.pop(point.id) for point in points])
                    with injector.injecting(torch.from_numpy(places).to(here.device), vectors_KD, times=times):
                        resid_BTD = arch.decoder(**batch.model_inputs).last_hidden_state
                        loss = answer_loss(arch, resid_BTD, labels)
                        loss.backward()
                    counts = [len(labels.ids_A), sum(map(len, sequences)), len(points)]
                    sums += torch.tensor([loss.item(), *counts], dtype=torch.float64, device=here.device)
                here.sum_(sums)
                here.sum_(flat_gradient)
                loss_sum, *counts = sums.tolist()
                flat_gradient /= counts[0]
                norm = flat_gradient.norm().item()
                if math.isfinite(norm):
                    flat_gradient *= min(1.0, config.max_grad_norm / (norm + 1e-12))
                    optimizer.step()
                else:
                    totals["skipped_steps"] += 1
                # -- step done --
                mean_loss = loss_sum / counts[0]
                losses.append(round(mean_loss, 6) if math.isfinite(mean_loss) else None)
                for name, count in zip(("answer_tokens", "input_tokens", "examples"), counts, strict=True):
                    totals[name] += int(count)
                step += 1
                bar.update()
                if here.first and (step % config.log_every == 0 or step == config.steps):
                    bar.set_postfix(loss=f"{mean_loss:.3f}")
                    log.info("step %d loss %.4f gradient norm %.3g rate %.3g", step, mean_loss, norm, rate)
            seconds["steps"] += time.perf_counter() - clock
    seconds["total"] = time.perf_counter() - started
    if totals["skipped_steps"] > config.steps // 10:
        raise RuntimeError(
            f"train: the gradient was not finite in {totals['skipped_steps']} of {config.steps} steps; "
            "lower train.learning_rate or use a wider precision"
        )
    return {
        "steps": step,
        "ranks": here.world,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "numpy")},
        "losses": losses,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        **totals,
        "examples_per_second": round(totals["examples"] / seconds["total"], 2),
    }


def windows(
    dataset: PackedDataset, config: TrainConfig, here: Ranks, padded: bool = False, start: int = 0
) -> Iterator[list[list[list[Datapoint]]]]:
    """This rank's datapoints by window, step and row, epoch after epoch until the steps are done.

    Args:
        dataset: what is trained on.
        config: the steps and their rows.
        here: the rank.
        padded: rows are rectangles, not sequences joined.
        start: steps that are done already.
    """
    settings = PlanSettings(
        tokens_per_row=config.tokens_per_row,
        examples_per_step=config.examples_per_step,
        padded=padded,
        longer_alone=True,
        window=config.window,
        ranks=here.world,
        seed=config.seed,
    )
    done = epoch = 0
    while done < config.steps:
        plan = Plan.make(dataset, replace(settings, epoch=epoch))
        if len(plan) == 0:
            raise ValueError(
                f"the data set holds {len(dataset)} datapoints, fewer than train.examples_per_step = {config.examples_per_step}"
            )
        if start < done + len(plan):
            for window in plan.windows(max(0, start - done), end=config.steps - done, rank=here.rank):
                yield [[[dataset[index] for index in row.tolist()] for row in rows] for rows in window]
        done += len(plan)
        epoch += 1


def look_ahead(
    target: PreTrainedModel, arch: archs.Arch, points: Sequence[Datapoint], config: TrainConfig
) -> dict[str, torch.Tensor]:
    """The vectors of a window's datapoints by id; each distinct context is run once, adapter off."""
    if not points:
        return {}
    reads = [Read(point.context_ids, point.layers, point.read_positions) for point in points]
    vectors_PD, offsets = read_vectors(target, arch, reads, tokens_per_row=config.tokens_per_row)
    return {point.id: vectors_PD[first:end] for point, first, end in zip(points, offsets, offsets[1:], strict=False)}


def setup_optimizer(peft: torch.nn.Module, config: TrainConfig) -> tuple[torch.optim.Optimizer, torch.Tensor]:
    """AdamW over the adapter, and the one flat buffer that all its gradients are views of."""
    parameters = [parameter for parameter in peft.parameters() if parameter.requires_grad]
    flat = torch.zeros(sum(parameter.numel() for parameter in parameters), device=parameters[0].device)
    first = 0
    for parameter in parameters:
        parameter.grad = flat[first : first + parameter.numel()].view_as(parameter)
        first += parameter.numel()
    settings = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw8bit":
        return adamw8bit(parameters, **settings), flat
    return torch.optim.AdamW(parameters, **settings, fused=True), flat


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then linear decay to zero after the last step."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    return config.learning_rate * (config.steps - step) / max(1, config.steps - warm)


def write(
    recipe: Recipe, peft: Any, arch: archs.Arch, dataset: PackedDataset, record: dict[str, Any], out: Path
) -> None:
    """Write the adapter, its contract, the resolved recipe and the training record."""
    config = recipe.train
    contract = OracleConfig(
        model=recipe.model.name,
        injection=config.injection,
        injection_layer=config.injection_layer,
        injection_scale=config.injection_scale,
        rescale=config.rescale,
        layer_combinations=tuple(dataset.layer_combinations),
        num_layers=arch.num_layers,
        framing=framer(recipe.model.name, recipe.model.revision).fingerprint,
        trained={
            "steps": record["steps"],
            "examples": record["examples"],
            "precision": recipe.model.precision,
            "target": recipe.model.target or recipe.model.name,
            "lora": {"r": config.rank, "alpha": config.alpha, "dropout": config.dropout},
        },
    )
    save_adapter(peft, out, base=recipe.model.name, ao_config=contract.to_json())
    write_atomic(out / "recipe.toml", to_toml(recipe))
    write_atomic(out / "training.json", json.dumps(record, indent=1) + "\n")
