"""The oracle on the embedded model with random adapters: what is read, what is asked, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ao import Oracle
from ao.checkpoint import FILE, OracleConfig, read_config
from ao.decode import OraclePrompt
from ao.models.adapters import as_oracle
from ao.prompt import framer, model_folder, resolve_layer
from conftest import save_demo_adapter

SYSTEM = {"role": "system", "content": "You are a pirate. You feel calm."}
USER = {"role": "user", "content": "Tell me about the red drum."}
OTHER = "The queen baked the bread happily."
QUESTION = "What mood is the assistant in?"
CHOICES = ["calm", "angry", "proud"]
WIDE = "caf\u00e9 \U0001f680 \u4f60\u597d!"
"""Characters that take several tokens each."""


@pytest.fixture(scope="module")
def oracle(demo_adapter):
    return Oracle.from_pretrained("demo", demo_adapter, device="cpu")


@pytest.fixture(scope="module")
def bare():
    """The model as the library loads it, without anything of ours."""
    return AutoModelForCausalLM.from_pretrained(model_folder("demo"), dtype=torch.float32).eval()


@pytest.fixture
def adapter(demo_adapter, tmp_path):
    """A copy of the adapter that a test may damage."""
    return Path(shutil.copytree(demo_adapter, tmp_path / "adapter"))


def hidden_states(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(ids)[None], output_hidden_states=True, use_cache=False).hidden_states


def change(folder, name, **values):
    """Put values into a JSON file; None takes a key out."""
    contents = json.loads((folder / name).read_text()) | values
    (folder / name).write_text(json.dumps({key: value for key, value in contents.items() if value is not None}))


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [[SYSTEM, USER], OTHER])
def test_reading_equals_the_library_with_the_adapter_off(oracle, bare, context):
    activations = oracle.read(context, layers=[0, 0.5, 4])
    assert activations.layers == (0, resolve_layer(0.5, oracle.arch.num_layers), 4)
    assert activations.context_ids.tolist() == np.asarray(framer("demo").context(json.dumps(context)).ids).tolist()
    expected = hidden_states(bare, activations.context_ids)
    assert activations.values.shape == (len(activations.context_ids), 3, oracle.arch.d_model)
    for column, layer in enumerate(activations.layers):
        torch.testing.assert_close(activations.values[:, column], expected[layer + 1][0], rtol=1e-4, atol=1e-4)
        assert torch.equal(activations.at(layer), activations.values[:, column])
    assert oracle.read(context).layers == (1, 3, 4)
    with pytest.raises(ValueError, match="layer 1 was not read; read: 0, 3, 4"):
        activations.at(1)


def test_a_read_leaves_the_adapter_as_it_was(oracle):
    oracle.read(OTHER)
    assert not any(parameter.requires_grad for parameter in oracle.model.parameters())
    assert not oracle.model.training


def test_positions_choose_tokens(oracle):
    whole = oracle.read([USER])
    some = oracle.read([USER], positions=[2, -1])
    assert some.positions.tolist() == [2, len(whole) - 1]
    assert torch.equal(some.values, whole.values[[2, -1]])
    assert some.tokens == (whole.tokens[2], whole.tokens[-1])
    with pytest.raises(IndexError, match="99"):
        oracle.read([USER], positions=[99])
    with pytest.raises(ValueError, match="positions"):
        oracle.read([USER], positions=[])


@pytest.mark.parametrize("context", [[SYSTEM, USER], [{**USER, "content": WIDE}], OTHER, WIDE])
def test_tokens_spell_the_context(oracle, context):
    rendered = framer("demo").context(json.dumps(context)).text
    activations = oracle.read(context, layers=[1])
    assert len(activations) == len(activations.tokens) == len(activations.context_ids)
    assert activations.text == rendered
    for first in range(0, len(activations), 3):
        assert activations[first : first + 5].text in rendered
        assert activations[first].text == activations.tokens[first]


def test_slices_keep_rows_and_tokens_together(oracle):
    activations = oracle.read([SYSTEM, USER])
    num = len(activations)
    for which in (slice(-3, None), slice(None, None, -1), 4, -1, [0, 5], np.array([5, 5])):
        chosen = np.atleast_1d(np.arange(num)[which])
        part = activations[which]
        assert part.positions.tolist() == chosen.tolist()
        assert torch.equal(part.values, activations.values[chosen.tolist()])
        assert list(part.tokens) == [activations.tokens[index] for index in chosen]
        assert (part.layers, len(part)) == (activations.layers, len(chosen))
    assert activations[2:8][1].positions.tolist() == [3]
    for nothing in (slice(num, None), []):
        with pytest.raises(IndexError, match=f"no token left: .* of {num} tokens"):
            activations[nothing]
    with pytest.raises(IndexError):
        activations[num]


# --- asking ----------------------------------------------------------------------------------------------------------


def asked_by_hand(oracle, layer, vectors, question, choices, *, num=None):
    """Probabilities of one-token choices: one forward of the prompt, vectors written into the output of block 1."""
    prompt = oracle.framer.prompt([layer], num or len(vectors), question)
    ids = torch.tensor(np.asarray(prompt.ids), dtype=torch.long)

    def hook(module, args, output):
        for place, vector in zip(np.asarray(prompt.placeholders), vectors, strict=True):
            output[0, place] += output[0, place].norm() * vector / vector.norm()
        return output

    handle = oracle.arch.layers[1].register_forward_hook(hook) if vectors is not None else None
    try:
        with torch.no_grad(), as_oracle(oracle.model):
            logits = oracle.model(input_ids=ids[None], use_cache=False).logits[0, -1]
    finally:
        if handle is not None:
            handle.remove()
    tokens = [int(np.asarray(oracle.framer.answer(choice))[0]) for choice in choices]
    return logits[tokens].softmax(-1).numpy()


def shares(answer):
    return [answer.probabilities[choice] for choice in CHOICES]


def differ(one, other):
    """Random adapters are sure of anything, so the odds tell them apart."""
    return np.abs(np.log(shares(one)) - np.log(shares(other))).max() > 0.02


def test_an_answer_is_about_the_activations_and_its_control_is_not(oracle):
    activations = oracle.read([SYSTEM, USER])[-3:]
    answer = oracle.ask(activations, QUESTION, choices=CHOICES)
    # The trained layer nearest to half the depth speaks for all.
    assert answer.layer == answer.control.layer == 3
    assert_allclose(shares(answer), asked_by_hand(oracle, 3, activations.at(3), QUESTION, CHOICES), atol=1e-5)
    assert_allclose(shares(answer.control), asked_by_hand(oracle, 3, None, QUESTION, CHOICES, num=3), atol=1e-5)
    assert differ(answer, answer.control)
    assert answer.confidence == max(shares(answer)) == answer.probabilities[answer.text]
    assert sum(shares(answer)) == pytest.approx(1)
    assert str(answer) == answer.text
    assert answer.control.control is None
    assert oracle.ask(activations, QUESTION, choices=CHOICES, control=None).control is None


def test_the_shuffled_control_reads_another_context(oracle):
    mine, other = oracle.read([SYSTEM, USER])[-3:], oracle.read(OTHER)[:2]
    answer = oracle.ask(mine, QUESTION, choices=CHOICES, control="shuffled", other=other)
    # Two vectors spread over three placeholders.
    expected = asked_by_hand(oracle, 3, other.at(3)[[0, 0, 1]], QUESTION, CHOICES)
    assert_allclose(shares(answer.control), expected, atol=1e-5)
    with pytest.raises(ValueError, match="shuffled needs the activations of another context, given as other="):
        oracle.ask(mine, QUESTION, control="shuffled")


def test_the_text_control_shows_the_tokens_without_turn_marks(oracle):
    """Inside the question an end of turn would end the user's turn, and the control would stumble over that."""
    activations = oracle.read([SYSTEM, {**USER, "content": WIDE}])
    answer = oracle.ask(activations, QUESTION, choices=CHOICES, control="text")
    shown = f"system\n{SYSTEM['content']}\nuser\n{WIDE}\nmodel\nthought\n\n{QUESTION}"
    expected = asked_by_hand(oracle, 3, None, shown, CHOICES, num=len(activations))
    assert_allclose(shares(answer.control), expected, atol=1e-5)


