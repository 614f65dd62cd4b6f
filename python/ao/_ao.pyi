"""The compiled part of `ao`: framing, packing, shards and plans.

Buffers are read-only `memoryview`s of native int32; `numpy.asarray` views them without a copy.
"""

from collections.abc import Sequence
from os import PathLike
from typing import Any, Final, Protocol, final

from typing_extensions import Buffer

RULES: Final[int]
"""The version of the draws, questions and ids of a packed data set, as its manifest has it."""

class AoError(ValueError):
    """Bad input. The message says what, which, expected, got and what to do."""

@final
class Framer:
    """Turns contexts, questions and answers into aligned token ids for one tokenizer and one chat template.

    Args:
        tokenizer_json: The text of `tokenizer.json`.
        chat_template: The Jinja source of the chat template.
        special_tokens_json: A JSON object of template variables: `bos_token`, `eos_token` and so on, `null` for none.
        placeholder: The text of one placeholder; one token per repetition inside a prompt.
        date: The day, YYYY-MM-DD, that a template is told if it asks.

    Raises:
        AoError: A text cannot be used, or the placeholder is not one token per repetition.
    """

    def __new__(
        cls,
        tokenizer_json: str,
        chat_template: str,
        special_tokens_json: str,
        *,
        placeholder: str = " ?",
        date: str = "2025-01-01",
    ) -> Framer: ...
    @property
    def placeholder_id(self) -> int:
        """The id of one placeholder."""
    @property
    def engine(self) -> str:
        """Which tokenizer library encodes, and what was proved of it on this tokenizer, or why the other one runs."""
    @property
    def end_of_turn_id(self) -> int:
        """The id that closes an assistant's turn; every answer ends with it."""
    @property
    def fingerprint(self) -> dict[str, str]:
        """Hashes of tokenizer, template and variables, the placeholder, the date where it is printed."""
    @property
    def uses_date(self) -> bool:
        """Whether the template asks for the date."""
    def context(self, context_json: str) -> Context:
        """Tokens of a context: a JSON string, or a JSON list of {"role", "content"}."""
    def prompt(self, layers: Sequence[int], num_positions: int, question: str) -> Prompt:
        """Tokens of an oracle prompt with `num_positions` placeholders for each of `layers`."""
    def answer(self, answer: str) -> memoryview:
        """Ids, int32 [n], of an answer encoded alone, the end of the turn behind it."""
    def encode(self, text: str) -> memoryview:
        """Ids, int32 [n], of a text; special tokens in it are found, none is added."""
    def decode(self, ids: Buffer | Sequence[int]) -> str:
        """The text of ids, special tokens included. `ids`: an int32 buffer or a sequence."""

@final
class Context:
    """A context as tokens. Made by `Framer.context`."""

    @property
    def ids(self) -> memoryview:
        """int32 [T]."""
    @property
    def text(self) -> str:
        """The rendered text; of a raw string, the beginning-of-sequence token and the string."""
    @property
    def token_spans(self) -> memoryview:
        """int32 [T, 2]: the bytes of `text` (as UTF-8) that each token covers, whole characters."""
    @property
    def char_spans(self) -> memoryview:
        """int32 [T, 2]: the same in code points."""
    def readable(self, read_json: str) -> memoryview:
        """int32 [R]: indices of the tokens that overlap the spans of a `read` field; `null` for all tokens."""

@final
class Prompt:
    """An oracle prompt as tokens. Made by `Framer.prompt`."""

    @property
    def ids(self) -> memoryview:
        """int32 [T]."""
    @property
    def placeholders(self) -> memoryview:
        """int32 [layers * num_positions]: indices into `ids`, layer by layer."""
    @property
    def text(self) -> str:
        """The rendered text."""

class ArrowBatch(Protocol):
    """A record batch of any Arrow library: `pyarrow`, `datasets`, `polars`."""

    def __arrow_c_array__(self, requested_schema: object | None = None) -> tuple[object, object]: ...

