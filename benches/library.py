"""The peer `library`: what a good engineer builds from libraries. Runs in a process of its own, because its tokenizers 1.0
and LightBinPack do not agree with what is installed beside `ao`.

Compiled Jinja as transformers compiles it, batched BPE, NumPy, LightBinPack, safetensors. Layer, number of positions,
question and answer of every example are given to it ready made, so it draws nothing and finds no spans; with contexts it
also tokenizes each text once. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

CHUNK = 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--path", action="append", default=[], help="folders with the packages")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--end-of-turn", required=True)
    parser.add_argument("--examples", type=Path, required=True)
    parser.add_argument("--contexts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    sys.path[:0] = args.path
    args.out.mkdir(parents=True)
    import lightbinpack  # noqa: F401 - loaded before the clock starts, as ours is
    import numpy  # noqa: F401
    import safetensors.numpy  # noqa: F401
    import tokenizers

    started, cpu = time.perf_counter(), cpu_seconds()
    count = build(args)
    seconds = time.perf_counter() - started
    report = {
        "examples": count,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - cpu,
        "peak_rss_bytes": peak_rss_bytes(),
        "bytes": sum(file.stat().st_size for file in args.out.iterdir()),
        "tokenizers": tokenizers.__version__,
    }
    print(json.dumps(report))


def build(args: argparse.Namespace) -> int:
    import numpy as np
    from lightbinpack import pack
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    template = compiled((args.model / "chat_template.jinja").read_text())
    settings = json.loads((args.model / "tokenizer_config.json").read_text())
    variables = {name: settings.get(name) for name in ("bos_token", "eos_token") if settings.get(name)}

    def render(messages: list[dict[str, str]], *, generation: bool) -> str:
        return template.render(messages=messages, add_generation_prompt=generation, enable_thinking=False, **variables)

    def encoded(texts: list[str]) -> tuple[Any, Any]:
        """Ids one behind the other, and where each text's begin."""
        ids = [encoding.ids_array for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
        offsets = np.cumsum([0, *map(len, ids)])
        return np.concatenate(ids).astype(np.int32), offsets

    placeholder = encoded([render([{"role": "user", "content": "Layer: 0\n ? \nx"}], generation=True)])[0]
    placeholder = next(int(i) for i in placeholder if tokenizer.decode([int(i)]) == " ?")
    count, lengths = 0, []
    for number, rows in enumerate(chunks(args.examples)):
        prompts, offsets = encoded(
            [
                render(
                    [{"role": "user", "content": f"Layer: {layer}\n{' ?' * positions} \n{question}"}], generation=True
                )
                for layer, positions, question, _ in rows
            ]
        )
        answers, answer_offsets = encoded([row[3] + args.end_of_turn for row in rows])
        of_prompt, of_answer = np.diff(offsets), np.diff(answer_offsets)
        starts = np.concatenate([[0], np.cumsum(of_prompt + of_answer)])
        ids = np.empty(starts[-1], np.int32)
        labels = np.full(starts[-1], -100, np.int32)
        into = np.repeat(starts[:-1] - offsets[:-1], of_prompt) + np.arange(len(prompts))
        ids[into] = prompts
        into = np.repeat(starts[:-1] + of_prompt - answer_offsets[:-1], of_answer) + np.arange(len(answers))
        ids[into] = labels[into] = answers
        positions = np.array([row[1] for row in rows])
        found = np.flatnonzero(ids == placeholder)
        first = found[np.searchsorted(found, starts[:-1])]
        ends = np.cumsum(positions)
        placeholders = np.repeat(first - (ends - positions), positions) + np.arange(ends[-1])
        if not (ids[placeholders] == placeholder).all():
            raise ValueError("a placeholder is not one token")
        layers = np.repeat(np.array([row[0] for row in rows], np.int16), positions)
        lengths.append(of_prompt + of_answer)
        arrays = {"ids": ids, "labels": labels, "offsets": starts, "placeholders": placeholders, "layers": layers}
        save_file(arrays, args.out / f"tokens-{number:05}.safetensors")
        count += len(rows)
    for number, rows in enumerate(chunks(args.contexts) if args.contexts else ()):
        bos = variables.get("bos_token", "")
        texts = [
            bos + row if isinstance(row, str) else render(row, generation=row[-1]["role"] != "assistant")
            for row in rows
        ]
        ids, offsets = encoded(texts)
        save_file({"ids": ids, "offsets": offsets}, args.out / f"contexts-{number:05}.safetensors")
    bins = pack(np.concatenate(lengths).tolist(), 8192, strategy="obfd")
    flat = np.fromiter((item for row in bins for item in row), np.int64)
    save_file({"order": flat, "offsets": np.cumsum([0, *map(len, bins)])}, args.out / "rows.safetensors")
    return count


def compiled(source: str) -> Any:
    """A template as transformers compiles it."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    return environment.from_string(source)


def chunks(path: Path) -> Any:
    """Parsed lines of a file, some thousands at a time."""
    with path.open(encoding="utf-8") as file:
        lines = map(json.loads, file)
        while chunk := list(islice(lines, CHUNK)):
            yield chunk


def cpu_seconds() -> float:
    """Of this process, threads included."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def peak_rss_bytes() -> int:
    """Greatest resident memory so far; getrusage's figure would hold the parent's as well."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
