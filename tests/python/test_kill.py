"""kill -9 at random moments: a build that goes on with `--resume` ends with the bytes of an undisturbed one.

`AO_KILLS` is the number of kills of a whole build, and twice that of parts and merges; `make soak` raises it.
"""

import itertools
import os
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mixture import Mixture, files, save_mixture

KILLS = int(os.environ.get("AO_KILLS", "4"))
SEED = int(os.environ.get("AO_KILL_SEED", "0"))
PARTS = 3


@dataclass
class Build:
    """The mixture, what an undisturbed build of it leaves, and how long that took in seconds."""

    mixture: Mixture
    expected: dict[str, bytes]
    seconds: float

    @property
    def num_shards(self) -> int:
        return sum(name.startswith("shard-") for name in self.expected)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    mixture = save_mixture(tmp_path_factory.mktemp("kill"), rows=700, examples_per_shard=64)
    started = time.monotonic()
    mixture.packed(out="undisturbed")
    seconds = time.monotonic() - started
    expected = files(mixture.folder / "undisturbed")
    assert len(expected) > 60
    return Build(mixture, expected, seconds)


def names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def num_shards(folder: Path) -> int:
    return sum(name.startswith("shard-") for name in names(folder))


def is_merging(folder: Path) -> bool:
    return any("manifest.json" in name for name in names(folder))


def wait(process: subprocess.Popen[str], partial: Path, draws: random.Random, build: Build, manner: str) -> None:
    """Return at the moment of the kill, or when the process has ended."""
    if manner == "any time":
        end = time.monotonic() + draws.uniform(0, build.seconds)
        reached = lambda: time.monotonic() >= end  # noqa: E731
    elif manner == "manifest":
        reached = lambda: is_merging(partial)  # noqa: E731
    else:
        wanted = num_shards(partial) + draws.randrange(1, build.num_shards)
        reached = lambda: num_shards(partial) >= wanted  # noqa: E731
    while process.poll() is None and not reached():
        time.sleep(0.0005)
    if manner == "among shards":
        time.sleep(draws.uniform(0, 0.01))


def manners() -> Iterator[str]:
    return itertools.cycle(["among shards", "any time", "manifest", "any time"])


def finish(build: Build, out: str) -> None:
    """What is there in the end, and nothing else beside it."""
    mixture = build.mixture
    found = files(mixture.folder / out)
    assert sorted(found) == sorted(build.expected)
    assert found == build.expected
    assert not [name for name in names(mixture.folder) if name.startswith((f"{out}.", f".{out}."))]


@pytest.mark.slow
def test_a_killed_build_is_resumed_to_the_same_bytes(build: Build) -> None:
    mixture, draws, kinds = build.mixture, random.Random(SEED), manners()
    kills = amid = 0
    for turn in itertools.count():
        if kills >= KILLS:
            break
        out = f"killed-{turn}"
        partial = mixture.folder / f"{out}.partial"
        disturbed = True
        while disturbed:
            process = mixture.start("--resume", out=out)
            wait(process, partial, draws, build, next(kinds))
            process.kill()
            _, stderr = process.communicate()
            if process.returncode == 0:
                break
            assert process.returncode == -9, stderr
            kills += 1
            amid += num_shards(partial) > 0 and not (partial / "manifest.json").exists()
            disturbed = draws.random() < 0.3
        mixture.packed("--resume", out=out)
        finish(build, out)
    print(f"{kills} kills, {amid} of them with shards and no manifest")
    assert amid >= max(1, KILLS // 5), f"of {kills} kills {amid} came in the middle of a build"


@pytest.mark.slow
def test_killed_parts_and_a_killed_merge_make_the_same_bytes(build: Build) -> None:
    mixture, draws = build.mixture, random.Random(SEED + 1)
    kills = amid = merges = 0
    for turn in itertools.count():
        if kills >= KILLS // 2:
            break
        out = f"parts-{turn}"
        partial = mixture.folder / f"{out}.partial"
        for part in draws.sample(range(PARTS), PARTS):
            flags = ("--part", f"{part}/{PARTS}", "--resume")
            if draws.random() < 0.5:
                process = mixture.start(*flags, out=out)
                before = num_shards(partial)
                wait(process, partial, draws, build, draws.choice(["among shards", "any time"]))
                process.kill()
                _, stderr = process.communicate()
                assert process.returncode in (0, -9), stderr
                kills += process.returncode == -9
                amid += process.returncode == -9 and num_shards(partial) > before
            mixture.packed(*flags, out=out)
        process = mixture.start("--merge", out=out)
        wait(process, partial, draws, build, draws.choice(["manifest", "any time"]))
        process.kill()
        _, stderr = process.communicate()
        assert process.returncode in (0, -9), stderr
        kills += process.returncode == -9
        merges += process.returncode == -9
        if not (mixture.folder / out).exists():
            mixture.packed("--merge", out=out)
        finish(build, out)
    print(f"{kills} kills, {amid} of them with new shards, {merges} of merges")
    assert amid + merges > 0
