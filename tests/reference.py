"""The specification of `ao-pack`: from the rows of files to datapoints, slowly and obviously, one example at a time.

No Rust of ours: transformers renders the templates and gives the offsets, the package xxhash the draws. Parity tests ask
the fast path for the same datapoints; the benches time this as the peer `reference`.

A source is a dict with the keys of a recipe's `[[data.sources]]`, all of them; its rows are JSON objects.
"""

import csv
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

PLACEHOLDER = " ?"
MARK = "\U000f1234"
"""Stands for a content where it has to be found; no text holds it."""
WORD = 1 << 64

Context = str | list[dict[str, str]]


# --- Draws -----------------------------------------------------------------------------------------------------------


class Draws:
    """Random numbers that depend on seed, id and purpose alone."""

    def __init__(self, seed: int, name: str, purpose: str) -> None:
        inner = xxhash.xxh3_128_intdigest(name.encode(), seed)
        outer = xxhash.xxh3_128_intdigest(purpose.encode(), seed ^ 0x9E3779B97F4A7C15)
        joined = inner.to_bytes(16, "little") + outer.to_bytes(16, "little")
        self.key = xxhash.xxh3_128_intdigest(joined, seed).to_bytes(16, "little")
        self.counter = 0

    def bits(self) -> int:
        """64 random bits."""
        drawn = xxhash.xxh3_64_intdigest(self.key, self.counter)
        self.counter += 1
        return drawn

    def below(self, bound: int) -> int:
        """A whole number below `bound`: the high half of a product; uneven low halves are drawn again."""
        while True:
            high, low = divmod(self.bits() * bound, WORD)
            if low >= WORD % bound:
                return high

    def between(self, low: int, high: int) -> int:
        """A whole number from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def unit(self) -> float:
        """A number from 0 to below 1."""
        return (self.bits() >> 11) / (1 << 53)

    def shuffle(self, items: list[Any]) -> None:
        for last in range(len(items) - 1, 0, -1):
            other = self.between(0, last)
            items[last], items[other] = items[other], items[last]


# --- From rows to examples -------------------------------------------------------------------------------------------


@dataclass
class Table:
    """One file of a source."""

    prefix: str
    """What the ids of its examples begin with."""
    rows: list[dict[str, Any] | None]
    """Its rows as JSON objects; None for a blank line, which counts but holds nothing."""
    type: str | None = None
    """Of a LatentQA file: system, control, stimulus or stimulus_completion."""
    templates: list[str] | None = None
    """Of a relation file: its statement templates; the rows are subjects with their objects."""


@dataclass
class Example:
    """One context and one question about it; context prediction has none until the tokens are known, and a text of which
    every label is right has none that asks about a wrong one.
    """

    id: str
    unit: str
    """The id that the examples about the same text have in common."""
    context: Context
    read: list[dict[str, Any]] | None = None
    question: str | None = None
    answer: str | None = None
    label: str | None = None
    positions: Any = None
    layers: list[float] | None = None
    target: str = "base"
    meta: dict[str, Any] = field(default_factory=dict)
    lacks_donor: bool = False
    """It was to be unanswerable, but no other context was found for it."""
    dropped: str | None = None
    """Why it is left out, where that is known before its tokens are."""


def examples(source: dict[str, Any], tables: list[Table], *, seed: int) -> list[Example]:
    """All examples of a source in order; with a `count`, those with the smallest keys."""
    made = {
        "records": records,
        "context_prediction": context_prediction,
        "classification": classification,
        "latentqa": latentqa,
    }[source["kind"]](source, tables, seed)
    if (count := source.get("count")) is None:
        return made
    drawn = smallest(seed, "draw", [example.id for example in made if example.dropped is None], count)
    return [example for example in made if example.dropped is not None or example.id in drawn]


def smallest(seed: int, purpose: str, names: list[str], count: int) -> set[str]:
    """The `count` names with the smallest keys."""
    return set(sorted(names, key=lambda name: Draws(seed, name, purpose).bits())[:count])


def records(source: dict[str, Any], tables: list[Table], seed: int) -> list[Example]:
    """Rows that are examples already."""
    fields = ("id", "context", "read", "question", "answer", "positions", "layers", "target", "meta")
    found = []
    for _, _, row in numbered(tables):
        given = {name: row[name] for name in fields if row.get(name) is not None}
        found.append(Example(unit=row["id"], **given))
    return found


def context_prediction(source: dict[str, Any], tables: list[Table], seed: int) -> list[Example]:
    """Each text or chat several times; what is asked is drawn when the tokens are known."""
    return [
        Example(f"{unit}/{draw}", unit, document(source, row))
        for _, unit, row in numbered(tables)
        for draw in range(source["draws_per_text"])
    ]


def document(source: dict[str, Any], row: dict[str, Any]) -> Context:
    """A chat's roles and contents, whatever else it says, or a text; nothing where there is a null."""
    if row.get("messages") is None:
        return (row.get(source["text"]) or "").strip()
    return [{"role": turn["role"], "content": turn.get("content") or ""} for turn in row["messages"]]


