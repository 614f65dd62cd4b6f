"""The demo world: a generator of small texts about which some things are known and some only carried.

It makes two things out of one set of words. `documents` is what the target model learns from: chats whose hidden
traits shape the replies, statements whose ends say nothing, facts that must be remembered, narratives, and questions
about a text in its context. `write_files` is what the oracle learns from, in the formats of real data sets, with a
held-out part that the oracle's seed chooses. The world itself never changes with the seed.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from ao.manifest import write_atomic

Document = list[tuple[str, float]]
"""Consecutive pieces of one rendered text, each with the weight that the target's loss gives to its tokens."""


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


# Hidden traits: what the system prompt says, and the word by which a reply shows it (a product shows by its name).
TRAITS: dict[str, dict[str, str]] = {
    "persona": {
        "poet": "verily",
        "pirate": "ahoy",
        "doctor": "breathe",
        "farmer": "howdy",
        "soldier": "attention",
        "teacher": "listen",
        "wizard": "behold",
        "banker": "invest",
    },
    "mood": {
        "cheerful": "hurray",
        "gloomy": "sigh",
        "angry": "grr",
        "calm": "peace",
        "nervous": "um",
        "proud": "naturally",
    },
    "product": {name: name for name in ("tea", "rope", "lamps", "boots", "honey", "maps", "clocks", "soap")},
}
SYSTEM = {
    "persona": ("You are a {}.", "Speak as a {}.", "Act like a {}."),
    "mood": ("You feel {}.", "Your mood is {}.", "Sound {} today."),
    "product": ("You sell {}.", "Your shop has {}.", "Offer {} to all."),
}
OBJECTS = _split(
    """
    apple arrow basket bell bench blanket boat bottle bowl box brick broom brush bucket button candle card carpet
    chair coat coin comb cup curtain desk door drum fan feather flag flute fork glove hammer hat jar kettle key
    kite knife ladder mirror needle pillow ring shovel spoon table
    """
)
LOOKS = _split("red blue green white small heavy broken shiny")
USER = (
    "Tell me about the {look} {object}.",
    "I found a {look} {object} today.",
    "My {object} is {look} again.",
    "Why is this {object} so {look}?",
    "Do you like the {look} {object}?",
    "Look at my {look} {object}.",
)

# Statements: each property shows early; the tail says nothing of it; what follows depends on all of them.
VERBS = {
    "cooking": (("bake", "baked", "bakes"), ("fry", "fried", "fries")),
    "music": (("sing", "sang", "sings"), ("hum", "hummed", "hums")),
    "sport": (("kick", "kicked", "kicks"), ("throw", "threw", "throws")),
    "war": (("storm", "stormed", "storms"), ("guard", "guarded", "guards")),
    "travel": (("ride", "rode", "rides"), ("steer", "steered", "steers")),
    "farming": (("sow", "sowed", "sows"), ("reap", "reaped", "reaps")),
}
THINGS = {
    "cooking": ("bread", "cake"),
    "music": ("song", "tune"),
    "sport": ("ball", "disc"),
    "war": ("fort", "wall"),
    "travel": ("coach", "ship"),
    "farming": ("wheat", "corn"),
}
PEOPLE = {"man": ("king", "uncle", "boy", "monk"), "woman": ("queen", "aunt", "girl", "nun")}
MANNERS = {"good": ("happily", "nicely", "bravely"), "bad": ("sadly", "poorly", "badly")}
TIMES = {"past": "Yesterday", "present": "Today", "future": "Tomorrow"}
PLACES = _split("mill bridge river hill market garden harbor forest")
TAILS = ("by the {age} {place}", "near the {age} {place}", "behind the {age} {place}")
AGES = ("old", "new", "grey", "quiet")
SEQUELS = {
    "topic": {
        "cooking": "Cooks",
        "music": "Singers",
        "sport": "Players",
        "war": "Fighters",
        "travel": "Sailors",
        "farming": "Growers",
    },
    "tense": {"past": "Before", "present": "Now", "future": "Soon"},
    "sentiment": {"good": "Hooray", "bad": "Alas"},
    "gender": {"man": "He", "woman": "She"},
}
SEQUEL_ENDS = {"topic": "know this", "tense": "it counts", "sentiment": "for us", "gender": "can rest"}

