"""Plans: one epoch of a packed data set in steps, ranks and rows; a small file of its own, no torch.

A plan is made in Rust and knows nothing of tokens but their number, so another budget needs no new packing. Which
datapoints a step holds does not depend on the number of ranks, and the number of steps done is all that resuming needs.

N datapoints of the data set, n of them planned, R rows, S steps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Lt
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from typing_extensions import TypedDict

from ao import _ao
from ao.config import PlanOptions
from ao.manifest import canonical_json, own_digest_problem, with_own_digest, write_atomic
from ao.shards import PackedDataset, Part

SCHEMA = 2
"""Version of the file; others are refused."""

_REMEDY = "make it again with ao plan"

_ARRAYS = {
    "order": np.int32,
    "row_offsets": np.int64,
    "row_ranks": np.int32,
    "row_tokens": np.int32,
    "row_context_tokens": np.int32,
    "step_offsets": np.int64,
}


@dataclass(frozen=True, kw_only=True)
class PlanSettings(PlanOptions):
    """What a plan is made for."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic, not a field

    tokens_per_row: int
    """Token budget of a row, which is one forward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens_per_row < 1:
            raise ValueError(f"plan: tokens_per_row must be positive, got {self.tokens_per_row}")


class _Data(TypedDict):
    manifest_sha256: str
    datapoints: Annotated[int, Ge(0), Lt(2**31)]


class _ContextTokens(TypedDict):
    alone: Annotated[int, Ge(0)]
    in_ranks: Annotated[int, Ge(0)]
    in_windows: Annotated[int, Ge(0)]
    at_all: Annotated[int, Ge(0)]


class _Described(TypedDict):
    """What the file says of the plan."""

    settings: PlanSettings
    data: _Data
    context_tokens: _ContextTokens


@dataclass(frozen=True, eq=False)
class Plan:
    """One epoch: datapoints by step, in it by rank, in it by row."""

    settings: PlanSettings
    """What it was made for."""
    data_sha256: str
    """Of the data set's manifest.json."""
    num_datapoints: int
    """N of the data set."""
    context_tokens: dict[str, int]
    """Context tokens to run: "alone", summed over the datapoints; "in_ranks", where a context serves a rank for one
    window; "in_windows", where it serves all ranks for one window; "at_all", where it serves the whole plan."""
    order: np.ndarray
    """Indices of datapoints, each at most once, int32 [n]."""
    row_offsets: np.ndarray
    """Where each row begins in `order`, and the end of the last, int64 [R + 1]."""
    row_ranks: np.ndarray
    """Rank of each row, int32 [R]."""
    row_tokens: np.ndarray
    """Input tokens of each row, int32 [R]."""
    row_context_tokens: np.ndarray
    """Context tokens of each row, int32 [R]."""
    step_offsets: np.ndarray
    """Where each step begins in the rows, and the end of the last, int64 [S + 1]."""

    @classmethod
    def make(cls, data: PackedDataset | Part, settings: PlanSettings) -> Plan:
        """Plan one epoch. What does not fill a last step is left out, in another epoch something else.

        Raises:
            ValueError: a setting cannot be used, or a datapoint exceeds a row and may not stand alone.
        """
        if not settings.longer_alone and len(long := longer(data, settings)):
            point, contexts = data[int(long[0])], settings.context_tokens_per_row
            budgets = f"{settings.tokens_per_row}" + ("" if contexts is None else f" and {contexts} context tokens")
            raise ValueError(
                f"plan: datapoint {point.id!r} has {len(point.input_ids)} input and {len(point.context_ids)} context "
                f"tokens, too many for a row of {budgets}, and so have {len(long) - 1} others; raise the budget, lower "
                "data.max_input_tokens when packing, or let each have a row of its own (longer_alone)"
            )
        passed = asdict(settings)
        if settings.examples_per_step is None and settings.tokens_per_step is None:
            passed["tokens_per_step"] = settings.ranks * settings.tokens_per_row
        made = _ao.plan(data.lengths, data.context_lengths, data.groups, json.dumps(passed))
        arrays = {name: np.asarray(made[name]) for name in _ARRAYS if name in made}
        starts = arrays["row_offsets"][:-1]
        for name, lengths in (("row_tokens", data.lengths), ("row_context_tokens", data.context_lengths)):
            of_rows = np.add.reduceat(lengths[arrays["order"]], starts) if len(starts) else starts
            arrays[name] = of_rows.astype(np.int32)
        return cls(
            settings=settings,
            data_sha256=_sha256(data),
            num_datapoints=len(data),
            context_tokens={name: made[name] for name in ("alone", "in_ranks", "in_windows", "at_all")},
            **arrays,
        )

    def for_ranks(self, data: PackedDataset, ranks: int) -> Plan:
        """The same steps divided among another number of ranks.

        Raises:
            ValueError: the data set is another one, or cannot be divided so.
        """
        self.require(data)
        if ranks == self.settings.ranks:
            return self
        steps = {}
        if self.settings.examples_per_step is None:
            steps["tokens_per_step"] = (
                self.settings.tokens_per_step or self.settings.ranks * self.settings.tokens_per_row
            )
        return Plan.make(data, replace(self.settings, ranks=ranks, **steps))

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self.step_offsets) - 1

    def steps(self, start: int = 0, *, end: int | None = None, rank: int | None = None) -> Iterator[list[np.ndarray]]:
        """The rows of each step, as indices of datapoints.

        Args:
            start: The first step, which is how many are done.
            end: The step after the last, if that is not the plan's last.
            rank: Only this rank's rows; all without it.
        """
        for step in range(start, len(self) if end is None else min(end, len(self))):
            rows = range(self.step_offsets[step], self.step_offsets[step + 1])
            yield [
                self.order[self.row_offsets[row] : self.row_offsets[row + 1]]
                for row in rows
                if rank is None or self.row_ranks[row] == rank
            ]

    def windows(
        self, start: int = 0, *, end: int | None = None, rank: int | None = None
    ) -> Iterator[list[list[np.ndarray]]]:
        """The same steps by window; one that `start` or `end` cuts is shorter, the others are what they always are."""
        window: list[list[np.ndarray]] = []
        for done, step in enumerate(self.steps(start, end=end, rank=rank), start=start + 1):
            window.append(step)
            if done % self.settings.window == 0:
                yield window
                window = []
        if window:
            yield window

    @property
    def fill(self) -> float:
        """Share of the rows' token budgets that tokens fill."""
        return int(self.row_tokens.sum()) / max(1, len(self.row_tokens) * self.settings.tokens_per_row)

    @property
    def sharing(self) -> dict[str, float]:
        """How many times fewer context tokens are run than if nothing were shared, by how long a context serves."""
        alone = self.context_tokens["alone"]
        return {name: alone / max(1, run) for name, run in self.context_tokens.items() if name != "alone"}

    def statistics(self) -> dict[str, Any]:
        """Counts, fill, rows and sharing factors, as plain numbers."""
        share = self.row_tokens / self.settings.tokens_per_row
        quantiles = np.quantile(share, (0, 0.01, 0.5)).tolist() if len(share) else [0.0] * 3
        return {
            "steps": len(self),
            "rows": len(self.row_tokens),
            "datapoints": len(self.order),
            "left_out": self.num_datapoints - len(self.order),
            "tokens": int(self.row_tokens.sum()),
            "context_tokens": self.context_tokens,
            "fill": round(self.fill, 6),
            "row_fill": dict(zip(("least", "percentile_1", "median"), (round(q, 6) for q in quantiles), strict=True)),
            "sharing": {name: round(factor, 4) for name, factor in self.sharing.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write the plan as one safetensors file, whole or not at all."""
        described = {
            "kind": "plan",
            "schema": SCHEMA,
            "settings": asdict(self.settings),
            "data": {"manifest_sha256": self.data_sha256, "datapoints": self.num_datapoints},
            "context_tokens": self.context_tokens,
            "sha256": "0" * 64,
        }
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _ARRAYS}
        write_atomic(path, with_own_digest(save(arrays, metadata={"ao": canonical_json(described)})))

    @classmethod
    def load(cls, path: str | Path, data: PackedDataset | None = None) -> Plan:
        """Read a plan, and refuse it if it was made for other data.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no plan of this version, is damaged, or was made for another data set.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such plan; make one with ao plan")
        try:
            with safe_open(path, framework="numpy") as file:
                text = (file.metadata() or {}).get("ao", "null")
                described = json.loads(text)
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{path}: not a plan: {error}; {_REMEDY}") from None
        found = (described.get("kind"), described.get("schema")) if isinstance(described, dict) else (None, None)
        if found != ("plan", SCHEMA):
            raise ValueError(
                f"{path}: expected a plan of schema {SCHEMA}, got kind {found[0]!r}, schema {found[1]!r}; {_REMEDY}"
            )
        if problem := own_digest_problem(path, remedy=_REMEDY):
            raise ValueError(problem)
        try:
            checked = TypeAdapter(_Described).validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path}: damaged: its metadata at {where}: {first['msg']}; {_REMEDY}") from None
        settings, of = checked["settings"], checked["data"]
        plan = cls(
            settings=settings,
            data_sha256=of["manifest_sha256"],
            num_datapoints=of["datapoints"],
            context_tokens=described["context_tokens"],
            **_checked(path, arrays, num_datapoints=of["datapoints"], ranks=settings.ranks),
        )
        if data is not None:
            plan.require(data)
        return plan

    def require(self, data: PackedDataset) -> None:
        """Refuse another data set than the plan was made for.

        Raises:
            ValueError: its manifest is another one.
        """
        if (found := _sha256(data)) != self.data_sha256:
            raise ValueError(
                f"plan: made for a data set whose manifest.json has sha256 {self.data_sha256[:8]}.., {data.folder} has "
                f"{found[:8]}..; make the plan again with ao plan"
            )


def _checked(path: Path, arrays: dict[str, np.ndarray], *, num_datapoints: int, ranks: int) -> dict[str, np.ndarray]:
    """The arrays of a file, after making sure that following them cannot go wrong."""

    def require(what: str, holds: object) -> None:
        if not holds:
            raise ValueError(f"{path}: damaged: {what}; {_REMEDY}")

    for name, dtype in _ARRAYS.items():
        require(f"the array {name!r} is missing", name in arrays)
        fits = arrays[name].dtype == dtype and arrays[name].ndim == 1
        require(f"the array {name!r} is not a list of {dtype.__name__}", fits)
    order, rows, steps = arrays["order"], arrays["row_offsets"], arrays["step_offsets"]
    for name, offsets, end in (("row_offsets", rows, len(order)), ("step_offsets", steps, len(rows) - 1)):
        whole = len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == end and (np.diff(offsets) > 0).all()
        require(f"{name!r} does not rise from 0 to {end}", whole)
    require(
        f"'order' is not made of different numbers below {num_datapoints}",
        len(order) == 0 or (order.min() >= 0 and order.max() < num_datapoints and np.bincount(order).max() == 1),
    )
    for name in ("row_ranks", "row_tokens", "row_context_tokens"):
        require(
            f"{name!r} has {len(arrays[name])} entries for {len(rows) - 1} rows", len(arrays[name]) == len(rows) - 1
        )
    of_ranks = arrays["row_ranks"]
    require(f"'row_ranks' is not made of numbers below {ranks}", ((of_ranks >= 0) & (of_ranks < ranks)).all())
    for name in ("row_tokens", "row_context_tokens"):
        require(f"{name!r} has a row without tokens", (arrays[name] > 0).all())
    return {name: arrays[name] for name in _ARRAYS}


def longer(data: PackedDataset | Part, settings: PlanSettings) -> np.ndarray:
    """Indices of the datapoints that exceed a row's budget by themselves, int64."""
    long = data.lengths > settings.tokens_per_row
    if settings.context_tokens_per_row is not None:
        long = long | (data.context_lengths > settings.context_tokens_per_row)
    return np.flatnonzero(long)


def compare(data: PackedDataset, settings: PlanSettings, budgets: Sequence[int]) -> list[dict[str, Any]]:
    """What plans of several row budgets would look like, without keeping them.

    Returns:
        For each budget `{"tokens_per_row", "longer", "plan"}`: how many datapoints exceed a row, and the plan's
        statistics, or None where some do and may not stand alone.
    """
    found = []
    for budget in budgets:
        each = replace(settings, tokens_per_row=budget)
        num_longer = len(longer(data, each))
        possible = num_longer == 0 or settings.longer_alone
        plan = Plan.make(data, each).statistics() if possible else None
        found.append({"tokens_per_row": budget, "longer": num_longer, "plan": plan})
    return found


def table(budgets: Sequence[dict[str, Any]]) -> str:
    """The result of `compare` as text, a line for each budget."""
    lines = [f"{'tokens/row':>10} {'rows':>9} {'steps':>9} {'fill %':>7} {'left out':>9} {'sharing':>8}"]
    for budget in budgets:
        start, plan = f"{budget['tokens_per_row']:>10}", budget["plan"]
        if plan is None:
            lines.append(f"{start} impossible: {budget['longer']} datapoints are longer than a row")
            continue
        if not plan["steps"]:
            lines.append(f"{start} impossible: {plan['left_out']} datapoints do not fill one step")
            continue
        shared = plan["sharing"]["in_windows"]
        lines.append(
            f"{start} {plan['rows']:>9} {plan['steps']:>9} {100 * plan['fill']:>7.2f} {plan['left_out']:>9} {shared:>7.2f}x"
        )
    return "\n".join(lines)


def command(
    packed: str | Path, budgets: Sequence[int], *, out: str | Path | None = None, **settings: Any
) -> dict[str, Any]:
    """What `ao plan` does: compare budgets, or write the plan of a single one to `out`.

    Returns:
        {"budgets": as `compare` gives them, "out": the file or None}.

    Raises:
        ValueError: a setting cannot be used, or a plan is to be written and there is not one budget, or not one step.
    """
    if not budgets or (out is not None and len(budgets) > 1):
        raise ValueError(
            f"plan: expected one --tokens-per-row{'' if out else ' or more'}{' with --out' if out else ''}, got "
            f"{len(budgets)}"
        )
    data, chosen = PackedDataset.open(packed), PlanSettings(tokens_per_row=budgets[0], **settings)
    if out is None:
        found = compare(data, chosen, budgets)
    else:
        plan = Plan.make(data, chosen)
        if not len(plan):
            raise ValueError(
                f"plan: {packed} holds {len(data)} datapoints with {int(data.lengths.sum())} tokens, which do not fill one "
                "step; lower --examples-per-step, --tokens-per-step or --tokens-per-row"
            )
        plan.save(out)
        num_longer = len(longer(data, chosen))
        found = [{"tokens_per_row": budgets[0], "longer": num_longer, "plan": plan.statistics()}]
    return {"budgets": found, "out": None if out is None else str(out)}


def _sha256(data: PackedDataset | Part) -> str:
    return hashlib.sha256((data.folder / "manifest.json").read_bytes()).hexdigest()