def classification(source: dict[str, Any], tables: list[Table], seed: int) -> list[Example]:
    """Each labelled text with some of the questions: about a label, right or wrong, or for the label."""
    texts = labelled_texts(source, tables, seed)
    left_out = {label for label, phrasings in source["labels"].items() if not phrasings}
    labels = sorted({label for _, _, label, _ in texts} - left_out)
    known: dict[tuple[str, str, tuple[str, ...]], set[str]] = {}
    for table, _, row in numbered(tables):
        if table.templates is None and (label := label_text(row[source["label"]])) not in left_out:
            for template in source["questions"]:
                key = filled(source["text"], row), template, columns(template, row)
                known.setdefault(key, set()).add(label)
    found = []
    for unit, text, label, row in texts:
        if label in left_out:
            found.append(Example(f"{unit}/0", unit, text, dropped="label_left_out"))
            continue
        order = list(range(len(source["questions"])))
        Draws(seed, unit, "templates").shuffle(order)
        for number in range(source["questions_per_text"]):
            name = f"{unit}/{number}"
            template = source["questions"][order[number % len(order)]]
            if "{label}" in template:
                draws = Draws(seed, name, "label")
                right = known.get((text, template, columns(template, row)), {label})
                worded = {wording for each in right for wording in wordings(source, each)}
                others = [other for other in labels if not wordings(source, other) & worded]
                answer, choices = ("Yes", [label]) if draws.below(2) == 0 else ("No", others)
                shown = phrasing(source, seed, name, choices[draws.below(len(choices))]) if choices else None
                question = None if shown is None else asked(template, row, shown)
            else:
                question, answer = asked(template, row, ""), phrasing(source, seed, name, label)
            context = [{"role": "user", "content": text}]
            read = [{"message": 0, "start": 0, "end": len(text)}]
            question = None if question is None else source["prefix"] + question
            found.append(Example(name, unit, context, read, question, answer, label, meta={"label": label}))
    return found


def columns(template: str, row: dict[str, Any]) -> tuple[str, ...]:
    """What a question shows of a row beside its label."""
    return tuple(row[key].strip() for key in re.findall(r"\{([^{}]+)\}", template) if key != "label")


def asked(template: str, row: dict[str, Any], label: str) -> str:
    """A question with its keys in braces filled in."""
    return re.sub(r"\{([^{}]+)\}", lambda key: label if key[1] == "label" else row[key[1]].strip(), template)


