"""Which columns of a table a source needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ao.config import SLOT, ClassificationSource, ContextPredictionSource, SourceConfig

if TYPE_CHECKING:
    import pyarrow as pa

Found = TypeVar("Found", "pa.RecordBatch", "pa.Table")


def fields(template: str) -> list[str]:
    """The columns that stand in braces in a template, each once."""
    return list(dict.fromkeys(SLOT.findall(template)))


@dataclass(frozen=True)
class Columns:
    """The columns of a table that are read."""

    needed: tuple[str, ...] = ()
    """Each must be there; without any, all columns are read."""
    any_of: tuple[str, ...] = ()
    """Those of these that are there are read, one at least; of the messages of a chat, role and content alone."""
    label: str | None = None
    """The one that holds labels."""

    @staticmethod
    def of(config: SourceConfig) -> Columns:
        """The columns of a source's tables."""
        match config:
            case ClassificationSource():
                in_questions = [name for question in config.questions for name in fields(question) if name != "label"]
                names = [*(fields(config.text) or [config.text]), *in_questions, config.label]
                return Columns(needed=tuple(dict.fromkeys(names)), label=config.label)
            case ContextPredictionSource():
                return Columns(any_of=tuple(dict.fromkeys((config.text, "messages"))))
            case _:
                return Columns()

    def chosen(self, names: Sequence[str], *, where: str) -> list[str]:
        """Those of a table's columns that are read, in the table's order.

        Raises:
            ValueError: one is missing; names those that are there.
        """
        if missing := [name for name in self.needed if name not in names]:
            raise ValueError(f"{where}: column {missing[0]!r} is missing; there are {sorted(names)}")
        if self.any_of and not set(self.any_of) & set(names):
            expected = " or ".join(map(repr, self.any_of))
            raise ValueError(f"{where}: expected a column {expected}; there are {sorted(names)}")
        wanted = {*self.needed, *self.any_of} or set(names)
        return [name for name in names if name in wanted]


def plain(found: Found, columns: Columns, *, where: str) -> Found:
    """A batch, or a table, as rows are made of it: of the messages of a chat role and content alone.

    Raises:
        ValueError: JSON has no words for a column, as for a date, which would be packed as the number that Arrow stores for
            it; names the column and its type.
    """
    import pyarrow as pa

    kept = [
        column.with_type(_turns_alone(column.type)) if column.name in columns.any_of else column
        for column in found.schema
    ]
    for column in kept:
        if not _is_plain(column.type):
            raise ValueError(
                f"{where}: column {column.name!r}: expected text, numbers, true and false, lists or structs of them, got "
                f"{column.type}; cast it to text"
            )
    schema = pa.schema(kept, found.schema.metadata)
    return found if schema == found.schema else found.cast(schema)


def _turns_alone(kind: pa.DataType) -> pa.DataType:
    """The type of a list of messages without all that they have besides role and content; any other type as it is."""
    import pyarrow as pa
    from pyarrow import types

    is_large = types.is_large_list(kind)
    if not (is_large or types.is_list(kind)) or not types.is_struct(message := kind.value_type):
        return kind
    turn = [field for field in message.fields if field.name in ("role", "content")]
    if len(turn) < 2:
        return kind
    return (pa.large_list if is_large else pa.list_)(kind.value_field.with_type(pa.struct(turn)))


def _is_plain(kind: pa.DataType) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    if types.is_nested(kind):
        return all(_is_plain(kind.field(index).type) for index in range(kind.num_fields))
    binary = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return not any(is_kind(kind) for is_kind in (types.is_temporal, types.is_interval, *binary))


def spelled(batch: pa.RecordBatch, label: str, names: Sequence[str]) -> pa.RecordBatch:
    """The batch with its class numbers replaced by the names of the classes; a number without a name stays as text."""
    import pyarrow as pa
    import pyarrow.compute

    compute: Any = pyarrow.compute  # its functions are made at run time
    index = batch.schema.get_field_index(label)
    numbers = batch.column(index)
    if not pa.types.is_integer(numbers.type):
        return batch
    known = compute.and_(compute.greater_equal(numbers, 0), compute.less(numbers, len(names)))
    found = pa.array(names, pa.string()).take(compute.if_else(known, numbers, pa.scalar(None, numbers.type)))
    return batch.set_column(index, label, compute.coalesce(found, numbers.cast(pa.string())))
