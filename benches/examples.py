"""What `train_throughput.py` measures: its settings, and examples drawn with a fixed seed, the same in every process."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ao.shards import Datapoint
from shapes import SHAPES

PER_STEP = 16
PLACEHOLDER = 5


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    shape: str
    residency: str
    """How ours holds the weights; `fp32`, `bf16`, `nf4` or `nf4-dequantized`."""
    recompute: str
    dropout: float
    shared: int
    """Examples that read one context."""
    tokens_per_row: int
    ranks: int
    """Of ours; the card's way knows one."""
    threads: int
    """Of a CPU, for all ranks together."""
    cap: float | None
    """GiB of a GPU that a process may take."""
    compile: bool = False
    """Whether ours compiles its blocks."""
    split: bool = False
    """Whether ours spreads its blocks over all GPUs."""
    optimizer: str = "adamw"
    """Of ours."""

    @property
    def precision(self) -> str:
        """The peer's: dequantized weights have the numbers of NF4."""
        return "nf4" if self.residency == "nf4-dequantized" else self.residency


def drawn(setting: Setting, steps: int) -> list[list[Datapoint]]:
    """Steps of 16 examples, the same in every process: 60 % predict their context, the others answer about a short one."""
    shape = SHAPES[setting.shape]
    vocab = shape.settings["vocab_size"]
    random = np.random.default_rng(0)
    points: list[Datapoint] = []
    for index in range(steps * PER_STEP):
        predicts = random.random() < 0.6
        if index % setting.shared == 0 or not points:
            length = random.integers(20, 513 if predicts else 91)
            context_ids = random.integers(PLACEHOLDER + 1, vocab, size=length, dtype=np.int32)
        else:
            context_ids = points[-1].context_ids
        num_vectors = 1 if random.random() < 0.5 else int(random.integers(1, 51))
        num_answer = int(random.integers(1, 51)) if predicts else 3
        layer = int(shape.layers[random.integers(len(shape.layers))])
        points.append(
            example(
                f"{index}", context_ids, layer=layer, num_vectors=num_vectors, num_answer=num_answer,
                num_question=int(random.integers(20, 45)), vocab=vocab, random=random,
            )
        )  # fmt: skip
    return [points[first : first + PER_STEP] for first in range(0, len(points), PER_STEP)]


def example(
    name: str,
    context_ids: np.ndarray,
    *,
    layer: int,
    num_vectors: int,
    num_answer: int,
    num_question: int,
    vocab: int,
    random: np.random.Generator,
) -> Datapoint:
    """An example that reads the last tokens of a context: a frame of ten tokens, placeholders, question, answer."""
    num_vectors = min(num_vectors, len(context_ids))
    input_ids = random.integers(
        PLACEHOLDER + 1, vocab, size=10 + num_vectors + num_question + num_answer, dtype=np.int32
    )
    placeholders = np.arange(10, 10 + num_vectors, dtype=np.int32)
    input_ids[placeholders] = PLACEHOLDER
    return Datapoint(
        id=name,
        source="drawn",
        input_ids=input_ids,
        answer_start=len(input_ids) - num_answer,
        placeholders=placeholders,
        layers=np.full(num_vectors, layer, dtype=np.int16),
        context_ids=context_ids,
        read_positions=np.arange(len(context_ids) - num_vectors, len(context_ids), dtype=np.int32),
        question="",
        answer="",
        kind="base",
        meta={},
    )


def long_example(setting: Setting, what: str, tokens: int) -> Datapoint:
    """One example whose context or whose prompt has so many tokens; the other is short."""
    shape = SHAPES[setting.shape]
    random = np.random.default_rng(1)
    vocab = shape.settings["vocab_size"]
    context = random.integers(PLACEHOLDER + 1, vocab, size=tokens if what == "context" else 64, dtype=np.int32)
    num_question = (tokens if what == "prompt" else 64) - 10 - 16 - 8
    return example(
        f"{what}-{tokens}", context, layer=shape.layers[-1], num_vectors=16, num_answer=8, num_question=num_question,
        vocab=vocab, random=random,
    )  # fmt: skip
