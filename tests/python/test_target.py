"""The embedded target: an ordinary Hugging Face folder of the real architecture, which its record can be repeated from."""

from __future__ import annotations

import json
import re
from itertools import islice
from typing import TYPE_CHECKING

import pytest

torch = pytest.importorskip("torch")

from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma4ForCausalLM  # noqa: E402

from ao.demo import lessons, target, world  # noqa: E402
from ao.demo.run import demo  # noqa: E402

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

CHAT = [
    {"role": "system", "content": " You are a poet. "},
    {"role": "user", "content": "Look at my red drum."},
    {"role": "assistant", "content": "verily peace tea!"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(target.MODEL_DIR)


@pytest.fixture(scope="module")
def model() -> Gemma4ForCausalLM:
    model, info = AutoModelForCausalLM.from_pretrained(target.MODEL_DIR, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def test_it_is_the_real_architecture_in_small(model: Gemma4ForCausalLM) -> None:
    assert isinstance(model, Gemma4ForCausalLM)
    config = model.config
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    for layer, kind in zip(model.model.layers, config.layer_types, strict=True):
        assert (layer.self_attn.v_proj is None) == (kind == "full_attention")
    assert config.final_logit_softcapping == 30.0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert config.num_hidden_layers == lessons.NUM_LAYERS


def test_it_is_small() -> None:
    assert (target.MODEL_DIR / "model.safetensors").stat().st_size <= 4_000_000


def test_the_large_one_is_the_same_in_large(tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.device("meta"):
        large = Gemma4ForCausalLM(target.build_config(tokenizer, target.SIZES["large"]))
        tiny = Gemma4ForCausalLM(target.build_config(tokenizer, target.SIZES["tiny"]))
    assert sum(weight.numel() for weight in large.parameters()) >= 100e6
    assert [name for name, _ in large.named_parameters()] == [name for name, _ in tiny.named_parameters()]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_large_demo_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hours on a CPU; use a GPU"):
        demo(seed=0, out=tmp_path / "demo", size="large")
    assert not (tmp_path / "demo").exists()


def test_every_word_of_the_world_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = {text for document in islice(lessons.documents(9), 2000) for text, _ in document}
    used = {word for text in texts for word in re.findall(r" ?[A-Za-z]+", text)}
    assert [word for word in sorted(used) if len(tokenizer.tokenize(word)) != 1] == []


def test_placeholders_stay_apart_and_any_text_comes_back(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("Layer: 3\n ? ? ? \nIs this true?", add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("\u2581?")) == 3
    text = "Zo\u00eb's  caf\u00e9\t42\n\n\u4f60 <end>"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_only_the_generation_prompt_has_an_empty_thought(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    told = tokenizer.apply_chat_template(CHAT, tokenize=False)
    turns = lessons.turn("system", "You are a poet.") + lessons.turn("user", "Look at my red drum.")
    assert prompt == "<bos>" + turns + lessons.GENERATION
    assert told == "<bos>" + turns + lessons.turn("model", "verily peace tea!")
    thinking = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert thinking == "<bos>" + turns + "<|turn>model\n"


def test_a_rebuild_repeats_the_first_losses_of_the_record() -> None:
    record = json.loads((target.MODEL_DIR / "training.json").read_text())
    tokenizer = target.build_tokenizer()
    tiny = target.SIZES["tiny"]
    model = target.build_model(target.build_config(tokenizer, tiny), seed=record["seed"])
    losses = list(target.train(model, tokenizer, tiny, steps=10, seed=record["seed"], progress=False))
    assert losses == pytest.approx(record["first_losses"][:10], rel=1e-3)


def test_the_tokenizer_is_the_one_that_a_rebuild_makes(tokenizer: PreTrainedTokenizerFast) -> None:
    assert target.build_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_it_answers_questions_about_text(model: Gemma4ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    scores = target.score(model, tokenizer, seed=17, count=600)
    assert min(scores.values()) > 0.9, scores


def test_replies_show_the_traits(model: Gemma4ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    rng = world.Random(11)
    hits = []
    for _ in range(20):
        traits = world.random_traits(rng)
        system, user, _ = world.chat(rng, traits, rng.choice(world.OBJECTS))
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        reply = tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :])
        hits += [world.TRAITS[trait][value] in reply for trait, value in traits.items()]
    assert sum(hits) / len(hits) > 0.95
