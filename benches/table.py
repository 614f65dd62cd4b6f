"""One table of all benches: the results of `benches/*.py --json` and of criterion.

`python benches/table.py [--quick]` runs every Python bench, then reads what `cargo bench` left, and prints the table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KINDS = ("pack", "activations", "train", "collect", "oracle")
"""A file with one of these in its name is a bench that compares."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--criterion", type=Path, default=HERE.parent / "target" / "criterion")
    args = parser.parse_args()
    machine: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for script in sorted(HERE.glob("*.py")):
        if any(kind in script.stem for kind in KINDS):
            print(f"== {script.name}", file=sys.stderr, flush=True)
            command = [sys.executable, str(script), "--json", *["--quick"] * args.quick]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                failed.append(script.name)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            machine = machine or found["machine"]
            rows += found["rows"]
    rows += criterion_rows(args.criterion)
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows}))
    else:
        print(f"{machine.get('cpu')}, {machine.get('cores')} cores, Python {machine.get('python')}\n\n{table(rows)}")
    if failed:
        raise SystemExit(f"not in the table, as they failed: {', '.join(failed)}; what they said stands above")


def criterion_rows(folder: Path) -> list[dict[str, Any]]:
    """The medians that criterion's latest run left behind, not those of benches that are gone."""
    rows = []
    found = {path: path.stat().st_mtime for path in sorted(folder.glob("**/new/estimates.json"))}
    for estimates in (path for path, time in found.items() if time > max(found.values()) - 3600):
        described = json.loads(estimates.with_name("benchmark.json").read_text())
        nanoseconds = json.loads(estimates.read_text())["median"]["point_estimate"]
        value, unit, note = nanoseconds / 1e3, "us", ""
        if described["throughput"] and (elements := described["throughput"].get("Elements")):
            note = f"{elements / nanoseconds * 1e9:.4g} elements/s"
        rows.append({"name": f"criterion/{described['full_id']}", "unit": unit, "value": value, "note": note})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Results as aligned text: value, each peer's value and how many times better ours is, note below."""
    cells = [("bench", "unit", "ours", "peers (times better)")]
    for row in rows:
        ratio = row.get("ratio", {})
        unit = row["unit"]
        peers = [f"{name} {short(value, unit)} ({short(ratio[name])}x)" for name, value in row.get("peers", {}).items()]
        cells.append((row["name"], unit, short(row["value"], unit), ", ".join(peers) or row.get("note", "")))
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    lines = []
    for name, unit, value, peers in cells:
        lines.append(f"{name:<{widths[0]}}  {unit:<{widths[1]}}  {value:>{widths[2]}}  {peers}".rstrip())
    lines.insert(1, "-" * len(lines[0]))
    notes = dict.fromkeys(f"{row['name']}: {row['note']}" for row in rows if row.get("note") and row.get("peers"))
    return "\n".join([*lines, "", *notes])


def short(value: float, unit: str = "") -> str:
    """A number for people; per cent with the digits in which fills differ."""
    if unit == "%":
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    main()
