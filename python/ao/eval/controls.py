"""The prompts of an oracle and of its controls: pure functions of items and their activations.

A score says little by itself: the tuned weights have priors, the prompt has slots, and the tokens that are read give
much away. Each control takes one thing from the oracle and keeps the rest.
Shapes: K vectors of an item, D d_model.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from ao.eval.tasks import Item

if TYPE_CHECKING:
    import torch

    from ao._ao import Framer
    from ao.decode import OraclePrompt

CONTROLS = ("no_activation", "shuffled", "text", "untrained")
"""Conditions that the gain is taken against."""
CONDITIONS = ("oracle", *CONTROLS, "full_text")
"""All conditions. `full_text` stands outside the gain: the context holds more than was read."""


@dataclass(frozen=True, kw_only=True)
class Condition:
    """The prompts of all items under one condition."""

    name: str
    """One of `CONDITIONS`."""
    prompts: Sequence[OraclePrompt]
    """One an item."""
    adapter: bool
    """Whether the oracle's adapter is on."""


def condition(
    name: str, items: Sequence[Item], vectors: Sequence[torch.Tensor], *, framer: Framer, seed: int
) -> Condition:
    """The prompts of one condition.

    oracle: hook on, adapter on. no_activation: hook off, the placeholders kept. shuffled: activations of another item.
    text: hook off, the tokens at the read positions as text in the question. untrained: hook on, adapter off.
    full_text: as text, with the whole context.

    Args:
        name: one of `CONDITIONS`.
        items: the items.
        vectors: activations of each, [K, D].
        framer: the oracle's, to write the prompts of `text` and `full_text`.
        seed: keys the derangement of `shuffled`.

    Raises:
        ValueError: there is no such condition, or nothing to shuffle with.
    """
    if name in ("oracle", "untrained"):
        prompts = [_prompt(item, own) for item, own in zip(items, vectors, strict=True)]
    elif name == "no_activation":
        prompts = [_prompt(item, None) for item in items]
    elif name == "shuffled":
        others = derangement(items, seed=seed)
        prompts = [_prompt(item, fitted(item, vectors[other])) for item, other in zip(items, others, strict=True)]
    elif name == "text":
        prompts = [_text_prompt(item, item.read_text, framer) for item in items]
    elif name == "full_text":
        prompts = [_text_prompt(item, item.context_text, framer) for item in items]
    else:
        raise ValueError(f"condition: expected one of {', '.join(CONDITIONS)}, got {name!r}")
    return Condition(name=name, prompts=prompts, adapter=name != "untrained")


def derangement(items: Sequence[Item], *, seed: int) -> list[int]:
    """For each item the index of another one that reads another context at the same layers, whatever its answer.

    Each item is taken once. Keyed by the seed and the contexts, not by the order of the items.

    Raises:
        ValueError: more than half of the items that read the same layers share one context.
    """
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, item in enumerate(items):
        groups[item.layers].append(index)
    others = [-1] * len(items)
    for layers, members in groups.items():
        contexts = {index: np.asarray(items[index].read.context_ids, dtype="<i4").tobytes() for index in members}
        shift = max(Counter(contexts.values()).values())
        if 2 * shift > len(members):
            raise ValueError(
                f"shuffled control: {shift} of the {len(members)} items that read layers {list(layers)} have the same "
                "context, expected at most half; raise the task's count or give it fewer read_depths"
            )
        # Items of one context stand side by side, so a step as long as the longest run of them leaves every run.
        ordered = sorted(members, key=lambda index: (_key(seed, contexts[index]), items[index].id))
        for place, index in enumerate(ordered):
            others[index] = ordered[(place + shift) % len(ordered)]
    return others


def fitted(item: Item, vectors_KD: torch.Tensor) -> torch.Tensor:
    """Another item's vectors, made as many as the item has placeholders: evenly spaced ones, in order, for each layer."""
    import torch

    from ao.activations import spread

    num_layers = len(item.layers)
    num_wanted = len(item.placeholders) // num_layers
    blocks = vectors_KD.split(len(vectors_KD) // num_layers)
    return torch.cat([spread(block_KD, num_wanted) for block_KD in blocks])


def _key(seed: int, context: bytes) -> bytes:
    return blake2b(f"{seed} eval shuffle ".encode() + context, digest_size=16).digest()


def _prompt(item: Item, vectors_KD: torch.Tensor | None) -> OraclePrompt:
    from ao.decode import OraclePrompt

    return OraclePrompt(input_ids=item.prompt_ids, placeholders=item.placeholders, vectors_KD=vectors_KD)


def _text_prompt(item: Item, text: str, framer: Framer) -> OraclePrompt:
    from ao.decode import OraclePrompt

    num_positions = len(item.placeholders) // len(item.layers)
    prompt = framer.prompt(list(item.layers), num_positions, f"{text}\n{item.question}")
    return OraclePrompt(
        input_ids=np.asarray(prompt.ids, dtype=np.int64),
        placeholders=np.asarray(prompt.placeholders, dtype=np.int64),
        vectors_KD=None,
    )
