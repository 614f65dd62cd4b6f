"""Reading: documents do not see each other, layer k is hidden_states[k + 1], prefixes are shared, adapters are off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ao.attention import Documents, _short_attention, document_attention, packed_rows
from ao.batch import lay_out, layout, rows_of
from ao.models import arch as archs
from ao.models.adapters import add_adapter, as_oracle, as_target
from ao.residuals import Read, Reading, distinct_contexts, read_vectors, residuals
from ao.selftest import check_model
from conftest import FAMILIES, SMALL, sequences, small_model

LENGTHS = [9, 3, 14, 1, 7]


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_of_a_shared_forward_equal_separate_runs(family, rng):
    model = small_model(family)
    arch = archs.find(model)
    assert arch.attention_only == (family != "qwen3_next")
    contexts = sequences(rng, LENGTHS)
    with layout(model, arch):
        batch = lay_out(contexts, packed=arch.attention_only, device=torch.device("cpu"))
        together = arch.decoder(**batch.model_inputs).last_hidden_state.flatten(0, 1)
    for start, context in zip(batch.starts, contexts, strict=True):
        alone = model(input_ids=torch.from_numpy(context)[None], use_cache=False).logits[0]
        shared = archs.logits(arch, together[start : start + len(context)])
        torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-5)
    check_model(model, arch, contexts)


def test_a_long_document_does_not_make_short_ones_long(rng):
    """Every token has a place of its own, a document's lie side by side, and less than half of the places are padding."""
    for _ in range(50):
        lengths = rng.integers(1, 300, size=rng.integers(1, 40)).tolist()
        documents = Documents.of(lengths, torch.device("cpu"))
        places = sum(num * longest for num, longest in documents.rectangles)
        slots = documents.slots_T.numpy()
        assert len(np.unique(slots)) == len(slots) == sum(lengths)
        assert slots.max() < places <= 2 * sum(lengths)
        for first, end in zip(documents.bounds[:-1].tolist(), documents.bounds[1:].tolist(), strict=True):
            assert (np.diff(slots[first:end]) == 1).all()


def test_packing_is_what_keeps_documents_apart(gemma, rng):
    """The same row without its documents leaks: the test above can fail."""
    arch = archs.find(gemma)
    first, second = sequences(rng, [5, 5])
    joined = torch.from_numpy(np.concatenate([first, second]))[None]
    leaky = arch.decoder(input_ids=joined, use_cache=False).last_hidden_state[0, 5:]
    alone = arch.decoder(input_ids=torch.from_numpy(second)[None], use_cache=False).last_hidden_state[0]
    assert not torch.allclose(leaky, alone, atol=1e-2)


def test_packed_attention_refuses_rows_without_documents(gemma, rng):
    ids = torch.from_numpy(sequences(rng, [5])[0])[None]
    with packed_rows(gemma), pytest.raises(RuntimeError, match="documents=False"):
        gemma(input_ids=ids, use_cache=False)
    gemma(input_ids=ids, use_cache=False)


def test_attention_that_is_not_implemented_names_the_remedy():
    states, documents = torch.ones(1, 1, 3, 8), Documents.of([3], torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r'sinks .* not implemented; set `attention = "stock"` under \[model\]'):
        document_attention(torch.nn.Module(), *[states] * 3, None, documents=documents, s_aux=torch.ones(1))


@pytest.mark.parametrize("grouped", [1, 2, 6])
@pytest.mark.parametrize("scaling", [None, 1.0])
def test_short_attention_is_attention(grouped, scaling):
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, heads, 7, 16) for heads in (6, grouped, grouped))
    expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    torch.testing.assert_close(_short_attention(query, key, value, scaling), expected)


def test_layer_k_is_hidden_states_k_plus_1(gemma, rng):
    arch = archs.find(gemma)
    context = sequences(rng, [11])[0]
    expected = gemma(
        input_ids=torch.from_numpy(context)[None], output_hidden_states=True, use_cache=False
    ).hidden_states
    read = Read(context, np.array([0, 1, 2, 0]), np.array([10, 3, 0, 10]))
    vectors, offsets = read_vectors(gemma, arch, [read])
    assert offsets.tolist() == [0, 4]
    for vector, layer, position in zip(vectors, read.layers, read.positions, strict=True):
        torch.testing.assert_close(vector, expected[layer + 1][0, position], rtol=1e-5, atol=1e-5)


def test_read_stops_after_the_deepest_layer(gemma, rng):
    arch = archs.find(gemma)
    calls = []
    arch.layers[2].register_forward_hook(lambda *_: calls.append(2))
    batch = lay_out(sequences(rng, [4]), packed=False, device=torch.device("cpu"))
    residuals(gemma, arch, batch, [0, 1])
    assert calls == []
    with pytest.raises(ValueError, match=r"read layer 4: expected 0\.\.3"):
        residuals(gemma, arch, batch, [4])


def test_each_context_is_run_once_and_prefixes_not_at_all(rng):
    long = sequences(rng, [8])[0]
    other = sequences(rng, [8])[0]
    contexts = [long[:3], long, other, long[:5], long]
    runs, serving = distinct_contexts(contexts, share_prefixes=True)
    assert sorted(map(len, runs)) == [8, 8]
    for context, which in zip(contexts, serving, strict=True):
        assert np.array_equal(runs[which][: len(context)], context)
    assert len(distinct_contexts(contexts, share_prefixes=False)[0]) == 4


