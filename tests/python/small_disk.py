"""A real small disk for tests of a full one."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest


def run(script: str, *, proof: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a shell script that may mount; skips where that is not allowed: it then exits with 77, or leaves no `proof`."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no `unshare` to mount a small disk with")
    done = subprocess.run(
        [unshare, "--user", "--map-root-user", "--mount", "sh", "-c", script],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )
    if done.returncode == 77 or not proof.exists():
        pytest.skip(f"this machine lets nobody mount a small disk: {done.stderr.strip()}")
    return done
