"""Answers: every short cut equals one full forward per sequence, with the injection written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from transformers import GenerationConfig

from ao.decode import OraclePrompt, choice_log_probs, generate
from ao.injection import Injector
from ao.models import arch as archs
from ao.models.load import freeze
from conftest import sequences, small_model

LENGTHS = [11, 6, 9, 6]
FAMILIES = ["gemma4_text", "gemma2", "qwen3_next"]
NEVER = 96
"""A token id that ends no answer of these tests."""


def prompts_of(rng, lengths=LENGTHS, *, vectors=True):
    """Prompts with one to three placeholders at different places."""
    prompts = []
    for index, ids in enumerate(sequences(rng, lengths)):
        places = np.arange(1 + index % 3) + 1 + index
        vectors_KD = torch.from_numpy(rng.normal(size=(len(places), 32)) * 30).float()
        prompts.append(OraclePrompt(ids, places, vectors_KD if vectors else None))
    return prompts


@torch.no_grad()
def logits_by_hand(model, prompt, ids):
    """Logits [T, V] of a sequence alone: no cache, no packing, h + |h| v / |v| written into the output of block 1."""

    def hook(module, args, output):
        for place, vector in zip(prompt.placeholders, prompt.vectors_KD, strict=True):
            h = output[0, place].clone()
            output[0, place] = h + h.norm() * vector / vector.norm()
        return output

    handles = [archs.find(model).layers[1].register_forward_hook(hook)] if prompt.vectors_KD is not None else []
    try:
        return model(input_ids=torch.from_numpy(ids)[None], use_cache=False).logits[0].double()
    finally:
        for handle in handles:
            handle.remove()


def choice_by_hand(model, prompt, choice):
    log_probs = logits_by_hand(model, prompt, np.concatenate([prompt.input_ids, choice])).log_softmax(-1)
    first = len(prompt.input_ids) - 1
    return sum(float(log_probs[first + step, token]) for step, token in enumerate(choice))


def greedy_by_hand(model, prompt, num, end=NEVER):
    ids = prompt.input_ids
    for _ in range(num):
        token = int(logits_by_hand(model, prompt, ids)[-1].argmax())
        if token == end:
            break
        ids = np.append(ids, token)
    return ids[len(prompt.input_ids) :].tolist()


def setup(family="gemma4_text"):
    model = small_model(family)
    arch = archs.find(model)
    return model, arch, Injector(arch.layers, layer=1)


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_choices_equal_a_full_forward_for_each(family, vectors, rng):
    model, arch, injector = setup(family)
    prompts = prompts_of(rng, vectors=vectors)
    choices = [
        [np.array([5]), np.array([9]), np.array([5, 7])],
        [np.array([3]), np.array([4])],
        [np.array([8, 8, 2]), np.array([6, 2])],
        [np.array([90]), np.array([3])],
    ]
    done = []
    found = choice_log_probs(model, arch, injector, prompts, choices, tokens_per_row=24, progress=done.append)
    for prompt, options, got in zip(prompts, choices, found, strict=True):
        assert got.dtype == np.float64
        assert_allclose(got, [choice_by_hand(model, prompt, option) for option in options], atol=2e-5)
    assert sum(done) == len(prompts)


def test_one_token_choices_take_one_forward_for_all_and_equal_the_general_path(rng):
    model, arch, injector = setup()
    prompts = prompts_of(rng)
    single = [[np.array([token]) for token in (3, 50, 95)]] * len(prompts)
    fast = choice_log_probs(model, arch, injector, prompts, single)
    assert injector.hits == 1
    # A choice of two tokens beside them sends the same choices down the general path.
    general = choice_log_probs(model, arch, injector, prompts, [[*options, np.array([3, 4])] for options in single])
    for short, long in zip(fast, general, strict=True):
        assert_allclose(short, long[:3], atol=2e-5)
    # What is injected decides: the fast path does not forget the hook.
    plain = choice_log_probs(model, arch, injector, prompts_of(rng, vectors=False), single)
    assert np.abs(np.stack(fast) - np.stack(plain)).max() > 1e-2


def test_a_choice_that_begins_another_is_told_apart_by_its_end_of_turn(rng):
    """Without the end of turn the longer of two choices can never win; with it both are whole answers."""
    model, arch, injector = setup("llama")
    model.lm_head.weight *= 4  # surer of itself
    (prompt,) = prompts_of(rng, [9])
    first, second = greedy_by_hand(model, prompt, 2)
    # An end of turn that the model would rather say after both tokens than after the first.
    log_probs = logits_by_hand(model, prompt, np.append(prompt.input_ids, [first, second])).log_softmax(-1)
    end = int((log_probs[-1] - log_probs[-2]).argmax())
    short, long = np.array([first, end]), np.array([first, second, end])
    (found,) = choice_log_probs(model, arch, injector, [prompt], [[short, long]])
    assert_allclose(found, [choice_by_hand(model, prompt, choice) for choice in (short, long)], atol=2e-5)
    assert found[1] > found[0]
    (bare,) = choice_log_probs(model, arch, injector, [prompt], [[short[:1], long[:2]]])
    assert bare[0] > bare[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_equals_greedy_decoding_without_cache_one_by_one(family, rng):
    model, _, injector = setup(family)
    prompts = prompts_of(rng)
    # A token of the second answer ends it early, so the batch goes on over its padding.
    end = greedy_by_hand(model, prompts[1], 6)[3]
    expected = [greedy_by_hand(model, prompt, 6, end) for prompt in prompts]
    done = []
    got = generate(model, injector, prompts, end_of_turn_id=end, max_new_tokens=6, progress=done.append)
    assert [answer.tolist() for answer in got] == expected
    assert {len(answer) for answer in expected} != {6}
    assert end not in np.concatenate(got)
    # Four prompts of three lengths in one batch, left-padded; decode steps inject nothing.
    assert (done, injector.hits) == ([4], 1)
    rows = generate(model, injector, prompts, end_of_turn_id=end, max_new_tokens=6, tokens_per_row=30)
    assert [answer.tolist() for answer in rows] == expected


def test_generation_without_vectors_leaves_the_hook_off(rng):
    model, _, injector = setup()
    prompts = prompts_of(rng, vectors=False)
    got = generate(model, injector, prompts, end_of_turn_id=NEVER, max_new_tokens=4)
    assert [answer.tolist() for answer in got] == [greedy_by_hand(model, prompt, 4, NEVER) for prompt in prompts]
    assert injector.hits == 0


def test_a_checkpoint_cannot_change_how_answers_are_generated(rng):
    """`generation_config.json` of chat models asks for sampling, penalties and other ends."""
    model, _, injector = setup()
    prompts = prompts_of(rng)
    expected = [greedy_by_hand(model, prompt, 5, NEVER) for prompt in prompts]
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        repetition_penalty=50.0,
        eos_token_id=[answer[1] for answer in expected],
        suppress_tokens=[answer[0] for answer in expected],
    )
    freeze(model)
    got = generate(model, injector, prompts, end_of_turn_id=NEVER, max_new_tokens=5)
    assert [answer.tolist() for answer in got] == expected


def test_samples_follow_the_whole_distribution(rng):
    model, _, injector = setup()
    (prompt,) = prompts_of(rng, [7])
    probabilities = logits_by_hand(model, prompt, prompt.input_ids)[-1].softmax(-1)
    torch.manual_seed(0)
    drawn = generate(
        model, injector, [prompt] * 400, end_of_turn_id=NEVER, max_new_tokens=1, temperature=1.0, tokens_per_row=10**6
    )
    tokens = [int(answer[0]) for answer in drawn if len(answer)]
    best = int(probabilities.argmax())
    assert abs(tokens.count(best) / len(drawn) - float(probabilities[best])) < 0.06
    # More than any default top-k leaves.
    assert len(set(tokens)) > 50
    torch.manual_seed(0)
    cold = generate(model, injector, [prompt] * 20, end_of_turn_id=NEVER, max_new_tokens=1, temperature=1e-3)
    assert {int(answer[0]) for answer in cold} == {best}


@pytest.mark.parametrize("call", ["choices", "generate"])
def test_a_batch_half_with_vectors_is_refused_and_leaves_the_model_as_it_was(call, rng):
    model, arch, injector = setup()
    mixed = [*prompts_of(rng, [6, 6]), *prompts_of(rng, [6], vectors=False)]
    before = model.config._attn_implementation

    def run():
        if call == "choices":
            return choice_log_probs(model, arch, injector, mixed, [[np.array([3]), np.array([4])]] * 3)
        return generate(model, injector, mixed, end_of_turn_id=NEVER, max_new_tokens=2)

    with pytest.raises(ValueError, match="2 of 3 prompts of a batch have activations; expected all or none") as caught:
        run()
    # The traceback is still held here, as a notebook holds its last one.
    assert caught.tb is not None
    assert model.config._attn_implementation == before
