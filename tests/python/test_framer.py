"""The framer against Python's own tokenizers and transformers' own template engine, on text chosen to be nasty."""

from __future__ import annotations

import argparse
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jinja2.exceptions import TemplateError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.utils.chat_template_utils import render_jinja_template

from ao._ao import AoError, Framer

TEMPLATES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_3_5 = QWEN_2.replace(r"\p{L}+|\p{N}|", r"[\p{L}\p{M}]+|\p{N}|").replace(
    r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+"
)
PIECES = [
    *[
        " ",
        "  ",
        "\n",
        "\n\n\n",
        "\t",
        "\r\n",
        "a",
        "e",
        "?",
        " ?",
        "'s",
        "def ",
        "import",
        "0",
        "12",
        "<custom>",
        "  X",
    ],
    *[
        "<|turn>",
        "<turn|>",
        "<|im_end|>",
        "<tool>",
        "<s>",
        "<bos>",
        "<0x41>",
        "\u2581",
        "\ufffd",
        "\x00",
        "\x1c",
        "\u00a0",
    ],
    *["\u0301", "\u0323", "\u00e9", "\u1e9e", "\ufb01", "\u1100", "\u1161", "\uac00", "\u4f60\u597d", "\U0001f600"],
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
]


def nasty() -> list[str]:
    rng = random.Random(0)
    fixed = ["x" * 500, " " * 300, "?" * 200 + " ?" * 50, "e\u0301" * 40, " leading", "trailing ", "<tool> x  <tool>"]
    mixed = ["".join(rng.choice(PIECES) for _ in range(rng.randint(1, 30))) for _ in range(1500)]
    return PIECES + fixed + mixed


@cache
def corpus() -> list[str]:
    """Real text, without question marks but for one that makes " ?" an entry."""
    text = Path(argparse.__file__).read_text().replace("?", "")
    marks = [f"{a} ?{b}" for a in "abcdefghij" for b in "klmnopqrst"]
    return (
        marks
        + ["na\u00efve caf\u00e9 \u4f60\u597d\u4e16\u754c"] * 20
        + [text[at : at + 120] for at in range(0, len(text), 120)]
    )