def test_an_unknown_control_is_refused(oracle):
    with pytest.raises(ValueError, match="control: expected no_activation, shuffled, text or None, got 'none'"):
        oracle.ask(oracle.read(OTHER), QUESTION, control="none")


def test_layers_by_index_by_depth_and_all(oracle):
    activations = oracle.read([SYSTEM, USER])[-2:]
    answers = oracle.ask(activations, QUESTION, layer="all", choices=CHOICES)
    assert [answer.layer for answer in answers] == [1, 3, 4]
    for answer in answers:
        alone = oracle.ask(activations, QUESTION, layer=answer.layer, choices=CHOICES)
        assert_allclose(shares(alone), shares(answer), atol=1e-5)
        assert_allclose(shares(alone.control), shares(answer.control), atol=1e-5)
    assert len({answer.confidence for answer in answers}) == 3
    assert oracle.ask(activations, QUESTION, layer=0.5, choices=CHOICES).layer == 3
    # The default layer where it was read, else the first that was.
    assert oracle.ask(oracle.read(OTHER, layers=[4, 1]), QUESTION, choices=CHOICES).layer == 4


def test_a_layer_that_training_did_not_show_is_refused(oracle):
    activations = oracle.read(OTHER, layers=[2, 3])
    with pytest.raises(
        ValueError, match=r"layer 2: the adapter was not trained to read it; trained: \[1\], \[3\], \[4\]"
    ):
        oracle.ask(activations, QUESTION, layer=2)
    with pytest.raises(ValueError, match="layer 1 was not read"):
        oracle.ask(activations, QUESTION, layer=1)
    with pytest.raises(ValueError, match="layer 6 is out of range"):
        oracle.ask(activations, QUESTION, layer=6)


