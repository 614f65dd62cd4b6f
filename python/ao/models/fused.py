"""Operations of a model run in fewer kernels where that gives the same numbers, found by what they compute.

Shapes: B batch, H heads, T tokens, E width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

ROTARY = "apply_rotary_pos_emb"
"""What every family's attention calls to turn queries and keys."""


def fuse(model: nn.Module, *, compiled: bool = False) -> tuple[int, int]:
    """Fuse norms, and on a GPU rotary embeddings, unless blocks are `compiled`, which fuses them anyway; returns how many of
    each."""
    rotary = next(model.parameters()).is_cuda and not compiled
    return fuse_norms(model), fuse_rotary(model) if rotary else 0


def fuse_norms(model: nn.Module) -> int:
    """Let RMS norms run as torch's one fused operation where that gives the same numbers; returns how many.

    A norm is recognized by what it computes: a module whose name ends in RMSNorm, tried on random rows. In half precision
    the same numbers are those that differ by no more than the last digit, as both sum in fp32 and round at the end.

    Source: the library's norm takes six passes over memory and eight kernels, the fused one two and one.
    """
    fused = 0
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm"):
            continue
        weight = getattr(module, "weight", None)
        eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        if eps is None:
            continue
        like = weight if weight is not None else next(model.parameters())
        width = weight.shape[0] if weight is not None else 64
        if not like.dtype.is_floating_point:
            continue
        probe = torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(like.device, like.dtype)
        with torch.no_grad():
            expected = module(probe)
            got = torch.rms_norm(probe, (width,), weight, eps)
        rtol = 1e-5 if like.dtype == torch.float32 else 1.01 * torch.finfo(like.dtype).eps
        if got.dtype == expected.dtype and torch.allclose(expected, got, rtol=rtol, atol=1e-6):
            module.forward = _FusedNorm(module, eps)
            fused += 1
    return fused


class _FusedNorm:
    """The forward of a fused norm; the module keeps its weight, so that casting and moving it still work."""

    def __init__(self, module: nn.Module, eps: float) -> None:
        self.module = module
        self.eps = eps

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = getattr(self.module, "weight", None)
        return torch.rms_norm(hidden_states, hidden_states.shape[-1:], weight, self.eps)


def fuse_rotary(model: nn.Module) -> int:
    """Turn queries and keys without the copies of their halves, where that gives the same numbers; returns in how many modules.

    Families bring functions of one name but different arithmetic (whole or partial, by halves or by pairs), so they are
    recognized by what they compute. A module whose forward calls one gets a forward that calls ours instead. The numbers
    are the same but for the last digit: ours round once less.

    Source: x cos + rotate_half(x) sin takes five kernels and ten passes over memory, the fused one three and five.
    """
    fused = 0
    dtype = next(model.parameters()).dtype
    for module in model.modules():
        forward = type(module).forward
        called = getattr(forward, "__code__", None)
        if called is None or ROTARY not in called.co_names or "forward" in vars(module):
            continue
        if (ours := _fused_rotary(forward.__globals__[ROTARY], dtype)) is None:
            continue
        own = FunctionType(
            called, {**forward.__globals__, ROTARY: ours}, "forward", forward.__defaults__, forward.__closure__
        )
        own.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(own, module)
        fused += 1
    return fused


@cache
def _fused_rotary(theirs: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any] | None:
    """A family's function, of one or of two states, with fewer kernels; None where ours would give other numbers."""
    arguments = list(inspect.signature(theirs).parameters)
    if arguments[-3:] != ["cos", "sin", "unsqueeze_dim"]:
        return None
    num_states = len(arguments) - 3

    def ours(*args: torch.Tensor, unsqueeze_dim: int = 1) -> Any:
        *states, cos, sin = args
        if any(x.shape[-1] != cos.shape[-1] or x.dtype != cos.dtype for x in states):
            return theirs(*args, unsqueeze_dim=unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        turned: Any = tuple(_Rotary.apply(x, cos, sin) for x in states)
        return turned if num_states > 1 else turned[0]

    random = torch.Generator().manual_seed(0)
    *states, angles = (torch.randn(shape, generator=random) for shape in ((1, 2, 5, 16),) * num_states + ((1, 5, 8),))
    angles = torch.cat([angles, angles], dim=-1)
    probe = [x.to(dtype) for x in (*states, angles.cos(), angles.sin())]
    expected, got = theirs(*probe), ours(*probe)
    expected, got = (pair if num_states > 1 else (pair,) for pair in (expected, got))
    # Two products of up to four are rounded before they are added, ours once.
    atol = 8 * torch.finfo(dtype).eps
    same = all(torch.allclose(mine, peer, rtol=0.0, atol=atol) for mine, peer in zip(got, expected, strict=True))
    return ours if same else None


class _Rotary(torch.autograd.Function):
    """x cos + rotate_half(x) sin for x [B, H, T, E], or [B, T, H, E], and angles that broadcast to it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = sin.chunk(2, dim=-1)
        return _turned(x, cos, first, second, sign=1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        first, second = sin.chunk(2, dim=-1)
        return _turned(gradients[0], cos, second, first, sign=-1), None, None


def _turned(
    x: torch.Tensor, cos: torch.Tensor, to_first: torch.Tensor, to_second: torch.Tensor, *, sign: int
) -> torch.Tensor:
    turned = x * cos
    half = x.shape[-1] // 2
    turned.narrow(-1, 0, half).addcmul_(x.narrow(-1, half, half), to_first, value=-sign)
    turned.narrow(-1, half, half).addcmul_(x.narrow(-1, 0, half), to_second, value=sign)
    return turned