@final
class Source:
    """One source of examples. Its rows are surveyed if they must be, then settled, then packed.

    A row is a JSON object: the value of a batch's only column `json`, or what the columns of any other batch give.

    Args:
        settings_json: {"name", "kind", "seed", "count", "layers_per_example", "reads", "unanswerable"} and what the kind
            has: `records` nothing more; `context_prediction` "text", "single_share", "window", "predict", "direction",
            "max_context_tokens", "draws_per_text", "within"; `classification` "text", "label", "questions", "labels",
            "prefix", "questions_per_text", "words"; `latentqa` "questions", "questions_per_stimulus".

    Raises:
        AoError: A setting cannot be used.
    """

    def __new__(cls, settings_json: str) -> Source: ...
    @property
    def needs_survey(self) -> bool:
        """Whether all rows must be shown to `survey` first: there is a count, or labels are asked about or not given."""
    def survey(self, table_json: str, batch: ArrowBatch, first_row: int) -> None:
        """See rows; bad ones are passed over here and named when they are packed.

        Args:
            table_json: {"prefix", "origin", "unit", "type", "templates", "unreadable"}: what ids begin with, the file for
                messages, "line", "row" or "entry", the type of a LatentQA file, the templates of a relation file, and
                whether `batch` holds, in `json`, what is wrong with each row instead of the row.
            batch: The rows.
            first_row: Number of the first one in its table, from 0.
        """
    def settle(self) -> int | None:
        """End the survey: how many examples the rows will give, where a count tells.

        Raises:
            AoError: A question needs a wrong label, and the rows have none.
        """

@final
class PackWriter:
    """Writes a packed data set into one folder: shards as they fill, the manifest last.

    Args:
        folder: The folder; made if it is not there.
        framer: What turns the examples' texts into tokens.
        settings_json: {"seed", "num_layers", "read_layers", "layers_per_example", "examples_per_shard",
            "max_input_tokens", "max_context_tokens", "oracle", "targets", "config", "inputs"}.
        part: (i, n) builds every n-th shard from the i-th on; `merge` joins the parts.
        resume: Go on with the shards that are there; without it there must be none.
        max_errors: How many bad rows are passed over and counted before the build stops.

    Raises:
        AoError: A setting cannot be used, another process builds this part, or the shards there belong to another build.
    """

    def __new__(
        cls,
        folder: str | PathLike[str],
        framer: Framer,
        settings_json: str,
        *,
        part: tuple[int, int] = (0, 1),
        resume: bool = False,
        max_errors: int = 0,
    ) -> PackWriter: ...
    def add(self, source: Source, table_json: str, batch: ArrowBatch, first_row: int) -> dict[str, Any]:
        """Add rows of a settled source, in order; returns the counts so far, as `progress` has them.

        Raises:
            AoError: More examples than `max_errors` cannot be used; the first is named by source and id or row. The
                writer then refuses further work; finished shards stay.
            OSError: A shard cannot be written.
        """
    def finish(self) -> str:
        """Write the last shard and manifest.json, or part-I-of-N.json; returns its canonical JSON."""
    @property
    def progress(self) -> dict[str, Any]:
        """Counts so far: "offered" (examples seen), "skipped" (of other parts, or there already); of what was built now
        "examples", "datapoints", "input_tokens", "unanswerable", "without_donor", "drops" and "errors" by reason,
        "messages" (the first errors)."""

def merge(folder: str | PathLike[str]) -> str:
    """Prove that the parts in a folder make one whole build, write its manifest.json and return the text.

    Raises:
        AoError: A part or shard is missing, was changed, or belongs to another build.
    """

def input_digest(path: str | PathLike[str]) -> str:
    """The xxh3-128 of a file's bytes, in hexadecimal."""

def shard_layout(path: str | PathLike[str]) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Name, type ("I32"), shape and byte offset in the file of each array, after checking the whole structure.

    Raises:
        AoError: The file is cut or is not a shard of this version.
        FileNotFoundError: There is no such file.
    """

def shard_metadata(path: str | PathLike[str]) -> str:
    """The canonical JSON in a shard's header."""

def verify_shard(path: str | PathLike[str], sha256: str) -> None:
    """Raise AoError unless the content of the file has this sha256."""

def check_digest(path: str | PathLike[str]) -> None:
    """Raise AoError unless the content of a shard has the digest that its own header says."""

def write_atomic(path: str | PathLike[str], data: bytes) -> None:
    """Write a file so that a reader sees the old one or the whole new one, also after a power cut."""

def pack_rows(
    lengths: Buffer,
    tokens_per_row: int,
    *,
    context_lengths: Buffer | None = None,
    context_tokens_per_row: int | None = None,
    examples_per_row: int | None = None,
    window: int | None = None,
    padded: bool = False,
    longer_alone: bool = False,
) -> tuple[memoryview, memoryview]:
    """Lay examples out in rows of a token budget, none cut, each once.

    Args:
        lengths: int32 [N], tokens of each example.
        tokens_per_row: Budget of a row.
        context_lengths: int32 [N], tokens of each example's context; wanted with `context_tokens_per_row`.
        context_tokens_per_row: Second budget, of the row's context tokens; each example's own count, shared or not.
        examples_per_row: Most examples of a row.
        window: Fill each row only from the first so many examples that have no row yet; the very first of them is
            always in the next row. Without it, from all.
        padded: A row costs its examples times the longest of them, not the sum of their lengths.
        longer_alone: An example that exceeds a budget by itself gets a row of its own.

    Returns:
        order, int32 [N], and the offsets of the rows in it, int64 [rows + 1].

    Raises:
        AoError: A limit cannot be used, or (without `longer_alone`) an example exceeds a budget.
    """

