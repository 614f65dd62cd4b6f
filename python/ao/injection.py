"""Injection: adding activations to the oracle's residual stream at the placeholders of its prompt.

Shapes: B rows, T tokens, D d_model, K vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

RULES = ("norm_matched_add", "rescaled_add", "replace")


def inject(
    resid_BTD: torch.Tensor,
    positions_K: torch.Tensor,
    vectors_KD: torch.Tensor,
    *,
    rule: str = "norm_matched_add",
    scale: float = 1.0,
    rescale: float = 2.0,
) -> torch.Tensor:
    """Put vectors into a residual stream; every other position comes back as it was.

    norm_matched_add: h' = h + c * ||h|| * v / ||v||, the added term detached (arXiv 2512.15674).
    rescaled_add: u = h + c * ||h|| * v / ||v||, then h' = u * s * ||h|| / ||u|| (arXiv 2606.02609).
    replace: h' = v (LatentQA, arXiv 2412.08686).

    Args:
        resid_BTD: residual stream [B, T, D].
        positions_K: places in the flattened [B * T], one per vector.
        vectors_KD: raw activations [K, D], finite and not zero (`check_vectors`).
        rule: one of `RULES`.
        scale: c.
        rescale: s.

    Returns:
        A new tensor [B, T, D].
    """
    flat = resid_BTD.reshape(-1, resid_BTD.shape[-1])
    # Of a model on several GPUs the block may lie on another one than the inputs.
    positions_K, vectors_KD = positions_K.to(flat.device), vectors_KD.to(flat.device)
    vectors = vectors_KD.to(flat.dtype)
    if rule == "replace":
        return flat.index_copy(0, positions_K, vectors).view_as(resid_BTD)
    slots = flat.index_select(0, positions_K)
    norms = slots.detach().float().norm(dim=-1, keepdim=True)
    direction = vectors_KD.float() / vectors_KD.float().norm(dim=-1, keepdim=True)
    added = (scale * norms * direction).to(flat.dtype).detach()
    if rule == "norm_matched_add":
        return flat.index_add(0, positions_K, added).view_as(resid_BTD)
    if rule == "rescaled_add":
        sums = slots + added
        # The norm of h is a function of h here, so it takes part in the gradient.
        factor = rescale * slots.float().norm(dim=-1, keepdim=True) / sums.float().norm(dim=-1, keepdim=True)
        return flat.index_copy(0, positions_K, sums * factor.to(sums.dtype)).view_as(resid_BTD)
    raise ValueError(f"injection: expected one of {', '.join(RULES)}, got {rule!r}")


def check_vectors(vectors_KD: torch.Tensor, what: str = "activations") -> None:
    """Refuse vectors whose direction means nothing: injection throws the magnitude away.

    Raises:
        ValueError: a vector is zero or not finite; the message says which.
    """
    norms_K = vectors_KD.float().norm(dim=-1)
    bad_K = ~torch.isfinite(norms_K) | (norms_K == 0)
    if bool(bad_K.any()):
        index = int(bad_K.nonzero()[0])
        raise ValueError(
            f"{what}: vector {index} of {len(norms_K)} has norm {float(norms_K[index])}, expected finite and positive; "
            "injected at full strength it would be noise (a difference of equal models is one cause)"
        )


@dataclass(frozen=True, eq=False)
class _State:
    positions_K: torch.Tensor
    vectors_KD: torch.Tensor


class Injector:
    """One permanent hook at the output of the injection layer, driven by state.

    It stays registered for the model's whole life, so that a forward which gradient checkpointing runs again injects
    again; the state is set before the forward and cleared after the backward pass. A forward over one token is a decode
    step and is left alone.
    """

    def __init__(
        self,
        layers: nn.ModuleList,
        *,
        layer: int,
        rule: str = "norm_matched_add",
        scale: float = 1.0,
        rescale: float = 2.0,
    ) -> None:
        if not 0 <= layer < len(layers):
            raise ValueError(f"injection layer: expected 0..{len(layers) - 1}, got {layer}")
        if rule not in RULES:
            raise ValueError(f"injection: expected one of {', '.join(RULES)}, got {rule!r}")
        self.layer = layer
        self.rule = rule
        self.scale = scale
        self.rescale = rescale
        self.hits = 0
        self._state: _State | None = None
        self._handle = layers[layer].register_forward_hook(self._hook)

    @contextmanager
    def injecting(self, positions_K: torch.Tensor, vectors_KD: torch.Tensor, *, hits: int = 1) -> Iterator[None]:
        """Inject in every forward inside.

        Args:
            positions_K: places in the flattened [B * T] of the prompt.
            vectors_KD: one vector per place.
            hits: how often the hook must have fired by the end: once per forward, and once more per recompute where the
                library's checkpointing runs hooks again.

        Raises:
            RuntimeError: the hook fired another number of times, so the answer was not about these activations.
            ValueError: the numbers of places and vectors differ.
        """
        if positions_K.shape[0] != vectors_KD.shape[0]:
            raise ValueError(f"injection: {positions_K.shape[0]} placeholders but {vectors_KD.shape[0]} vectors")
        if self._state is not None:
            raise RuntimeError("injection: already injecting; one batch at a time")
        self._state, self.hits = _State(positions_K, vectors_KD), 0
        try:
            yield
        finally:
            self._state = None
        self.require_hits(hits)

    def require_hits(self, hits: int) -> None:
        """Refuse another number of injections since `injecting` was entered.

        Raises:
            RuntimeError: tells how often the hook fired.
        """
        if self.hits != hits:
            raise RuntimeError(
                f"injection: the hook at layer {self.layer} fired {self.hits} times, expected {hits}; "
                "the hooked block was bypassed or run more often than it should"
            )

    def remove(self) -> None:
        """Take the hook off the model."""
        self._handle.remove()

    def _hook(self, module: nn.Module, args: object, output: torch.Tensor | tuple) -> torch.Tensor | tuple | None:
        if self._state is None:
            return None
        resid_BTD = output[0] if isinstance(output, tuple) else output
        if resid_BTD.shape[1] == 1:
            return None
        self.hits += 1
        resid_BTD = inject(
            resid_BTD,
            self._state.positions_K,
            self._state.vectors_KD,
            rule=self.rule,
            scale=self.scale,
            rescale=self.rescale,
        )
        return (resid_BTD, *output[1:]) if isinstance(output, tuple) else resid_BTD