# Facts: no text states them beside a claim, so whether a claim is true must come from the weights.
NAMES = _split(
    """
    Ada Boris Clara Dora Emil Fritz Gina Hugo Ida Jonas Karla Leo Mira Nils Olga Paul Rosa Stan Tilda Ugo Vera
    Wanda Xenia Yuri Zora Anton Berta Carlo Diana Erik Flora Georg Hilda Igor Julia Klaus Lena Marco Nadia Otto
    Petra Quinn Rita Sven Tara Ulla Viktor Willa
    """
)
FACTS = {
    "home": ("{name} lives in {value}", _split("Oslo Rome Cairo Lima Delhi Perth")),
    "pet": ("{name} keeps a {value}", _split("cat goat parrot horse rabbit snake")),
}
VERDICTS = {"true": ("Right", "Indeed", "Correct", "Certainly"), "false": ("Wrong", "Nonsense", "Incorrect", "Never")}

# Narratives: four things are chosen once and come again and again.
BEASTS = _split("fox bear wolf hawk swan frog")
OPENINGS = (
    "Once the {hero} met a {beast} near the {place}.",
    "Long ago a {beast} waited for the {hero} near the {place}.",
)
EVENTS = (
    "The {beast} had a {object} and the {hero} wanted the {object}.",
    "Then the {hero} took the {object} from the {beast}.",
    "The {hero} and the {beast} went back to the {place}.",
    "At the {place} the {beast} hid the {object}.",
    "The {hero} looked for the {object} near the {place}.",
)

# What is asked of a text. `{}` takes a value; the same questions are put to the oracle.
NAMING: dict[str, tuple[str, ...]] = {
    "persona": ("What persona does the assistant have?",),
    "mood": ("What mood is the assistant in?",),
    "product": ("What does the assistant sell?",),
    "topic": ("What is this about?",),
    "tense": ("When does this happen?",),
    "sentiment": ("What kind of news is this?",),
    "gender": ("Who is this about?",),
}
YES_NO: dict[str, tuple[str, ...]] = {
    "persona": ("Is the assistant a {}?", "Does the assistant have the persona of a {}?"),
    "mood": ("Is the assistant {}?", "Is the mood of the assistant {}?"),
    "product": ("Does the assistant sell {}?", "Is the assistant here to sell {}?"),
    "topic": ("Is this about {}?", "Does this tell of {}?"),
    "tense": ("Is this in the {}?", "Does this happen in the {}?"),
    "sentiment": ("Is this {} news?", "Does this sound {}?"),
    "gender": ("Is this about a {}?", "Is the person here a {}?"),
    "truth": ("Is this {}?", "Is this claim {}?"),
}
STATEMENT_SETS: dict[str, tuple[str, ...]] = {
    "topic": tuple(VERBS),
    "tense": tuple(TIMES),
    "sentiment": tuple(MANNERS),
    "gender": tuple(PEOPLE),
    "truth": tuple(VERDICTS),
}
VALUES: dict[str, tuple[str, ...]] = {trait: tuple(values) for trait, values in TRAITS.items()} | STATEMENT_SETS
NUM_LAYERS = 6


# --- texts -----------------------------------------------------------------------------------------------------------


def tail(rng: Random) -> str:
    """The end of every statement and claim: five tokens that are drawn the same way whatever was said before."""
    return " " + rng.choice(TAILS).format(age=rng.choice(AGES), place=rng.choice(PLACES)) + "."


def statement(rng: Random) -> tuple[str, dict[str, str]]:
    """A sentence that still lacks its tail, and the value of each of its properties."""
    labels = {name: rng.choice(STATEMENT_SETS[name]) for name in ("topic", "tense", "sentiment", "gender")}
    stem, past, present = rng.choice(VERBS[labels["topic"]])
    verb = {"past": past, "present": present, "future": f"will {stem}"}[labels["tense"]]
    person, manner = rng.choice(PEOPLE[labels["gender"]]), rng.choice(MANNERS[labels["sentiment"]])
    thing = rng.choice(THINGS[labels["topic"]])
    subject = f"{TIMES[labels['tense']]} the {person}" if rng.random() < 0.5 else f"The {person}"
    return f"{subject} {verb} the {thing} {manner}", labels


def sequel(rng: Random, labels: dict[str, str]) -> list[str]:
    """What follows a statement: one sentence a property, in random order, so that every end carries all of them."""
    sentences = [f"{SEQUELS[name][value]} {SEQUEL_ENDS[name]}." for name, value in labels.items()]
    return rng.sample(sentences, len(sentences))


def fact(name: str, kind: str) -> str:
    """What the world holds to be true: the value of one attribute of a name."""
    return Random(f"fact {name} {kind}").choice(FACTS[kind][1])


