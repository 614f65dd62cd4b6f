"""Memory of training: linear in the length of a context and of a prompt, as its bench measures it in fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "benches" / "train_throughput.py"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the system's own count of a process's greatest memory")
def test_a_long_example_costs_memory_linear_in_its_length():
    command = [sys.executable, BENCH, "--shape", "tiny", "--only", "long", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    # Twice the tokens for more than 2.2 times the memory ends the bench with an error.
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)["rows"]
    assert [row["name"] for row in rows] == ["train/tiny/long_context", "train/tiny/long_prompt"]
    assert all(row["value"] > 10 for row in rows)
