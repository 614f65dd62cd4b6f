"""One optimizer step: rows of datapoints and their vectors in, an adapter that has moved out.

Shapes: K vectors of a datapoint, D d_model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ao.batch import lay_out, layout
from ao.config import TrainConfig
from ao.distributed import Ranks
from ao.injection import Injector
from ao.loss import answer_loss, labels_of
from ao.models import arch as archs
from ao.models import split
from ao.models.adapters import add_adapter, as_oracle
from ao.models.load import adamw8bit, compile_blocks, enable_recompute, recompute_blocks, recompute_runs_hooks
from ao.models.lora import LeanLora, cast_ahead, lean_forward
from ao.shards import Datapoint
from ao.training.lookahead import runs_beside
from ao.training.recompute import Recompute, choose_recompute
from ao.transfer import Streams, arrival, default_stream, to_cpu_memory, to_device

Rows = Sequence[Sequence[Datapoint]]
"""The datapoints of a step on this rank, by row; a row is one forward pass."""


COMPILED_MULTIPLE = 256
"""Rows of compiled blocks have a multiple of so many tokens."""


@dataclass(frozen=True)
class StepResult:
    """What a step did, over all ranks."""

    loss: float
    """As it was minimized: mean over answer tokens, or over examples."""
    gradient_norm: float
    """Before clipping."""
    skipped: bool
    """Whether the gradient was not finite, so that nothing moved."""
    examples: int
    """Datapoints."""
    input_tokens: int
    """Tokens of prompts and answers."""
    answer_tokens: int
    """Labelled tokens."""
    context_tokens: int
    """Tokens that were run through the target since the step before."""
    recomputed_tokens: float
    """Input tokens, each counted by the share of the blocks that its row recomputed."""
    stop: bool
    """Whether a rank was asked to stop."""


class Underway:
    """A step that a GPU may still be at. Its result is on its way to CPU memory: who asks for it when the next step has been
    launched leaves the GPU something to do."""

    def __init__(self, numbers: torch.Tensor) -> None:
        """`numbers`: the gradient's norm and what `Learner.backward` returns, float64 [9] on the device."""
        self._numbers = to_cpu_memory(numbers)
        self._arrived = arrival(numbers.device)

    def result(self) -> StepResult:
        """What the step did; waits for the device."""
        if self._arrived is not None:
            self._arrived.synchronize()
        norm, loss_sum, divisor, answer_tokens, input_tokens, examples, recomputed, contexts, stopping = (
            self._numbers.tolist()
        )
        return StepResult(
            loss=loss_sum / divisor,
            gradient_norm=norm,
            skipped=not math.isfinite(norm),
            examples=int(examples),
            input_tokens=int(input_tokens),
            answer_tokens=int(answer_tokens),
            context_tokens=int(contexts),
            recomputed_tokens=recomputed,
            stop=stopping > 0,
        )


def settled(
    launched: Iterable[tuple[int, Underway]], is_looked_at: Callable[[int], bool], *, runs_ahead: bool
) -> Iterator[tuple[int, StepResult]]:
    """The results of steps in their order. Where the host runs ahead of the device, each comes when the next step has been
    launched, so that the device always has something to do; but at once where the adapter is looked at behind a step."""
    before: tuple[int, Underway] | None = None
    for done, underway in launched:
        if before is not None:
            yield before[0], before[1].result()
        before = done, underway
        if not runs_ahead or is_looked_at(done):
            yield done, underway.result()
            before = None
    if before is not None:
        yield before[0], before[1].result()


