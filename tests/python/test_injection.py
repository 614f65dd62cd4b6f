"""Injection: the rules against a hand-written loop, the hook's count, and gradients under recompute."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ao.batch import lay_out, layout
from ao.decode import OraclePrompt, injection
from ao.injection import RULES, Injector, check_vectors, inject
from ao.loss import answer_loss, labels_of
from ao.models import arch as archs
from ao.models.adapters import add_adapter, as_oracle
from ao.models.load import enable_recompute, recompute_runs_hooks
from conftest import sequences, small_model


def by_hand(resid, positions, vectors, rule, scale, rescale):
    out = resid.clone()
    flat = out.view(-1, resid.shape[-1])
    for position, vector in zip(positions.tolist(), vectors, strict=True):
        h = flat[position].clone()
        if rule == "replace":
            flat[position] = vector
            continue
        u = h + scale * h.norm() * vector / vector.norm()
        flat[position] = u if rule == "norm_matched_add" else u * rescale * h.norm() / u.norm()
    return out


@pytest.mark.parametrize("rule", ["norm_matched_add", "rescaled_add", "replace"])
def test_rules_equal_the_loop_and_leave_other_text_alone(rule):
    torch.manual_seed(0)
    resid, vectors = torch.randn(2, 5, 8), 100 * torch.randn(3, 8)
    positions = torch.tensor([1, 4, 7])
    got = inject(resid, positions, vectors, rule=rule, scale=0.7, rescale=1.5)
    assert_close(got, by_hand(resid, positions, vectors, rule, 0.7, 1.5))
    untouched = [index for index in range(10) if index not in positions]
    assert torch.equal(got.view(-1, 8)[untouched], resid.view(-1, 8)[untouched])


def test_norm_matched_add_ignores_magnitude_and_detaches():
    resid = torch.randn(1, 3, 8, requires_grad=True)
    vector = torch.randn(1, 8)
    position = torch.tensor([1])
    assert_close(inject(resid, position, vector), inject(resid, position, 50 * vector))
    inject(resid, position, vector).sum().backward()
    assert torch.equal(resid.grad, torch.ones_like(resid))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_zero_and_non_finite_vectors_are_refused(bad):
    vectors = torch.ones(3, 4)
    vectors[2] = bad
    with pytest.raises(ValueError, match="vector 2 of 3 has norm"):
        check_vectors(vectors, "test")


def test_hook_fires_once_per_forward_and_says_so_when_not(gemma, rng):
    arch = archs.find(gemma)
    injector = Injector(arch.layers, layer=1)
    batch = lay_out(sequences(rng, [6]), packed=False, device=torch.device("cpu"))
    places, vectors = torch.tensor([2, 3]), torch.randn(2, 32)
    with injector.injecting(places, vectors):
        arch.decoder(**batch.model_inputs)
    assert injector.hits == 1
    with pytest.raises(RuntimeError, match="fired 0 times, expected 1"), injector.injecting(places, vectors):
        pass

    def twice():
        with injector.injecting(places, vectors):
            arch.decoder(**batch.model_inputs)
            arch.decoder(**batch.model_inputs)

    with pytest.raises(RuntimeError, match="fired 2 times, expected 1"):
        twice()
    with pytest.raises(ValueError, match="2 placeholders but 1 vectors"), injector.injecting(places, vectors[:1]):
        pass
    with pytest.raises(ValueError, match=r"expected 0\.\.3, got 9"):
        Injector(arch.layers, layer=9)


def test_injection_moves_only_what_follows(gemma, rng):
    arch = archs.find(gemma)
    injector = Injector(arch.layers, layer=1)
    batch = lay_out(sequences(rng, [8]), packed=False, device=torch.device("cpu"))
    plain = arch.decoder(**batch.model_inputs).last_hidden_state
    with injector.injecting(torch.tensor([4]), torch.randn(1, 32)):
        moved = arch.decoder(**batch.model_inputs).last_hidden_state
    assert torch.equal(moved[:, :4], plain[:, :4])
    assert (moved[:, 4:] - plain[:, 4:]).norm(dim=-1).min() > 1e-3


def test_a_batch_is_injected_as_its_prompts_are_alone(gemma, rng):
    arch = archs.find(gemma)
    injector = Injector(arch.layers, layer=1)
    prompts = [OraclePrompt(ids, np.array([1, 2]), torch.randn(2, 32)) for ids in sequences(rng, [7, 4, 9])]

    def run(these):
        with layout(gemma, arch):
            batch = lay_out([prompt.input_ids for prompt in these], packed=True, device=torch.device("cpu"))
            with injection(injector, these, batch.starts):
                hidden = arch.decoder(**batch.model_inputs).last_hidden_state[0]
        return hidden.split([len(prompt.input_ids) for prompt in these])

    for together, prompt in zip(run(prompts), prompts, strict=True):
        assert_close(together, run([prompt])[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_gradient_under_checkpointing_equals_the_gradient_without(rule, rng):
    contexts = sequences(rng, [9, 6])
    gradients = []
    for recompute in (False, True):
        model = small_model("gemma4_text")
        arch = archs.find(model)
        torch.manual_seed(1)
        peft = add_adapter(model, rank=4, alpha=8, dropout=0.0)
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        if recompute:
            enable_recompute(model)
        model.train()
        injector = Injector(arch.layers, layer=1, rule=rule)
        vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
        with layout(model, arch), as_oracle(model):
            batch = lay_out(contexts, packed=True, device=torch.device("cpu"))
            labels = labels_of(batch, contexts, [7, 4])
            with injector.injecting(
                torch.tensor([2, 10]), vectors, hits=2 if recompute and recompute_runs_hooks() else 1
            ):
                answer_loss(arch, arch.decoder(**batch.model_inputs).last_hidden_state, labels).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in peft.parameters() if p.requires_grad]))
    assert gradients[0].norm() > 0
    assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
