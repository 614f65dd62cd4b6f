"""kill -9 at random moments: what goes on ends with the bytes of what was not disturbed, a build with `--resume`, `ao collect`
as it is.

`AO_KILLS` is the number of kills of a whole build, and of `ao collect`, and twice that of parts and merges; `make soak`
raises it.
"""

import itertools
import json
import os
import random
import subprocess
import sys
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


COLLECT = """
import contextlib, json, os, random, signal, sys, time
from pathlib import Path
from ao import cli
from ao.collect import run, wanted  # run brings torch, once for all forks

recipe, root, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
wanted.UNIT_TOKENS = 15
draws = random.Random(seed)

def start(out):
    if (process := os.fork()) == 0:
        sys.stderr = open(root / "err", "w")
        os._exit(cli.main(["collect", recipe, "--out", str(out)]) or 0)
    return process

def names(out):
    with contextlib.suppress(FileNotFoundError):
        return set(os.listdir(out))
    return set()

def ended(process):
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

def kill(process, out, count):
    # When the folder has so many names; nothing happens to a process that has ended.
    while not ended(process) and len(names(out)) < count:
        time.sleep(0.0002)  # a unit is there after some milliseconds, and a kill is to come among its files
    time.sleep(draws.uniform(0, 0.005))  # not always at a name's first moment, but also between files and within one
    os.kill(process, signal.SIGKILL)

out = root / "undisturbed"
assert os.waitpid(start(out), 0)[1] == 0, (root / "err").read_text()
whole = len(names(out))
done = amid = turn = 0
# A kill that comes too late, on a machine that has other work, does not count.
while (done < kills or amid < max(1, kills // 2)) and turn < 10 * kills:
    turn += 1
    out = root / f"killed-{turn}"
    for _ in range(draws.choice((1, 1, 2, 3))):
        before, process = names(out), start(out)
        # Most of the time goes to loading: wait for names that were not there.
        kill(process, out, len(before) + draws.randrange(1, max(2, whole - len(before))))
        status = os.waitpid(process, 0)[1]
        if status == 0:
            break
        assert status == signal.SIGKILL, (root / "err").read_text()
        done += 1
        amid += "manifest.json" not in names(out) and names(out) != before
    else:
        assert os.waitpid(start(out), 0)[1] == 0, (root / "err").read_text()
print(json.dumps({"kills": done, "amid": amid, "turns": turn}))
"""
"""Forks each `ao collect` from a process that has torch loaded already, of which a kill of a second's run would see little else."""


@pytest.mark.slow
def test_a_killed_collect_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    words = itertools.permutations(("kite", "hat", "boat", "cup", "red", "blue", "green"), 3)
    lines = [
        json.dumps({"id": f"{number}", "context": " ".join(three), "question": "What is it?", "answer": three[0]})
        for number, three in enumerate(words)
    ]
    (tmp_path / "records.jsonl").write_text("\n".join(lines))
    (tmp_path / "recipe.toml").write_text(
        f"""
[model]
name = "demo"
precision = "fp32"
device = "cpu"

[data]
out = "{tmp_path}/packed"
read_depths = [0.25, 0.5]
sources = [{{ name = "r", kind = "records", path = "{tmp_path}/records.jsonl" }}]
"""
    )
    recipe = str(tmp_path / "recipe.toml")
    subprocess.run([sys.executable, "-m", "ao", "pack", recipe], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, recipe, str(tmp_path), str(KILLS), str(SEED)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    # The picture's title is the folder's name.
    expected, *killed = (
        {name: content for name, content in files(tmp_path / out).items() if name != "norms.png"}
        for out in ("undisturbed", *(f"killed-{turn}" for turn in range(1, told["turns"] + 1)))
    )
    assert len(expected) > 10
    for number, found in enumerate(killed, 1):
        assert found == expected, f"killed-{number}"
    print(f"{told['kills']} kills of ao collect, {told['amid']} of them among units")
    assert told["kills"] >= KILLS
    assert told["amid"] >= max(1, KILLS // 2)
