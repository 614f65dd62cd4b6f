"""The answer loss against the library's own, and labels that cannot be lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from ao import loss as losses
from ao.batch import lay_out, layout
from ao.loss import answer_log_probs, answer_loss, labels_of
from ao.models import arch as archs
from conftest import sequences, small_model


@pytest.mark.parametrize("family", ["gemma4_text", "llama", "granite", "cohere", "qwen3_next"])
@pytest.mark.parametrize("chunk", [2, 2048])
def test_equals_the_library_loss_on_masked_labels(family, chunk, rng, monkeypatch):
    monkeypatch.setattr(losses, "chunk_of", lambda *_: chunk)
    model = small_model(family)
    arch = archs.find(model)
    documents, starts = sequences(rng, [9, 5, 12]), [6, 1, 11]
    with layout(model, arch):
        batch = lay_out(documents, packed=arch.attention_only, device=torch.device("cpu"))
        labels = labels_of(batch, documents, starts)
        got = answer_loss(arch, arch.decoder(**batch.model_inputs).last_hidden_state, labels)
    expected = 0.0
    for document, start in zip(documents, starts, strict=True):
        ids = torch.from_numpy(document)[None]
        masked = ids.clone()
        masked[:, :start] = -100
        expected += float(model(input_ids=ids, labels=masked, use_cache=False).loss) * (len(document) - start)
    assert len(labels.ids_A) == sum(len(d) - s for d, s in zip(documents, starts, strict=True))
    assert_close(float(got), expected, rtol=1e-5, atol=1e-5)


def test_log_probs_sum_to_the_loss(gemma, rng):
    arch = archs.find(gemma)
    documents = sequences(rng, [9])
    batch = lay_out(documents, packed=False, device=torch.device("cpu"))
    labels = labels_of(batch, documents, [3])
    resid = arch.decoder(**batch.model_inputs).last_hidden_state
    assert_close(answer_log_probs(arch, resid, labels).sum(), -answer_loss(arch, resid, labels))


@pytest.mark.parametrize("start", [0, 5, 9])
def test_an_example_without_a_supervised_token_is_an_error(start, rng):
    documents = [np.arange(5)]
    batch = lay_out(documents, packed=True, device=torch.device("cpu"))
    with pytest.raises(ValueError, match=f"answer starts at token {start} of 5"):
        labels_of(batch, documents, [start])
