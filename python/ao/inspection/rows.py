"""A datapoint as a person wants to see it: prompt, answer, context, and which token each placeholder stands for."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from ao._ao import Framer
from ao.shards import Datapoint, PackedDataset
from ao.summary import printable

TABLE_ROWS = 40
"""Placeholders listed; --json lists all."""
RUN = 6
"""A longer run of placeholders is shown by its first two and its last."""
MARGIN = 60
"""Context tokens shown around those that are read; longer stretches without any are left out."""
WIDTH = 100
"""Characters of a line of ids."""


class Style:
    """How marks look: colours on a terminal that has them, brackets everywhere."""

    def __init__(self, *, color: bool) -> None:
        self._color = color

    def _paint(self, code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._color else text

    def placeholder(self, text: str) -> str:
        """A placeholder of the prompt."""
        return self._paint("30;46", f"[{text}]")

    def read(self, text: str) -> str:
        """A context token that is read."""
        return self._paint("30;43", f"[{text}]")

    def learned(self, text: str) -> str:
        """A token that the loss is taken of."""
        return self._paint("30;42", f"[{text}]")

    def head(self, text: str) -> str:
        """A heading."""
        return self._paint("1", text)

    def soft(self, text: str) -> str:
        """An aside."""
        return self._paint("2", text)


def token_texts(framer: Framer, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text of each id; where several tokens make one character, the first has it and the others are empty."""
    values = np.asarray(ids, dtype=np.int32).tolist()
    texts: list[str] = []
    start = 0
    while start < len(values):
        # A token's text is what it adds to the one before: some decoders drop the space that a text begins with.
        before = framer.decode(values[start - 1 : start]) if start else ""
        for end in range(start + 1, len(values) + 1):
            text = framer.decode(values[max(0, start - 1) : end])
            text = text[len(before) :] if text.startswith(before) else framer.decode(values[start:end])
            if "\N{REPLACEMENT CHARACTER}" not in text or end - start == 8:
                break
        else:
            end, text = start + 1, framer.decode(values[start : start + 1])
        texts += [text, *[""] * (end - start - 1)]
        start = end
    return texts


def described(data: PackedDataset, index: int, framer: Framer | None) -> dict[str, Any]:
    """A datapoint as plain JSON; texts of tokens are null without a framer."""
    index = range(len(data))[index]
    point = data[index]
    file, row = data.place(index)

    def texts(ids: np.ndarray) -> list[str] | None:
        return None if framer is None else token_texts(framer, ids)

    context = texts(point.context_ids)
    return {
        "row": index,
        "id": point.id,
        "source": point.source,
        "reads": point.kind,
        "shard": file,
        "row_in_shard": row,
        "question": point.question,
        "answer": point.answer,
        "meta": point.meta,
        "input_ids": point.input_ids.tolist(),
        "answer_start": point.answer_start,
        "input_tokens": texts(point.input_ids),
        "context_ids": point.context_ids.tolist(),
        "context_tokens": context,
        "placeholders": [
            {
                "number": number,
                "index": place,
                "layer": layer,
                "position": position,
                "id": int(point.context_ids[position]),
                "token": None if context is None else context[position],
            }
            for number, (place, layer, position) in enumerate(_reads(point), start=1)
        ],
    }


def _reads(point: Datapoint) -> Iterable[tuple[int, int, int]]:
    return zip(point.placeholders.tolist(), point.layers.tolist(), point.read_positions.tolist(), strict=True)


