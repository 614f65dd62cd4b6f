"""The model card of an adapter: README.md as the Hub shows it, drafted from what the run recorded.

Every number comes from `ao_config.json`, the resolved recipe, `training.json` or a report of `ao eval`; what none of them
says, the card does not say. The license and any claim about use are the author's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ao.config import Recipe, load_recipe
from ao.manifest import read_manifest

FILE = "README.md"
REPOSITORY = "OWNER/NAME"
"""Stands in a draft where the adapter's own repository will."""
PAPER_EXAMPLES = 1_000_000
"""Examples of the training mixture of arXiv 2512.15674."""

_PRECISIONS = {
    "nf4": "NF4 (4 bit, double quantization)",
    "nf4-dequantized": "NF4 (4 bit, double quantization), its values held in bf16",
}
_RULES = {
    "norm_matched_add": "h' = h + c \\|\\|h\\|\\| v / \\|\\|v\\|\\|, c = {scale:g}",
    "rescaled_add": "h + c \\|\\|h\\|\\| v / \\|\\|v\\|\\|, c = {scale:g}, rescaled to {rescale:g} \\|\\|h\\|\\|",
    "replace": "h' = v",
}
_CONTROLS = ("no_activation", "shuffled", "text", "untrained")
_EVALUATION = "## Evaluation"


def model_card(
    *,
    contract: Mapping[str, Any],
    recipe: Recipe,
    record: Mapping[str, Any],
    report: Mapping[str, Any] | None = None,
) -> str:
    """The card as Markdown with the Hub's front matter.

    Args:
        contract: the contents of `ao_config.json`.
        recipe: the resolved recipe.
        record: the contents of `training.json`.
        report: the contents of a `report.json` of `ao eval`.
    """
    base = recipe.model.name
    parts = [
        _front_matter(base),
        f"# Activation Oracle for {base}",
        _what(recipe, contract),
        "## Ask it\n\n" + _snippet(recipe),
        "## Training\n\n" + _table(("", ""), _training(recipe, contract, record)),
        "### Data\n\n" + _table(("source", "kind", "from", "examples at most"), _sources(recipe)),
        "### Held-out loss\n\n" + _held_out(recipe, record),
        evaluation(report),
        "## Limits\n\n" + "\n".join(f"- {limit}" for limit in _limits(recipe, contract, record)),
        "## Versions\n\n" + ", ".join(f"{name} {value}" for name, value in record.get("versions", {}).items()),
    ]
    return "\n\n".join(parts) + "\n"


def card_of(folder: str | Path, *, report: Mapping[str, Any] | None = None) -> str:
    """The card drafted from an adapter's folder.

    Raises:
        FileNotFoundError: the folder lacks ao_config.json, recipe.toml or training.json.
    """
    folder = Path(folder)
    return model_card(
        contract=read_manifest(folder / "ao_config.json"),
        recipe=load_recipe(folder / "recipe.toml"),
        record=read_manifest(folder / "training.json"),
        report=report,
    )


def evaluation(report: Mapping[str, Any] | None) -> str:
    """The card's section on scores; without a report it says that there are none."""
    if report is None:
        return (
            f"{_EVALUATION}\n\nNone recorded. Until `ao eval` has scored this adapter beside its controls, nothing here shows "
            "how well it answers."
        )
    rows = [
        (
            task["name"],
            str(task["n"]),
            f"{task['score']:.2f} {_interval(task['interval'])}",
            *(f"{task['controls'][name]['score']:.2f}" for name in _CONTROLS),
            f"{task['gain']:+.2f} {_interval(task['gain_interval'], sign='+')}",
        )
        for task in report["tasks"]
    ]
    unclear = [task["name"] for task in report["tasks"] if task["gain_interval"][0] <= 0]
    parts = [
        _EVALUATION,
        _table(("task", "n", "score", *(name.replace("_", " ") for name in _CONTROLS), "gain"), rows),
        "*No activation*: injection off. *Shuffled*: another item's activations. *Text*: the tokens that were read, as text. "
        "*Untrained*: the adapter off, injection on. *Gain*: the score less the best of the four; 95 % bootstrap intervals "
        f"over items. `ao eval`, seed {report['seed']}.",
    ]
    if unclear:
        parts.append(
            f"The gain's interval reaches zero for {', '.join(unclear)}: no reading of activations is shown there."
        )
    return "\n\n".join(parts)


