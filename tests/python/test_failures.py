"""A full disk and inputs that cannot be read: clear errors, the right exit code, and nothing lost that was finished."""

import ctypes
import gzip
import json
import os
import resource
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import small_disk
from ao.config import load_recipe, parse_recipe
from ao.pack import pack
from ao.sources import files as readers
from mixture import Mixture, files, save_mixture


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    mixture = save_mixture(tmp_path_factory.mktemp("failures"), rows=120, examples_per_shard=32)
    mixture.packed(out="expected")
    return mixture


@pytest.fixture
def own(tmp_path: Path, mixture: Mixture) -> Mixture:
    """A copy, to spoil."""
    folder = tmp_path / "own"
    shutil.copytree(mixture.folder, folder, ignore=shutil.ignore_patterns("expected"))
    return Mixture(folder)


def test_a_full_disk_keeps_what_is_finished(mixture: Mixture, tmp_path: Path) -> None:
    """On a real small disk: a tmpfs in a mount namespace of its own, which is made larger before the build goes on."""
    expected = files(mixture.folder / "expected")
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    size = sum(map(len, expected.values())) // 2
    first, then = (
        f"{shlex.join(mixture.command(*flags, out=str(disk / 'packed')))} >{kept}/{name}.json 2>{kept}/{name}.err"
        for name, flags in (("first", ()), ("then", ("--resume",)))
    )
    script = f"""
        mount -t tmpfs -o size={size} none {disk} || exit 77
        {first}; echo $? >{kept}/code
        ls -A {disk}/packed.partial >{kept}/names
        mount -o remount,size=100m {disk} || exit 77
        {then} || exit 1
        cp -r {disk}/packed {kept}/packed
    """
    done = small_disk.run(script, proof=kept / "code", cwd=mixture.folder, env={**os.environ, "OMP_NUM_THREADS": "1"})
    error = (kept / "first.err").read_text()
    assert (kept / "code").read_text().strip() == "3", error
    assert "No space left on device" in error
    assert "free some space and go on with --resume, what is finished is kept" in error
    assert json.loads((kept / "first.json").read_text())["exit_code"] == 3
    left = (kept / "names").read_text().split()
    assert 1 <= sum(name.startswith("shard-") for name in left) < len(expected) - 1
    assert not [name for name in left if name.endswith(".partial")], "no torn file takes the space that is left"
    assert done.returncode == 0, (kept / "then.err").read_text()
    assert json.loads((kept / "then.json").read_text())["skipped"] > 0
    assert files(kept / "packed") == expected


def test_a_file_that_may_not_grow_keeps_what_is_finished(mixture: Mixture) -> None:
    """The same where no disk can be mounted: a limit on the size of a file stops the largest shard (EFBIG)."""
    expected = files(mixture.folder / "expected")
    limit = max(len(data) for name, data in expected.items() if name > "shard-00000.safetensors") - 1

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    code, result, error = mixture.run(out="limited", preexec_fn=limited)
    assert code == 3, error
    assert "File too large" in result["error"]
    assert "raise the limit" in result["error"]
    left = [file.name for file in (mixture.folder / "limited.partial").iterdir()]
    assert sum(name.startswith("shard-") for name in left) >= 1
    assert not [name for name in left if name.endswith(".partial")]
    assert "--resume goes on with them" in error
    assert mixture.packed("--resume", out="limited")["skipped"] > 0
    assert files(mixture.folder / "limited") == expected


