"""Answers of the oracle: probabilities of given choices, and generated text.

Shapes: B prompts, T tokens, K placeholders, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from ao.batch import Batch, lay_out, layout, rows_of
from ao.injection import Injector
from ao.loss import answer_log_probs, labels_of
from ao.models.arch import Arch, logits

Progress = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class OraclePrompt:
    """An oracle prompt with what is to be injected."""

    input_ids: np.ndarray
    """Token ids, [T]."""
    placeholders: np.ndarray
    """Indices of the placeholders in `input_ids`, [K]."""
    vectors_KD: torch.Tensor | None
    """Raw activations, one per placeholder; None leaves the hook off and the placeholders as they are."""


@contextmanager
def injection(injector: Injector, prompts: Sequence[OraclePrompt], starts: np.ndarray) -> Iterator[None]:
    """Inject the prompts' vectors at their placeholders, given where each prompt starts in the flattened [B * T].

    Raises:
        ValueError: only some of the prompts have vectors.
    """
    given = [prompt.vectors_KD for prompt in prompts if prompt.vectors_KD is not None]
    if not given:
        yield
        return
    if len(given) != len(prompts):
        raise ValueError(f"{len(given)} of {len(prompts)} prompts of a batch have activations; expected all or none")
    places = np.concatenate([start + prompt.placeholders for start, prompt in zip(starts, prompts, strict=True)])
    vectors_KD = torch.cat(given)
    with injector.injecting(torch.from_numpy(places).to(vectors_KD.device), vectors_KD):
        yield


@torch.no_grad()
def choice_log_probs(
    model: PreTrainedModel,
    arch: Arch,
    injector: Injector,
    prompts: Sequence[OraclePrompt],
    choices: Sequence[Sequence[np.ndarray]],
    *,
    tokens_per_row: int = 8192,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """Log-probability of each choice after its prompt, not normalized over the choices.

    Args:
        model: the base, inside `as_oracle`.
        arch: its parts.
        injector: its injection hook.
        prompts: prompts with or without vectors.
        choices: for each prompt the token ids of its choices. They should end with the end of turn where one choice
            begins another; otherwise the end of turn only costs time.
        tokens_per_row: token budget of one forward.
        progress: told the number of prompts done.

    Returns:
        For each prompt an fp64 array over its choices.
    """
    found: list[np.ndarray] = [np.zeros(len(options)) for options in choices]
    device = next(model.parameters()).device

    # A choice of one token needs no forward of its own: the prompt's last position gives all of them.
    single = [index for index, options in enumerate(choices) if all(len(option) == 1 for option in options)]
    for row, batch in _rows(model, arch, [prompts[index].input_ids for index in single], tokens_per_row, device):
        these = [single[index] for index in row]
        with injection(injector, [prompts[index] for index in these], batch.starts):
            resid_BTD = arch.decoder(**batch.model_inputs).last_hidden_state
        last = batch.starts + np.array([len(prompts[index].input_ids) - 1 for index in these])
        resid_BD = resid_BTD.reshape(-1, arch.d_model)[torch.from_numpy(last).to(device)]
        log_probs_BV = logits(arch, resid_BD).log_softmax(dim=-1).cpu().double().numpy()
        for log_probs_V, index in zip(log_probs_BV, these, strict=True):
            found[index] = log_probs_V[np.concatenate(choices[index])]
        if progress is not None:
            progress(len(these))

    pairs = [
        (index, which)
        for index in sorted(set(range(len(choices))) - set(single))
        for which in range(len(choices[index]))
    ]
    sequences = [np.concatenate([prompts[index].input_ids, choices[index][which]]) for index, which in pairs]
    for row, batch in _rows(model, arch, sequences, tokens_per_row, device):
        these = [pairs[index] for index in row]
        labels = labels_of(
            batch, [sequences[index] for index in row], [len(prompts[index].input_ids) for index, _ in these]
        )
        with injection(injector, [prompts[index] for index, _ in these], batch.starts):
            resid_BTD = arch.decoder(**batch.model_inputs).last_hidden_state
        log_probs_A = answer_log_probs(arch, resid_BTD, labels).cpu().double().numpy()
        ends = np.cumsum([0, *(len(choices[index][which]) for index, which in these)])
        for (index, which), first, end in zip(these, ends, ends[1:], strict=False):
            found[index][which] = log_probs_A[first:end].sum()
        if progress is not None:
            progress(sum(which == 0 for _, which in these))
    return found


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    injector: Injector,
    prompts: Sequence[OraclePrompt],
    *,
    end_of_turn_id: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    tokens_per_row: int = 8192,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """Generate answers through the library's own `generate`; vectors enter at prefill only.

    Args:
        model: the base, inside `as_oracle`.
        injector: its injection hook.
        prompts: prompts with or without vectors.
        end_of_turn_id: ends an answer and pads shorter ones.
        max_new_tokens: longest answer.
        temperature: 0 takes the most probable token; else samples from torch's global generator.
        tokens_per_row: token budget of one batch, prompts times their longest.
        progress: told the number of prompts done.

    Returns:
        Token ids of each answer without the end of turn.
    """
    device = next(model.parameters()).device
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        eos_token_id=end_of_turn_id,
        pad_token_id=end_of_turn_id,
        use_cache=True,
    )
    answers: list[np.ndarray] = [np.zeros(0, dtype=np.int64)] * len(prompts)
    lengths = [len(prompt.input_ids) + max_new_tokens for prompt in prompts]
    for row in rows_of(lengths, tokens_per_row=tokens_per_row):
        these = [prompts[index] for index in row]
        longest = max(len(prompt.input_ids) for prompt in these)
        ids = np.full((len(these), longest), end_of_turn_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        pads = np.array([longest - len(prompt.input_ids) for prompt in these])
        for line, pad, prompt in zip(range(len(these)), pads, these, strict=True):
            ids[line, pad:] = prompt.input_ids
            mask[line, pad:] = 1
        with injection(injector, these, np.arange(len(these)) * longest + pads):
            output = cast(Any, model).generate(
                input_ids=torch.from_numpy(ids).to(device),
                attention_mask=torch.from_numpy(mask).to(device),
                generation_config=settings,
            )
        for index, tokens in zip(row, output[:, longest:].cpu().numpy(), strict=True):
            ends = np.flatnonzero(tokens == end_of_turn_id)
            answers[index] = tokens[: ends[0]] if len(ends) else tokens
        if progress is not None:
            progress(len(these))
    return answers


def _rows(
    model: PreTrainedModel, arch: Arch, sequences: Sequence[np.ndarray], tokens_per_row: int, device: torch.device
) -> Iterator[tuple[np.ndarray, Batch]]:
    if not sequences:
        return
    with layout(model, arch):
        for row in rows_of(
            [len(sequence) for sequence in sequences], tokens_per_row=tokens_per_row, packed=arch.attention_only
        ):
            yield row, lay_out([sequences[index] for index in row], packed=arch.attention_only, device=device)
