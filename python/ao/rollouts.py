"""The target's own answers: prompts in, chats out, for context prediction on what the model itself says (on-policy).

Half of the prompts get a system turn with a persona, so that there is something behind the answers that can be read.
Source: "Building Better Activation Oracles" (arXiv 2606.02609): at most 200 sampled tokens, half with a persona.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ao import sources
from ao._ao import AoError, Framer
from ao.config import ContextPredictionSource, ModelConfig
from ao.decode import OraclePrompt, generate
from ao.injection import Injector
from ao.models import arch as archs
from ao.models.load import load_model
from ao.prompt import framer, special_ids

Messages = list[dict[str, str]]

CHUNK = 64
"""Prompts answered, and written, together."""
MAX_PROMPT_TOKENS = 2000
"""Longer prompts are passed over."""

PERSONAS = (
    "You are a retired lighthouse keeper who measures everything against the weather.",
    "You are a schoolteacher in a mountain village and explain things with patience and small examples.",
    "You are a pastry cook with strong opinions, short of time and fond of precise quantities.",
    "You are a night nurse: calm, dry-humoured, always thinking of what could go wrong.",
    "You are a stage magician and never quite say how anything is done.",
    "You are a bookkeeper who distrusts round numbers and likes to see every step.",
    "You are a gardener of seventy. You speak slowly, in the present tense, mostly of what grows.",
    "You are a sports commentator and cannot help making everything sound like a final.",
    "You are a monk who has taken a vow of plain words: no sentence of yours has more than ten of them.",
    "You are an enthusiastic first-year student of chemistry.",
    "You are a grumpy ship's engineer. You help, but you complain about it first.",
    "You are a diplomat and avoid saying no to anybody.",
    "You are a detective who suspects that each question hides another one.",
    "You are a grandmother from a fishing port and give advice in proverbs.",
    "You are a museum guide who relates everything to the eighteenth century.",
    "You are a chess player. You think aloud in plans, threats and exchanges.",
    "You are a travelling musician without money, cheerful about it.",
    "You are a lawyer who qualifies every statement.",
    "You are a wildlife photographer, quiet and observant, with an eye for light.",
    "You are a robot from an old novel, courteous and literal to a fault.",
    "You are a radio host late at night and speak to your listener as to a friend.",
    "You are a carpenter who believes that most problems are problems of measuring.",
    "You secretly want to bring every conversation round to the sea, without saying so.",
    "You are a poet who has sworn off rhymes but not off images.",
)
"""System turns, one of which is drawn by key for each prompt that gets one."""


def rollouts(
    model: ModelConfig,
    *,
    prompts: Path,
    out: Path,
    text: str = "text",
    count: int | None = None,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    persona_share: float = 0.5,
    personas: Sequence[str] = PERSONAS,
    seed: int = 0,
    tokens_per_row: int = 8192,
    progress: bool = False,
) -> dict[str, Any]:
    """Let the target answer prompts, and append its chats to a JSONL file; prompts whose id is there are passed over.

    A line is {"id", "messages"}: the persona as system turn where there is one, the prompt, the answer. Answers are sampled
    from a generator seeded by `seed` and the first id of their chunk.

    Args:
        model: Names the target, or the base where there is no other.
        prompts: Texts or chats in any format that `context_prediction` reads; of a chat what follows its last user turn is
            cut off. A row's `id` is kept where it has one, else it is the file's name and the row.
        out: The JSONL file.
        text: Column of the text.
        count: Prompts taken; all without a number.
        max_new_tokens: Longest answer.
        temperature: 0 takes the most probable token.
        persona_share: Share of the prompts that get a persona, if they have no system turn.
        personas: What to draw personas from.
        seed: Keys personas and answers.
        tokens_per_row: Token budget of one batch.
        progress: Show a progress bar on stderr.

    Returns:
        {"out", "answered", "skipped" (there already), "too_long", "empty" (answers without a word), "tokens"}.

    Raises:
        FileNotFoundError: the prompts or the model are missing.
        ValueError: a prompt is no text or chat, an id repeats, or the template takes no system turn.
    """
    if not 0 <= persona_share <= 1:
        raise ValueError(f"persona_share lies in [0, 1], got {persona_share}")
    if persona_share and not personas:
        raise ValueError("personas is empty; give at least one, or persona_share = 0")
    done = _finished(out)
    asked = {}
    for id_, messages in _prompts(prompts, text=text, count=count):
        if id_ in asked:
            raise ValueError(f"{prompts}: the id {id_!r} repeats; ids must be unique")
        asked[id_] = messages
    waiting = [(id_, messages) for id_, messages in asked.items() if id_ not in done]
    record: dict[str, Any] = {"out": str(out), "answered": 0, "skipped": len(asked) - len(waiting)}
    record |= {"too_long": 0, "empty": 0, "tokens": 0}
    if not waiting:
        return record
    name, revision = (model.name, model.revision) if model.target is None else (model.target, model.target_revision)
    target_framer = framer(name, revision)
    special = special_ids(ModelConfig(name=name, revision=revision))
    target = load_model(model, which="base" if model.target is None else "target")
    # No vectors, so the hook stays idle; `generate` wants one.
    injector = Injector(archs.find(target).layers, layer=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "ab") as file:
        for chunk in _chunks(waiting, progress=progress):
            chats = [(id_, _with_persona(id_, messages, persona_share, personas, seed)) for id_, messages in chunk]
            framed = [(id_, messages, _ids(target_framer, id_, messages)) for id_, messages in chats]
            short = [entry for entry in framed if len(entry[2]) <= MAX_PROMPT_TOKENS]
            record["too_long"] += len(framed) - len(short)
            torch.manual_seed(_key(seed, chunk[0][0], "rollout"))
            answers = generate(
                target,
                injector,
                [OraclePrompt(ids, np.zeros(0, dtype=np.int64), None) for _, _, ids in short],
                end_of_turn_id=target_framer.end_of_turn_id,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                tokens_per_row=tokens_per_row,
            )
            for (id_, messages, _), ids in zip(short, answers, strict=True):
                answer = target_framer.decode(ids[~np.isin(ids, special)].astype(np.int32)).strip()
                if not answer:
                    record["empty"] += 1
                    continue
                line = {"id": id_, "messages": [*messages, {"role": "assistant", "content": answer}]}
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                record["answered"] += 1
                record["tokens"] += len(ids)
            file.flush()
            os.fsync(file.fileno())
    return record


def _key(seed: int, id_: str, purpose: str) -> int:
    """A number below 2**63 that depends on these three alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{purpose}\0{id_}".encode(), digest_size=8).digest(), "little") >> 1


