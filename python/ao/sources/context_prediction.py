"""Plain text and chats whose own tokens are predicted; question and answer are made from the tokens when packed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ao.config import ContextPredictionSource
from ao.sources import files


def examples(config: ContextPredictionSource, *, seed: int, path: Path) -> Iterator[dict[str, Any]]:
    """One Example per document, in file order, with no more than a context.

    A .jsonl file has a document a line: a chat where the object has `messages`, else the text under `config.text`. Any
    other file is plain text, a document a paragraph (paragraphs are parted by blank lines).
    """
    if path.is_dir():
        raise ValueError(f"source {config.name!r}: {path} is a folder; expected a .jsonl or a text file")
    is_jsonl = path.suffix == ".jsonl"

    def rows() -> Iterator[tuple[str, tuple[int, bytes]]]:
        for number, document in files.lines(path) if is_jsonl else _paragraphs(path):
            yield f"{config.name}/{number}", (number, document)

    for name, (number, document) in files.draw(rows, count=config.count, seed=seed):
        where = f"{path}: line {number}"
        context = _context(config, document, where=where) if is_jsonl else _text(document, where=where)
        yield {"id": name, "source": config.name, "context": context}


def _context(config: ContextPredictionSource, line: bytes, *, where: str) -> str | list[dict[str, str]]:
    entry = files.parse_object(line, where=where)
    if "messages" not in entry:
        return files.field(entry, config.text, where=where)
    messages = entry["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: key 'messages': expected a list of messages, got {messages!r}")
    for index, message in enumerate(messages):
        is_turn = isinstance(message, dict) and all(isinstance(message.get(name), str) for name in ("role", "content"))
        if not is_turn:
            raise ValueError(
                f"{where}: message {index}: expected an object with texts role and content, got {message!r}"
            )
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _text(document: bytes, *, where: str) -> str:
    try:
        return document.decode().strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8: {error}") from None


def _paragraphs(path: Path) -> Iterator[tuple[int, bytes]]:
    """Paragraphs of a text file, each with the number of its first line."""
    start, last, paragraph = 0, 0, []
    for number, line in files.lines(path):
        if paragraph and number > last + 1:
            yield start, b"".join(paragraph)
            paragraph = []
        if not paragraph:
            start = number
        last = number
        paragraph.append(line)
    if paragraph:
        yield start, b"".join(paragraph)
