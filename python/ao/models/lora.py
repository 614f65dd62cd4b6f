"""The LoRA forward of training: PEFT makes, saves and switches the adapter, the products are made here.

PEFT's forward casts the whole input to the adapter's fp32, looks at every adapter at every call, and keeps a dropped-out copy
of every input. Here the two small matrices are cast instead, so weights and their gradients stay fp32, and of the dropout only
its mask is kept. Where base and adapter agree in precision the numbers are the same.

Shapes: I features in, O features out, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ao.models.adapters import NAME


def lean_forward(peft: nn.Module) -> list[LeanLora]:
    """Let the LoRA layers of a model compute in the base's own precision and keep little; returns their forwards.

    Raises:
        ValueError: a layer carries other adapters than the oracle's.
    """
    found = []
    for layer in peft.modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not isinstance(layer, nn.Module) or set(layer.lora_A) != {NAME}:
            raise ValueError(f"LoRA layers carry the adapters {sorted(layer.lora_A)}, expected only {NAME!r}")
        layer.forward = LeanLora(layer)
        found.append(layer.forward)
    return found


class CastMatrices(NamedTuple):
    """Both matrices of a LoRA layer as they are multiplied, and views that turn them."""

    down: torch.Tensor
    """[R, I]."""
    up: torch.Tensor
    """[O, R]."""
    down_t: torch.Tensor
    up_t: torch.Tensor


class LeanLora:
    """The forward of a LoRA layer with one adapter; the layer keeps its weights and its switch."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.base = layer.get_base_layer()
        self.down, self.up = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
        self.dropout = layer.lora_dropout[NAME]
        self.scaling = layer.scaling[NAME]
        self.cast: CastMatrices | None = None
        """Where a learner casts the matrices at every row and holds their gradients; else they are cast at every call."""

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output."""
        if self.layer.disable_adapters:
            return self.base(x)
        p = self.dropout.p if self.layer.training and isinstance(self.dropout, nn.Dropout) else 0.0
        is_plain = type(self.base) is nn.Linear and self.base.bias is None and not self.base.weight.requires_grad
        # A plain linear's product is made, and its gradient added up, in the kernels of the LoRA's own.
        weight, y = (self.base.weight, None) if is_plain else (None, self.base(x))
        if self.cast is not None and x.dtype == self.cast.down.dtype:
            return _CastLoraLinear.apply(x, y, self.down, self, weight, p)
        return _LoraLinear.apply(x, y, weight, self.down, self.up, self.scaling, p)


@dataclass(frozen=True)
class CastWeights:
    """A piece of a learner's flat buffer of weights in the precision of the base, on the device of the linears that use it."""

    part: slice
    """Of the flat buffer."""
    values: torch.Tensor

    def take(self, weights: torch.Tensor) -> None:
        """Take over what the flat buffer holds."""
        self.values.copy_(weights.detach()[self.part])


def cast_ahead(weights: torch.Tensor, forwards: Sequence[LeanLora], *, dtype: torch.dtype) -> list[CastWeights]:
    """Copies of a flat buffer of weights, one on each device of the bases; the forwards multiply with views of them.

    One kernel casts all matrices, where each by itself would be two for every linear. The parameters must be views of the
    flat buffer, and their gradients of another.
    """
    groups: dict[torch.device, list[LeanLora]] = {}
    for forward in forwards:
        groups.setdefault(forward.base.weight.device, []).append(forward)
    copies = []
    for device, group in groups.items():
        matrices = [matrix for forward in group for matrix in (forward.down, forward.up)]
        first = min(matrix.storage_offset() for matrix in matrices)
        end = max(matrix.storage_offset() + matrix.numel() for matrix in matrices)
        copy = CastWeights(slice(first, end), weights.detach()[first:end].to(device, dtype, copy=True))
        for forward in group:
            begins = (forward.down.storage_offset() - first, forward.up.storage_offset() - first)
            down, up = (
                copy.values[begin : begin + matrix.numel()].view_as(matrix)
                for begin, matrix in zip(begins, (forward.down, forward.up), strict=True)
            )
            forward.cast = CastMatrices(down, up, down.t(), up.t())
        copies.append(copy)
    return copies