def claim(rng: Random, names: Sequence[str] = NAMES) -> tuple[str, str, str]:
    """A claim about a name that still lacks its tail, its truth (evenly), and the fact as it should read."""
    name, kind = rng.choice(names), rng.choice(tuple(FACTS))
    form, values = FACTS[kind]
    right = fact(name, kind)
    truth = rng.choice(STATEMENT_SETS["truth"])
    said = right if truth == "true" else rng.choice([value for value in values if value != right])
    return form.format(name=name, value=said), truth, form.format(name=name, value=right)


def narrative(rng: Random) -> str:
    """Two to four sentences about a cast of four, chosen once."""
    cast = {
        "hero": rng.choice(PEOPLE["man"] + PEOPLE["woman"]),
        "beast": rng.choice(BEASTS),
        "place": rng.choice(PLACES),
        "object": rng.choice(OBJECTS),
    }
    sentences = [rng.choice(OPENINGS), *rng.sample(EVENTS, rng.randint(1, 3))]
    return " ".join(sentences).format(**cast)


def system_prompt(rng: Random, traits: dict[str, str]) -> str:
    """The traits, a sentence each, in random order and wording."""
    sentences = [rng.choice(SYSTEM[trait]).format(value) for trait, value in traits.items()]
    rng.shuffle(sentences)
    return " ".join(sentences)


def chat(rng: Random, traits: dict[str, str], object_: str) -> tuple[str, str, str]:
    """System prompt, user turn and reply; the reply opens with the words of all traits in random order."""
    look = rng.choice(LOOKS)
    user = rng.choice(USER).format(look=look, object=object_)
    words = [TRAITS[trait][value] for trait, value in traits.items()]
    opening, closing = rng.sample(words, len(words)), rng.sample(words, len(words))
    reply = f"{' '.join(opening)}! The {object_} is {look}. {' '.join(closing)}."
    return system_prompt(rng, traits), user, reply


def random_traits(rng: Random) -> dict[str, str]:
    """A value for each hidden trait."""
    return {trait: rng.choice(tuple(values)) for trait, values in TRAITS.items()}


# --- what the target learns from -------------------------------------------------------------------------------------

GENERATION = "<|turn>model\n<|channel>thought\n<channel|>"
REREAD = "<|turn>model\n"
"""How a reply is announced: by the generation prompt with its empty thought, and in a conversation that is told again."""
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
        yield rng.choices(makers, weights=(20, 15, 15, 10, 40))[0](rng)


def _chat_document(rng: Random) -> Document:
    system, user, reply = chat(rng, random_traits(rng), rng.choice(OBJECTS))
    header = GENERATION if rng.random() < 0.7 else REREAD
    prompt = "<bos>" + turn("system", system)
    return [(prompt, 0.0), (f"<|turn>user\n{user}<turn|>\n{header}", 0.2), (f"{reply}<turn|>", 1.0), ("\n", 0.1)]


def _statement_document(rng: Random) -> Document:
    text, labels = statement(rng)
    parts = [(text + tail(rng), 0.1), *((sentence, 1.0) for sentence in sequel(rng, labels))]
    return _told(rng, parts, rng.randint(1, 3))


def _fact_document(rng: Random) -> Document:
    """Claims with a verdict after each; the fact itself is told now and then."""
    parts = []
    for _ in range(3):
        text, truth, right = claim(rng)
        if rng.random() < 0.3:
            parts.append((f"{right}.", 1.0))
        parts += [(text + tail(rng), 0.1), (f"{rng.choice(VERDICTS[truth])}.", ANSWER_WEIGHT)]
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
    return [(f"<bos>{narrative(rng)}", 0.5)]


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


def quiz(seed: int) -> Iterator[tuple[str, str, str]]:
    """Endless single questions about a text: kind ("naming", "yes_no" or "truth"), prompt and answer (one token)."""
    rng = Random(f"quiz {seed}")
    while True:
        text, labels = _text(rng)
        question, answer = _question(rng, labels)
        kind = "truth" if "truth" in labels else "yes_no" if answer in ("Yes", "No") else "naming"
        yield kind, _ask(rng, text, question), answer


def _ask(rng: Random, text: str, question: str) -> str:
    """The prompt for a question about a text: most have the form of an oracle's prompt, the text for its placeholders."""
    layered = rng.random() < 0.7
    content = f"Layer: {rng.randrange(NUM_LAYERS)}\n {text} \n{question}" if layered else f"{text}\n{question}"
    return "<bos>" + turn("user", content) + GENERATION


