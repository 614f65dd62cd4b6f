"""Recipes: one TOML with `[model] [data] [train] [eval]`, read into frozen dataclasses.

Every command reads its part of the recipe; an unknown key is an error; the resolved recipe is saved with each artifact.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Range = tuple[int, int]
"""An inclusive range of whole numbers."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all parts of a recipe share: unknown keys are refused."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic, not a field


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """The base under the oracle, and the target where that is another model."""

    name: str = "demo"
    """Hub id, a folder, or "demo": the target embedded in the package."""
    revision: str | None = None
    """Hub revision of `name`."""
    target: str | None = None
    """Checkpoint whose activations are read; without one the base itself, its oracle adapter switched off."""
    target_revision: str | None = None
    """Hub revision of `target`."""
    precision: Literal["nf4", "bf16", "fp32"] = "bf16"
    """How the frozen weights are held. nf4: bitsandbytes 4-bit NormalFloat with double quantization."""
    device: str = "auto"
    """"auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N"."""


@dataclass(frozen=True, kw_only=True)
class ReadConfig(Config):
    """One way to choose which readable tokens of a context are read."""

    share: float = 1.0
    """Weight among the ways of the same source."""
    all: bool = False
    """Read every readable token."""
    window: Range | None = None
    """Read K consecutive tokens, K uniform in this range."""
    before_end: Range = (0, 0)
    """The window's last token lies this many tokens before the last readable one."""

    def __post_init__(self) -> None:
        if self.all == (self.window is not None):
            raise ValueError(
                f"a read is either all = true or window = [min, max]: got all={self.all}, window={self.window}"
            )
        if self.window is not None and not 1 <= self.window[0] <= self.window[1]:
            raise ValueError(f"window: expected 1 <= min <= max, got {self.window}")
        if not 0 <= self.before_end[0] <= self.before_end[1]:
            raise ValueError(f"before_end: expected 0 <= min <= max, got {self.before_end}")
        if self.share <= 0:
            raise ValueError(f"share: expected a positive weight, got {self.share}")


@dataclass(frozen=True, kw_only=True)
class SourceBase(Config):
    """What every source has."""

    name: str
    """Name in counts, records and reports."""
    path: str
    """File or folder; a relative path is taken from the recipe's folder."""
    count: int | None = None
    """Examples drawn from it, by key; all of them without a count."""

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"source {self.name!r}: count must be positive, got {self.count}")


@dataclass(frozen=True, kw_only=True)
class LatentQASource(SourceBase):
    """LatentQA's published JSON files: stimuli with labels, and questions and answers per label (arXiv 2412.08686)."""

    kind: Literal["latentqa"]
    types: tuple[Literal["system", "control", "stimulus", "stimulus_completion"], ...] = ("system",)
    """Which stimulus files are used; each must be there."""
    questions_per_stimulus: int | None = None
    """Question-answer pairs drawn per stimulus; all of its label's without a number."""
    reads: tuple[ReadConfig, ...] = (
        ReadConfig(share=0.5, all=True),
        ReadConfig(share=0.5, window=(1, 3), before_end=(1, 10)),
    )
    """Half the whole unmasked segment, half 1-3 tokens that end 1-10 tokens before its end (arXiv 2512.15674)."""