def test_several_layers_in_one_prompt_where_the_adapter_was_trained_so(demo_adapter):
    oracle = Oracle.from_pretrained("demo", demo_adapter, device="cpu")
    oracle.config = replace(oracle.config, layer_combinations=((1, 3), (4,)))
    acts = oracle.read([SYSTEM, USER])[-2:]
    answer = oracle.ask(acts, QUESTION, choices=CHOICES, layer=(1, 3))
    framed = oracle.framer.prompt([1, 3], 2, QUESTION)
    vectors = torch.cat([acts.values[:, 0], acts.values[:, 1]])
    prompt = OraclePrompt(np.asarray(framed.ids), np.asarray(framed.placeholders), vectors)
    (expected,) = oracle.choice_log_probs([prompt], [CHOICES])
    assert_allclose(list(answer.probabilities.values()), np.exp(expected) / np.exp(expected).sum(), rtol=1e-6)
    assert answer.layer == (1, 3)
    assert [each.layer for each in oracle.ask(acts, QUESTION, choices=CHOICES, layer="all")] == [(1, 3), 4]
    with pytest.raises(ValueError, match="layer 1, 4: the adapter was not trained"):
        oracle.ask(acts, QUESTION, layer=(1, 4))


def test_a_vector_without_direction_is_refused(oracle):
    activations = oracle.read(OTHER)
    activations.values[2, 1] = 0
    with pytest.raises(ValueError, match=r"layer 3: vector 2 of .* has norm 0\.0"):
        oracle.ask(activations, QUESTION, layer=3)


def test_a_scan_asks_each_token_and_layer_by_itself(oracle):
    activations = oracle.read([SYSTEM, USER])[-4:]
    found = oracle.scan(activations, QUESTION, CHOICES)
    assert found.shape == (4, 3, 3)
    assert_allclose(found.sum(-1), 1)
    for token, column in ((0, 0), (3, 2), (1, 1)):
        vectors = activations.values[token : token + 1, column]
        expected = asked_by_hand(oracle, activations.layers[column], vectors, QUESTION, CHOICES)
        assert_allclose(found[token, column], expected, atol=1e-5)


