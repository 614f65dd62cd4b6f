"""What the benches have in common: children that measure themselves, the machine, and how results are told."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every bench has."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    made.add_argument("--quick", action="store_true", help="small sizes, one repeat: does it run?")
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


def rank_counts(asked: Sequence[int] | None, devices: int) -> list[int]:
    """Numbers of ranks to compare: one, and those that are asked for, or 2, 4 and 8 as far as there are devices."""
    return sorted({1, *(asked or (count for count in (2, 4, 8) if count <= devices))})


def row(
    name: str,
    unit: str,
    value: float,
    *,
    peers: Mapping[str, float] | None = None,
    more_is_better: bool,
    note: str,
) -> dict[str, Any]:
    """One result. `ratio` above 1 means that ours is better; outputs were equal, or the bench had stopped before."""
    peers = dict(peers or {})
    ratio = {peer: value / other if more_is_better else other / value for peer, other in peers.items()}
    return {
        "name": name,
        "unit": unit,
        "value": rounded(value),
        "peers": {peer: rounded(other) for peer, other in peers.items()},
        "ratio": {peer: rounded(times) for peer, times in ratio.items()},
        "equal": True,
        "note": note,
    }


def rounded(value: float) -> float:
    """Five digits: fills differ in the fourth."""
    return float(f"{value:.5g}")


def tell(rows: list[dict[str, Any]], *, as_json: bool) -> None:
    """Print the results: JSON for programs, a table for people."""
    if as_json:
        print(json.dumps({"machine": machine(), "rows": rows}))
        return
    from table import table

    print(table(rows))


def machine() -> dict[str, Any]:
    """Where this ran, and with which versions."""
    from importlib.metadata import version

    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    packages = ("numpy", "tokenizers", "transformers", "torch", "safetensors")
    return {
        "cpu": names[0].split(":", 1)[1].strip() if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def child(script: str, *arguments: object) -> dict[str, Any]:
    """Run a bench's script in a fresh process; what it prints on stdout is the JSON that comes back."""
    command = [sys.executable, script, *map(str, arguments)]
    # transformers takes a large vocabulary for one of Mistral's and warns; the outputs are compared anyway.
    environment = os.environ | {"PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """A result, and seconds, CPU seconds (all threads) and the process's greatest resident memory so far."""
    started, cpu = time.perf_counter(), cpu_seconds()
    result = work()
    seconds = {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu}
    return result, seconds | {"peak_rss_bytes": peak_rss_bytes()}


def cpu_seconds() -> float:
    """Of this process, threads included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_rss_bytes() -> int:
    """Greatest resident memory so far; getrusage's figure would hold the parent's as well."""
    return _status("VmHWM")


def rss_bytes() -> int:
    """Resident memory now."""
    return _status("VmRSS")


def private_bytes() -> int:
    """Memory that is this process's own: mapped files, which the system may drop, do not count."""
    return _status("RssAnon")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def median_and_spread(values: list[float]) -> str:
    """For notes."""
    return f"{statistics.median(values):.3g} [{min(values):.3g}-{max(values):.3g}]"
