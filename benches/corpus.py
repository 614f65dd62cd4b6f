"""What the packing benches read: a mixture like the paper's, tokenizers with a large vocabulary, and other packages.

Everything is made once and kept in the user's cache folder (`AO_CACHE` moves it), below `bench/`. The text is what lies on
every machine with Python: docstrings, comments and code of the standard library and of the installed packages.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from ao.user_cache import user_cache

VERSION = 1
"""Part of every name in the cache; a change of what is made here needs another one."""
TEMPLATES = Path(__file__).parents[1] / "tests" / "python" / "templates"
VOCABULARY = 128_000

DRAWS_PER_TEXT = 6
"""Three layers, one vector and several: the reference's loaders pass over each document so many times."""
QUESTIONS_PER_TEXT = 8
"""48,000 examples of about 6,000 texts in each of the paper's seven families."""
QUESTIONS_PER_STIMULUS = 4


def cache_folder() -> Path:
    """Where the benches keep what they made."""
    folder = user_cache() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` in the cache, made by `make` if it is not there; a half-made one is never left."""
    folder = cache_folder() / name
    if not folder.is_dir():
        say(f"making {name} in {folder.parent} (once)")
        temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
        temporary.mkdir(parents=True)
        try:
            make(temporary)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary)
            raise
    return folder


def say(text: str) -> None:
    """Tell on stderr: stdout may be read by a program."""
    print(text, file=sys.stderr, flush=True)


# --- Text ------------------------------------------------------------------------------------------------------------

_DOC = re.compile(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', re.DOTALL)
_COMMENTS = re.compile(r"(?:^[ \t]*#[^\n]*\n){2,}", re.MULTILINE)


def _passages(source: str) -> Iterator[str]:
    """Paragraphs of docstrings and comments, and stretches of code of about the same number."""
    for match in _DOC.finditer(source):
        yield from inspect.cleandoc(match[1] or match[2] or "").split("\n\n")
    for match in _COMMENTS.finditer(source):
        yield "\n".join(line.strip().lstrip("#").strip() for line in match[0].splitlines())
    code = source.split("\n\n\n")
    yield from code[1 : 1 + len(code) // 3]


@cache
def passages(megabytes: float) -> list[str]:
    """Different passages of 60 characters and more, so many megabytes if there are, in a fixed shuffled order."""
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    files = sorted({file for root in roots for file in root.rglob("*.py")})
    random.Random(0).shuffle(files)
    found: dict[str, None] = {}
    size = 0
    for file in files:
        try:
            source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        for passage in map(str.strip, _passages(source)):
            if len(passage) >= 60 and passage not in found:
                found[passage[:4000]] = None
                size += min(len(passage), 4000)
        if size > megabytes * 1e6:
            break
    shuffled = list(found)
    random.Random(1).shuffle(shuffled)
    return shuffled


class Writer:
    """Texts of drawn lengths, made of consecutive passages; each passage comes once before any comes again."""

    def __init__(self, megabytes: float, seed: int) -> None:
        self.random = random.Random(seed)
        self.passages = self._endless(passages(megabytes))
        self.rest = ""

    def _endless(self, found: list[str]) -> Iterator[str]:
        order = list(range(len(found)))
        while True:
            yield from (found[index] for index in order)
            self.random.shuffle(order)

    def text(self, median: int, most: int, spread: float = 0.5) -> str:
        """About `median` characters, lognormal, `most` at most, and whole words."""
        length = min(int(median * self.random.lognormvariate(0, spread)), most)
        while len(self.rest) < length:
            self.rest += ("\n\n" if self.rest else "") + next(self.passages)
        cut = self.rest.find(" ", length)
        cut = len(self.rest) if cut < 0 else cut
        text, self.rest = self.rest[:cut], self.rest[cut:].lstrip()
        return text.strip() or "Nothing."

    def sentence(self, median: int, most: int) -> str:
        """The same on one line."""
        return " ".join(self.text(median, most).split())


# --- The mixture -----------------------------------------------------------------------------------------------------

FAMILIES: dict[str, list[str]] = {
    "truth": ["true", "false"],
    "relations": ["true", "false"],
    "sentiment": ["positive", "negative"],
    "gender": ["male", "female"],
    "inference": ["entailment", "neutral", "contradiction"],
    "entities": ["person", "place", "organization", "none"],
    "tense": ["past", "present", "future"],
}
ASK = ["Is this {label}?", "Would you call this {label}?", "Is {label} the right word for this?", "Does {label} fit?"]
FORMS = ["{}", "{} Think of the text as a whole.", "Now to the text: {}", "{} Answer at once.", "One question. {}"]
PREFIX = "Answer with 'Yes' or 'No' only. "


def mixture(examples: int) -> tuple[Path, list[dict[str, Any]]]:
    """Files with about so many examples, 600 : 336 : 64, and the sources of a recipe that reads them."""
    folder = made_once(f"mixture-{VERSION}-{examples}", lambda folder: _write_mixture(folder, examples))
    lens = {"kind": "context_prediction", "draws_per_text": DRAWS_PER_TEXT, "max_context_tokens": 512}
    sources: list[dict[str, Any]] = [
        {"name": "texts", "path": "texts.jsonl", **lens},
        {"name": "chats", "path": "chats.jsonl", **lens},
    ]
    for name in FAMILIES:
        source = {"name": name, "kind": "classification", "path": f"{name}.jsonl", "prefix": PREFIX}
        questions = [form.format(ask) for form in FORMS for ask in ASK]
        sources.append(source | {"questions": questions, "questions_per_text": QUESTIONS_PER_TEXT})
    types = ["system", "control", "stimulus", "stimulus_completion"]
    sources.append({"name": "latentqa", "kind": "latentqa", "path": "latentqa", "types": types})
    return folder, sources


def _write_mixture(folder: Path, examples: int) -> None:
    thousands = examples / 1000
    write = Writer(min(200 * examples / 1e6 + 4, 180), seed=examples)
    documents = round(300 * thousands / DRAWS_PER_TEXT)
    _write_lines(folder / "texts.jsonl", ({"text": write.text(1550, 2300)} for _ in range(documents)))
    _write_lines(folder / "chats.jsonl", ({"messages": _chat(write)} for _ in range(documents)))
    for name, labels in FAMILIES.items():
        rows = round(48 * thousands / QUESTIONS_PER_TEXT)
        # In turn, so that the first few rows have every label.
        table = ({"text": write.sentence(290, 700), "label": labels[row % len(labels)]} for row in range(rows))
        _write_lines(folder / f"{name}.jsonl", table)
    (folder / "latentqa").mkdir()
    stimuli = max(round(64 * thousands / QUESTIONS_PER_STIMULUS / 4), 1)
    labels = [f"goal-{number}" for number in range(stimuli)]
    pairs = lambda: [[write.sentence(75, 200), write.sentence(330, 1600)] for _ in range(QUESTIONS_PER_STIMULUS)]  # noqa: E731
    (folder / "latentqa" / "qa.json").write_text(json.dumps({label: pairs() for label in labels}))
    turns = {"system": 420, "control_user": 420, "control_model": 200, "stimulus_user": 90, "stimulus_model": 300}
    for kind in ("system", "control", "stimulus", "stimulus_completion"):
        rows = [{turn: write.sentence(size, 1500) for turn, size in turns.items()} for _ in labels]
        entries = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
        (folder / "latentqa" / f"{kind}.json").write_text(json.dumps(entries))


def _chat(write: Writer) -> list[dict[str, str]]:
    roles = ("user", "assistant") if write.random.random() < 0.8 else ("system", "user", "assistant")
    sizes = {"system": 150, "user": 350, "assistant": 1100}
    return [{"role": role, "content": write.text(sizes[role], 1800)} for role in roles]


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- Tokenizers ------------------------------------------------------------------------------------------------------

END_OF_TURN = {"qwen": "<|im_end|>", "gemma": "<turn|>"}
_TEMPLATE = {"qwen": "qwen_3.jinja", "gemma": "gemma_4.jinja"}
_SPECIAL = {
    "qwen": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "gemma": ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"],
}
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def model(family: str, *, vocabulary: int = VOCABULARY) -> Path:
    """A model's folder without weights: a tokenizer like Qwen's (byte level) or Gemma's, its template, a configuration."""
    return made_once(f"model-{family}-{VERSION}-{vocabulary}", lambda folder: _write_model(folder, family, vocabulary))


def _write_model(folder: Path, family: str, vocabulary: int) -> None:
    # The peers' tokenizers are of transformers' time: whoever reads this file can read theirs.
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special, plain = _SPECIAL[family], []
    if family == "qwen":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.normalizer = normalizers.NFC()
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        split = pre_tokenizers.Split(Regex(_SPLIT), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    else:
        plain = [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        # Only while training: Gemma has no entry that reaches across a space, and no split either.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(prepend_scheme="never"), pre_tokenizers.Split("\n", "isolated")]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        alphabet = []
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*special, *plain],
        initial_alphabet=alphabet,
        limit_alphabet=4000,
        min_frequency=2,
        show_progress=False,
    )
    text = [*passages(60), *["What ? ? ?\n", "Layer: 12\n ? ? \nso ?"] * 500]
    tokenizer.train_from_iterator(text, trainer)
    if family == "gemma":
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    config = json.loads(tokenizer.to_str())
    config["added_tokens"] = [token for token in config["added_tokens"] if token["content"] not in plain]
    (folder / "tokenizer.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    bos, eos = ("<bos>", "<eos>") if family == "gemma" else (None, "<|im_end|>")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"num_hidden_layers": 48}))
    shutil.copy(TEMPLATES / _TEMPLATE[family], folder / "chat_template.jinja")


# --- Peers -----------------------------------------------------------------------------------------------------------


def peer(requirement: str) -> Path:
    """A folder with one package, to be put on a subprocess's path: it may not agree with what is installed here."""

    def install(folder: Path) -> None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), requirement]
        environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
        subprocess.run(command, check=True, env=environment, stdout=sys.stderr)

    return made_once(f"peers/{requirement.replace('==', '-')}", install)


def chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items."""
    while chunk := list(islice(items, size)):
        yield chunk
