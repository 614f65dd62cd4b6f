"""Recipes: one TOML with `[model] [data] [train] [eval]`, read into frozen dataclasses.

Every command reads its part of the recipe; an unknown key is an error; the resolved recipe is saved with each artifact.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Range = tuple[int, int]
"""An inclusive range of whole numbers."""
SLOT = re.compile(r"\{([^{}]+)\}")
"""A column's name in braces, as it stands in templates."""
_STRAY = re.compile(r"\{\w+\}?|\w+\}")
"""A name with a brace that is no slot."""
LayersPerExample = Literal["each", "one", "together"]
"""each: a datapoint per layer; one: one layer drawn per example; together: one prompt that shows all."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all parts of a recipe share: unknown keys are refused."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic, not a field


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """The base under the oracle, and the target where that is another model."""

    name: str = "demo"
    """Hub id, a folder (from the working directory), or "demo": the target embedded in the package."""
    revision: str | None = None
    """Hub revision of `name`."""
    target: str | None = None
    """Checkpoint whose activations are read; without one the base itself, its oracle adapter switched off."""
    target_revision: str | None = None
    """Hub revision of `target`."""
    precision: Literal["nf4", "nf4-dequantized", "bf16", "fp32"] = "bf16"
    """How the frozen weights are held. nf4: bitsandbytes 4-bit NormalFloat with double quantization; nf4-dequantized: the
    same values in bf16, four times the memory and no dequantization at every pass."""
    device: str = "auto"
    """"auto" (a GPU where there is one), "cpu", "cuda", "cuda:N", or "split": the blocks of a model that does not fit one GPU
    are spread over all of them, in one process; slower than one replica a GPU, which torchrun makes of "cuda"."""
    attention: Literal["documents", "stock"] = "documents"
    """documents: sequences share a row and do not see each other; stock: padded rows through the library's own attention,
    slower, the reference where the other is in doubt."""


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
class UnanswerableConfig(Config):
    """Examples whose placeholders read another context of the same source and shard: they teach abstention.

    For questions that only their own context answers, as LatentQA's, or those that name a thing of the text. A question that
    fits every text of a labelled table has a right answer for the other one too, which this would teach the oracle to hold
    back. Where labels are known, the other context has another label.
    """

    share: float = 0.1
    """Share of the source's examples that are made so."""
    answer: str = "I cannot tell."
    """What the oracle shall say then."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"unanswerable.share lies between 0 and 1, got {self.share}")
        if not self.answer.strip():
            raise ValueError("unanswerable.answer is empty; expected what the oracle shall say, as 'I cannot tell.'")


@dataclass(frozen=True, kw_only=True)
class SourceBase(Config):
    """What every source has."""

    name: str
    """Name in counts, records and reports."""
    path: str | None = None
    """File or folder; a relative path is taken from the recipe's folder."""
    dataset: str | None = None
    """Hugging Face data set (OWNER/NAME), streamed; instead of `path`."""
    subset: str | None = None
    """Its configuration, where it has several."""
    split: str | None = None
    """Its split, "train" without one; also of a folder that `save_to_disk` wrote."""
    revision: str | None = None
    """Its revision; "refs/convert/parquet" for a set that is a script."""
    rows: int | None = None
    """Rows read at most: the first ones of a file, of a hub's set the first of its own shuffle, keyed by data.seed."""
    count: int | None = None
    """Examples drawn from it, by key; all of them without a count."""
    share: float | None = None
    """Instead of `count`: its weight among the sources in what data.examples leaves to them."""
    layers_per_example: LayersPerExample | None = None
    """Datapoints of an example of this source; data.layers_per_example without a word."""

    def __post_init__(self) -> None:
        where = f"source {self.name!r}"
        if not self.name.strip():
            raise ValueError("a source's name is empty; expected a word for counts and reports")
        # Ids are NAME/FILE/ROW of a folder and NAME/ROW of a file: a name with a slash could give another source's.
        if "/" in self.name:
            raise ValueError(
                f"{where}: a name has no '/', which parts the names in ids; write {self.name.replace('/', '_')!r}"
            )
        if (self.path is None) == (self.dataset is None):
            got = "neither" if self.path is None else f"path={self.path!r} and dataset={self.dataset!r}"
            raise ValueError(f"{where}: expected either path or dataset, got {got}")
        for key in ("subset", "revision"):
            if self.dataset is None and getattr(self, key) is not None:
                raise ValueError(f"{where}: {key} belongs to a Hugging Face data set, got it beside path={self.path!r}")
        for key in ("count", "rows"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{where}: {key} must be positive, got {value}")
        if self.share is not None and not self.share > 0:
            raise ValueError(f"{where}: share must be a positive weight, got {self.share}")
        if self.share is not None and self.count is not None:
            raise ValueError(f"{where}: expected count or share, got both ({self.count} and {self.share})")


@dataclass(frozen=True, kw_only=True)
class LatentQASource(SourceBase):
    """LatentQA's published JSON files: stimuli with labels, and questions and answers per label (arXiv 2412.08686)."""

    kind: Literal["latentqa"]
    types: tuple[Literal["system", "control", "stimulus", "stimulus_completion"], ...] = ("system",)
    """Which stimulus files are used; each must be there."""
    questions_per_stimulus: int | None = None
    """Question-answer pairs drawn per stimulus; all of its label's without a number."""
    unanswerable: UnanswerableConfig | None = None
    """Share of examples that cannot be answered; none without it."""
    reads: tuple[ReadConfig, ...] = (
        ReadConfig(share=0.5, all=True),
        ReadConfig(share=0.5, window=(1, 3), before_end=(1, 10)),
    )
    """Half the whole unmasked segment, half 1-3 tokens that end 1-10 tokens before its end (arXiv 2512.15674)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset is not None:
            raise ValueError(f"source {self.name!r}: LatentQA is a folder of JSON files; expected path, got dataset")
        if not self.types or len(set(self.types)) < len(self.types):
            raise ValueError(f"source {self.name!r}: types: expected different types, one at least, got {self.types}")
        if self.questions_per_stimulus is not None and self.questions_per_stimulus < 1:
            raise ValueError(
                f"source {self.name!r}: questions_per_stimulus must be positive, got {self.questions_per_stimulus}"
            )


@dataclass(frozen=True, kw_only=True)
class ClassificationSource(SourceBase):
    """A labelled table, or a folder of tables, asked as Yes/No questions or by naming the label."""

    kind: Literal["classification"]
    text: str = "text"
    """Column of the text that the target reads, or a template of columns: "{title}. {body}"."""
    label: str = "label"
    """Column of its label."""
    questions: tuple[str, ...]
    """Templates; columns may stand in them, as {hypothesis}. One with `{label}` is a Yes/No question about a label, right
    half of the time; others ask for the label's name."""
    labels: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    """How labels are worded in questions and answers, by value, one phrasing or several to draw from; with an empty list
    rows of that label are left out. Without `labels` they stand as they are. With labels "true" and "false" of a question
    without `{label}`, word them "Yes" and "No"."""
    prefix: str = ""
    """Put before every question as it is, as "Answer with 'Yes' or 'No' only. "."""
    questions_per_text: int = 1
    """Examples made of each text, with different questions as long as they last."""
    unanswerable: UnanswerableConfig | None = None
    """Share of examples that cannot be answered; none without it."""
    reads: tuple[ReadConfig, ...] = (
        ReadConfig(share=2, window=(1, 1), before_end=(0, 4)),
        ReadConfig(share=1, window=(1, 50), before_end=(0, 4)),
    )
    """Two thirds one token 1-5 tokens before the end, one third windows of 1-50 (arXiv 2512.15674)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.questions:
            raise ValueError(f"source {self.name!r}: questions is empty; expected at least one template")
        if self.questions_per_text < 1:
            raise ValueError(
                f"source {self.name!r}: questions_per_text must be positive, got {self.questions_per_text}"
            )
        # What was meant as a column would be packed as it is written; braces beside no name are text.
        for key, templates in (("text", (self.text,)), ("questions", self.questions), ("prefix", (self.prefix,))):
            for template in templates:
                if stray := _STRAY.search(template if key == "prefix" else SLOT.sub(" ", template)):
                    expected = "no columns, they go into questions" if key == "prefix" else "columns as in {label}"
                    raise ValueError(
                        f"source {self.name!r}: {key}: expected {expected}, got {stray[0]!r} in {template!r}"
                    )
        for value, phrasings in self.labels.items():
            for phrasing in (phrasings,) if isinstance(phrasings, str) else phrasings:
                if not phrasing.strip():
                    raise ValueError(
                        f"source {self.name!r}: labels.{value}: a phrasing is empty; to leave rows of this label out "
                        "give an empty list"
                    )


@dataclass(frozen=True, kw_only=True)
class ContextPredictionSource(SourceBase):
    """Plain text or chats; question and answer are made from the tokens ("past lens")."""

    kind: Literal["context_prediction"]
    text: str = "text"
    """Column of the text; a list of messages there, or under `messages`, is a chat."""
    documents: Literal["paragraph", "file"] = "paragraph"
    """What a document of a .txt file is: what stands between blank lines, or the file."""
    within: Literal["all", "assistant"] = "all"
    """assistant: only what the assistant says is read and predicted, for chats that `ao rollouts` wrote (on-policy)."""
    draws_per_text: int = 1
    """Examples made of each text or chat, each with its own window."""
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

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("draws_per_text", "max_context_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"source {self.name!r}: {key} must be positive, got {getattr(self, key)}")
        for key in ("window", "predict"):
            low, high = getattr(self, key)
            if not 1 <= low <= high:
                raise ValueError(f"source {self.name!r}: {key}: expected 1 <= min <= max, got [{low}, {high}]")
        if not 0 <= self.single_share <= 1:
            raise ValueError(f"source {self.name!r}: single_share lies in [0, 1], got {self.single_share}")


@dataclass(frozen=True, kw_only=True)
class RecordsSource(SourceBase):
    """Rows that are Examples already."""

    kind: Literal["records"]
    unanswerable: UnanswerableConfig | None = None
    """Share of examples that cannot be answered; none without it."""
    reads: tuple[ReadConfig, ...] = (ReadConfig(all=True),)
    """For examples that do not say their positions."""


SourceConfig = LatentQASource | ClassificationSource | ContextPredictionSource | RecordsSource


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """What `ao-pack` builds."""

    out: str = "packed"
    """Folder of the packed data set; a relative path is taken from the working directory."""
    seed: int = 0
    """Every draw is keyed by this seed and the example's id."""
    read_depths: tuple[float, ...] = (0.25, 0.5, 0.75)
    """Layers read, as depths: index = int(num_layers * depth)."""
    layers_per_example: LayersPerExample = "one"
    """each: a datapoint per layer; one: one layer drawn per example; together: one prompt that shows all."""
    examples: int | None = None
    """Examples of all sources together, for those that give a share; a source's own count is taken off first."""
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
        source_counts(self.sources, self.examples)


def source_counts(sources: Sequence[SourceConfig], examples: int | None) -> list[int | None]:
    """How many examples each source gives at most; None for all that it has.

    What `examples` leaves over the sources' own counts is parted by their shares, rounded so that the sum is exact.

    Raises:
        ValueError: shares without a total or a total without shares, sources with neither, or nothing left to part.
    """
    shares = [0.0 if source.share is None else source.share for source in sources]
    shared = [source.name for source in sources if source.share is not None]
    counts = [source.count for source in sources]
    if examples is None:
        if shared:
            raise ValueError(f"data.examples is missing: {', '.join(shared)} give a share, expected the total to part")
        return counts
    if not sources:
        return counts
    neither = [source.name for source in sources if source.count is None and source.share is None]
    if neither:
        raise ValueError(f"data.examples is a total of {examples}: {', '.join(neither)} must give a share or a count")
    left = examples - sum(count for count in counts if count is not None)
    if not shared:
        raise ValueError(f"data.examples is {examples}, but no source gives a share; expected one, or leave it out")
    if left < len(shared):
        raise ValueError(f"data.examples is {examples}: the sources' own counts leave {left} for {', '.join(shared)}")
    ends = [0]
    for index in range(len(sources)):
        ends.append(round(left * sum(shares[: index + 1]) / sum(shares)))
    drawn: list[int | None] = [
        end - start if count is None else count for count, start, end in zip(counts, ends, ends[1:], strict=False)
    ]
    if 0 in drawn:
        name = sources[drawn.index(0)].name
        raise ValueError(f"data.examples is {examples}: the share of {name!r} is less than one example")
    return drawn


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """How an epoch becomes steps and rows, but for the rows' budget."""

    examples_per_step: int | None = None
    """Datapoints of a step over all ranks; without it, steps are rows."""
    tokens_per_step: int | None = None
    """Tokens of a step over all ranks, a multiple of ranks * tokens_per_row; without it, one row for each rank."""
    context_tokens_per_row: int | None = None
    """Second budget of a row: its datapoints' context tokens, each datapoint's own counted, shared or not."""
    examples_per_row: int | None = None
    """Most datapoints of a row."""
    padded: bool = False
    """Rows are rectangles, as a model needs that does not only attend: a row costs its datapoints times the longest."""
    longer_alone: bool = False
    """A datapoint above a budget gets a row of its own; otherwise it is an error."""
    window: int = 64
    """Steps within which all datapoints of a shared context fall."""
    ranks: int = 1
    """Ranks that divide each step."""
    seed: int = 0
    """Keys the order."""
    epoch: int = 0
    """Keys the order too."""

    def __post_init__(self) -> None:
        for name in ("seed", "epoch"):
            if getattr(self, name) < 0:
                raise ValueError(f"plan: {name} must not be negative, got {getattr(self, name)}")
        for name in ("window", "ranks"):
            if getattr(self, name) < 1:
                raise ValueError(f"plan: {name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """How the oracle's adapter is trained."""

    out: str = "adapter"
    """Folder of the adapter."""
    steps: int = 1500
    """Optimizer steps."""
    examples_per_step: int = 16
    """Datapoints per step, over all ranks."""
    tokens_per_step: int | None = None
    """Instead: tokens of prompts and answers per step, over all ranks; a multiple of ranks * tokens_per_row."""
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
    """adamw8bit: bitsandbytes' 8-bit state, a fourth of the memory; the host waits for every step of it."""
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
    context_tokens_per_row: int = 8192
    """Token budget of one forward pass of the target, for contexts; of one that runs beside steps on a GPU at most 4,096."""
    loss: Literal["per_token", "per_example_mean"] = "per_token"
    """What a step's loss is the mean over: answer tokens, or examples, each the mean of its own tokens."""
    recompute: Literal["auto", "on", "off"] = "auto"
    """Gradient checkpointing: recompute activations in the backward pass. auto: where they would not fit."""
    compile: bool = False
    """torch.compile for each block, on rows filled up to a multiple of 256 tokens."""
    cache: str | None = None
    """Activation cache of `ao collect`; what it lacks is collected ahead."""
    held_out: int = 0
    """Datapoints kept from training, with all that share a context with them, and scored on the way."""
    eval_every: int = 100
    """Steps between scores of the held-out part."""
    save_every: int = 200
    """Steps between checkpoints, from which --resume goes on; 0: only where a signal stops the run."""
    keep: int = 2
    """Checkpoints kept: the last ones; beside them the one with the best held-out loss."""
    track: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ()
    """Where the log goes beside log.jsonl."""
    seed: int = 0
    """Initialization of the adapter, dropout and data order."""
    log_every: int = 10
    """Steps between lines of the log."""

    def __post_init__(self) -> None:
        for name in (
            *("steps", "examples_per_step", "tokens_per_step", "rank", "alpha", "tokens_per_row"),
            *("context_tokens_per_row", "window", "log_every", "eval_every"),
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"train.{name} must be positive, got {value}")
        for name in ("held_out", "save_every", "keep", "seed", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"train.{name} must not be negative, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm", "injection_scale", "rescale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"train.{name} must be positive, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas lie in [0, 1), got {list(self.betas)}")
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
        if shared := [source.name for source in self.sources if getattr(source, "share", None) is not None]:
            raise ValueError(f"eval task {self.name!r}: {', '.join(shared)}: a share is for data.sources; give a count")


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
                problems.append(f"{where}: unknown key; {_known(item['loc'])}")
            else:
                problems.append(f"{where}: {item['msg']}, got {item['input']!r}")
        raise ValueError(f"{origin}: " + "; ".join(problems)) from None


def _known(where: Sequence[int | str]) -> str:
    """What lists the keys that a part of a recipe has."""
    if len(where) == 1:
        return f"a recipe has {', '.join(Recipe.__dataclass_fields__)}"
    if any(isinstance(part, int) for part in where):
        return "docs/packing.md has those of sources, recipes/ those of tasks"
    command = {"data": "ao-pack", "eval": "ao eval"}.get(str(where[0]), "ao train")
    return f"see `{command} --help` for those there are"


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file; relative source paths are resolved against its folder.

    `include = ["data/paper.toml"]` at its top puts the `[[data.sources]]` and `[[eval.tasks]]` of other files before its
    own; paths in them are taken from their own folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no TOML, or a key is unknown, missing or wrong.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such recipe; recipes/ has examples")
    values = _toml(path)
    included = values.pop("include", [])
    if not isinstance(included, list) or not all(isinstance(name, str) for name in included):
        raise ValueError(f"{path}: include: expected a list of file names, got {included!r}")
    for part, key in _INCLUDED:
        found = [entry for name in included for entry in _included(path, name, part, key)]
        if found:
            values.setdefault(part, {}).setdefault(key, [])[:0] = found
    return parse_recipe(values, origin=str(path))


_INCLUDED = (("data", "sources"), ("eval", "tasks"))


def _toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a TOML file: {error}") from None


def _included(recipe: Path, name: str, part: str, key: str) -> list[Any]:
    path = recipe.parent / name
    if not path.is_file():
        raise FileNotFoundError(f"{recipe}: include: {path} does not exist; it is taken from the recipe's folder")
    values = _toml(path)
    for other, entries in values.items():
        known = dict(_INCLUDED).get(other)
        if known is None or set(entries) - {known}:
            raise ValueError(f"{path}: an included file has [[data.sources]] and [[eval.tasks]] only, got {other!r}")
    entries = values.get(part, {}).get(key, [])
    for entry in entries:
        for source in entry.get("sources", [entry]):
            if isinstance(source.get("path"), str):
                source["path"] = str(Path(name).parent / source["path"])
    return entries


def to_dict(config: Config) -> dict[str, Any]:
    """Plain values of a configuration, absent ones left out."""
    from pydantic import TypeAdapter

    _adapter()
    return TypeAdapter(type(config)).dump_python(config, mode="json", exclude_none=True)


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML, every default written out."""
    import tomli_w

    return tomli_w.dumps(to_dict(recipe))