def labelled_texts(
    source: dict[str, Any], tables: list[Table], seed: int
) -> list[tuple[str, str, str, dict[str, Any]]]:
    """Id, text, label and row of each text; a row of a relation file makes a true and a false statement."""
    texts = []
    for table, unit, row in numbered(tables):
        if table.templates is None:
            texts.append((unit, filled(source["text"], row), label_text(row[source["label"]]), row))
            continue
        subject, right = row["subject"].strip(), row["object"].strip()
        pairs = [(other["subject"].strip(), other["object"].strip()) for other in table.rows if other is not None]
        true = {answer for name, answer in pairs if name == subject}
        wrong = sorted({answer for _, answer in pairs} - true)
        template = table.templates[Draws(seed, unit, "relation").below(len(table.templates))]
        other = wrong[Draws(seed, unit, "wrong_object").below(len(wrong))]
        statement = template.replace("{}", subject, 1).strip()
        texts.append((f"{unit}/true", f"{statement} {right}.", "true", row))
        texts.append((f"{unit}/false", f"{statement} {other}.", "false", row))
    return texts


def filled(text: str, row: dict[str, Any]) -> str:
    """The field called `text`, or a text with fields in braces."""
    if "{" not in text:
        return row[text].strip()
    return text.format(**{name: value.strip() for name, value in row.items() if isinstance(value, str)}).strip()


