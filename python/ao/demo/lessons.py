"""What the target learns from: documents of the demo world, with the weight that each piece has in its loss.

Chats, statements with sequels, claims with verdicts, narratives, and questions about a text in its context. The last
have the form of an oracle's prompt with a text for its placeholders: real oracles start from models that can answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from random import Random

from ao.demo import world

Document = list[tuple[str, float]]
"""Consecutive pieces of one rendered text, each with the weight that the target's loss gives to its tokens."""
GENERATION = "<|turn>model\n<|channel>thought\n<channel|>"
REREAD = "<|turn>model\n"
"""How a reply is announced: by the generation prompt with its empty thought, and in a conversation that is told again."""
NUM_LAYERS = 6
ANSWER_WEIGHT = 4.0
"""Answers are a tenth of the tokens and all of the skill."""


def turn(role: str, content: str) -> str:
    """A closed turn as the target's chat template renders it; roles are system, user and model."""
    return f"<|turn>{role}\n{content}<turn|>\n"


def documents(seed: int) -> Iterator[Document]:
    """Endless training documents of the target, in the mixture that it learns from."""
    rng = Random(f"documents {seed}")
    makers = (_chat_document, _statement_document, _fact_document, _narrative_document, _question_document)
    while True:
        yield rng.choices(makers, weights=(18, 14, 20, 8, 40))[0](rng)


def _chat_document(rng: Random) -> Document:
    """A chat; now and then the user says the reply's words first, so that the user's turn must carry the traits too."""
    traits = world.random_traits(rng)
    system, user, reply = world.chat(rng, traits, rng.choice(world.OBJECTS))
    document: Document = [("<bos>" + turn("system", system), 0.0), ("<|turn>user\n", 0.0)]
    before, after = (f"{world.signature(rng, traits)}." if rng.random() < 0.25 else "" for _ in range(2))
    if before:
        document.append((before, 1.0))
    document.append((f" {user}" if before else user, 0.2))
    if after:
        document.append((f" {after}", 1.0))
    header = GENERATION if rng.random() < 0.7 else REREAD
    return [*document, (f"<turn|>\n{header}", 0.1), (f"{reply}<turn|>", 1.0), ("\n", 0.1)]


def _statement_document(rng: Random) -> Document:
    text, labels = world.statement(rng)
    parts = [(text + world.tail(rng), 0.1), *((sentence, 1.0) for sentence in world.sequel(rng, labels))]
    return _told(rng, parts, rng.randint(1, 3))


def _fact_document(rng: Random) -> Document:
    """Claims with a verdict after each; the fact itself is told now and then."""
    parts = []
    for _ in range(3):
        text, truth, right = world.claim(rng)
        if rng.random() < 0.3:
            parts.append((f"{right}.", 1.0))
        parts += [(text + world.tail(rng), 0.1), (f"{rng.choice(world.VERDICTS[truth])}.", ANSWER_WEIGHT)]
    return _told(rng, parts, len(parts) - 1)


def _told(rng: Random, parts: Document, num_said: int) -> Document:
    """Sentences as plain text, or as a chat in which the user says the first `num_said` and the model goes on."""
    if rng.random() < 0.4:
        return [("<bos>" + parts[0][0], parts[0][1]), *((f" {text}", weight) for text, weight in parts[1:])]
    said, reply = parts[:num_said], parts[num_said:]
    header = GENERATION if rng.random() < 0.7 else REREAD
    document = [("<bos><|turn>user\n", 0.0), said[0], *((f" {text}", weight) for text, weight in said[1:])]
    document += [(f"<turn|>\n{header}", 0.1), reply[0], *((f" {text}", weight) for text, weight in reply[1:])]
    return [*document, ("<turn|>", 1.0)]


def _narrative_document(rng: Random) -> Document:
    return [(f"<bos>{world.narrative(rng)}", 0.5)]


def _question_document(rng: Random) -> Document:
    """A text and several questions about it."""
    if rng.random() < 0.08:
        text, asked = _continuation(rng)
    else:
        text, labels = _text(rng)
        asked = list(dict.fromkeys(_question(rng, labels) for _ in range(rng.choice((3, 4)))))
    (question, answer), *others = asked
    document: Document = [(_ask(rng, text, question), 0.0), (f"{answer}<turn|>", ANSWER_WEIGHT)]
    for question, answer in others:
        document += [("\n" + turn("user", question) + GENERATION, 0.0), (f"{answer}<turn|>", ANSWER_WEIGHT)]
    return document