@pytest.mark.parametrize("choices", [["calm"], ["calm", "calm"]])
def test_choices_must_be_choices(oracle, choices):
    with pytest.raises(ValueError, match="choices: expected at least two different ones"):
        oracle.ask(oracle.read(OTHER), QUESTION, choices=choices)


def test_a_choice_that_begins_another_is_asked_with_its_end(oracle):
    bare = oracle._choice_ids(["calm", "angry"])
    ended = oracle._choice_ids(["calm", "calm sea"])
    assert all(ids[-1] != oracle.framer.end_of_turn_id for ids in bare)
    assert all(ids[-1] == oracle.framer.end_of_turn_id for ids in ended)
    assert ended[0][:-1].tolist() == bare[0].tolist()


def test_free_answers_and_samples(oracle):
    activations = oracle.read([SYSTEM, USER])[-3:]
    answer = oracle.ask(activations, QUESTION, max_new_tokens=5)
    assert answer.confidence is None
    assert answer.probabilities == {}
    again = oracle.ask(activations, QUESTION, layer="all", max_new_tokens=5)[1]
    assert (again.text, again.control.text) == (answer.text, answer.control.text)
    torch.manual_seed(0)
    sampled = oracle.ask(activations, QUESTION, samples=5, max_new_tokens=2, temperature=1e-4, control=None)
    assert answer.text.startswith(sampled.text)
    assert sampled.confidence == 1.0
    torch.manual_seed(0)
    hot = oracle.ask(activations, QUESTION, samples=8, max_new_tokens=2, temperature=20.0, control=None)
    assert hot.confidence in [count / 8 for count in range(1, 8)]


def test_a_reply_is_the_targets_own(bare, tmp_path):
    oracle = Oracle.from_pretrained("demo", save_demo_adapter(tmp_path / "strong", std=3.0), device="cpu")
    ids = torch.from_numpy(oracle.read([SYSTEM, USER]).context_ids)[None]
    for _ in range(8):
        token = int(hidden_logits(bare, ids).argmax())
        if token == oracle.framer.end_of_turn_id:
            break
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    said = oracle.framer.decode(ids[0, len(oracle.read([SYSTEM, USER])) :].numpy().astype(np.int32))
    assert oracle.reply([SYSTEM, USER], max_new_tokens=8) == said.strip()
    # With the adapter on it would be another.
    prompt = OraclePrompt(oracle.read([SYSTEM, USER]).context_ids, np.zeros(0, dtype=np.int64), None)
    assert oracle.generate([prompt], max_new_tokens=8) != [said.strip()]


def hidden_logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[0, -1]


def test_two_oracles_do_not_touch_each_other(oracle, tmp_path):
    activations = oracle.read([SYSTEM, USER])[-3:]
    before = oracle.ask(activations, QUESTION, choices=CHOICES)
    folder = save_demo_adapter(tmp_path / "second", seed=1)
    second = Oracle.from_pretrained("demo", folder, device="cpu")
    theirs = second.ask(second.read([SYSTEM, USER])[-3:], QUESTION, choices=CHOICES)
    again = oracle.ask(activations, QUESTION, choices=CHOICES)
    assert shares(again) == shares(before)
    assert differ(theirs, before)
    # The base below is the same, so either may be asked about what the other has read.
    torch.testing.assert_close(second.read([SYSTEM, USER])[-3:].values, activations.values)


def test_the_settings_of_the_adapter_are_used(oracle, tmp_path):
    folder = save_demo_adapter(tmp_path / "replace", injection="replace", injection_layer=2)
    replacing = Oracle.from_pretrained("demo", folder, device="cpu")
    assert (replacing.injector.rule, replacing.injector.layer) == ("replace", 2)
    activations = oracle.read([SYSTEM, USER])[-3:]
    ours, theirs = (each.ask(activations, QUESTION, choices=CHOICES) for each in (oracle, replacing))
    assert_allclose(shares(ours.control), shares(theirs.control), atol=1e-5)
    assert differ(ours, theirs)