def character_level(
    special: list[str], normalizer: Any = None, splitter: Any = None, decoder: Any = None, *, words: bool = False
) -> Tokenizer:
    """As SentencePiece models are converted: characters, bytes for unknown ones. `words`: no entry crosses a space."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    training_splitter = pre_tokenizers.Metaspace(prepend_scheme="never") if words else splitter
    if training_splitter is not None:
        tokenizer.pre_tokenizer = training_splitter
    trainer = trainers.BpeTrainer(vocab_size=1500, special_tokens=["<unk>", *special, *BYTES], show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    if splitter is not None:
        tokenizer.pre_tokenizer = splitter
    if decoder is not None:
        tokenizer.decoder = decoder
    config = json.loads(tokenizer.to_str())
    # The trainer knows the bytes as special tokens; in real files they are ordinary entries.
    config["added_tokens"] = [token for token in config["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(config))


def gemma(*, words: bool) -> Tokenizer:
    tokenizer = character_level(
        ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>"],
        normalizers.Replace(" ", "\u2581"),
        pre_tokenizers.Split(" ", "merged_with_previous"),
        decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]),
        words=words,
    )
    plain = AddedToken("\n\n\n", normalized=False)
    tokenizer.add_tokens([plain, AddedToken("<custom>", normalized=True), AddedToken("  X", normalized=True)])
    return tokenizer


def llama_2(*, words: bool) -> Tokenizer:
    marks = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    fuse = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return character_level(["<s>", "</s>"], marks, None, decoders.Sequence(fuse), words=words)


def metaspace(scheme: str) -> Tokenizer:
    splitter = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    return character_level(["<s>", "</s>"], None, splitter, decoders.Metaspace(prepend_scheme=scheme))


def byte_level(pattern: str, *, nfc: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=False, lstrip=True, rstrip=True)])
    return tokenizer


TOKENIZERS = {
    "gemma": lambda: gemma(words=True),
    "gemma with entries across spaces": lambda: gemma(words=False),
    "llama 2": lambda: llama_2(words=True),
    "llama 2 with entries across spaces": lambda: llama_2(words=False),
    "metaspace always": lambda: metaspace("always"),
    "metaspace first": lambda: metaspace("first"),
    "metaspace never": lambda: metaspace("never"),
    "qwen 2": lambda: byte_level(QWEN_2),
    "qwen 3": lambda: byte_level(QWEN_2, nfc=True),
    "qwen 3.5": lambda: byte_level(QWEN_3_5, nfc=True),
}


def framer_of(tokenizer: Tokenizer, template: str = TEMPLATES["chatml"], **special_tokens: str | None) -> Framer:
    end = next(token for token in ("<|im_end|>", "<eos>", "</s>") if tokenizer.token_to_id(token) is not None)
    return Framer(tokenizer.to_str(), template, json.dumps({"eos_token": end, **special_tokens}))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_text_and_offsets_are_those_of_tokenizers(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    framer = framer_of(tokenizer)
    composed = 0
    for text in nasty():
        expected = tokenizer.encode(text, add_special_tokens=False)
        ids = framer.encode(text)
        assert ids.tolist() == expected.ids, text
        assert framer.decode(ids) == tokenizer.decode(expected.ids, skip_special_tokens=False), text
        context = framer.context(json.dumps(text))
        assert context.ids.tolist() == expected.ids
        for (start, end), (their_start, their_end) in zip(context.char_spans.tolist(), expected.offsets, strict=True):
            # What normalization joins is covered whole here; tokenizers gives the first character alone.
            assert start <= their_start < their_end <= end, text
            composed += (start, end) != (their_start, their_end)
        encoded = text.encode()
        for (start, end), (first, last) in zip(context.token_spans.tolist(), context.char_spans.tolist(), strict=True):
            assert encoded[start:end].decode() == text[first:last]
    assert bool(composed) == (tokenizer.normalizer is not None and "NFC" in repr(tokenizer.normalizer))


CONTENTS = [
    "plain", "  outer space \n", "\n\nlines\n\n", "caf\u00e9 \U0001f600", "{{ x }} {% if y %}", "<think>\nno\n</think>\n\nyes",
    "none", "a</think>b", "<think>half", "<tool_response>x</tool_response>", "[INST] hi [/INST]", "<|channel>t<channel|>u", " ",
    "\x1cseparator\x1f", "<|turn>user\nhi<turn|>", "back\\slash 'quotes' \"double\" <b>&amp;</b>", "\u00a0hard\u3000",
]  # fmt: skip


SHAPES = [
    ["user"],
    ["system", "user"],
    ["user", "assistant"],
    ["user", "assistant", "user"],
    ["system", "user", "assistant", "user"],
    ["user", "assistant", "user", "assistant"],
    ["system", "user", "assistant"],
    ["assistant", "user"],
    ["user", "user"],
    ["user", "developer"],
]


def conversations(shapes: list[list[str]] = SHAPES[:2] + SHAPES[2:5:2]) -> list[list[dict[str, str]]]:
    """Every odd content in every role of each shape."""
    made = []
    for shape in shapes:
        for shift in range(len(CONTENTS)):
            contents = [CONTENTS[(shift + 3 * at) % len(CONTENTS)] for at in range(len(shape))]
            made.append([{"role": role, "content": content} for role, content in zip(shape, contents, strict=True)])
    return made


def in_transformers(template: str, messages: list[dict[str, str]], special_tokens: dict[str, str]) -> str | None:
    """As `apply_chat_template` renders, but with the framer's date; `None` where the template refuses."""
    fixed = template.replace('strftime_now("%d %b %Y")', "'01 Jan 2025'")
    fixed = fixed.replace('strftime_now("%Y-%m-%d")', "'2025-01-01'")
    try:
        rendered, _ = render_jinja_template(
            conversations=[messages],
            chat_template=fixed,
            add_generation_prompt=messages[-1]["role"] != "assistant",
            enable_thinking=False,
            **special_tokens,
        )
    except TemplateError:
        return None
    return rendered[0]


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_apply_chat_template(name: str) -> None:
    special_tokens = {"bos_token": "<bos>", "eos_token": "<eos>"}
    template = TEMPLATES[name]
    tokenizer = gemma(words=True)
    framer = framer_of(tokenizer, template, **special_tokens)
    refused = 0
    for messages in conversations(SHAPES):
        expected = in_transformers(template, messages, special_tokens)
        if expected is None:
            refused += 1
            with pytest.raises(AoError, match="chat template"):
                framer.context(json.dumps(messages))
        else:
            assert framer.context(json.dumps(messages)).text == expected, messages
    assert refused <= len(SHAPES) * len(CONTENTS) // 2, "a template that refuses nearly everything tests nothing"
    assert framer.uses_date == (name in {"llama_3", "llama_3_1", "mistral_small"})
    prompt = framer.prompt([12], 2, "Is it? ")
    asked = [{"role": "user", "content": "Layer: 12\n ? ? \nIs it? "}]
    assert prompt.text == in_transformers(template, asked, special_tokens)