def with_report(card: str, report: Mapping[str, Any]) -> str:
    """A card, maybe edited by its author, with the section on scores put in or replaced."""
    section = evaluation(report)
    found = re.search(rf"^{_EVALUATION}$.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if found is None:
        return f"{card.rstrip()}\n\n{section}\n"
    rest = card[found.end() :]
    return card[: found.start()] + section + ("\n\n" + rest if rest else "\n")


def is_hub_id(name: str) -> bool:
    """Whether a model's name is one of the Hub and not a folder of this machine."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def _front_matter(base: str) -> str:
    lines = ["---"]
    if is_hub_id(base):
        lines += [f"base_model: {base}", "base_model_relation: adapter"]
    lines += ["library_name: peft", "tags:", "- activation-oracle", "- lora", "- interpretability"]
    lines += ["# license: yours to choose before this is published; the base's own terms hold, too", "---"]
    return "\n".join(lines)


def _what(recipe: Recipe, contract: Mapping[str, Any]) -> str:
    base, target = recipe.model.name, recipe.model.target
    read = f"`{target}`" if target else "that same model, the adapter switched off"
    return (
        f"A LoRA adapter that turns `{base}` into an Activation Oracle ([arXiv 2512.15674](https://arxiv.org/abs/2512.15674)): "
        f"it reads residual-stream activations of {read}, put in at placeholder tokens of its prompt, and answers questions "
        "about them in plain language. `ao_config.json` holds what it must be asked with; `ao` reads it.\n\n"
        f"It reads layers {_layers(contract)}. Layer k is the output of block k, counted from 0."
    )


def _layers(contract: Mapping[str, Any]) -> str:
    count = contract["ao"]["num_layers"]
    combinations = contract["act_layer_combinations"]
    shown = "; ".join(", ".join(map(str, combination)) for combination in combinations)
    if all(len(combination) == 1 for combination in combinations):
        shown = ", ".join(str(combination[0]) for combination in combinations)
        return f"{shown} of {count}, one in a prompt"
    return f"{shown} of {count}, those between semicolons together in one prompt"


def _snippet(recipe: Recipe) -> str:
    model = recipe.model
    precision = model.precision.removesuffix("-dequantized")  # the same values in less memory
    options = {"revision": model.revision, "target": model.target, "target_revision": model.target_revision}
    arguments = [f'"{model.name}"', f'adapter="{REPOSITORY}"', f'precision="{precision}"']
    arguments += [f'{name}="{value}"' for name, value in options.items() if value is not None]
    return (
        "```python\n"
        "from ao import Oracle                # the package activation-oracles\n\n"
        f"oracle = Oracle.from_pretrained({', '.join(arguments)})\n"
        'acts = oracle.read([{"role": "user", "content": "What shall we have for dinner?"}])\n'
        'answer = oracle.ask(acts[-10:], "What is the model thinking about?")\n'
        "print(answer, answer.control)        # control: the same question without activations\n"
        "```"
    )


def _training(recipe: Recipe, contract: Mapping[str, Any], record: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    model, train = recipe.model, recipe.train
    revision = f" at {model.revision}" if model.revision else ""
    yield "base", f"{model.name}{revision}, {_PRECISIONS.get(model.precision, model.precision)}, frozen"
    if model.target:
        yield "target", model.target + (f" at {model.target_revision}" if model.target_revision else "")
    yield "LoRA", f"r {train.rank}, alpha {train.alpha}, dropout {train.dropout:g}, on every linear of the blocks"
    yield "layers read", _layers(contract)
    rule = _RULES[train.injection].format(scale=train.injection_scale, rescale=train.rescale)
    yield "injection", f"{train.injection} at the output of block {train.injection_layer}: {rule}"
    yield "steps", f"{record['steps']:,}"
    yield "examples seen", f"{record['examples']:,}"
    yield "tokens", f"{record['input_tokens']:,} of prompts and answers, {record['answer_tokens']:,} of them learned"
    yield "optimizer", f"{train.optimizer}, gradients clipped at {train.max_grad_norm:g}"
    yield "learning rate", f"{train.learning_rate:g}, linear warm-up over {train.warmup:.0%} of the steps, linear decay"
    losses = [loss for loss in record["losses"] if loss is not None]
    if losses:
        end = losses[-max(1, len(losses) // 20) :]
        yield (
            "training loss",
            f"{losses[0]:.3f} at the first step, {math.fsum(end) / len(end):.3f} over the last {len(end)}",
        )
    if record.get("skipped_steps"):
        yield "skipped steps", f"{record['skipped_steps']:,}, whose gradient was not finite"
    ranks = ", then ".join(_count(number, "process", "processes") for number in record.get("ran_on", [record["ranks"]]))
    yield "time", f"{_duration(record['seconds']['total'])} on {ranks}"
    yield "seed", str(train.seed)


def _sources(recipe: Recipe) -> Iterable[tuple[str, str, str, str]]:
    for source in recipe.data.sources:
        # Paths of the machine that trained say nothing to a reader.
        origin = (
            "files" if source.dataset is None else source.dataset + (f" ({source.subset})" if source.subset else "")
        )
        drawn = "all" if source.count is None else f"{source.count:,}"
        if source.share is not None:
            drawn = f"share {source.share:g} of {recipe.data.examples:,}"
        yield source.name, source.kind, origin, drawn


def _held_out(recipe: Recipe, record: Mapping[str, Any]) -> str:
    scores = record.get("held_out")
    if not scores:
        return "Not scored."
    own, other = scores["held_out_loss"], scores["held_out_loss_shuffled"]
    if own is None or other is None:
        return f"Not finite after step {scores['step']:,}: the run broke."
    unit = "nats per answer token" if recipe.train.loss == "per_token" else "nats, mean over examples"
    verdict = (
        f"With wrong activations the loss is {other - own:.3f} higher: the answers depend on what is read. How much of that is "
        "gained over no activations at all, `ao eval` tells."
        if other > own
        else "The right activations are no better than wrong ones: this run shows no reading of them."
    )
    rows = [("its own", f"{own:.3f}"), ("another datapoint's (shuffled)", f"{other:.3f}")]
    return (
        f"After step {scores['step']:,}, on {scores['datapoints']:,} datapoints whose contexts training never saw.\n\n"
        + _table(("activations", unit), rows)
        + f"\n\n{verdict}"
    )


def _limits(recipe: Recipe, contract: Mapping[str, Any], record: Mapping[str, Any]) -> Iterable[str]:
    yield "Answers can be fluent and wrong. Compare each with its control, which is asked without activations."
    yield (
        "Confidence that the oracle states in words means nothing; `choices=` gives probabilities. They were not calibrated."
    )
    yield f"Trained on layers {_layers(contract)}; answers about others are extrapolation. So are other targets and tokenizers."
    if record["examples"] < PAPER_EXAMPLES / 2:
        yield f"It saw {record['examples']:,} examples, where the paper's oracles saw about a million."
    if recipe.model.precision.startswith("nf4"):
        yield "Do not merge it into 4-bit weights: quantizing again erases it."


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(text.split()))


def _interval(ends: Sequence[float], *, sign: str = "") -> str:
    return f"[{ends[0]:{sign}.2f}, {ends[1]:{sign}.2f}]"


def _duration(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _count(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"