# --- another target --------------------------------------------------------------------------------------------------


@pytest.fixture
def tuned(tmp_path):
    """The embedded model with other weights, as full fine-tuning leaves one."""
    folder = Path(shutil.copytree(model_folder("demo"), tmp_path / "tuned"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"] *= -1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_another_target_is_read_and_the_oracle_speaks(oracle, bare, demo_adapter, tuned):
    other = Oracle.from_pretrained("demo", demo_adapter, target=str(tuned), device="cpu")
    activations = other.read([SYSTEM, USER])
    model = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).eval()
    expected = hidden_states(model, activations.context_ids)[4][0]
    torch.testing.assert_close(activations.at(3), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(activations.at(3), hidden_states(bare, activations.context_ids)[4][0], atol=1e-2)
    # The same vectors get the same answer, whatever the target is.
    assert_allclose(
        shares(other.ask(activations[-2:], QUESTION, choices=CHOICES)),
        shares(oracle.ask(activations[-2:], QUESTION, choices=CHOICES)),
        atol=1e-5,
    )


def test_a_target_of_another_tokenizer_is_refused(demo_adapter, tuned):
    tokenizer = json.loads((tuned / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tuned / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        ValueError, match=r"target '.*tuned': the base has tokenizer \w+\.\., got .*must be of one family"
    ):
        Oracle.from_pretrained("demo", demo_adapter, target=str(tuned), device="cpu")


# --- the contract of an adapter --------------------------------------------------------------------------------------

PUBLISHED = {
    "schema_version": 1,
    "model_name": "demo",
    "hook_onto_layer": 1,
    "layer_combinations": [[25], [50], [75]],
    "special_token": " ?",
    "prefix_template": "Layer: {layer}\\n{special_token} * {num_positions} \\n",
    "steering_coefficient": 1.0,
    "lora_r": 64,
    "dataset_loader_names": ["latentqa"],
    "created_at_utc": "2026-01-01T00:00:00Z",
}
"""What published adapters carry; nothing of ours."""


def test_a_published_contract_is_read():
    config = OracleConfig.from_json({**PUBLISHED, "steering_coefficient": 1.5}, num_layers=60)
    assert (config.injection, config.injection_layer, config.injection_scale) == ("norm_matched_add", 1, 1.5)
    assert config.layer_combinations == ((15,), (30,), (45,))
    assert (config.layers, config.default_layer) == ((15, 30, 45), 30)
    absolute = OracleConfig.from_json({**PUBLISHED, "act_layer_combinations": [[9, 18], [27]]}, num_layers=60)
    assert absolute.layer_combinations == ((9, 18), (27,))


def test_our_contract_comes_back_as_it_was():
    config = OracleConfig(
        model="m",
        injection="rescaled_add",
        injection_layer=2,
        injection_scale=0.5,
        rescale=3.0,
        layer_combinations=((3,), (3, 5)),
        num_layers=8,
        framing={"tokenizer": "ab"},
        trained={"steps": 4, "lora": {"r": 2}},
    )
    values = json.loads(json.dumps(config.to_json()))
    assert OracleConfig.from_json(values, num_layers=8) == config
    assert values["lora_r"] == 2
    # A tool that knows schema 1 alone reads the same layers, as percentages too.
    published = {key: value for key, value in values.items() if key not in ("ao", "act_layer_combinations")}
    assert OracleConfig.from_json(published, num_layers=8).layer_combinations == config.layer_combinations


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"schema_version": 2}, "schema_version: expected 1, got 2"),
        ({"prefix_template": "L{layer}:{special_token} * {num_positions}.\\n"}, "prefix_template: expected .*got 'L"),
        ({"special_token": " #"}, "special_token: expected ' \\?', got ' #'"),
        ({"steering_coefficient": None}, 'records no injection rule; say injection="norm_matched_add" or "replace"'),
        ({"act_layer_combinations": [[3], [6]]}, r"with \(3, 6\) read and 1 written, but the loaded base has 6"),
        ({"hook_onto_layer": -1}, "-1 written, but the loaded base has 6; load the base 'demo'"),
        ({"ao": {"injection": "replace", "num_layers": 60}}, "made for 60 layers"),
        ({"ao": {"injection": "subtract"}}, "injection: expected one of norm_matched_add, .*, got 'subtract'"),
        ({"model_name": None}, "lacks 'model_name'"),
        ({"hook_onto_layer": None}, "lacks 'hook_onto_layer'"),
        ({"layer_combinations": None}, "lacks 'layer_combinations'"),
        ({"layer_combinations": []}, "layer_combinations: expected at least one"),
    ],
)
def test_contracts_that_cannot_be_kept_are_refused(tmp_path, values, problem):
    (tmp_path / FILE).write_text(json.dumps(PUBLISHED))
    change(tmp_path, FILE, **values)
    with pytest.raises(ValueError, match=problem) as caught:
        read_config(tmp_path, num_layers=6)
    assert FILE in str(caught.value)