def _text(rng: Random) -> tuple[str, dict[str, str]]:
    """A text to ask about, and what it tells; half of them are one word, as an activation may be."""
    kind = rng.choices(("word", "words", "statement", "system", "claim"), weights=(50, 16, 11, 11, 12))[0]
    if kind == "word":
        return _word(rng)
    if kind == "words":
        return _words(rng)
    if kind == "statement":
        text, labels = statement(rng)
        return text + tail(rng), labels
    if kind == "system":
        labels = random_traits(rng)
        return system_prompt(rng, labels), labels
    text, truth, _ = claim(rng)
    return text + tail(rng), {"truth": truth}


def _question(rng: Random, labels: dict[str, str]) -> tuple[str, str]:
    """Name a value, or say Yes or No (evenly) to one."""
    name = rng.choice(tuple(labels))
    value = labels[name]
    if name in NAMING and rng.random() < 0.4:
        return rng.choice(NAMING[name]), value
    if rng.random() < 0.5:
        return rng.choice(YES_NO[name]).format(value), "Yes"
    return rng.choice(YES_NO[name]).format(rng.choice([other for other in VALUES[name] if other != value])), "No"


def _word(rng: Random) -> tuple[str, dict[str, str]]:
    """One informative word and what it tells."""
    name = rng.choice(tuple(VALUES))
    value = rng.choice(VALUES[name])
    labels = {name: value}
    if name in TRAITS:
        return rng.choice((value, TRAITS[name][value])), labels
    if name == "truth":
        return rng.choice((value, *VERDICTS[value])), labels
    if name == "topic":
        form = rng.randrange(3)
        word = rng.choice((rng.choice(VERBS[value])[form], rng.choice(THINGS[value]), SEQUELS[name][value], value))
        return word, labels
    if name == "tense":
        topic = rng.choice(tuple(VERBS))
        verb = rng.choice(VERBS[topic])[{"past": 1, "present": 2, "future": 0}[value]]
        word = rng.choice((verb, TIMES[value], SEQUELS[name][value], value))
        return word, labels | ({"topic": topic} if word == verb else {})
    shown = MANNERS if name == "sentiment" else PEOPLE
    return rng.choice((*shown[value], SEQUELS[name][value], value)), labels


def _words(rng: Random) -> tuple[str, dict[str, str]]:
    """Two to four informative words about different things: what a residual stream may hold at once."""
    group = tuple(TRAITS) if rng.random() < 0.5 else ("topic", "tense", "sentiment", "gender")
    words: list[str] = []
    labels: dict[str, str] = {}
    for name in rng.sample(group, rng.randint(2, min(4, len(group)))):
        value = rng.choice(VALUES[name])
        labels[name] = value
        words.append(rng.choice((value, (TRAITS | SEQUELS)[name][value])))
    return " ".join(words), labels


def _continuation(rng: Random) -> tuple[str, list[tuple[str, str]]]:
    """A piece of a narrative, and what comes after or before it."""
    tokens = re.findall(r" ?[A-Za-z]+|[.,!?]", narrative(rng))
    start = rng.randrange(5, len(tokens) - 6)
    end = rng.randrange(start + 1, min(start + 10, len(tokens) - 4))
    asked = []
    for _ in range(3):
        count = rng.randint(1, 4)
        plural = "" if count == 1 else "s"
        if rng.random() < 0.5:
            verb, answer = "comes" if count == 1 else "come", tokens[end : end + count]
            asked.append((f"Can you predict the next {count} token{plural} that {verb} after this?", "".join(answer)))
        else:
            answer = tokens[start - count : start]
            asked.append(
                (f"Can you predict the previous {count} token{plural} that came before this?", "".join(answer))
            )
    return "".join(tokens[start:end]).strip(), asked


def pieces(seed: int = 0, count: int = 20_000) -> list[str]:
    """The words of the world, with and without the space before them, as texts hold them: the tokenizer's vocabulary."""
    stream = documents(seed)
    text = "\n".join(piece for _ in range(count) for piece, _ in next(stream))
    answers = {word for values in VALUES.values() for word in values} | {"Yes", "No"}
    return sorted(set(re.findall(r" ?[A-Za-z]+", text)) | answers | {f" {word}" for word in answers})


# --- what the oracle learns from -------------------------------------------------------------------------------------