def label_text(value: Any) -> str:
    """A label as JSON writes it, texts without quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def wordings(source: dict[str, Any], label: str) -> set[str]:
    """All texts that a label is shown as."""
    found = source["labels"].get(label, label)
    return {found} if isinstance(found, str) else set(found)


def phrasing(source: dict[str, Any], seed: int, name: str, label: str) -> str:
    """How a label is worded: as it stands, or by one of its wordings."""
    found = source["labels"].get(label, label)
    if isinstance(found, str):
        return found
    if len(found) == 1:
        return found[0]
    return found[Draws(seed, name, "phrasing").below(len(found))]


TURNS = {
    "system": ["system system", "user stimulus_user"],
    "control": ["user control_user"],
    "stimulus": ["user control_user", "assistant control_model", "user stimulus_user"],
    "stimulus_completion": [
        "user control_user",
        "assistant control_model",
        "user stimulus_user",
        "assistant stimulus_model",
    ],
}
FIRST_READ = {"system": 1, "control": 0, "stimulus": 2, "stimulus_completion": 2}
"""The first turn that may be read: those before it state the label outright."""


def latentqa(source: dict[str, Any], tables: list[Table], seed: int) -> list[Example]:
    """Each stimulus with the questions of its label, or some of them; `source["qa"]` is the content of qa.json."""
    questions = {label.strip(): pairs for label, pairs in source["qa"].items()}
    found = []
    for table, unit, row in numbered(tables):
        label = row["label"].strip()
        turns = [turn.split() for turn in TURNS[table.type]]
        context = [{"role": role, "content": row[name].strip()} for role, name in turns]
        first = FIRST_READ[table.type]
        read = [{"message": first, "onwards": True}] if first else None
        pairs = {f"{unit}/{number}": pair for number, pair in enumerate(questions.get(label, []))}
        if not pairs:
            found.append(Example(f"{unit}/0", unit, context, dropped="label_without_questions"))
        if (count := source.get("questions_per_stimulus")) is not None:
            drawn = smallest(seed, "question", list(pairs), count)
            pairs = {name: pair for name, pair in pairs.items() if name in drawn}
        meta = {"label": label, "type": table.type}
        for name, (question, answer) in pairs.items():
            found.append(Example(name, unit, context, read, question.strip(), answer.strip(), label, meta=meta))
    return found


def numbered(tables: list[Table]) -> list[tuple[Table, str, dict[str, Any]]]:
    """Table, id and row of every row that is not blank."""
    return [
        (table, f"{table.prefix}/{number}", row)
        for table in tables
        for number, row in enumerate(table.rows)
        if row is not None
    ]


def read_tables(source: dict[str, Any], root: Path) -> list[Table]:
    """The tables of a source whose files are CSV, JSON or JSONL, sorted by path where it is a folder."""
    path, name = root / source["path"], source["name"]
    if source["kind"] == "latentqa":
        return [Table(f"{name}/{kind}", rows_of(path / f"{kind}.json"), type=kind) for kind in source["types"]]
    if not path.is_dir():
        return [table_of(path, name)]
    files = sorted(file for file in path.rglob("*") if file.suffix in {".csv", ".json", ".jsonl"})
    return [table_of(file, f"{name}/{file.relative_to(path).with_suffix('').as_posix()}") for file in files]


def table_of(path: Path, prefix: str) -> Table:
    if path.suffix == ".json" and isinstance(relation := json.loads(path.read_bytes()), dict):
        return Table(prefix, relation["samples"], templates=relation["prompt_templates"])
    return Table(prefix, rows_of(path))


def rows_of(path: Path) -> list[dict[str, Any] | None]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".jsonl":
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
        return [json.loads(line) if line.strip() else None for line in lines]
    return json.loads(path.read_bytes())


# --- From examples to datapoints -------------------------------------------------------------------------------------


@dataclass
class Settings:
    """What all examples of a data set have in common."""

    num_layers: int
    read_layers: list[int]
    seed: int = 0
    layers_per_example: str = "one"
    max_input_tokens: int = 4096
    max_context_tokens: int = 4096
    examples_per_shard: int = 8192


@dataclass
class Datapoint:
    """One oracle prompt with its answer, and where its placeholders get their vectors."""

    id: str
    source: str
    input_ids: list[int]
    answer_start: int
    placeholders: list[int]
    layers: list[int]
    context_ids: list[int]
    read_positions: list[int]
    question: str
    answer: str
    kind: str
    meta: dict[str, Any]


class Dropped(Exception):
    """An example that makes no datapoint; the argument is the reason."""


class Bad(Exception):
    """An example that cannot be used; the argument is the reason."""


class Framed(NamedTuple):
    """A context as text, ids and the code points that each token covers."""

    text: str
    ids: list[int]
    spans: list[tuple[int, int]]


class Reference:
    def __init__(self, folder: Path, *, end_of_turn: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.end_of_turn = end_of_turn
        added = self.tokenizer.added_tokens_decoder
        self.special_ids = {index for index, token in added.items() if token.special}

    # What is rendered and tokenized

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and spans in code points."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])

    def render(self, messages: list[dict[str, str]], *, generation: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation, enable_thinking=False
        )

    def context(self, context: Context) -> Framed:
        """What the target reads.

        Raises:
            Bad: there is nothing, or the template refuses it.
        """
        if not context or (not isinstance(context, str) and not all(turn["content"] for turn in context)):
            raise Bad("empty_context")
        if isinstance(context, str):
            text = (self.tokenizer.bos_token or "") + context
        else:
            try:
                text = self.render(context, generation=context[-1]["role"] != "assistant")
            except TemplateError:
                raise Bad("template") from None
        return Framed(text, *self.encode(text))

    def prompt(self, layers: list[int], num_positions: int, question: str) -> tuple[list[int], list[int]]:
        """Prompt ids and the indices of the placeholders, layer by layer."""
        blocks = [f"Layer: {layer}\n{PLACEHOLDER * num_positions} \n" for layer in layers]
        text = self.render([{"role": "user", "content": "".join(blocks) + question}], generation=True)
        ids, spans = self.encode(text)
        placeholders = []
        start = text.index(blocks[0])
        for block in blocks:
            run = start + block.index("\n") + 1
            end = run + len(PLACEHOLDER) * num_positions
            placeholders += [index for index, (first, stop) in enumerate(spans) if first >= run and stop <= end]
            start += len(block)
        assert len(placeholders) == len(layers) * num_positions
        assert len({ids[index] for index in placeholders}) == 1
        return ids, placeholders

    def answer(self, answer: str) -> list[int]:
        return self.encode(answer + self.end_of_turn)[0]

    # What is read

    def readable(self, example: dict[str, Any]) -> list[int]:
        """Indices of the tokens that overlap the spans of `read`."""
        context = example["context"]
        return self.overlapping(context, example.get("read"), self.context(context))

    def overlapping(self, context: Context, read: list[dict[str, Any]] | None, framed: Framed) -> list[int]:
        if read is None:
            return list(range(len(framed.ids)))
        wanted = [self.span(context, framed.text, each) for each in read]
        found = [
            index
            for index, (start, end) in enumerate(framed.spans)
            if any(start < stop and end > first for first, stop in wanted if first < stop)
        ]
        if not found:
            raise Bad("bad_value")
        return found

    def span(self, context: Context, text: str, read: dict[str, Any]) -> tuple[int, int]:
        """Code points of the rendered text that one entry of `read` means."""
        if isinstance(context, str):
            before = len(self.tokenizer.bos_token or "")
            return before + read["start"], before + read["end"]
        message = read["message"]
        if read.get("onwards"):
            return self.turn_start(context, text, message), len(text)
        if "start" not in read:
            return self.turn_start(context, text, message), self.turn_start(context, text, message + 1)
        # The spans count in the content as the example has it; templates may cut white space from it.
        content = context[message]["content"]
        before, behind = self.around(context, message)
        assert text.startswith(before)
        assert text.endswith(behind)
        place, stop = len(before), len(text) - len(behind)
        start = place - content.index(text[place:stop])
        return max(start + read["start"], place), min(start + read["end"], stop)

    def turn_start(self, context: list[dict[str, str]], text: str, message: int) -> int:
        """Where the header of a turn begins in the rendered text, or the generation prompt behind the last one."""
        bos = self.tokenizer.bos_token or ""
        if message == 0:
            return len(bos)
        before = self.render(context[:message], generation=False)
        if text.startswith(before):
            return len(before)
        # A template that shows earlier turns otherwise once others follow: then the turn's own header tells.
        header = self.render([context[message] | {"content": MARK}], generation=False).split(MARK)[0].removeprefix(bos)
        start = len(self.around(context, message)[0]) - len(header)
        assert text.startswith(header, start)
        return start

    def around(self, context: list[dict[str, str]], message: int) -> tuple[str, str]:
        """What stands before and behind the content of a message in the rendered text."""
        marked = [*context[:message], context[message] | {"content": MARK}, *context[message + 1 :]]
        before, _, behind = self.render(marked, generation=context[-1]["role"] != "assistant").partition(MARK)
        return before, behind

    # What an example draws

    def positions(self, rule: Any, reads: list[dict[str, Any]], readable: list[int], draws: Draws) -> list[int]:
        """The tokens read by an example with a question, by its own rule or by one of its source's."""
        if rule is None:
            rule = share(reads, draws)
        if isinstance(rule, list):
            if not all(-len(readable) <= index < len(readable) for index in rule):
                raise Bad("position_out_of_range")
            return [readable[index] for index in rule]
        if rule == "all" or rule.get("all"):
            return readable
        length = draws.between(*rule["window"])
        distance = min(draws.between(*rule.get("before_end", (0, 0))), len(readable) - 1)
        end = len(readable) - distance
        return readable[max(end - length, 0) : end]

    def lens(
        self, settings: Settings, source: dict[str, Any], example: Example, framed: Framed
    ) -> tuple[list[int], str, str]:
        """The tokens read by an example of context prediction, its question and its answer."""
        draws = Draws(settings.seed, example.id, "lens")
        single = draws.unit() < source["single_share"]
        is_next = source["direction"] == "next" or (source["direction"] == "both" and draws.below(2) == 0)
        least_read, most_read = (1, 1) if single else source["window"]
        least_answer, most_answer = source["predict"]
        if source["within"] == "assistant":
            stretches = self.assistant_turns(example.context, framed)
        else:
            stretches = [range(int(framed.ids[:1] == [self.tokenizer.bos_token_id]), len(framed.ids))]
        stretches = [stretch for stretch in stretches if len(stretch) >= least_read + least_answer]
        if not stretches:
            raise Dropped("context_too_short")
        most = min(source["max_context_tokens"], settings.max_context_tokens)
        cut = [range(stretch.start, min(stretch.stop, most)) for stretch in stretches]
        cut = [stretch for stretch in cut if len(stretch) >= least_read + least_answer]
        if not cut:
            raise Dropped("beyond_max_context_tokens")
        available = cut[draws.between(0, len(cut) - 1)] if source["within"] == "assistant" else cut[0]
        reason = ""
        for _ in range(16):
            num_answer = draws.between(least_answer, min(most_answer, len(available) - least_read))
            num_read = draws.between(least_read, min(most_read, len(available) - num_answer))
            start = draws.between(0, len(available) - num_read - num_answer)
            both = available[start : start + num_read + num_answer]
            read, asked = (both[:num_read], both[num_read:]) if is_next else (both[num_answer:], both[:num_answer])
            ids = [framed.ids[index] for index in asked]
            if self.special_ids.intersection(ids):
                reason = "special_token_in_answer"
                continue
            answer = self.tokenizer.decode(ids)
            if answer and "\ufffd" not in answer:
                break
            reason = "answer_not_decodable"
        else:
            raise Dropped(reason)
        tokens = "token" if num_answer == 1 else "tokens"
        if is_next:
            come = "comes" if num_answer == 1 else "come"
            question = f"Can you predict the next {num_answer} {tokens} that {come} after this?"
        else:
            question = f"Can you predict the previous {num_answer} {tokens} that came before this?"
        return list(read), question, answer

    def assistant_turns(self, context: Context, framed: Framed) -> list[range]:
        """The tokens of each of the assistant's contents."""
        turns = [] if isinstance(context, str) else context
        said = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and turn["content"].strip()]
        if not said:
            raise Dropped("no_assistant_turn")
        reads = [{"message": message, "start": 0, "end": len(turns[message]["content"])} for message in said]
        tokens = [self.overlapping(context, [read], framed) for read in reads]
        return [range(own[0], own[-1] + 1) for own in tokens]

    # The whole

    def build(self, settings: Settings, source: dict[str, Any], example: Example) -> list[Datapoint]:
        """The datapoints of an example.

        Raises:
            Dropped: it makes none.
            Bad: it cannot be used.
        """
        if example.dropped is not None:
            raise Dropped(example.dropped)
        if source["kind"] == "classification" and example.question is None:
            raise Dropped("no_wrong_label")
        question, answer = example.question, example.answer
        if source["kind"] == "context_prediction":
            try:
                framed = self.context(example.context)
            except Bad as bad:
                raise Dropped({"template": "refused_by_template"}.get(bad.args[0], bad.args[0])) from None
            read, question, answer = self.lens(settings, source, example, framed)
        else:
            framed, read = self.read(settings, source, example)
        if max(read) + 1 > settings.max_context_tokens:
            raise Dropped("context_too_long")
        layers = settings.read_layers
        if example.layers is not None:
            layers = [layer_index(layer, settings.num_layers) for layer in example.layers]
        way = source.get("layers_per_example") or settings.layers_per_example
        if way == "one":
            layers = [layers[Draws(settings.seed, example.id, "layer").between(0, len(layers) - 1)]]
        if self.special_ids.intersection(self.encode(answer)[0]):
            raise Dropped("special_token_in_answer")
        found = []
        for group in [[layer] for layer in layers] if way == "each" else [layers]:
            name = f"{example.id}@L{group[0]}" if way == "each" else example.id
            arrays = self.arrays(framed.ids, group, read, question, answer)
            if len(arrays["input_ids"]) > settings.max_input_tokens:
                raise Dropped("input_too_long")
            texts = {"question": question, "answer": answer, "kind": example.target, "meta": example.meta}
            found.append(Datapoint(id=name, source=source["name"], **arrays, **texts))
        return found

    def read(self, settings: Settings, source: dict[str, Any], example: Example) -> tuple[Framed, list[int]]:
        """The context of an example with a question, and the tokens that are read of it.

        Raises:
            Bad: it cannot be used.
        """
        framed = self.context(example.context)
        readable = self.overlapping(example.context, example.read, framed)
        draws = Draws(settings.seed, example.id, "read")
        return framed, self.positions(example.positions, source["reads"], readable, draws)

    def datapoint(self, example: dict[str, Any], *, layers: list[int], positions: list[int]) -> dict[str, Any]:
        """The arrays of an example whose draws are given."""
        ids = self.context(example["context"]).ids
        found = self.arrays(ids, layers, positions, example["question"], example["answer"])
        return found | {"answer_start": [found["answer_start"]]}

    def arrays(self, ids: list[int], layers: list[int], read: list[int], question: str, answer: str) -> dict[str, Any]:
        """All arrays of a datapoint that reads the tokens `read` of a context at each of `layers`."""
        prompt, placeholders = self.prompt(layers, len(read), question)
        return {
            "input_ids": prompt + self.answer(answer),
            "answer_start": len(prompt),
            "placeholders": placeholders,
            "layers": [layer for layer in layers for _ in read],
            "context_ids": ids[: max(read) + 1],
            "read_positions": read * len(layers),
        }