@dataclass(frozen=True, kw_only=True)
class ClassificationSource(SourceBase):
    """A labelled table, CSV, JSON or JSONL, asked as Yes/No questions or by naming the label."""

    kind: Literal["classification"]
    text: str = "text"
    """Column (or key) of the text that the target reads."""
    label: str = "label"
    """Column (or key) of its label."""
    questions: tuple[str, ...]
    """Templates. One with `{label}` is a Yes/No question about a label, right half of the time; others ask for the label's name."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """How labels are worded in questions and answers, by value; empty: as they stand. With labels "true"/"false" of a
    Yes/No template without `{label}`, map them to "Yes" and "No"."""
    prefix: str = ""
    """Put before every question, as "Answer with 'Yes' or 'No' only. "."""
    questions_per_text: int = 1
    """Examples made of each text."""
    reads: tuple[ReadConfig, ...] = (
        ReadConfig(share=2, window=(1, 1), before_end=(0, 4)),
        ReadConfig(share=1, window=(1, 50), before_end=(0, 4)),
    )
    """Two thirds one token 1-5 tokens before the end, one third windows of 1-50 (arXiv 2512.15674)."""


@dataclass(frozen=True, kw_only=True)
class ContextPredictionSource(SourceBase):
    """Plain text or chats; question and answer are made from the tokens ("past lens")."""

    kind: Literal["context_prediction"]
    text: str = "text"
    """Key of the text of a JSONL line; a line with `messages` is a chat; a .txt file is one document a paragraph."""
    single_share: float = 0.5
    """Share of examples that read one token; the others read a window."""
    window: Range = (1, 50)
    """Tokens read by the others."""
    predict: Range = (1, 50)
    """Tokens to predict."""
    direction: Literal["both", "next", "previous"] = "both"
    """Which side of the read tokens is asked for; both: half and half."""
    max_context_tokens: int = 512
    """Longer documents are cut to their first tokens."""


@dataclass(frozen=True, kw_only=True)
class RecordsSource(SourceBase):
    """JSONL lines that are Examples already."""

    kind: Literal["records"]
    reads: tuple[ReadConfig, ...] = (ReadConfig(all=True),)
    """For examples that do not say their positions."""


SourceConfig = LatentQASource | ClassificationSource | ContextPredictionSource | RecordsSource


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """What `ao-pack` builds."""

    out: str = "packed"
    """Folder of the packed data set."""
    seed: int = 0
    """Every draw is keyed by this seed and the example's id."""
    read_depths: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Layers read, as depths: index = int(num_layers * depth)."""
    layers_per_example: Literal["each", "one", "together"] = "one"
    """each: a datapoint per layer; one: one layer drawn per example; together: one prompt that shows all."""
    examples_per_shard: int = 8192
    """Consecutive examples in a shard; contexts are shared within it."""
    max_input_tokens: int = 4096
    """Longer oracle inputs are dropped and counted."""
    max_context_tokens: int = 4096
    """Longer contexts are dropped and counted."""
    sources: tuple[SourceConfig, ...] = ()
    """Where examples come from, each with its count."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"data.sources: names must differ, got {names}")
        if not self.read_depths:
            raise ValueError("data.read_depths is empty; name at least one depth")
        for depth in self.read_depths:
            if not 0 <= depth < 1:
                raise ValueError(f"data.read_depths: a depth lies in [0, 1), got {depth}")
        if self.seed < 0:
            raise ValueError(f"data.seed must not be negative, got {self.seed}")
        for name in ("examples_per_shard", "max_input_tokens", "max_context_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """How the oracle's adapter is trained."""

    out: str = "adapter"
    """Folder of the adapter."""
    steps: int = 1500
    """Optimizer steps."""
    examples_per_step: int = 16
    """Datapoints per step, over all ranks."""
    learning_rate: float = 1e-4
    """Peak; linear warm-up, then linear decay to zero."""
    warmup: float = 0.1
    """Share of the steps spent warming up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit: bitsandbytes' 8-bit state."""
    rank: int = 16
    """LoRA rank."""
    alpha: int = 32
    """LoRA alpha; the update is scaled by alpha / rank."""
    dropout: float = 0.0
    """LoRA dropout."""
    injection: Literal["norm_matched_add", "rescaled_add", "replace"] = "norm_matched_add"
    """How vectors enter the oracle's residual stream."""
    injection_layer: int = 1
    """At the output of this block."""
    injection_scale: float = 1.0
    """Coefficient c of the injected direction."""
    rescale: float = 2.0
    """Final norm s of `rescaled_add`, in units of the residual's own norm."""
    tokens_per_row: int = 8192
    """Token budget of one forward pass."""
    window: int = 64
    """Steps whose contexts are collected together, each context once."""
    recompute: bool = False
    """Gradient checkpointing: recompute activations in the backward pass."""
    seed: int = 0
    """Initialization of the adapter, dropout and data order."""
    log_every: int = 10
    """Steps between lines of the log."""

    def __post_init__(self) -> None:
        for name in ("steps", "examples_per_step", "rank", "alpha", "tokens_per_row", "window", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be positive, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm", "injection_scale", "rescale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"train.warmup is a share of the steps, got {self.warmup}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"train.dropout lies in [0, 1), got {self.dropout}")
        if self.injection_layer < 0:
            raise ValueError(f"train.injection_layer is an index from 0, got {self.injection_layer}")


@dataclass(frozen=True, kw_only=True)
class TaskConfig(Config):
    """One scored task: held-out examples, a scorer and a read layer."""

    name: str
    """Name in the report."""
    sources: tuple[SourceConfig, ...]
    """Where its examples come from."""
    scorer: Literal["choice", "token_f1"] = "choice"
    """choice: the most probable of the answers that the same question has in the task; token_f1: overlap with the answer."""
    count: int = 300
    """Examples scored, drawn by key."""
    read_depths: tuple[float, ...] = (0.5,)
    """Layers read; with several, one drawn per example."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"eval task {self.name!r}: count must be positive, got {self.count}")
        if not self.sources:
            raise ValueError(f"eval task {self.name!r} has no source")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Config):
    """What `ao eval` scores."""

    out: str = "eval"
    """Folder of records and report."""
    seed: int = 0
    """Keys the draws, the derangement and the bootstrap."""
    tasks: tuple[TaskConfig, ...] = ()
    """Scored one after the other, each under every control."""
    bootstrap: int = 2000
    """Resamples of the items for each interval."""
    max_new_tokens: int = 64
    """Longest generated answer."""

    def __post_init__(self) -> None:
        for name in ("bootstrap", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"eval.{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """A whole recipe."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()


@cache
def _adapter() -> TypeAdapter[Recipe]:
    from pydantic import Field, TypeAdapter

    # The annotation is made here because pydantic is too slow to import for `--help`.
    discriminated = Annotated[SourceConfig, Field(discriminator="kind")]
    for owner in (DataConfig, TaskConfig):
        owner.__dataclass_fields__["sources"].type = tuple[discriminated, ...]
    return TypeAdapter(Recipe)


def parse_recipe(values: Mapping[str, Any], *, origin: str = "recipe") -> Recipe:
    """A recipe from plain values; errors name the key, what was expected and what stood there.

    Raises:
        ValueError: on an unknown key, a missing key or a value of the wrong kind.
    """
    from pydantic import ValidationError

    try:
        return _adapter().validate_python(values)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"])
            if item["type"] == "value_error":
                problems.append(f"{where}: {item.get('ctx', {}).get('error', item['msg'])}")
                continue
            if item["type"] == "unexpected_keyword_argument":
                problems.append(f"{where}: unknown key; see `ao train --help` for those there are")
            else:
                problems.append(f"{where}: {item['msg']}, got {item['input']!r}")
        raise ValueError(f"{origin}: " + "; ".join(problems)) from None


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file; relative source paths are resolved against its folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no TOML, or a key is unknown, missing or wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such recipe; recipes/ has examples")
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from None
    return parse_recipe(values, origin=str(path))


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values of a configuration, absent ones left out."""
    from pydantic import TypeAdapter

    _adapter()
    return TypeAdapter(type(config)).dump_python(config, mode="json", exclude_none=True)


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML, every default written out."""
    import tomli_w

    return tomli_w.dumps(to_dict(recipe))