class Learner:
    """A frozen base with the adapter that is trained, and all that changes with it."""

    def __init__(
        self,
        model: PreTrainedModel,
        arch: archs.Arch,
        peft: Any,
        injector: Injector,
        config: TrainConfig,
        here: Ranks,
        recompute: Recompute,
        forwards: Sequence[LeanLora],
    ) -> None:
        self.model = model
        self.arch = arch
        self.peft = peft
        self.injector = injector
        self.config = config
        self.here = here
        self.recompute = recompute
        self.devices = split.devices_of(model)
        """The base's; more than one where it is split."""
        self._streams = Streams(here.device if runs_beside(model, here.device) else None)
        self.weights, self.gradient = _flatten([p for p in peft.parameters() if p.requires_grad])
        self.optimizer = _optimizer(self.weights, config)
        # Compiled blocks would trace how gradients are added.
        is_cast = here.device.type == "cuda" and model.dtype != self.weights.dtype and not config.compile
        self._casts = cast_ahead(self.weights, forwards, dtype=model.dtype) if is_cast else []

    @classmethod
    def of(cls, model: PreTrainedModel, config: TrainConfig, here: Ranks) -> Learner:
        """Put a new adapter on a base, and set up injection, recompute and optimizer."""
        arch = archs.find(model)
        torch.manual_seed(config.seed)
        peft = add_adapter(model, rank=config.rank, alpha=config.alpha, dropout=config.dropout)
        forwards = lean_forward(peft)
        # Every rank begins with the same adapter, and from here on drops units of its own.
        torch.manual_seed(config.seed + here.rank)
        injector = Injector(
            arch.layers,
            layer=config.injection_layer,
            rule=config.injection,
            scale=config.injection_scale,
            rescale=config.rescale,
        )
        recompute = choose_recompute(model, arch, config, here.device)
        if recompute.possible:
            enable_recompute(model)
        if config.compile:
            compile_blocks(arch.layers)
        model.train()
        return cls(model, arch, peft, injector, config, here, recompute, forwards)

    @property
    def aside(self) -> torch.cuda.Stream | None:
        """A stream for what a GPU may do where steps leave it idle; None on a CPU, where the base is split, and where its forward
        writes what two at once would read."""
        return self._streams.aside

    @property
    def runs_ahead(self) -> bool:
        """Whether a step's result is better asked for when the next one has been launched."""
        return self.here.device.type == "cuda"

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, steps can be made: the model takes packed rows, and the adapter is the active one; a GPU serves them before
        what is given to `aside`."""
        with layout(self.model, self.arch), as_oracle(self.model), self._streams.first():
            yield

    def step(
        self,
        rows: Rows,
        vectors: Mapping[str, torch.Tensor],
        rate: float,
        *,
        context_tokens: int = 0,
        stop: bool = False,
    ) -> Underway:
        """One optimizer step; on a GPU it has only been launched behind this. Where the gradient is not finite nothing moves.

        Args:
            rows: this rank's datapoints; other ranks call with theirs.
            vectors: activations by the datapoint's id, each [K, D].
            rate: the learning rate.
            context_tokens: what this rank has run through the target since the step before, for the result.
            stop: whether this rank was asked to stop; all ranks are told in the result.
        """
        sums = self.backward(rows, vectors, context_tokens=context_tokens, stop=stop)
        norm = self.gradient.norm().double()
        self.gradient *= (self.config.max_grad_norm / (norm + 1e-12)).clamp(max=1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        is_bad = ~norm.isfinite()
        if isinstance(self.optimizer, torch.optim.AdamW):
            # How gradient scalers tell it to leave everything as it is, without the host's knowing.
            self.optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not is_bad:
            # bitsandbytes launches on the default stream, whatever the current one is; it has been waited for, and waits itself.
            with default_stream(self.here.device):
                self.optimizer.step()
        return Underway(torch.cat([norm[None], sums]))

    def backward(
        self, rows: Rows, vectors: Mapping[str, torch.Tensor], *, context_tokens: int = 0, stop: bool = False
    ) -> torch.Tensor:
        """The gradient of a step, over all ranks, in `gradient`; no update.

        Returns:
            Float64 [8] on the device: loss sum, what it is divided by, answer tokens, input tokens, examples, recomputed
            tokens, context tokens, ranks that were asked to stop.
        """
        self.gradient.zero_()
        sums = to_device(np.array([0] * 6 + [context_tokens, stop], dtype=np.float64), self.here.device)
        for points in rows:
            loss, counts = self.row_loss(points, vectors)
            sums[0] += loss
            sums[1:6] += to_device(np.array(counts, dtype=np.float64), sums.device)
        self.here.sum_(sums)
        self.here.sum_(self.gradient)
        self.gradient /= sums[1].to(self.gradient.dtype)
        return sums

    def row_loss(
        self, points: Sequence[Datapoint], vectors: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, list[float]]:
        """Loss sum of one row, whose gradient is added up where gradients are on, and its five counts."""
        # At every row, whoever has moved the weights; outside of autograd, to which the copies are constants.
        for cast in self._casts:
            cast.take(self.weights)
        sequences = [point.input_ids for point in points]
        multiple = COMPILED_MULTIPLE if self.config.compile else 1
        batch = lay_out(sequences, packed=self.arch.attention_only, device=self.here.device, multiple=multiple)
        labels = labels_of(
            batch,
            sequences,
            [point.answer_start for point in points],
            per_example=self.config.loss == "per_example_mean",
        )
        places = np.concatenate([start + point.placeholders for start, point in zip(batch.starts, points, strict=True)])
        vectors_KD = torch.cat([vectors[point.id] for point in points])
        recomputed = 0
        if self.recompute.possible and torch.is_grad_enabled():
            recomputed = self.recompute.blocks(batch.input_ids_BT.numel())
            recompute_blocks(self.arch.layers, recomputed)
        hits = 2 if recomputed > self.injector.layer and recompute_runs_hooks() else 1
        with self.injector.injecting(to_device(places, self.here.device), vectors_KD, hits=hits):
            resid_BTD = self.arch.decoder(**batch.model_inputs).last_hidden_state
            self.injector.require_hits(1)
            loss = answer_loss(self.arch, resid_BTD, labels)
            if loss.requires_grad:
                loss.backward()
        divisor = len(points) if self.config.loss == "per_example_mean" else len(labels.ids_A)
        tokens = sum(map(len, sequences))
        again = tokens * recomputed / self.arch.num_layers
        return loss.detach(), [divisor, len(labels.ids_A), tokens, len(points), again]

    @torch.no_grad()
    def losses(self, rows: Rows, vectors: Mapping[str, torch.Tensor]) -> float:
        """The loss of datapoints over all ranks, dropout off."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.here.device)
        self.model.eval()
        try:
            for points in rows:
                loss, counts = self.row_loss(points, vectors)
                sums[0] += loss
                sums[1:] += to_device(np.array(counts[:1], dtype=np.float64), sums.device)
        finally:
            self.model.train()
        self.here.sum_(sums)
        return float(sums[0] / sums[1])


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then linear decay to zero after the last step."""
    warm = max(1, round(config.warmup * config.steps))
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    return config.learning_rate * (config.steps - step) / max(1, config.steps - warm)


def _flatten(parameters: list[torch.nn.Parameter]) -> tuple[torch.nn.Parameter, torch.Tensor]:
    """Make parameters views of one flat buffer, and their gradients of another: one reduction and one optimizer kernel
    instead of one for each of hundreds of small tensors."""
    device = parameters[0].device
    flat = torch.nn.Parameter(torch.cat([parameter.detach().flatten().to(device) for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    first = 0
    for parameter in parameters:
        end = first + parameter.numel()
        parameter.data = flat.data[first:end].view_as(parameter)
        parameter.grad = flat.grad[first:end].view_as(parameter)
        first = end
    return flat, flat.grad


def _optimizer(weights: torch.nn.Parameter, config: TrainConfig) -> torch.optim.Optimizer:
    settings = {"lr": config.learning_rate, "betas": config.betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw8bit":
        return adamw8bit([weights], **settings)
    return torch.optim.AdamW([weights], **settings, fused=True)