def test_shared_reads_equal_separate_reads(gemma, rng):
    arch = archs.find(gemma)
    long = sequences(rng, [12])[0]
    contexts = [long[:4], long, *sequences(rng, [6, 9]), long[:7]]
    reads = [Read(context, np.array([1, 3]), np.array([len(context) - 1, 0])) for context in contexts]
    together, offsets = read_vectors(gemma, arch, reads, tokens_per_row=20)
    for read, first in zip(reads, offsets, strict=False):
        alone, _ = read_vectors(gemma, arch, [read])
        torch.testing.assert_close(together[first : first + 2], alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"positions 12\.\.12 of a context of 12 tokens"):
        read_vectors(gemma, arch, [Read(long, np.array([1]), np.array([12]))])


def test_the_adapter_is_off_while_the_target_is_read(gemma, rng):
    arch = archs.find(gemma)
    read = Read(sequences(rng, [7])[0], np.array([3]), np.array([6]))
    before, _ = read_vectors(gemma, arch, [read])
    peft = add_adapter(gemma, rank=4, alpha=8, dropout=0.5)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    gemma.train()
    with as_oracle(gemma):
        during, _ = read_vectors(gemma, arch, [read])
        moved = residuals(gemma, arch, lay_out([read.context_ids], packed=False, device=torch.device("cpu")), [3])[3][6]
    torch.testing.assert_close(during, before, rtol=0, atol=0)
    assert not torch.allclose(moved, before[0], atol=1e-2)
    assert gemma.training


def test_rows_between_steps_leave_the_learner_as_it_was(gemma, rng):
    """Rows of contexts and forwards with the adapter take turns."""
    arch = archs.find(gemma)
    contexts = sequences(rng, [9, 8, 7, 6])
    reads = [Read(context, np.array([1, 3]), np.array([len(context) - 1, 0])) for context in contexts]
    expected, _ = read_vectors(gemma, arch, reads)
    peft = add_adapter(gemma, rank=4, alpha=8, dropout=0.5)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    gemma.train()
    arch.layers[2].eval()

    def state():
        trained = [module.training for module in gemma.modules()]
        return trained, [parameter.requires_grad for parameter in gemma.parameters()]

    def step():
        torch.manual_seed(0)
        ids = torch.from_numpy(contexts[0])[None]
        with as_oracle(gemma):
            gemma(input_ids=ids, use_cache=False).logits.square().sum().backward()
        gradients = [parameter.grad.clone() for parameter in gemma.parameters() if parameter.requires_grad]
        gemma.zero_grad()
        return gradients

    before, alone, rows = state(), step(), 0
    reading = Reading(gemma, arch, reads, tokens_per_row=9)
    while reading.row():
        rows += 1
        assert state() == before
        torch.testing.assert_close(step(), alone, rtol=0, atol=0)
    assert rows == 4
    torch.testing.assert_close(reading.vectors(), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_that_stays_on_is_refused(gemma):
    layers = [each for each in add_adapter(gemma, rank=2, alpha=2, dropout=0.0).modules() if hasattr(each, "merged")]
    gemma.train()
    layers[3].merged_adapters.append("oracle")
    with pytest.raises(RuntimeError, match="cannot be switched off: a layer is merged"), as_target(gemma):
        pass
    assert gemma.training
    assert not any(layer.disable_adapters for layer in layers)


def test_modes_are_checked(gemma):
    with pytest.raises(RuntimeError, match="no LoRA layer"), as_oracle(gemma):
        pass
    add_adapter(gemma, rank=2, alpha=2, dropout=0.0)
    with as_target(gemma), pytest.raises(RuntimeError, match="not the one active adapter"), as_oracle(gemma):
        pass


def test_rows_hold_everything_once_within_the_budget(rng):
    lengths = rng.integers(1, 50, size=200)
    rows = rows_of(lengths, tokens_per_row=128)
    assert sorted(np.concatenate(rows).tolist()) == list(range(200))
    assert all(len(row) * lengths[row].max() <= 128 for row in rows)
    assert [row.tolist() for row in rows_of([300], tokens_per_row=128)] == [[0]]
    joined = rows_of(lengths, tokens_per_row=128, packed=True)
    assert sorted(np.concatenate(joined).tolist()) == list(range(200))
    assert all(lengths[row].sum() <= 128 for row in joined)
    assert len(joined) == -(-lengths.sum() // 128) < len(rows)
    assert rows_of([], tokens_per_row=128) == []


def test_embeddings_that_a_forward_writes_over_are_known(gemma):
    """Phi 3 turns long contexts by other frequencies, in a buffer that two forwards at once would share."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = CONFIG_MAPPING["phi3"](**SMALL, rope_parameters=rope, original_max_position_embeddings=16)
    model = AutoModelForCausalLM.from_config(config).eval()
    before = [each.clone() for each in model.buffers()]
    model(input_ids=torch.arange(1, 33)[None], use_cache=False)
    assert not all(map(torch.equal, before, model.buffers()))
    assert archs.forward_writes(model)
    assert not archs.forward_writes(gemma)
