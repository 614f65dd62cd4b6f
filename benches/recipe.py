"""The published card's way to train, written plainly with transformers and PEFT: the peer of `train_throughput.py`.

Two padded examples a micro-batch, eight micro-batches a step. For each the adapter is switched off, the target's residuals
are read by hooks, the adapter is switched on again, the vectors are added at the output of block 1, and the model's own
loss over full logits is backpropagated under gradient checkpointing.

Shapes: B examples, T tokens, D d_model, K vectors of an example.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from ao.shards import Datapoint

MICRO_BATCH = 2
INJECTION_LAYER = 1


class _DeepestLayerRead(Exception):
    """Ends the target's forward: nothing behind the deepest layer is wanted."""


class Recipe:
    """The card's hyperparameters: LoRA r16 / alpha 32 on all linears, 8-bit AdamW where there is a GPU."""

    def __init__(self, model: PreTrainedModel, *, dropout: float, rate: float) -> None:
        self.device = next(model.parameters()).device
        self.blocks: Any = model.get_decoder().layers
        config = LoraConfig(
            r=16, lora_alpha=32, lora_dropout=dropout, target_modules="all-linear", bias="none", task_type="CAUSAL_LM"
        )
        self.model: Any = get_peft_model(model, config)
        model.enable_input_require_grads()
        # Renamed in transformers 5.23; the old name warns there.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        self.model.train()
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if self.device.type == "cuda":
            from bitsandbytes.optim import AdamW8bit

            self.optimizer: Any = AdamW8bit(self.parameters, lr=rate, weight_decay=0.0)
        else:
            self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0)

    def step(self, points: Sequence[Datapoint]) -> float:
        """One optimizer step; returns the loss."""
        loss = self.backward(points)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss

    def backward(self, points: Sequence[Datapoint]) -> float:
        """Gradients of a step's loss, the sum over all answer tokens divided by their number; returns the loss."""
        answer_tokens = sum(len(point.input_ids) - point.answer_start for point in points)
        total = 0.0
        for first in range(0, len(points), MICRO_BATCH):
            few = points[first : first + MICRO_BATCH]
            vectors = self.read(few)
            input_ids_BT, mask_BT = self.padded([point.input_ids for point in few])
            labels_BT = torch.full_like(input_ids_BT, -100)
            for row, point in enumerate(few):
                answer = slice(point.answer_start, len(point.input_ids))
                labels_BT[row, answer] = input_ids_BT[row, answer]
            # Up to transformers 5.22 a checkpointed block runs its hooks again in the backward pass.
            with self.injecting([point.placeholders for point in few], vectors):
                output = self.model(
                    input_ids=input_ids_BT,
                    attention_mask=mask_BT,
                    labels=labels_BT,
                    use_cache=False,
                    # Divides by this instead of by the micro-batch's own number of labels.
                    num_items_in_batch=torch.tensor(answer_tokens, device=self.device),
                )
                output.loss.backward()
            total += output.loss.item()
        return total

    @torch.no_grad()
    def read(self, points: Sequence[Datapoint]) -> list[torch.Tensor]:
        """The target's residuals [K, D] of each example."""
        captured: dict[int, torch.Tensor] = {}
        wanted = sorted({layer for point in points for layer in point.layers.tolist()})

        def capturing(layer: int) -> Any:
            def hook(module: nn.Module, args: object, output: torch.Tensor) -> None:
                captured[layer] = output.detach().clone()
                if layer == wanted[-1]:
                    raise _DeepestLayerRead

            return hook

        handles = [self.blocks[layer].register_forward_hook(capturing(layer)) for layer in wanted]
        context_ids_BT, mask_BT = self.padded([point.context_ids for point in points])
        try:
            with self.model.disable_adapter():
                self.model(input_ids=context_ids_BT, attention_mask=mask_BT, use_cache=False)
        except _DeepestLayerRead:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return [
            torch.stack(
                [captured[layer][row, position] for layer, position in zip(point.layers, point.read_positions, strict=True)]
            )
            for row, point in enumerate(points)
        ]  # fmt: skip

    @contextmanager
    def injecting(self, places: Sequence[np.ndarray], vectors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Inside, h + ||h|| * v / ||v|| stands at each example's placeholders behind block 1."""

        def hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            resid_BTD = output.clone()
            for row, (positions, vectors_KD) in enumerate(zip(places, vectors, strict=True)):
                at = torch.from_numpy(positions.astype(np.int64)).to(self.device)
                resid_KD = resid_BTD[row, at]
                norms_K = resid_KD.detach().float().norm(dim=-1, keepdim=True)
                direction_KD = vectors_KD.float() / vectors_KD.float().norm(dim=-1, keepdim=True)
                resid_BTD[row, at] = resid_KD + (norms_K * direction_KD).to(resid_KD.dtype)
            return resid_BTD

        handle = self.blocks[INJECTION_LAYER].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def padded(self, sequences: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [B, T] and their mask. Padded on the right: rows that see nothing have given NaN on GPUs."""
        longest = max(map(len, sequences))
        ids, mask = np.zeros((2, len(sequences), longest), dtype=np.int64)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = sequence
            mask[row, : len(sequence)] = 1
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)
