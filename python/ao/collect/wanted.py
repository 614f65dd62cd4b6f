"""What is to be collected, cut into units of consecutive contexts.

A unit is written by one process and is there whole or not at all, so a killed run goes on with the units that are missing,
and ranks take every n-th one; the files are the same whoever wrote them.

Shapes: P values wanted.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import numpy as np

from ao._ao import Framer
from ao.cache import context_keys
from ao.config import Recipe
from ao.manifest import fingerprint
from ao.prompt import fingerprints, framer, num_layers, resolve_layer, target_of
from ao.residuals import Wanted
from ao.shards import PackedDataset

UNIT_TOKENS = 2**19
"""Context tokens of a unit: what a kill loses at most, less than a minute of a large target on a GPU. A quarter of
it where every position is kept, so that a unit's index stays small."""
PLAIN_UNIT_TOKENS = 2**14
"""The same of a plain file, which is put together in memory."""

Positions = Literal["wanted", "all"]


@dataclass(frozen=True)
class Unit:
    """Consecutive contexts, and what is wanted of them."""

    contexts: list[np.ndarray]
    """Token ids, each [length]."""
    wanted: Wanted
    """Each (context, layer, position) once."""

    def keys(self) -> np.ndarray:
        """Key of each value wanted, uint64 [P, 2]."""
        offsets = np.cumsum([0, *map(len, self.contexts)])
        keys = np.concatenate([np.empty((0, 2), np.uint64), *map(context_keys, self.contexts)])
        return keys[offsets[self.wanted.contexts] + self.wanted.positions]

    def only(self, kept: np.ndarray) -> Unit:
        """The same with some of what is wanted, and contexts no longer than that needs."""
        wanted = Wanted(self.wanted.contexts[kept], self.wanted.layers[kept], self.wanted.positions[kept])
        lengths = np.zeros(len(self.contexts), dtype=np.int64)
        np.maximum.at(lengths, wanted.contexts, wanted.positions + 1)
        return Unit([ids[:length] for ids, length in zip(self.contexts, lengths, strict=True)], wanted)

    @property
    def num_tokens(self) -> int:
        """Context tokens that have to be run."""
        return sum(map(len, self.contexts))

    @property
    def digest(self) -> str:
        """Of all that it holds."""
        arrays = [*self.contexts, self.wanted.contexts, self.wanted.layers, self.wanted.positions]
        return fingerprint(*(np.ascontiguousarray(array, dtype="<i8").tobytes() for array in arrays))

    @classmethod
    def whole(cls, contexts: Sequence[np.ndarray], layers: Sequence[int]) -> Unit:
        """Every position of some contexts."""
        return cls(list(contexts), _at_layers(*_everywhere(contexts), np.asarray(layers)))


class Units(Sequence[Unit]):
    """Units that are built when they are asked for, a part (a shard, say) at a time, and held until another part is.

    Args:
        counts: number of units of each part.
        build: builds the units of the part of that number.
    """

    def __init__(self, counts: Sequence[int], build: Callable[[int], list[Unit]]) -> None:
        self._starts = np.cumsum([0, *counts])
        self._build = build
        self._held: tuple[int, list[Unit]] = (-1, [])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, number: int) -> Unit: ...
    @overload
    def __getitem__(self, number: slice) -> list[Unit]: ...
    def __getitem__(self, number: int | slice) -> Unit | list[Unit]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"unit {number} of {len(self)}")
        number %= len(self)
        part = int(self._starts.searchsorted(number, side="right")) - 1
        if self._held[0] != part:
            self._held = (part, self._build(part))
        return self._held[1][number - int(self._starts[part])]