def forbidden() -> None:
    """Give up root's right to read everything."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if prctl(24, capability, 0, 0, 0) != 0:  # PR_CAPBSET_DROP
            raise OSError(ctypes.get_errno(), "capabilities cannot be given up")


def without_permission(folder: Path) -> None:
    (folder / "records.jsonl").chmod(0)


def a_folder(folder: Path) -> None:
    (folder / "labels.csv").unlink()
    (folder / "labels.csv").mkdir()


def a_folder_as_model(folder: Path) -> None:
    (folder / "model/tokenizer.json").unlink()
    (folder / "model/tokenizer.json").mkdir()


def missing(folder: Path) -> None:
    (folder / "labels.csv").unlink()


def cut_gzip(folder: Path) -> None:
    data = (folder / "texts.jsonl.gz").read_bytes()
    (folder / "texts.jsonl.gz").write_bytes(data[: len(data) // 2])


def no_gzip(folder: Path) -> None:
    (folder / "texts.jsonl.gz").write_bytes(b"plain text")


def latin_rows(folder: Path) -> None:
    data = (folder / "records.jsonl").read_bytes().splitlines(keepends=True)
    data[40] = data[40].replace(b"Is this", b"Is th\xefs").replace(b"What is", b"Wh\xe4t is")
    (folder / "records.jsonl").write_bytes(b"".join(data))


def latin_rows_compressed(folder: Path) -> None:
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a b c d e f g"}\n{"text": "\xe4 b c d e"}\n'))


def latin_cells(folder: Path) -> None:
    data = (folder / "labels.csv").read_bytes()
    (folder / "labels.csv").write_bytes(data.replace(b"Paris", b"P\xe4ris", 1))


def latin_recipe(folder: Path) -> None:
    data = (folder / "recipe.toml").read_bytes()
    (folder / "recipe.toml").write_bytes(data.replace(b"Cannot", b"C\xe4nnot"))


def zeros(folder: Path) -> None:
    (folder / "records.jsonl").write_bytes(bytes(5000))


@pytest.mark.parametrize(
    ("spoil", "messages"),
    [
        (without_permission, ["source 'records' cannot be read", "records.jsonl", "ermission denied"]),
        (a_folder, ["source 'labels'", "labels.csv has no file of"]),
        (a_folder_as_model, ["tokenizer.json"]),
        (missing, ["labels.csv does not exist"]),
        (cut_gzip, ["texts.jsonl.gz: cannot be decompressed", "damaged or cut off"]),
        (no_gzip, ["texts.jsonl.gz: cannot be decompressed"]),
        (latin_rows, ['source "records"', "records.jsonl: line 41", "not JSON", "code point"]),
        (latin_rows_compressed, ['source "texts"', "texts.jsonl.gz: line 2", "not JSON", "code point"]),
        (latin_cells, ["labels.csv", "UTF"]),
        (latin_recipe, ["recipe.toml"]),
        (zeros, ['source "records"', "records.jsonl: line 1", "not JSON"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_cannot_be_read_is_told(own: Mixture, spoil: Callable[[Path], None], messages: list[str]) -> None:
    spoil(own.folder)
    if spoil is without_permission:
        options: dict[str, Any] = {"preexec_fn": forbidden} if os.geteuid() == 0 else {}
        code, result, error = own.run(**options)
    else:
        code, result, error = called(own)
    assert code == 2, error
    assert all(message in result["error"] for message in messages), result["error"]
    assert "Traceback" not in error
    assert not (own.folder / "packed").exists()


def called(mixture: Mixture) -> tuple[int, dict[str, Any], str]:
    """The command in this process, which is quicker."""
    import contextlib
    import io

    from ao.cli import pack_main

    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(mixture.folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        pack_main(mixture.command()[3:])
    return int(str(stop.value.code)), json.loads(out.getvalue()), err.getvalue()


@pytest.mark.parametrize("part", [(0, 1), (1, 2)])
def test_a_file_that_changes_meanwhile_is_told(
    own: Mixture, monkeypatch: pytest.MonkeyPatch, part: tuple[int, int]
) -> None:
    monkeypatch.chdir(own.folder)
    recipe = load_recipe(own.folder / "recipe.toml")
    out = own.folder / "packed"
    changed = own.folder / "labels.csv"
    before = changed.read_bytes()
    read = readers.read_csv
    passes = 0

    def changing(path: Path, columns: Any) -> Any:
        nonlocal passes
        passes += 1
        if passes == 2:  # The survey has seen it; now it is packed.
            path.write_bytes(before.replace(b",a\n", b",b\n"))
        return read(path, columns)

    with monkeypatch.context() as patch:
        patch.setitem(readers._READERS, ".csv", changing)
        with pytest.raises(ValueError, match=r"labels\.csv was changed while it was packed.*pack again"):
            pack(recipe, root=own.folder, out=out, part=part)
    assert passes == 2
    assert not list(own.folder.glob("packed*/shard-*")), "nothing that was built of it stays"
    changed.write_bytes(before)
    if part == (0, 1):
        pack(recipe, root=own.folder, out=out)
        assert (out / "manifest.json").is_file()
    else:
        pack(recipe, root=own.folder, out=out, part=part)
        assert list(own.folder.glob("packed.partial/shard-*"))


@pytest.mark.parametrize("target", ["fuzz", "soak"])
def test_a_soak_does_not_pass_without_fuzzing(tmp_path: Path, target: str) -> None:
    """`make` says what to install, before anything runs for long."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("no `make`")
    (tmp_path / "cargo").write_text("#!/bin/sh\nexit 101\n")
    (tmp_path / "cargo").chmod(0o755)
    done = subprocess.run(
        [make, "-C", str(Path(__file__).parents[2]), target],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    assert "fuzzing needs `rustup toolchain install nightly` and `cargo install cargo-fuzz`" in done.stderr


def test_a_part_that_is_refused_leaves_no_trace(own: Mixture) -> None:
    """Of another division than the parts that are there: its lock would make `ao inspect` ask for the rest of it."""
    own.packed("--part", "0/2")
    before = files(own.folder)
    code, _, error = own.run("--part", "1/3")
    assert code == 2, error
    assert files(own.folder) == before


def test_a_stream_of_a_known_count_shows_how_far_it_is(
    own: Mixture, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its rows are taken until they give the count, without a survey; the bar knows where it ends nevertheless."""
    import datasets

    rows = [{"text": f"she went to the park {index}"} for index in range(60)]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **values: datasets.Dataset.from_list(rows).to_iterable_dataset()
    )
    source = {
        "name": "s",
        "kind": "context_prediction",
        "dataset": "o/n",
        "count": 20,
        "window": [1, 2],
        "predict": [1, 2],
    }
    recipe = parse_recipe({"model": {"name": str(own.folder / "model")}, "data": {"sources": [source]}})
    pack(recipe, root=own.folder, out=own.folder / "streamed", progress=True)
    assert "20.0/20.0" in capsys.readouterr().err