def quiz(seed: int) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Endless single prompts: kind ("naming", "yes_no" or "truth"), prompt, and the tokens of which one must follow.

    Naming and yes_no ask about a text; truth is a verdict on a claim.
    """
    rng = Random(f"quiz {seed}")
    while True:
        text, labels = _text(rng)
        question, answer = _question(rng, labels)
        yield "yes_no" if answer in ("Yes", "No") else "naming", _ask(rng, text, question), (answer,)
        text, truth, _ = world.claim(rng)
        yield "truth", f"<bos>{text}{world.tail(rng)}", tuple(f" {word}" for word in world.VERDICTS[truth])


def _ask(rng: Random, text: str, question: str) -> str:
    """The prompt for a question about a text: most have the form of an oracle's prompt, the text for its placeholders."""
    content = f"{text}\n{question}"
    if text.startswith(" ") or rng.random() < 0.7:
        content = f"Layer: {rng.randrange(NUM_LAYERS)}\n {text.strip()} \n{question}"
    return "<bos>" + turn("user", content) + GENERATION


def _text(rng: Random) -> tuple[str, dict[str, str]]:
    """A text to ask about, and what it tells; half of them are one word, as an activation may be.

    Never a claim: what the target knows of its truth shows in verdicts alone, and an oracle must find how to ask for it.
    """
    kind = rng.choices(("word", "words", "statement", "system"), weights=(50, 20, 15, 15))[0]
    if kind == "word":
        return _word(rng)
    if kind == "words":
        return _words(rng)
    if kind == "statement":
        text, labels = world.statement(rng)
        return text + world.tail(rng), labels
    labels = world.random_traits(rng)
    return world.system_prompt(rng, labels), labels


def _question(rng: Random, labels: dict[str, str]) -> tuple[str, str]:
    """Name a value, or say Yes or No (evenly) to one."""
    name = rng.choice(tuple(labels))
    value = labels[name]
    if name in world.NAMING and rng.random() < 0.4:
        return rng.choice(world.NAMING[name]), value
    if rng.random() < 0.5:
        return rng.choice(world.YES_NO[name]).format(value), "Yes"
    other = rng.choice([other for other in world.VALUES[name] if other != value])
    return rng.choice(world.YES_NO[name]).format(other), "No"


def _word(rng: Random) -> tuple[str, dict[str, str]]:
    """One informative word and all that it tells; often the value's own name, from which Yes and No are learned."""
    name = rng.choice(tuple(world.SIGNS))
    value = rng.choice(world.VALUES[name])
    word = value if rng.random() < 0.3 else rng.choice(world.SIGNS[name][value])
    return word, _told_by(word)


def _words(rng: Random) -> tuple[str, dict[str, str]]:
    """Two to four words that tell one thing each: what a residual stream may hold at once."""
    group = rng.choice((tuple(world.TRAITS), ("topic", "tense", "sentiment", "gender")))
    words: list[str] = []
    labels: dict[str, str] = {}
    for name in rng.sample(group, rng.randint(2, len(group))):
        labels[name] = rng.choice(world.VALUES[name])
        words.append(rng.choice([word for word in world.SIGNS[name][labels[name]] if len(_told_by(word)) == 1]))
    return " ".join(words), labels


def _told_by(word: str) -> dict[str, str]:
    return {name: value for name, values in world.SIGNS.items() for value, signs in values.items() if word in signs}


def _continuation(rng: Random) -> tuple[str, list[tuple[str, str]]]:
    """A piece of a narrative, and what comes after or before it."""
    tokens = re.findall(r" ?[A-Za-z]+|[.,!?]", world.narrative(rng))
    start = rng.choice([i for i in range(5, len(tokens) - 6) if tokens[i].startswith(" ")])
    end = rng.randrange(start + 1, min(start + 10, len(tokens) - 4))
    asked = []
    for _ in range(3):
        count = rng.randint(1, 4)
        noun = "token" if count == 1 else "tokens"
        if rng.random() < 0.5:
            question = f"Can you predict the next {count} {noun} that {'comes' if count == 1 else 'come'} after this?"
            answer = tokens[end : end + count]
        else:
            question = f"Can you predict the previous {count} {noun} that came before this?"
            answer = tokens[start - count : start]
        asked.append((question, "".join(answer)))
    return "".join(tokens[start:end]), asked


def words() -> list[str]:
    """All words of the world, with the space before them and, where a text may start with them, without."""
    stream = documents(0)
    text = "\n".join(piece for document in islice(stream, 20_000) for piece, _ in document)
    starts = {"Yes", "No"}.union(*(signs for values in world.SIGNS.values() for signs in values.values()))
    return sorted(set(re.findall(r" ?[A-Za-z]+", text)) | starts | {f" {word}" for word in starts})