def test_a_rule_can_be_named_where_none_is_recorded(tmp_path):
    (tmp_path / FILE).write_text(json.dumps({**PUBLISHED, "steering_coefficient": 1.0}))
    change(tmp_path, FILE, steering_coefficient=None)
    assert read_config(tmp_path, num_layers=6, injection="replace").injection == "replace"


def test_a_published_adapter_answers_as_ours_does(oracle, adapter):
    """Same weights, contract without our keys: same answers."""
    ours = json.loads((adapter / FILE).read_text())
    (adapter / FILE).write_text(json.dumps({**PUBLISHED, "act_layer_combinations": ours["act_layer_combinations"]}))
    published = Oracle.from_pretrained("demo", adapter, device="cpu")
    activations = oracle.read([SYSTEM, USER])[-3:]
    answers = [each.ask(activations, QUESTION, choices=CHOICES) for each in (oracle, published)]
    assert_allclose(shares(answers[0]), shares(answers[1]), atol=1e-5)


def test_an_adapter_without_a_contract_is_refused(adapter):
    (adapter / FILE).unlink()
    with pytest.raises(FileNotFoundError, match="does not say how it wants to be asked"):
        Oracle.from_pretrained("demo", adapter, device="cpu")


def test_a_contract_that_is_no_json_is_refused(adapter):
    (adapter / FILE).write_text('{"schema_version": 1,')
    with pytest.raises(ValueError, match=f"{FILE}: not JSON"):
        Oracle.from_pretrained("demo", adapter, device="cpu")


def test_an_adapter_of_another_tokenizer_is_refused(adapter):
    values = json.loads((adapter / FILE).read_text())
    values["ao"]["framing"]["tokenizer"] = "0" * 64
    (adapter / FILE).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"trained with tokenizer 00000000\.\., got \w+\.\.; load the base 'demo'"):
        Oracle.from_pretrained("demo", adapter, device="cpu")


def test_an_untrained_adapter_is_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: torch.zeros_like(value) if "lora_B" in key else value for key, value in tensors.items()}, path)
    with pytest.raises(ValueError, match="every lora_B is zero"):
        Oracle.from_pretrained("demo", adapter, device="cpu")


def test_a_cut_adapter_is_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors.*damaged"):
        Oracle.from_pretrained("demo", adapter, device="cpu")


def test_a_missing_adapter_says_how_to_get_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="ao train"):
        Oracle.from_pretrained("demo", tmp_path / "nowhere", device="cpu")


def test_a_target_of_another_shape_is_refused(oracle, gemma):
    with pytest.raises(ValueError, match="target: expected 6 layers of width"):
        Oracle(
            model=oracle.model, target=gemma, config=oracle.config, framer=oracle.framer, special_ids=oracle.special_ids
        )
