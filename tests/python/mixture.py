"""A generated mixture of every kind of source, and the command that packs it, for tests of the command as a process."""

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny

WORDS = [
    "the",
    "a",
    "city",
    "of",
    "Paris",
    "France",
    "she",
    "will",
    "go",
    "went",
    "to",
    "park",
    "yesterday",
    "token",
    "1",
    "2",
]
RECIPE = """\
[model]
name = "model"

[data]
out = "packed"
examples_per_shard = {examples_per_shard}

[[data.sources]]
name = "records"
kind = "records"
path = "records.jsonl"
reads = [{{ share = 0.5, window = [1, 4] }}, {{ share = 0.5, all = true }}]

[[data.sources]]
name = "texts"
kind = "context_prediction"
path = "texts.jsonl.gz"
draws_per_text = 2
predict = [1, 4]
window = [1, 5]
count = {texts}

[[data.sources]]
name = "labels"
kind = "classification"
path = "labels.csv"
questions = ["Is it {{label}}?", "What is it?"]
questions_per_text = 2
unanswerable = {{ share = 0.2, answer = "Cannot tell." }}
"""


@dataclass(frozen=True)
class Mixture:
    """A folder with a recipe, its files and its model."""

    folder: Path

    def command(self, *flags: str, out: str = "packed") -> list[str]:
        """`ao-pack` on the recipe."""
        entry = "from ao.cli import pack_main; pack_main()"
        return [sys.executable, "-c", entry, "recipe.toml", "--out", out, "--json", *flags]

    def start(self, *flags: str, out: str = "packed", **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*flags, out=out),
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, *flags: str, out: str = "packed", **options: Any) -> tuple[int, dict[str, Any], str]:
        """Exit code, what is on stdout and what is on stderr."""
        process = self.start(*flags, out=out, **options)
        stdout, stderr = process.communicate(timeout=300)
        return process.returncode, json.loads(stdout or "{}"), stderr

    def packed(self, *flags: str, out: str = "packed", **options: Any) -> dict[str, Any]:
        """The same where it has to work."""
        code, result, stderr = self.run(*flags, out=out, **options)
        assert code == 0, stderr
        return result


def save_mixture(folder: Path, *, rows: int, examples_per_shard: int) -> Mixture:
    """Write a mixture of about seven examples for each of `rows`."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.save_model(folder / "model")

    def text(row: int) -> str:
        return " ".join(WORDS[(row * 7 + at * (1 + row % 5)) % len(WORDS)] for at in range(4 + row % 23)) + f" {row}"

    records = [
        {
            "id": f"r{row}",
            "context": text(row // 2) if row % 3 else [{"role": "user", "content": text(row)}],
            "question": "Is this statement true?" if row % 2 else "What is it about? \n ?",
            "answer": "Yes" if row % 5 else "It is Café 你好.",
        }
        for row in range(rows)
    ]
    _write_lines(folder / "records.jsonl", records)
    lines = "".join(json.dumps({"text": text(row)}) + "\n" for row in range(2 * rows))
    (folder / "texts.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    cells = [f"{text(row)},{'abc'[row * 5 % 3]}" for row in range(rows)]
    (folder / "labels.csv").write_text("\n".join(["text,label", *cells]) + "\n", encoding="utf-8")
    recipe = RECIPE.format(examples_per_shard=examples_per_shard, texts=3 * rows)
    (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    return Mixture(folder)


def files(folder: Path) -> dict[str, bytes]:
    """All files below a folder by name."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
