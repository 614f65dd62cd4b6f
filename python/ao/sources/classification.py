"""Labelled texts, asked as Yes/No questions or by naming the label.

A table (CSV, JSON list, JSONL) has a text and a label in each row. A relation file is a JSON object with `samples`
[{"subject", "object"}] and `prompt_templates` ["{} is the capital of"]: each sample gives two statements, its template
filled with the right object (label "true") and with another sample's (label "false"). A folder counts as all its tables
and relations, by name. The text is a user turn of which the content alone is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ao.config import ClassificationSource
from ao.sources import files


def examples(config: ClassificationSource, *, seed: int, path: Path) -> Iterator[dict[str, Any]]:
    """`config.questions_per_text` Examples per text, in file order.

    The templates of a text are drawn without repetition as long as they last. One with `{label}` asks for the text's
    own label with probability 1/2 and else for another, all others alike, and the answer is Yes or No; one without asks
    for the label, and the answer is its wording.
    """
    if not config.questions:
        raise ValueError(f"source {config.name!r}: questions is empty; expected at least one template")
    texts = [(name, text, _word(config, label, name)) for name, text, label in _texts(config, seed=seed, path=path)]
    words = sorted({word for _, _, word in texts})
    if len(words) < 2 and any("{label}" in template for template in config.questions):
        raise ValueError(f"source {config.name!r}: a question with {{label}} needs two labels or more, got {words}")

    def rows() -> Iterator[tuple[str, tuple[str, str, str]]]:
        for name, text, word in texts:
            templates = sorted(config.questions, key=lambda template: files.key(seed, f"{name}/{template}", "template"))
            for index in range(config.questions_per_text):
                yield f"{name}/{index}", (templates[index % len(templates)], text, word)

    for name, (template, text, word) in files.draw(rows, count=config.count, seed=seed):
        question, answer = template, word
        if "{label}" in template:
            others = [other for other in words if other != word]
            is_right = files.key(seed, name, "right") % 2 == 0
            asked = word if is_right else others[files.key(seed, name, "wrong") % len(others)]
            question, answer = template.replace("{label}", asked), "Yes" if is_right else "No"
        yield {
            "id": name,
            "source": config.name,
            "context": [{"role": "user", "content": text}],
            "read": [{"message": 0, "start": 0, "end": len(text)}],
            "question": config.prefix + question,
            "answer": answer,
            "meta": {"label": word},
        }


def _word(config: ClassificationSource, label: str, name: str) -> str:
    word = config.labels.get(label) if config.labels else label
    if word is None:
        raise ValueError(f"{name}: label {label!r} has no wording; labels has {sorted(config.labels)}")
    return word


def _texts(config: ClassificationSource, *, seed: int, path: Path) -> Iterator[tuple[str, str, str]]:
    """Id, text and label of each text."""
    if not path.is_dir():
        yield from _file_texts(config, seed=seed, path=path, name=config.name)
        return
    tables = sorted(file for file in path.rglob("*") if file.suffix in {".csv", ".json", ".jsonl"})
    if not tables:
        raise FileNotFoundError(f"source {config.name!r}: {path} has no .csv, .json or .jsonl file")
    for table in tables:
        name = f"{config.name}/{table.relative_to(path).with_suffix('').as_posix()}"
        yield from _file_texts(config, seed=seed, path=table, name=name)


def _file_texts(config: ClassificationSource, *, seed: int, path: Path, name: str) -> Iterator[tuple[str, str, str]]:
    if path.suffix == ".json" and isinstance(relation := files.read_json(path), dict):
        yield from _relation_texts(relation, seed=seed, path=path, name=name)
        return
    for index, (where, row) in enumerate(files.read_table(path)):
        label = files.column(row, config.label, where=where)
        if isinstance(label, bool):
            label = str(label).lower()
        if not isinstance(label, str | int) or not str(label).strip():
            raise ValueError(f"{where}: key {config.label!r}: expected a label, got {label!r}")
        yield f"{name}/{index}", files.field(row, config.text, where=where), str(label).strip()


def _relation_texts(relation: dict[str, Any], *, seed: int, path: Path, name: str) -> Iterator[tuple[str, str, str]]:
    samples = files.column(relation, "samples", where=str(path))
    templates = files.column(relation, "prompt_templates", where=str(path))
    if not isinstance(samples, list) or not isinstance(templates, list) or not templates:
        raise ValueError(f"{path}: expected lists of samples and of prompt_templates")
    pairs = []
    for index, sample in enumerate(samples):
        where = f"{path}: sample {index}"
        pairs.append((files.field(sample, "subject", where=where), files.field(sample, "object", where=where)))
    right: dict[str, set[str]] = {}
    for subject, answer in pairs:
        right.setdefault(subject, set()).add(answer)
    objects = sorted({answer for _, answer in pairs})
    for index, (subject, answer) in enumerate(pairs):
        row = f"{name}/{index}"
        template = templates[files.key(seed, row, "relation_template") % len(templates)]
        if not isinstance(template, str) or "{}" not in template:
            raise ValueError(f"{path}: prompt_templates: expected texts with {{}} for the subject, got {template!r}")
        wrong = [other for other in objects if other not in right[subject]]
        if not wrong:
            raise ValueError(f"{path}: sample {index}: no other object than {answer!r} to make a false statement of")
        statement = template.replace("{}", subject, 1).strip()
        yield f"{row}/true", f"{statement} {answer}.", "true"
        yield f"{row}/false", f"{statement} {wrong[files.key(seed, row, 'wrong_object') % len(wrong)]}.", "false"
