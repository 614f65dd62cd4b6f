"""The card says what was recorded, no more; the author's words survive a new report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ao.card import card_of, evaluation, is_hub_id, model_card, with_report
from ao.checkpoint import OracleConfig
from ao.config import Recipe, load_recipe, parse_recipe, to_toml

RECIPES = Path(__file__).parents[2] / "recipes"
CONTRACT = OracleConfig(
    model="google/gemma-4-31B-it",
    injection="norm_matched_add",
    injection_layer=1,
    layer_combinations=((15,), (30,), (45,)),
    num_layers=60,
).to_json()
HELD_OUT = {
    "step": 1500,
    "datapoints": 512,
    "held_out_loss": 1.2,
    "held_out_loss_shuffled": 1.45,
    "held_out_gain": 0.25,
}
RECORD: dict[str, Any] = {
    "steps": 1500,
    "ranks": 2,
    "losses": [2.0, None, *[1.0] * 1498],
    "held_out": HELD_OUT,
    "seconds": {"total": 1300.0},
    "examples": 24_000,
    "input_tokens": 1_700_000,
    "answer_tokens": 300_000,
    "skipped_steps": 1,
    "versions": {"torch": "2.15.0", "peft": "0.21.2"},
}
CONTROLS = {name: {"score": 0.5, "interval": [0.4, 0.6]} for name in ("no_activation", "shuffled", "text", "untrained")}


def scored(name: str, score: float, gain: float, spread: float) -> dict[str, Any]:
    ends = [round(gain - spread, 2), round(gain + spread, 2)]
    interval = [score - 0.05, score + 0.05]
    own = {"name": name, "n": 300, "score": score, "interval": interval, "gain": gain, "gain_interval": ends}
    return {**own, "controls": CONTROLS}


REPORT: dict[str, Any] = {
    "schema": 1,
    "seed": 3,
    "tasks": [scored("clear", 0.9, 0.4, 0.1), scored("not|clear", 0.5, 0.0, 0.2)],
}


def card(recipe: Recipe | None = None, **changes: Any) -> str:
    return model_card(
        **{
            "contract": CONTRACT,
            "recipe": recipe or load_recipe(RECIPES / "gemma-4-31b-it.toml"),
            "record": RECORD,
            **changes,
        }
    )


def front_matter(text: str) -> dict[str, Any]:
    import yaml  # huggingface_hub brings it

    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_is_what_the_hub_reads_and_leaves_the_license_to_the_author():
    values = front_matter(card())
    assert values["base_model"] == "google/gemma-4-31B-it"
    assert (values["base_model_relation"], values["library_name"]) == ("adapter", "peft")
    assert "activation-oracle" in values["tags"]
    assert "license" not in values


@pytest.mark.parametrize("name", ["demo", "/models/mine", "models/mine"])
def test_a_folder_is_no_base_of_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "models/mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(name)
    recipe = load_recipe(RECIPES / "demo.toml")
    assert "base_model" not in front_matter(card(replace(recipe, model=replace(recipe.model, name=name))))


def test_it_says_what_the_run_recorded():
    text = card()
    for words in (
        "| layers read | 15, 30, 45 of 60, one in a prompt |",
        "r 16, alpha 32, dropout 0.05",
        "| examples seen | 24,000 |",
        "| training loss | 2.000 at the first step, 1.000 over the last 74 |",
        "| skipped steps | 1, whose gradient was not finite |",
        "| time | 22 min on 2 processes |",
        "| web_text | context_prediction | HuggingFaceFW/fineweb (sample-10BT) | share 100 of 16,500 |",
        "| latentqa | latentqa | files | share 64 of 16,500 |",
        "torch 2.15.0",
        "24,000 examples, where the paper's oracles saw about a million",
        "Do not merge it into 4-bit weights",
        'precision="nf4"',
    ):
        assert words in text
    assert "../data" not in text
    # Every row of a table has the cells of its header.
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_the_held_out_loss_stands_beside_its_control():
    text = card()
    assert "| its own | 1.200 |" in text
    assert "| another datapoint's (shuffled) | 1.450 |" in text
    assert "the loss is 0.250 higher" in text
    blind = {**HELD_OUT, "held_out_loss": 1.45}
    assert "no better than wrong ones" in card(record={**RECORD, "held_out": blind})
    assert "### Held-out loss\n\nNot scored." in card(record={**RECORD, "held_out": None})


def test_scores_come_with_their_controls_or_not_at_all():
    assert "## Evaluation\n\nNone recorded." in card()
    text = card(report=REPORT)
    assert "| clear | 300 | 0.90 [0.85, 0.95] | 0.50 | 0.50 | 0.50 | 0.50 | +0.40 [+0.30, +0.50] |" in text
    assert "| not\\|clear |" in text
    assert "reaches zero for not|clear" in text


def test_a_new_report_leaves_the_authors_words_alone():
    edited = card().replace("## Limits", "## Intended use\n\nMine.\n\n## Limits")
    first = with_report(edited, REPORT)
    assert first == edited.replace(evaluation(None), evaluation(REPORT))
    assert with_report(first, {**REPORT, "seed": 4}) == first.replace("seed 3", "seed 4")
    assert with_report("# Mine\n", REPORT) == f"# Mine\n\n{evaluation(REPORT)}\n"
    last = f"# Mine\n\n{evaluation(None)}\n"
    assert with_report(last, REPORT) == f"# Mine\n\n{evaluation(REPORT)}\n"


def test_several_layers_of_a_prompt_and_another_target_are_said():
    contract = {**CONTRACT, "act_layer_combinations": [[21, 22, 23], [30]]}
    recipe = parse_recipe({"model": {"name": "a/b", "revision": "r1", "target": "c/d"}})
    text = card(recipe, contract=contract)
    assert "21, 22, 23; 30 of 60, those between semicolons together in one prompt" in text
    assert 'revision="r1", target="c/d"' in text
    assert "activations of `c/d`" in text


def test_a_folder_gives_the_same_card(tmp_path):
    recipe = load_recipe(RECIPES / "gemma-4-31b-it.toml")
    (tmp_path / "ao_config.json").write_text(json.dumps(CONTRACT))
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    (tmp_path / "training.json").write_text(json.dumps(RECORD))
    assert card_of(tmp_path) == card()
    (tmp_path / "training.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"training\.json"):
        card_of(tmp_path)