def plan(lengths: Buffer, context_lengths: Buffer, groups: Buffer, settings_json: str) -> dict[str, Any]:
    """Order one epoch into steps, divide each among ranks and lay out each rank's datapoints in rows.

    Args:
        lengths: int32 [N], tokens of each datapoint's input.
        context_lengths: int32 [N], tokens of its context.
        groups: int64 [N], equal where datapoints share a context.
        settings_json: The fields of `ao.plan.PlanSettings`.

    Returns:
        Buffers "order" int32 [n], "row_offsets" int64 [R + 1], "row_ranks" int32 [R], "step_offsets" int64 [S + 1] (in
        rows), and context tokens: "alone" (summed over the datapoints), "in_ranks" (run if shared within a window and
        rank), "in_windows", "at_all".

    Raises:
        AoError: A setting cannot be used, or a datapoint exceeds a row and may not stand alone.
    """

@final
class ActivationWriter:
    """Writes one unit of an activation cache: a file of rows for each layer, and last the index.

    Rows are copied into aligned buffers, which a thread writes past the page cache. A writer that is dropped or abandoned
    leaves nothing.

    Args:
        folder: The cache; made if it is not there.
        run: Digest of what is collected; units of one run belong together.
        unit: Number of the unit in its run.
        contract_json: What the rows are, a JSON object.
        dtype: BF16, F16 or F32.
        width: Values of a row.
        layers: Layers that rows may come from.

    Raises:
        AoError: The contract is longer than a header, or a setting is out of range.
        OSError: The folder cannot be made.
    """

    def __new__(
        cls,
        folder: str | PathLike[str],
        *,
        run: str,
        unit: int,
        contract_json: str,
        dtype: str,
        width: int,
        layers: Sequence[int],
    ) -> ActivationWriter: ...
    @property
    def rows(self) -> dict[int, int]:
        """Rows of each layer so far."""
    def append(self, layer: int, keys: Buffer, norms: Buffer, rows: Buffer) -> None:
        """Append K rows: keys uint64 [K, 2], norms float32 [K], rows [K, width], all contiguous."""
    def finish(self) -> str:
        """Give the files their names, write the index and return its name."""
    def abandon(self) -> None:
        """Remove what was written."""

@final
class ActivationReader:
    """Reads rows of one layer at random from several files: places sorted, neighbours read together.

    Args:
        paths: Files of rows.
        rows: How many each is to hold.
        contract_json: What they are to be.
        dtype: BF16, F16 or F32.
        width: Values of a row.

    Raises:
        AoError: A file is cut, another than its name says, or holds other rows.
        FileNotFoundError: One is missing.
    """

    def __new__(
        cls, paths: Sequence[str | PathLike[str]], *, rows: Sequence[int], contract_json: str, dtype: str, width: int
    ) -> ActivationReader: ...
    def __len__(self) -> int:
        """Rows in all files."""
    def gather(self, rows: Buffer, out: Buffer, *, mode: str = "auto") -> None:
        """Read row `rows[k]` (int64 [K], counted over all files) into the k-th of K rows in `out`.

        `mode`: auto, warm, hinted or direct; see `ao.cache.MODES`.
        """
    def prefetch(self, rows: Buffer) -> None:
        """Tell the system that these rows are wanted soon."""

def context_keys(ids: Buffer) -> bytes:
    """For each of int32 [n] ids the key of its position, uint64 [n, 2]: upper and lower half of a chained xxh3-128."""

def activation_units(
    folder: str | PathLike[str], indexes: Sequence[str], *, headers: bool = False
) -> list[tuple[str, str, int, dict[int, int]]]:
    """Of the unit of each index what a cache's units have in common (contract, dtype, width), as canonical JSON, its run, its
    number, and its rows by layer. From the manifest where it lists the index as it is; of others, and with `headers` of all,
    the header is read."""

def activation_arrays(index: str | PathLike[str]) -> list[tuple[str, str, tuple[int, ...], int]]:
    """Name, type, shape and byte offset of the arrays of a unit's index."""

def verify_activations(index: str | PathLike[str]) -> None:
    """Check every byte of a unit against its index.

    Raises:
        AoError: A file is cut, has grown, or holds other bytes than were written; names file and rows.
        FileNotFoundError: A file is missing.
    """