def refuses(name: str, messages: list[dict[str, str]]) -> bool:
    """Whether a template does more than show each content in its place."""
    roles = [message["role"] for message in messages]
    thought = any(m["role"] == "assistant" and "</think>" in m["content"] for m in messages)
    # Mistral's shows the system's message in the last user's turn.
    told = name == "gemma_4" and any(m["role"] == "assistant" and "<|channel>" in m["content"] for m in messages)
    return (name == "qwen_3" and thought) or told or (name == "mistral" and roles[0] == "system" and len(roles) > 2)


@pytest.mark.parametrize("name", ["gemma_4", "qwen_3", "llama_3", "chatml", "mistral"])
def test_read_spans_cut_out_the_contents(name: str) -> None:
    framer = framer_of(gemma(words=True), TEMPLATES[name], bos_token="<bos>", eos_token="<eos>")
    for messages in conversations():
        if name == "qwen_3" and any(message["content"].startswith("<tool_response>") for message in messages):
            continue  # It takes such a user's turn for a tool's, and shows the next assistant's otherwise.
        context = framer.context(json.dumps(messages))
        encoded = context.text.encode()
        spans = context.token_spans.tolist()
        for number, message in enumerate(messages):
            content = message["content"]
            if not content.strip():
                continue  # Nothing to find.
            read = json.dumps([{"message": number, "start": 0, "end": len(content)}])
            if refuses(name, messages):
                with pytest.raises(AoError, match='leave "read" out'):
                    context.readable(read)
                continue
            tokens = context.readable(read).tolist()
            # The first and the last token may reach beyond the content; less than a token does.
            text = encoded[spans[tokens[0]][0] : spans[tokens[-1]][1]].decode()
            before, found, behind = text.partition(content.strip())
            assert found, (text, content)
            assert len(before + behind) <= len(content) - len(content.strip()) + 8
            inner = encoded[spans[tokens[0]][1] : spans[tokens[-1]][0]].decode()
            assert inner in content


def test_whole_turns_and_onwards() -> None:
    messages = [{"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant", "user")]
    expected = {
        "llama_3": "<|start_header_id|>user<|end_header_id|>\n\nuser says<|eot_id|>",
        "chatml": "<|im_start|>user\nuser says<|im_end|>\n",
        "gemma_4": "<|turn>user\nuser says<turn|>\n",
    }
    for name, turn in expected.items():
        framer = framer_of(gemma(words=True), TEMPLATES[name], bos_token="<bos>", eos_token="<eos>")
        context = framer.context(json.dumps(messages))
        spans, encoded = context.token_spans.tolist(), context.text.encode()
        read = context.readable('[{"message": 1}]').tolist()
        covered = encoded[spans[read[0]][0] : spans[read[-1]][1]].decode()
        assert covered.strip() == turn.strip()
        onwards = context.readable('[{"message": 1, "onwards": true}]').tolist()
        assert onwards == list(range(onwards[0], len(spans)))
        assert abs(onwards[0] - read[0]) <= 1