class _LoraLinear(torch.autograd.Function):
    """W x + s B A dropout(x), with s the scaling; or y + s B A dropout(x) where the base has made y = W x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor | None,
        weight: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
        p: float,
    ) -> torch.Tensor:
        # Of a model on several GPUs the adapter lies on the first, in one buffer.
        a, b = down.to(x.device, x.dtype), up.to(x.device, x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        dropped, mask, keep = (flat, None, 1.0) if p == 0.0 else _dropout(flat, p)
        low = dropped @ a.t()
        if mask is not None and not x.is_cuda:
            low /= keep
        if weight is not None:
            out = (flat @ weight.t()).addmm_(low, b.t(), alpha=scaling)
        else:
            assert y is not None
            out = torch.addmm(y.reshape(-1, y.shape[-1]), low, b.t(), alpha=scaling)
        ctx.save_for_backward(flat, mask, low, a, b, weight)
        ctx.kinds = tuple((each.device, each.dtype) for each in (down, up))
        ctx.scaling, ctx.keep, ctx.shape = scaling, keep, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        flat, mask, low, a, b, weight = ctx.saved_tensors
        gradient = upstream[0].reshape(-1, upstream[0].shape[-1])
        # The factors go into the narrow matrices.
        of_low = (gradient @ b) * (ctx.scaling / ctx.keep)
        of_up = (gradient.t() @ (low * ctx.scaling)).to(*ctx.kinds[1])
        of_down = (of_low.t() @ (flat if mask is None else flat * mask)).to(*ctx.kinds[0])
        of_x = of_y = None
        if ctx.needs_input_grad[0]:
            of_x = of_low @ a
            if mask is not None:
                of_x.mul_(mask)
            if weight is not None:
                of_x.addmm_(gradient, weight)
            of_x = of_x.view(ctx.shape)
        if weight is None:
            of_y = upstream[0]
        return of_x, of_y, None, of_down, of_up, None, None


class _CastLoraLinear(torch.autograd.Function):
    """The same with matrices that are cast already, on a GPU, in half the kernels: a step of some hundred tokens waits for the
    host to launch them. The gradients are added to what the parameters have."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor | None,
        down: nn.Parameter,
        lora: LeanLora,
        weight: torch.Tensor | None,
        p: float,
    ) -> torch.Tensor:
        # `down` is here so that autograd comes back though `x` may want no gradient.
        matrices = lora.cast
        assert matrices is not None
        flat = x.reshape(-1, x.shape[-1])
        dropped, mask = (flat, None) if p == 0.0 else torch.native_dropout(flat, p, True)
        low = torch.mm(dropped, matrices.down_t)
        if weight is not None:
            out = torch.mm(flat, weight.t()).addmm_(low, matrices.up_t, alpha=lora.scaling)
        else:
            assert y is not None
            out = torch.addmm(y.reshape(-1, y.shape[-1]), low, matrices.up_t, alpha=lora.scaling)
        ctx.save_for_backward(flat, mask, low)
        # What does not change before the backward pass: a learner casts again only at the next row, behind it.
        ctx.lora, ctx.matrices, ctx.weight, ctx.shape, ctx.per_kept = lora, matrices, weight, x.shape, 1 / (1 - p)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        flat, mask, low = ctx.saved_tensors
        lora, matrices, weight = ctx.lora, ctx.matrices, ctx.weight
        gradient = upstream[0].reshape(-1, upstream[0].shape[-1])
        of_low = torch.mm(gradient, matrices.up)
        kept = flat if mask is None else torch.ops.aten.native_dropout_backward(flat, mask, ctx.per_kept)
        _add_product(lora.up.grad, gradient.t(), low, lora.scaling)
        _add_product(lora.down.grad, of_low.t(), kept, lora.scaling)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = torch.mm(of_low, matrices.down)
            if mask is not None:
                of_x = torch.ops.aten.native_dropout_backward(of_x, mask, ctx.per_kept)
            of_x = of_x.mul_(lora.scaling) if weight is None else of_x.addmm_(gradient, weight, beta=lora.scaling)
            of_x = of_x.view(ctx.shape)
        return of_x, None if weight is not None else upstream[0], None, None, None, None


def _add_product(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
    """Add a scaled product to a gradient, which is kept in fp32."""
    if into.device != left.device:
        # Of a model on several GPUs the adapter lies on the first.
        into.add_(torch.mm(left, right).to(into.device), alpha=scaling)
    elif into.dtype == left.dtype:
        into.addmm_(left, right, alpha=scaling)
    else:
        torch.addmm(into, left, right, out_dtype=into.dtype, alpha=scaling, out=into)


def _dropout(x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """What dropout leaves of `x`, on a GPU divided by the share that stays; the mask of what stays; and that share."""
    if x.is_cuda:
        return *torch.native_dropout(x, p, True), 1 - p
    # Sixteen random bits decide on a value: torch draws on one thread, and a draw for each took an eighth of a step.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    out_of_65536 = min(round(p * 2**16), 2**16 - 1)
    mask = (draws.view(torch.int16)[: x.numel()] >= out_of_65536 - 2**15).view(x.shape)
    return x * mask, mask, 1 - out_of_65536 / 2**16