def units(
    recipe: Recipe,
    *,
    data: str | Path | None = None,
    texts: str | Path | None = None,
    prompt: str | None = None,
    layers: Sequence[float] = (),
    positions: Positions = "wanted",
    plain: bool = False,
) -> Units:
    """What a recipe's packed data set reads, or every token of other contexts.

    Args:
        recipe: names the model and, without `data`, the data set.
        data: the packed data set.
        texts: instead, a JSONL file of `text` or `messages`.
        prompt: instead, one user turn.
        layers: indices or depths; without any those that the data set reads, or the recipe's depths.
        positions: "wanted" or "all"; other contexts than a data set's give all.
        plain: units for plain files, as for `collect`.

    Raises:
        ValueError: several of data, texts and prompt are given, or the data set is of another model or reads what cannot
            be collected.
    """
    given = {
        name: str(value) for name, value in (("data", data), ("texts", texts), ("prompt", prompt)) if value is not None
    }
    if len(given) > 1:
        raise ValueError(f"expected one of data, texts and prompt, got {given}; leave out all but one")
    model, unit_tokens = recipe.model, PLAIN_UNIT_TOKENS if plain else UNIT_TOKENS
    name, revision = target_of(model)
    chosen = [resolve_layer(layer, num_layers(name, revision)) for layer in layers]
    if texts is None and prompt is None:
        packed = PackedDataset.open(recipe.data.out if data is None else data)
        packed.require(**fingerprints(model))
        packed.require_base()
        if positions == "all":
            unit_tokens //= 4
        return packed_units(packed, layers=chosen or None, positions=positions, unit_tokens=unit_tokens)
    target_framer = framer(name, revision)
    if texts is not None:
        contexts = text_contexts(Path(texts), target_framer)
    else:
        turns = json.dumps([{"role": "user", "content": prompt}])
        contexts = [np.asarray(target_framer.context(turns).ids, dtype=np.int32)]
    depths = chosen or [resolve_layer(depth, num_layers(name, revision)) for depth in recipe.data.read_depths]
    return every_position(contexts, sorted(set(depths)), unit_tokens=unit_tokens // 4)


def units_of(contexts: Sequence[np.ndarray], wanted: Wanted, *, unit_tokens: int) -> Iterator[Unit]:
    """Cut contexts into units of so many tokens, in their order, each with what is wanted of it."""
    unit_of = _unit_of(contexts, unit_tokens)
    # One number for (context, layer, position): sorting numbers is what NumPy does fastest.
    num_layers, longest = int(wanted.layers.max(initial=0)) + 1, max(map(len, contexts), default=1)
    numbers = np.unique((wanted.contexts.astype(np.int64) * num_layers + wanted.layers) * longest + wanted.positions)
    which, rest = np.divmod(numbers, num_layers * longest)
    layers, positions = np.divmod(rest, longest)
    for unit in np.unique(unit_of):
        first, end = np.searchsorted(unit_of, [unit, unit + 1]).tolist()
        here = slice(*np.searchsorted(which, [first, end]).tolist())
        yield Unit(list(contexts[first:end]), Wanted(which[here] - first, layers[here], positions[here]))


def packed_units(data: PackedDataset, *, layers: Sequence[int] | None, positions: Positions, unit_tokens: int) -> Units:
    """What a packed data set reads; with `layers` at those instead of its own, with "all" at every position."""
    everywhere = positions == "all"
    chosen = sorted({layer for several in data.layer_combinations for layer in several}) if layers is None else layers

    def of_shard(shard: int) -> list[Unit]:
        contexts, which, own_layers, read = data.reads(shard)
        wanted = Wanted(which, own_layers, read)
        if everywhere or layers is not None:
            wanted = _at_layers(*(_everywhere(contexts) if everywhere else (which, read)), np.asarray(chosen))
        return list(units_of(contexts, wanted, unit_tokens=unit_tokens))

    shards = range(data.num_shards)
    return Units([len(np.unique(_unit_of(data.reads(shard)[0], unit_tokens))) for shard in shards], of_shard)


def every_position(contexts: Sequence[np.ndarray], layers: Sequence[int], *, unit_tokens: int) -> Units:
    """Every position of some contexts."""
    unit_of = _unit_of(contexts, unit_tokens)
    bounds = np.append(np.flatnonzero(np.diff(unit_of, prepend=-1)), len(contexts)).tolist()

    def of_number(number: int) -> list[Unit]:
        own = contexts[bounds[number] : bounds[number + 1]]
        return list(units_of(own, Unit.whole(own, layers).wanted, unit_tokens=unit_tokens))

    return Units([1] * (len(bounds) - 1), of_number)


def _unit_of(contexts: Sequence[np.ndarray], unit_tokens: int) -> np.ndarray:
    return (np.cumsum([0, *map(len, contexts)])[:-1] // unit_tokens).astype(np.int64)


def _everywhere(contexts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    lengths = [len(ids) for ids in contexts]
    return np.repeat(np.arange(len(contexts)), lengths), np.concatenate([np.empty(0, int), *map(np.arange, lengths)])


def _at_layers(which: np.ndarray, positions: np.ndarray, layers: np.ndarray) -> Wanted:
    return Wanted(np.repeat(which, len(layers)), np.tile(layers, len(which)), np.repeat(positions, len(layers)))


def text_contexts(path: Path, oracle_framer: Framer) -> list[np.ndarray]:
    """The contexts of a JSONL file: an object a line, with `text` or `messages`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is neither, and names it; or there is none.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: there is no such file; texts are a JSONL file, an object with text or messages a line"
        )
    contexts = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(BOM_UTF8)
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
                context = row["messages"] if "messages" in row else row["text"]
                contexts.append(np.asarray(oracle_framer.context(json.dumps(context)).ids, dtype=np.int32))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: line {number}: expected an object with text or messages, got {line[:60].decode(errors='replace')!r} "
                    f"({error})"
                ) from None
    if not contexts:
        raise ValueError(f"{path}: no contexts; expected one object with text or messages a line, got none")
    return contexts
