import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference import Reference

import tiny
from ao.probes import Probe
from ao.prompt import framer, identity, model_folder, num_layers, resolve_layer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny.save_model(tmp_path_factory.mktemp("models") / "tiny"))


def test_prompts_equal_the_reference(model: str) -> None:
    ours, theirs = framer(model), Reference(Path(model), end_of_turn="<|stop|>")
    for layers, num, question in [([2], 1, "Is this true?"), ([7], 40, "Why ? ? ?"), ([2, 4, 6], 3, " ? and\n ? ")]:
        prompt = ours.prompt(layers, num, question)
        ids, placeholders = theirs.prompt(layers, num, question)
        assert np.asarray(prompt.ids).tolist() == ids
        assert np.asarray(prompt.placeholders).tolist() == placeholders
        assert {ids[index] for index in placeholders} == {ours.placeholder_id}


def test_contexts_equal_the_reference(model: str) -> None:
    ours, theirs = framer(model), Reference(Path(model), end_of_turn="<|stop|>")
    user = {"role": "user", "content": " Caf\u00e9 \U0001f469\u200d\U0001f680 e\u0301, so? "}
    reply = {"role": "assistant", "content": "Yes."}
    for context in (
        "Plain \u4f60\u597d text.",
        [user],
        [user, reply],
        [{"role": "system", "content": "Be brief."}, user],
    ):
        found = ours.context(json.dumps(context))
        text, ids, spans = theirs.context(context)
        assert (found.text, np.asarray(found.ids).tolist()) == (text, ids)
        assert np.asarray(found.char_spans).tolist() == [list(span) for span in spans]


def test_the_reply_begins_after_the_empty_thought(model: str) -> None:
    """A rendered conversation lacks the empty thought of the generation prompt; labels must not be found by its length."""
    ours = framer(model)
    prompt = np.asarray(ours.prompt([2], 3, "Is this true?").ids).tolist()
    assert ours.decode(prompt).endswith("assistant\n<|think|>\n\n<|/think|>")
    for answer in ("Yes", "No"):
        assert np.asarray(ours.answer(answer)).tolist() == [*np.asarray(ours.encode(answer)), ours.end_of_turn_id]
    assert ours.decode([ours.end_of_turn_id]) == "<|stop|>"


def test_a_placeholder_of_two_tokens_is_refused(tmp_path: Path) -> None:
    tiny.save_model(tmp_path, placeholder=False)
    with pytest.raises(ValueError, match=r"placeholder.* \?"):
        framer(str(tmp_path))


@pytest.mark.parametrize("style", ["jinja", "string", "named", "json"])
def test_templates_are_found_wherever_they_stand(tmp_path: Path, model: str, style: str) -> None:
    tiny.save_model(tmp_path, template=tiny.TEMPLATE if style == "jinja" else None)
    if style == "json":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": tiny.TEMPLATE}))
    elif style != "jinja":
        named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": tiny.TEMPLATE}]
        path = tmp_path / "tokenizer_config.json"
        template = tiny.TEMPLATE if style == "string" else named
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    assert framer(str(tmp_path)).fingerprint == framer(model).fingerprint


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path, template=None)
    with pytest.raises(FileNotFoundError, match=r"has no chat template .* use the instruction-tuned model"):
        framer(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json; save one with transformers"):
        framer(str(folder))
    with pytest.raises(
        FileNotFoundError, match=rf"'\./nowhere': there is no such folder; expected {Path.cwd()}/nowhere"
    ):
        model_folder("./nowhere")
    with pytest.raises(ValueError, match="which has no revision 'main'"):
        model_folder(str(folder), "main")


def test_a_hub_model_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="not in the Hub's local cache, and the Hub cannot be reached"):
        model_folder("nobody/nothing-here")
    with pytest.raises(FileNotFoundError, match="neither a folder nor a Hub id"):
        model_folder("no such name!")


def test_identity_holds_no_path(model: str, tmp_path: Path) -> None:
    found = identity(model, framer=framer(model))
    assert found["model"] == "tiny"
    assert found["num_layers"] == num_layers(model) == 8
    copy = tiny.save_model(tmp_path / "tiny")
    assert identity(str(copy), framer=framer(str(copy))) == found
    (copy / "model.safetensors").write_bytes(b"weights")
    assert identity(str(copy), framer=framer(str(copy)))["weights"] != found["weights"]


def test_layers_by_index_and_depth() -> None:
    assert [resolve_layer(depth, 60) for depth in (0.25, 0.5, 0.75, 0.0, 0.29)] == [15, 30, 45, 0, 17]
    assert resolve_layer(0.29, 100) == 29  # 100 * 0.29 is 28.999999999999996
    assert resolve_layer(59, 60) == 59
    for layer, message in [(60, "layers 0 to 59"), (-1, "layers 0 to 59"), (1.0, "a depth lies in"), (True, "index")]:
        with pytest.raises(ValueError, match=message):
            resolve_layer(layer, 60)


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        ("token:-1", [9]),
        ("token:0", [0]),
        ("segment:-3:", [7, 8, 9]),
        ("segment:2:5", [2, 3, 4]),
        ("segment::2", [0, 1]),
    ],
)
def test_probes(text: str, positions: list[int]) -> None:
    probe = Probe.parse(text)
    assert probe.positions(10).tolist() == positions
    assert str(probe) == text
    assert Probe.parse("full_seq").positions(3).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("token", "expected token:INDEX"),
        ("token:x", "expected token:INDEX"),
        ("token:10", "index 10 is out of range for 10 tokens; expected -10 to 9"),
        ("segment:-11:", "index -11 is out of range"),
        ("segment:5:5", "selects nothing of 10 tokens"),
    ],
)
def test_bad_probes(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Probe.parse(text).positions(10)


def test_the_data_part_needs_no_torch() -> None:
    modules = "config manifest prompt probes sources pack shards"
    code = f"import sys; from ao import {', '.join(modules.split())}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