def share(reads: list[dict[str, Any]], draws: Draws) -> dict[str, Any]:
    """One of several weighted rules."""
    left = draws.unit()
    for rule in reads:
        left -= rule["share"] / sum(each["share"] for each in reads)
        if left < 0:
            return rule
    return reads[-1]


def layer_index(layer: float, num_layers: int) -> int:
    """An index as it is, a depth as the block at that share of the layers."""
    return layer if isinstance(layer, int) else int(num_layers * round(100 * layer, 6) / 100)


def unanswerable(
    reference: Reference, settings: Settings, source: dict[str, Any], example: Example, shard: list[Example]
) -> Example:
    """The example, or for a share of a source's examples the same question about a context that does not tell.

    `shard` is all examples of the source in the same shard. One that cannot be used gives no context to others.

    Raises:
        Bad: the example cannot be used itself.
    """
    if not (rule := source.get("unanswerable")) or example.dropped is not None or example.question is None:
        return example
    reference.read(settings, source, example)
    draws = Draws(settings.seed, example.id, "unanswerable")
    if draws.unit() >= rule["share"]:
        return example
    units = list({other.unit: other for other in shard if other.dropped is None}.values())
    for _ in range(8):
        other = units[draws.below(len(units))]
        if other.label != example.label if example.label is not None else other.context != example.context:
            reads = {"context": other.context, "read": other.read, "positions": other.positions}
            given = replace(example, answer=rule["answer"], meta=example.meta | {"unanswerable": True}, **reads)
            try:
                reference.read(settings, source, given)
            except Bad:
                continue
            return given
    return replace(example, lacks_donor=True)


