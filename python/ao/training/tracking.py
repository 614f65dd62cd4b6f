"""The log of a run: a line of JSON every few steps, and the trackers that the recipe names."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

PROJECT = "activation-oracles"


def new_id(out: Path) -> str:
    """A name for a run, read by people and had by no other: the folder's last two names and random digits."""
    words = "-".join(out.resolve().parts[-2:])
    return f"{re.sub(r'[^A-Za-z0-9]+', '-', words).strip('-')[-80:]}-{secrets.token_hex(4)}"


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that are not there.

    Raises:
        ModuleNotFoundError: a tracker is not installed.
    """
    for name in names:
        try:
            import_module(name)
        except ModuleNotFoundError:
            raise ModuleNotFoundError(
                f"train.track names {name!r}, which is not installed; pip install {name}, or leave it out "
                "(log.jsonl is written anyway)"
            ) from None


class Log:
    """Writes each line to log.jsonl and to the trackers.

    Args:
        out: folder of the run; log.jsonl keeps its lines up to `step`, later ones are of a part that is done again.
        trackers: tensorboard, trackio, wandb, each of which is also the name of the package that it needs.
        run: the run's id, by which trackers go on with it.
        config: what the trackers show beside the run.
        step: steps done.
        active: False on ranks that do not speak: nothing is written.
    """

    def __init__(
        self,
        out: Path,
        trackers: Sequence[str],
        *,
        run: str,
        config: Mapping[str, Any],
        step: int = 0,
        active: bool = True,
    ) -> None:
        self._path = out / "log.jsonl"
        self._kept = step
        self._active = active
        self._file: Any = None
        self._trackers = [_tracker(name, out, run, config, step=step) for name in trackers] if active else []

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line: numbers by name, after `step` steps."""
        if not self._active:
            return
        if self._file is None:
            self._file = self._opened()
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        for tracker in self._trackers:
            tracker.write(step, numbers)

    def _opened(self) -> Any:
        """The file at the first line: a run that fails before it leaves nothing."""
        kept = [line for line in _lines(self._path) if line["step"] <= self._kept]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._path.open("w", encoding="utf-8")
        file.writelines(json.dumps(line) + "\n" for line in kept)
        return file


def _lines(path: Path) -> list[dict[str, Any]]:
    """What a killed process left whole."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _tracker(name: str, out: Path, run: str, config: Mapping[str, Any], *, step: int) -> Any:
    return _TensorBoard(out, step=step) if name == "tensorboard" else _Run(name, run, config, resumed=step > 0)


class _TensorBoard:
    def __init__(self, out: Path, *, step: int) -> None:
        self._folder = str(out / "tensorboard")
        self._kept = step
        self._writer: Any = None

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # Steps that are done again, or are an earlier run's, are hidden; a run that fails before hides nothing.
            self._writer = SummaryWriter(self._folder, purge_step=self._kept + 1)
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Run:
    """trackio and W&B, which share an interface."""

    def __init__(self, name: str, run: str, config: Mapping[str, Any], *, resumed: bool) -> None:
        self._library: Any = import_module(name)
        settings: dict[str, Any] = {"resume": "allow"} if resumed else {}
        if name == "wandb":
            # trackio goes on with the run of the same name.
            settings["id"] = run
        self._library.init(project=PROJECT, name=run, config=dict(config), **settings)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._library.log(dict(numbers), step=step)

    def close(self) -> None:
        self._library.finish()