def _finished(out: Path) -> set[str]:
    """Ids in the file; a line that a killed run left unfinished is cut off."""
    if not out.exists():
        return set()
    done: set[str] = set()
    whole = 0
    with open(out, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                done.add(json.loads(line)["id"])
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{out}: line {number}: not a line of `ao rollouts`; choose another --out") from None
            whole += len(line)
    if whole < out.stat().st_size:
        os.truncate(out, whole)
    return done


def _prompts(path: Path, *, text: str, count: int | None) -> Iterator[tuple[str, Messages]]:
    """Id and messages of each prompt, the last message the user's."""
    config = ContextPredictionSource(name=path.stem, kind="context_prediction", path=str(path), text=text, rows=count)
    for part in sources.rows(config, root=Path(), seed=0):
        is_json = part.batch.schema.names == ["json"]
        for index, row in enumerate(part.batch.to_pylist(), start=part.first_row):
            where = f"{path}: row {index}"
            if is_json:
                if not row["json"].strip():
                    continue
                try:
                    row = json.loads(row["json"])
                except ValueError as error:
                    raise ValueError(f"{where}: not JSON: {error}") from None
            id_ = row.get("id") if isinstance(row, dict) else None
            yield id_ if isinstance(id_, str) else f"{part.table['prefix']}/{index}", _asked(row, text, where)


def _asked(row: Any, text: str, where: str) -> Messages:
    """A row's chat up to its last user turn."""
    prompt = (row.get("messages") or row.get(text)) if isinstance(row, dict) else None
    if isinstance(prompt, str) and prompt.strip():
        return [{"role": "user", "content": prompt.strip()}]
    turns: list[Any] = prompt if isinstance(prompt, list) else []
    messages: list[Any] = [
        {key: turn.get(key) for key in ("role", "content")} for turn in turns if isinstance(turn, dict)
    ]
    if len(messages) < len(turns) or not all(isinstance(value, str) for turn in messages for value in turn.values()):
        messages = []
    while messages and messages[-1]["role"] != "user":
        messages.pop()
    if not messages:
        raise ValueError(
            f"{where}: expected a text under {text!r} or a chat with a user turn, got {str(prompt)[:60]!r}"
        )
    return messages


def _with_persona(id_: str, messages: Messages, share: float, personas: Sequence[str], seed: int) -> Messages:
    if messages[0]["role"] == "system" or _key(seed, id_, "persona") >= share * 2**63:
        return messages
    return [{"role": "system", "content": personas[_key(seed, id_, "which") % len(personas)]}, *messages]


def _ids(target_framer: Framer, id_: str, messages: Messages) -> np.ndarray:
    try:
        return np.asarray(target_framer.context(json.dumps(messages)).ids).astype(np.int64)
    except AoError as error:
        remedy = "; a template without system turns wants --persona-share 0" if messages[0]["role"] == "system" else ""
        raise ValueError(f"prompt {id_!r}: {error}{remedy}") from None


def _chunks(waiting: list[tuple[str, Messages]], *, progress: bool) -> Iterator[list[tuple[str, Messages]]]:
    from tqdm import tqdm

    with tqdm(desc="rollouts", total=len(waiting), unit=" answers", disable=not progress) as bar:
        for start in range(0, len(waiting), CHUNK):
            chunk = waiting[start : start + CHUNK]
            yield chunk
            bar.update(len(chunk))