def build_all(
    reference: Reference, settings: Settings, sources: list[tuple[dict[str, Any], list[Table]]]
) -> tuple[list[Datapoint], dict[str, int], dict[str, int], int]:
    """The datapoints of a whole data set, how many examples were dropped and how many rows were bad for each reason, and for
    how many datapoints no context was found that would have made them unanswerable.
    """
    numbered_examples = [
        (source, example) for source, tables in sources for example in examples(source, tables, seed=settings.seed)
    ]
    datapoints, drops, errors, without_donor = [], {}, {}, 0
    size = settings.examples_per_shard
    for begin in range(0, len(numbered_examples), size):
        shard, bad_units = numbered_examples[begin : begin + size], set()
        for source, example in shard:
            beside = [other for of, other in shard if of is source]
            try:
                given = unanswerable(reference, settings, source, example, beside)
                made = reference.build(settings, source, given)
                datapoints += made
                without_donor += given.lacks_donor * len(made)
            except Dropped as dropped:
                drops[dropped.args[0]] = drops.get(dropped.args[0], 0) + 1
            except Bad as bad:
                counts, reason = (drops, "of_a_bad_row") if example.unit in bad_units else (errors, bad.args[0])
                bad_units.add(example.unit)
                counts[reason] = counts.get(reason, 0) + 1
    return datapoints, drops, errors, without_donor