def row_text(row: dict[str, Any], style: Style) -> str:
    """What `described` returns, for a terminal or a page."""
    reads, start, ids = row["placeholders"], row["answer_start"], row["input_ids"]
    tokens = row["input_tokens"] or list(map(str, ids))
    read_at: dict[int, list[int]] = {}
    for each in reads:
        read_at.setdefault(each["position"], []).append(each["layer"])
    layers = sorted({each["layer"] for each in reads})
    prompt, num_context = (
        _prompt(tokens[:start], reads, style, with_texts=row["input_tokens"] is not None),
        row["context_ids"],
    )
    lines = [
        style.head(f"row {row['row']}  {printable(row['id'])}"),
        f"  source {printable(row['source'])}, reads the target's {row['reads']} weights; {row['shard']} row {row['row_in_shard']}",
        "",
        style.head("prompt") + style.soft(f"  {start} tokens; {_several(len(reads), 'placeholder')} [?number@layer]"),
        *_indented(prompt, row),
        "",
        style.head("answer") + style.soft(f"  {_several(len(ids) - start, 'token')}, learned"),
        *_indented([style.learned(printable(token)) for token in tokens[start:]], row),
        "",
        style.head("context")
        + style.soft(
            f"  {len(num_context)} tokens, the last one read; [read] at layer{'s' * (len(layers) > 1)} "
            + ", ".join(map(str, layers))
        ),
        *_indented(_context(row, read_at, layers, style), row),
        "",
        style.head(f"{'':>4}?  layer  position  token"),
        *[
            f"{each['number']:>5}  {each['layer']:>5}  {each['position']:>8}  {_token(each)}"
            for each in reads[:TABLE_ROWS]
        ],
    ]
    if len(reads) > TABLE_ROWS:
        lines.append(style.soft(f"  and {len(reads) - TABLE_ROWS} more; --json lists all"))
    if row["input_tokens"] is None:
        lines += ["", f"  question  {printable(row['question'])}", f"  answer    {printable(row['answer'])}"]
    if row["meta"]:
        lines += [
            "",
            style.soft(
                "meta  " + ", ".join(f"{printable(key)} {printable(str(value))}" for key, value in row["meta"].items())
            ),
        ]
    return "\n".join(lines)


def _paragraphs(text: str) -> str:
    return "\n".join(map(printable, text.split("\n")))


def _several(num: int, what: str) -> str:
    return f"{num} {what}{'s' * (num != 1)}"


def _token(read: dict[str, Any]) -> str:
    text = read["token"]
    return str(read["id"]) if text is None else f"'{printable(text)}'" if text else "(of the character before)"


def _prompt(tokens: Sequence[str], reads: Sequence[dict[str, Any]], style: Style, *, with_texts: bool) -> list[str]:
    """The prompt's tokens, placeholders as marks; of a long run only some."""
    marks: dict[int, str] = {}
    runs = groupby(reads, key=lambda read: (read["index"] - read["number"], read["layer"]))
    for _, found in runs:
        run = list(found)
        for place, read in enumerate(run):
            is_shown = len(run) <= RUN or place < 2 or place == len(run) - 1
            mark = style.placeholder(f"?{read['number']}@{read['layer']}") if is_shown else ""
            marks[read["index"]] = " .. " if len(run) > RUN and place == 2 else mark
    text = _paragraphs if with_texts else printable
    return [mark for at, token in enumerate(tokens) if (mark := marks.get(at, text(token)))]


def _context(row: dict[str, Any], read_at: dict[int, list[int]], layers: list[int], style: Style) -> list[str]:
    """The context's tokens, those that are read as marks, with their layers where not all are read at the same."""
    ids, texts = row["context_ids"], row["context_tokens"]
    tokens = texts or list(map(str, ids))
    same = all(sorted(set(found)) == layers for found in read_at.values())
    places = np.array(sorted(read_at))
    out: list[str] = []
    left_out = 0
    for at, token in enumerate(tokens):
        if at in read_at:
            at_layers = "" if same else " @" + ",".join(map(str, sorted(set(read_at[at]))))
            out.append(style.read(printable(token) + at_layers) + ("\n" if token.endswith("\n") else ""))
        elif at < MARGIN or np.abs(places - at).min() <= MARGIN:
            out.append(_paragraphs(token))
        else:
            left_out += 1
            continue
        if left_out:
            out.insert(-1, style.soft(f"\n.. {left_out} tokens ..\n"))
            left_out = 0
    return out


def _indented(parts: Sequence[str], row: dict[str, Any]) -> list[str]:
    """Texts as they flow, or ids in lines, behind a bar."""
    if row["input_tokens"] is not None:
        lines = "".join(parts).removesuffix("\n").split("\n")
    else:
        lines = textwrap.wrap(" ".join(parts), WIDTH, break_on_hyphens=False)
    return [f"  | {line}" for line in lines]
