"""Checks of a loaded model that take a second and catch what would otherwise be silently wrong.

Shapes: T tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from transformers import PreTrainedModel

from ao.batch import lay_out, layout
from ao.models.adapters import as_target
from ao.models.arch import Arch, logits
from ao.residuals import residuals


@torch.no_grad()
def check_model(model: PreTrainedModel, arch: Arch, contexts: Sequence[np.ndarray]) -> None:
    """Check what reading, packing and the answer loss take for granted.

    Args:
        model: a loaded model, with or without an oracle adapter.
        arch: its parts.
        contexts: a few token sequences, as they will be read.

    Raises:
        RuntimeError: layer k is not `hidden_states[k + 1]`; the selected logits differ from the model's own; a later token
            moves an earlier residual; or documents of a packed row see each other.
    """
    contexts = [context[:512] for context in contexts]
    device = next(model.parameters()).device
    close = partial(_require_close, exact=arch.head.weight.dtype == torch.float32 and device.type == "cpu")
    last = arch.num_layers - 1
    middle = arch.num_layers // 2
    with as_target(model):
        ids = [torch.from_numpy(context.astype(np.int64)).to(device)[None] for context in contexts]
        outputs = [model(input_ids=each, output_hidden_states=True, use_cache=False) for each in ids]
        alone = [output.hidden_states[middle + 1][0] for output in outputs]
        batch = lay_out(contexts[-1:], packed=False, device=device)
        resid_TD = residuals(model, arch, batch, [middle, last])[middle]
        close(resid_TD, alone[-1], f"layer {middle} is not hidden_states[{middle + 1}]: the layer lookup is off")

        final_TD = arch.decoder(**batch.model_inputs).last_hidden_state[0]
        close(
            logits(arch, final_TD),
            outputs[-1].logits[0].float(),
            "logits of selected positions differ from the model's own: it does more after the head than a soft-cap",
        )

        if len(contexts[-1]) > 1:
            moved = contexts[-1].copy()
            moved[-1] = (moved[-1] + 1) % arch.vocab
            changed_TD = residuals(model, arch, lay_out([moved], packed=False, device=device), [middle])[middle]
            close(
                changed_TD[:-1],
                resid_TD[:-1],
                "a later token moves earlier residuals: the model does not read causally",
            )

        with layout(model, arch):
            batch = lay_out(contexts, packed=arch.attention_only, device=device)
            together = residuals(model, arch, batch, [middle])[middle]
        for index, (start, context) in enumerate(zip(batch.starts, contexts, strict=True)):
            close(
                together[start : start + len(context)],
                alone[index],
                f"context {index} of a shared forward differs from the same context alone: documents see each other",
            )


def _require_close(got_TD: torch.Tensor, expected_TD: torch.Tensor, problem: str, *, exact: bool) -> None:
    """Exact: relative error below 1e-4; else below 0.045 in every row: a cosine of 0.999, and the same length."""
    error_T = (got_TD - expected_TD).float().norm(dim=-1)
    norm_T = expected_TD.float().norm(dim=-1)
    error = float(error_T.norm() / norm_T.norm() if exact else (error_T / norm_T).max())
    most = 1e-4 if exact else 0.045
    if not error < most:
        raise RuntimeError(f"self-test: {problem} (relative error {error:.2g}, expected below {most})")
