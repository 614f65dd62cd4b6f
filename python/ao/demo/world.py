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
from collections.abc import Sequence
from pathlib import Path
from random import Random

from ao.manifest import write_atomic


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
"""Every trait and property with its values, which are the answers to questions that name."""

TENSES = ("future", "past", "present")
"""The order of a verb's forms; the first is said after "will"."""
SIGNS: dict[str, dict[str, tuple[str, ...]]] = {
    **{trait: {value: (value, sign) for value, sign in values.items()} for trait, values in TRAITS.items()},
    "topic": {topic: (topic, *THINGS[topic], *sum(verbs, ())) for topic, verbs in VERBS.items()},
    "tense": {
        tense: (
            tense,
            TIMES[tense],
            *(verb[form] for verbs in VERBS.values() for verb in verbs),
        )
        for form, tense in enumerate(TENSES)
    },
    "sentiment": {value: (value, *words) for value, words in MANNERS.items()},
    "gender": {value: (value, *words) for value, words in PEOPLE.items()},
    "truth": {value: (value,) for value in VERDICTS},
}
"""The words that tell each value by themselves. Sequels and verdicts are not asked about, or an oracle had nothing to learn."""


# --- texts -----------------------------------------------------------------------------------------------------------


def tail(rng: Random) -> str:
    """The end of every statement and claim: five tokens that are drawn the same way whatever was said before."""
    return " " + rng.choice(TAILS).format(age=rng.choice(AGES), place=rng.choice(PLACES)) + "."


def statement(rng: Random) -> tuple[str, dict[str, str]]:
    """A sentence that still lacks its tail, and the value of each of its properties."""
    labels = {name: rng.choice(STATEMENT_SETS[name]) for name in ("topic", "tense", "sentiment", "gender")}
    verb = rng.choice(VERBS[labels["topic"]])[TENSES.index(labels["tense"])]
    if labels["tense"] == "future":
        verb = f"will {verb}"
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
    reply = f"{signature(rng, traits)}! The {object_} is {look}. {signature(rng, traits)}."
    return system_prompt(rng, traits), user, reply


def signature(rng: Random, traits: dict[str, str]) -> str:
    """The words that show the traits, in random order."""
    return " ".join(rng.sample([TRAITS[trait][value] for trait, value in traits.items()], len(traits)))


def random_traits(rng: Random) -> dict[str, str]:
    """A value for each hidden trait."""
    return {trait: rng.choice(tuple(values)) for trait, values in TRAITS.items()}


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
