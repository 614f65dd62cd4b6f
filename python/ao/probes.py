"""Which tokens of a context are read when an oracle is asked: one token, a segment or the full sequence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

_FORMS = "token:INDEX, segment:START:STOP (either may be left out) or full_seq"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Tokens by index, counted from 0, or from the end if negative.

    `token` reads the token `start`; `segment` reads `start` up to but not including `stop`; `full_seq` reads all.
    """

    kind: Literal["token", "segment", "full_seq"]
    start: int | None = None
    stop: int | None = None

    @classmethod
    def parse(cls, text: str) -> Probe:
        """A probe from "token:-1", "segment:-10:", "segment:2:5" or "full_seq".

        Raises:
            ValueError: the text has another form.
        """
        if text == "full_seq":
            return cls(kind="full_seq")
        if match := re.fullmatch(r"token:(-?\d+)", text):
            return cls(kind="token", start=int(match[1]))
        if match := re.fullmatch(r"segment:(-?\d+)?:(-?\d+)?", text):
            start, stop = (None if part is None else int(part) for part in match.groups())
            return cls(kind="segment", start=start, stop=stop)
        raise ValueError(f"probe {text!r}: expected {_FORMS}")

    def __str__(self) -> str:
        if self.kind == "full_seq":
            return "full_seq"
        if self.kind == "token":
            return f"token:{self.start}"
        start, stop = ("" if part is None else part for part in (self.start, self.stop))
        return f"segment:{start}:{stop}"

    def positions(self, length: int) -> np.ndarray:
        """Indices of the tokens read in a context of `length` tokens, ascending, int32 [K], K >= 1.

        Raises:
            ValueError: the context has no such token, or the segment is empty.
        """
        if length < 1:
            raise ValueError(f"probe {self}: the context has no tokens")
        if self.kind == "full_seq":
            start, stop = 0, length
        elif self.kind == "token":
            assert self.start is not None
            start = self._bound(self.start, length=length, last=length - 1)
            stop = start + 1
        else:
            start = 0 if self.start is None else self._bound(self.start, length=length, last=length)
            stop = length if self.stop is None else self._bound(self.stop, length=length, last=length)
        if start >= stop:
            raise ValueError(f"probe {self}: selects nothing of {length} tokens; START must lie before STOP")
        return np.arange(start, stop, dtype=np.int32)

    def _bound(self, index: int, *, length: int, last: int) -> int:
        if not -length <= index <= last:
            raise ValueError(
                f"probe {self}: index {index} is out of range for {length} tokens; expected {-length} to {last}"
            )
        return index + length if index < 0 else index