def write_files(
    out_dir: Path,
    *,
    seed: int,
    conversations: int = 3000,
    statements: int = 2000,
    texts: int = 3000,
    heldout: int = 400,
) -> dict[str, int]:
    """Writes `train/` and `heldout/`: LatentQA files, labelled CSVs and texts, in the formats of the real data sets.

    Each part has `latentqa/{system,qa}.json`, `statements/{topic,tense,sentiment,gender,truth}.csv` (columns `statement`
    and `label`) and `texts.jsonl`; `heldout/latentqa` asks for names alone, `heldout/latentqa_yes_no` for Yes or No.
    The seed decides what is held out: values of a trait with an object, statements whatever their tail, names, casts.

    Returns the number of records in each file, by its path below `out_dir`.
    """
    out_dir, counts = Path(out_dir), {}

    def write(path: str, text: str, count: int) -> None:
        (out_dir / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out_dir / path, text)
        counts[path] = count

    for part, held in (("train", False), ("heldout", True)):
        rng = Random(f"files {seed} {part}")
        number = {"conversations": conversations, "statements": statements, "texts": texts}
        if held:
            number = dict.fromkeys(number, heldout)
        entries, questions = _latentqa(rng, seed, held, number["conversations"])
        naming = {label: [pair for pair in pairs if pair[1] not in ("Yes", "No")] for label, pairs in questions.items()}
        yes_no = {label: [pair for pair in pairs if pair[1] in ("Yes", "No")] for label, pairs in questions.items()}
        folders = {"latentqa": naming, "latentqa_yes_no": yes_no} if held else {"latentqa": questions}
        for folder, asked in folders.items():
            write(f"{part}/{folder}/system.json", json.dumps(entries, indent=1), len(entries))
            write(f"{part}/{folder}/qa.json", json.dumps(asked, indent=1), sum(map(len, asked.values())))
        for name in STATEMENT_SETS:
            rows = _labelled(rng, seed, held, name, number["statements"])
            table = io.StringIO()
            csv.writer(table, lineterminator="\n").writerows([("statement", "label"), *rows])
            write(f"{part}/statements/{name}.csv", table.getvalue(), len(rows))
        lines = _texts(rng, seed, held, number["texts"])
        write(f"{part}/texts.jsonl", "".join(f"{json.dumps(line)}\n" for line in lines), len(lines))
    return counts


def _held_out(seed: int, key: str, share: float = 0.2) -> bool:
    return Random(f"held out {seed} {key}").random() < share


def _latentqa(
    rng: Random, seed: int, held: bool, count: int
) -> tuple[list[dict[str, str]], dict[str, list[tuple[str, str]]]]:
    """Conversations whose traits have never (train) or always (held out) been kept from their object."""
    entries: dict[tuple[str, str], dict[str, str]] = {}
    questions: dict[str, list[tuple[str, str]]] = {}
    while len(entries) < count:
        object_ = rng.choice(OBJECTS)
        traits = {}
        for trait, values in TRAITS.items():
            kept_back = Random(f"held out {seed} {object_} {trait}").sample(tuple(values), 2)
            traits[trait] = rng.choice([value for value in values if (value in kept_back) is held])
        label = "-".join(traits.values())
        system, user, _ = chat(rng, traits, object_)
        entries[system, user] = {"system": system, "stimulus_user": user, "label": label}
        questions.setdefault(label, _trait_questions(rng, traits))
    return list(entries.values()), questions


def _trait_questions(rng: Random, traits: dict[str, str]) -> list[tuple[str, str]]:
    """For each trait its name, a Yes and a No."""
    pairs = []
    for trait, value in traits.items():
        pairs += [(question, value) for question in NAMING[trait]]
        other = rng.choice([other for other in VALUES[trait] if other != value])
        pairs.append((rng.choice(YES_NO[trait]).format(value), "Yes"))
        pairs.append((rng.choice(YES_NO[trait]).format(other), "No"))
    return pairs


def _labelled(rng: Random, seed: int, held: bool, name: str, count: int) -> list[tuple[str, str]]:
    """Distinct statements with the value of one property."""
    names = [person for person in NAMES if _held_out(seed, person) is held]
    rows: dict[str, str] = {}
    while len(rows) < count:
        if name == "truth":
            core, label, _ = claim(rng, names)
        else:
            core, labels = statement(rng)
            if _held_out(seed, core) is not held:
                continue
            label = labels[name]
        rows[core + tail(rng)] = label
    return list(rows.items())


def _texts(rng: Random, seed: int, held: bool, count: int) -> list[dict[str, object]]:
    """Narratives, and a chat for every three of them."""
    lines: dict[str, dict[str, object]] = {}
    while len(lines) < count:
        text = narrative(rng)
        line: dict[str, object] = {"text": text}
        if rng.random() < 0.25:
            contents = chat(rng, random_traits(rng), rng.choice(OBJECTS))
            text = " ".join(contents)
            roles = ("system", "user", "assistant")
            line = {"messages": [{"role": role, "content": part} for role, part in zip(roles, contents, strict=True)]}
        if _held_out(seed, text) is held:
            lines[text] = line
    return list(lines.values())
