"""The oracle: read a model's activations, ask about them, and see how far to believe the answer.

Shapes: T tokens, L layers, K vectors, D d_model.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from ao import _ao, decode
from ao.activations import Activations, Answer, spread, together
from ao.checkpoint import OracleConfig, read_config
from ao.config import ModelConfig
from ao.decode import OraclePrompt
from ao.injection import Injector, check_vectors
from ao.manifest import require_match
from ao.models import arch as archs
from ao.models.adapters import as_oracle, as_target, load_adapter
from ao.models.fused import fuse
from ao.models.load import load_model
from ao.prompt import adapter_folder, framer, num_layers, resolve_layer, special_ids
from ao.residuals import Read, read_vectors
from ao.selftest import check_model

Context = str | Sequence[dict[str, str]]
"""Raw text, or chat messages with `role` and `content`."""
Control = Literal["no_activation", "shuffled", "text"]


class Oracle:
    """A base model with an oracle adapter, and the target it reads."""

    def __init__(
        self,
        *,
        model: Any,
        target: Any,
        config: OracleConfig,
        framer: _ao.Framer,
        special_ids: np.ndarray,
    ) -> None:
        self.config = config
        self.framer = framer
        self.special_ids = special_ids
        self.model = model
        self.target = target
        self.arch = archs.find(model)
        self.target_arch = archs.find(target)
        if self.target_arch.d_model != self.arch.d_model or self.target_arch.num_layers != self.arch.num_layers:
            raise ValueError(
                f"target: expected {self.arch.num_layers} layers of width {self.arch.d_model} as the oracle's base has, "
                f"got {self.target_arch.num_layers} of {self.target_arch.d_model}"
            )
        self.injector = Injector(
            self.arch.layers,
            layer=config.injection_layer,
            rule=config.injection,
            scale=config.injection_scale,
            rescale=config.rescale,
        )

    @classmethod
    def from_pretrained(
        cls,
        base: str = "demo",
        adapter: str | Path = "runs/demo/adapter",
        *,
        target: str | None = None,
        revision: str | None = None,
        target_revision: str | None = None,
        load_in_4bit: bool = False,
        precision: Literal["nf4", "nf4-dequantized", "bf16", "fp32"] | None = None,
        device: str = "auto",
        injection: str | None = None,
    ) -> Oracle:
        """Load base and adapter.

        Args:
            base: Hub id or folder of the base; "demo" is the embedded target.
            adapter: folder or Hub id of the adapter with its `ao_config.json`.
            target: checkpoint to read where that is another, fully tuned model; else the base with the adapter off.
            revision: of the base.
            target_revision: of the target.
            load_in_4bit: NF4 with double quantization.
            precision: of the frozen weights; bf16 without one ("demo": fp32).
            device: as in a recipe: "auto", "cpu", "cuda", "cuda:N", or "split" over all GPUs.
            injection: rule, for an adapter that records none.

        Raises:
            ValueError: adapter and base do not fit: another tokenizer or template, layers out of range, missing weights,
                or an adapter whose B is zero.
        """
        precision = precision or ("nf4" if load_in_4bit else "fp32" if base == "demo" else "bf16")
        model_config = ModelConfig(
            name=base,
            revision=revision,
            target=target,
            target_revision=target_revision,
            precision=precision,
            device=device,
        )
        # What takes a moment is checked before the weights are loaded.
        folder = adapter_folder(adapter)
        config = read_config(folder, num_layers=num_layers(base, revision), injection=injection)
        text = framer(base, revision)
        require_match(
            f"{folder}: trained with",
            expected=config.framing,
            got={key: text.fingerprint.get(key, "none") for key in config.framing},
            remedy=f"load the base {config.model!r}",
        )
        if target is not None:
            require_match(
                f"target {target!r}: the base has",
                expected=text.fingerprint,
                got=framer(target, target_revision).fingerprint,
                remedy="contexts are framed as the base's, so both must be of one family",
            )
        model = load_model(model_config)
        target_model = load_model(model_config, which="target") if target else model
        check = _ids(text.context(json.dumps("A check of the loaded model.")).ids)
        for each in {id(model): model, id(target_model): target_model}.values():
            fuse(each)
            check_model(each, archs.find(each), [check])
        load_adapter(model, folder)
        return cls(model=model, target=target_model, config=config, framer=text, special_ids=special_ids(model_config))

    def read(
        self,
        context: Context,
        layers: Sequence[int | float] | None = None,
        *,
        positions: Sequence[int] | None = None,
    ) -> Activations:
        """Read a context: the target runs over it, the oracle's adapter off.

        Args:
            context: text, or messages; a list that ends in a user turn gets the generation prompt.
            layers: indices (int) or depths (float in [0, 1)); the layers of training without any.
            positions: tokens to keep; all without any.
        """
        framed = self.framer.context(json.dumps(context))
        ids = _ids(framed.ids)
        chosen = (
            self.config.layers
            if layers is None
            else tuple(resolve_layer(layer, self.arch.num_layers) for layer in layers)
        )
        where = np.arange(len(ids))
        if positions is not None:
            where = where[np.asarray(positions, dtype=np.int64)]
        if len(where) == 0 or len(chosen) == 0:
            raise ValueError(
                f"nothing to read: got {len(where)} positions and {len(chosen)} layers, expected some of each"
            )
        read = Read(ids, np.tile(np.array(chosen), len(where)), np.repeat(where, len(chosen)))
        values = self.read_vectors([read])[0].view(len(where), len(chosen), -1)
        return Activations(
            values=values,
            layers=chosen,
            positions=where,
            context_ids=ids,
            context_text=framed.text,
            spans=np.asarray(framed.char_spans).reshape(-1, 2)[where],
        )

    def ask(
        self,
        activations: Activations,
        question: str,
        *,
        choices: Sequence[str] | None = None,
        layer: int | float | Sequence[int | float] | Literal["all"] | None = None,
        control: Control | None = "no_activation",
        other: Activations | None = None,
        samples: int = 0,
        temperature: float = 1.0,
        max_new_tokens: int = 64,
    ) -> Any:
        """Ask a question about activations; an `Answer`, or with `layer="all"` a list of them.

        Args:
            activations: what to ask about; every token of it takes one placeholder.
            question: in plain language.
            choices: restrict the answer to these; gives probabilities and a confidence.
            layer: index or depth; several for one prompt that shows all of them, where the adapter was trained so; the
                adapter's default without any; "all" for an answer from each that was read.
            control: the same question beside it: "no_activation" leaves the hook off, "text" shows the tokens as text
                instead, special ones left out, "shuffled" injects the activations of `other`; None asks no control.
            other: another context's activations, for the shuffled control.
            samples: draw this many answers; the most frequent one counts, its share is the confidence.
            temperature: of the samples.
            max_new_tokens: longest generated answer.
        """
        if control is not None and control not in get_args(Control):
            raise ValueError(f"control: expected {', '.join(get_args(Control))} or None, got {control!r}")
        shown_together = self._combinations(activations, layer)
        if samples < 0 or (samples and choices is not None):
            raise ValueError(f"samples: expected a positive number and no choices, got {samples} and choices {choices}")
        if not question.strip():
            raise ValueError("the question is empty; say what to ask about the activations")
        if control == "shuffled" and other is None:
            raise ValueError("control: shuffled needs the activations of another context, given as other=")
        prompts = [self._prompt(question, layers, together(activations, layers)) for layers in shown_together]
        answers = self._answer(prompts, shown_together, choices, samples, temperature, max_new_tokens)
        if control is None:
            return answers if layer == "all" else answers[0]
        ids = activations.context_ids[activations.positions]
        shown = self.framer.decode(ids[~np.isin(ids, self.special_ids)].astype(np.int32))
        beside = []
        for layers, prompt in zip(shown_together, prompts, strict=True):
            if control == "text":
                beside.append(self._prompt(f"{shown}\n{question}", layers, None, num=len(activations)))
            elif control == "shuffled" and other is not None:
                vectors = [spread(other.at(each), len(activations)) for each in layers]
                beside.append(replace(prompt, vectors_KD=torch.cat(vectors)))
            else:
                beside.append(replace(prompt, vectors_KD=None))
        controls = self._answer(beside, shown_together, choices, samples, temperature, max_new_tokens)
        both = [replace(answer, control=other_answer) for answer, other_answer in zip(answers, controls, strict=True)]
        return both if layer == "all" else both[0]

    def scan(self, activations: Activations, question: str, choices: Sequence[str]) -> np.ndarray:
        """Probability of each choice read from each token at each layer by itself: [T, L, len(choices)].

        Plot the probability of one choice over tokens and layers: a heat map. A Yes/No question leans to one side on
        tokens that say nothing; naming the right one among several is the clearer picture.
        """
        prompts = [
            self._prompt(question, (layer,), activations.values[token : token + 1, column])
            for token in range(len(activations))
            for column, layer in enumerate(activations.layers)
        ]
        found = self.choice_log_probs(prompts, [list(choices)] * len(prompts))
        return np.stack([softmax(row) for row in found]).reshape(
            len(activations), len(activations.layers), len(choices)
        )

    def reply(self, context: Context, *, max_new_tokens: int = 256) -> str:
        """What the target itself goes on to say, greedily, the oracle's adapter off."""
        prompt = OraclePrompt(_ids(self.framer.context(json.dumps(context)).ids), _ids([]), None)
        with as_target(self.target):
            (ids,) = decode.generate(
                self.target,
                self.injector,
                [prompt],
                end_of_turn_id=self.framer.end_of_turn_id,
                max_new_tokens=max_new_tokens,
            )
        return self.framer.decode(ids.astype(np.int32)).strip()

    def read_vectors(
        self, reads: Sequence[Read], *, progress: Callable[[int], None] | None = None
    ) -> list[torch.Tensor]:
        """Activations [K, D] of each read of the target."""
        vectors_PD, offsets = read_vectors(self.target, self.target_arch, reads, progress=progress)
        return [vectors_PD[first:end] for first, end in itertools.pairwise(offsets)]

    def choice_log_probs(
        self,
        prompts: Sequence[OraclePrompt],
        choices: Sequence[Sequence[str]],
        *,
        adapter: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> list[np.ndarray]:
        """Log-probability of each choice after each prompt, not normalized.

        Args:
            prompts: oracle prompts.
            choices: the choices of each.
            adapter: False: the untrained control, the adapter off and the hook on.
            progress: told the number of prompts done.
        """
        encoded: dict[tuple[str, ...], list[np.ndarray]] = {}
        for options in choices:
            key = tuple(options)
            if key not in encoded:
                encoded[key] = self._choice_ids(key)
        with as_oracle(self.model, adapter=adapter):
            return decode.choice_log_probs(
                self.model,
                self.arch,
                self.injector,
                prompts,
                [encoded[tuple(options)] for options in choices],
                progress=progress,
            )

    def generate(
        self,
        prompts: Sequence[OraclePrompt],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        adapter: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> list[str]:
        """Generated answers, greedy at temperature 0, without the end of turn."""
        with as_oracle(self.model, adapter=adapter):
            ids = decode.generate(
                self.model,
                self.injector,
                prompts,
                end_of_turn_id=self.framer.end_of_turn_id,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                progress=progress,
            )
        return [self.framer.decode(answer.astype(np.int32)).strip() for answer in ids]

    def _combinations(self, activations: Activations, layer: Any) -> list[tuple[int, ...]]:
        """The layers of each prompt that is asked."""
        read = activations.layers
        trained = [layers for layers in self.config.layer_combinations if set(layers) <= set(read)]
        trained.sort(key=lambda layers: [read.index(each) for each in layers])
        if layer == "all":
            return trained or [(each,) for each in read]
        if layer is None:
            default = (self.config.default_layer,)
            return [default if default in trained or not trained else trained[0]]
        several = layer if isinstance(layer, Sequence) else [layer]
        return [tuple(resolve_layer(each, self.arch.num_layers) for each in several)]

    def _prompt(
        self, question: str, layers: tuple[int, ...], vectors_KD: torch.Tensor | None, *, num: int | None = None
    ) -> OraclePrompt:
        """A prompt that shows some layers of `num` tokens, or of as many as there are vectors for each layer."""
        if layers not in self.config.layer_combinations:
            trained = ", ".join(str(list(combination)) for combination in self.config.layer_combinations)
            raise ValueError(
                f"layer {', '.join(map(str, layers))}: the adapter was not trained to read it; trained: {trained}"
            )
        if vectors_KD is not None:
            check_vectors(vectors_KD, f"layer {', '.join(map(str, layers))}")
            num = len(vectors_KD) // len(layers)
        assert num is not None, "a prompt without vectors needs their number"
        framed = self.framer.prompt(list(layers), num, question)
        return OraclePrompt(_ids(framed.ids), _ids(framed.placeholders), vectors_KD)

    def _choice_ids(self, choices: Sequence[str]) -> list[np.ndarray]:
        if len(set(choices)) != len(choices) or len(choices) < 2:
            raise ValueError(f"choices: expected at least two different ones, got {list(choices)}")
        ids = [_ids(self.framer.answer(choice)) for choice in choices]
        bare = [option[:-1] for option in ids]
        begins = any(
            first is not second and len(first) <= len(second) and np.array_equal(first, second[: len(first)])
            for first in bare
            for second in bare
        )
        return ids if begins else bare

    def _answer(
        self,
        prompts: Sequence[OraclePrompt],
        shown_together: Sequence[tuple[int, ...]],
        choices: Sequence[str] | None,
        samples: int,
        temperature: float,
        max_new_tokens: int,
    ) -> list[Answer]:
        layers = [several if len(several) > 1 else next(iter(several)) for several in shown_together]
        if choices is not None:
            found = self.choice_log_probs(prompts, [list(choices)] * len(prompts))
            answers = []
            for layer, row in zip(layers, found, strict=True):
                probabilities = softmax(row)
                best = int(probabilities.argmax())
                shares = {choice: float(share) for choice, share in zip(choices, probabilities, strict=True)}
                answers.append(Answer(choices[best], layer, float(probabilities[best]), shares))
            return answers
        if samples:
            drawn = self.generate(
                [prompt for prompt in prompts for _ in range(samples)],
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            )
            answers = []
            for index, layer in enumerate(layers):
                mine = drawn[index * samples : (index + 1) * samples]
                best_text = max(sorted(set(mine)), key=mine.count)
                answers.append(Answer(best_text, layer, mine.count(best_text) / samples))
            return answers
        texts = self.generate(prompts, max_new_tokens=max_new_tokens)
        return [Answer(text, layer) for text, layer in zip(texts, layers, strict=True)]


def softmax(log_probs: np.ndarray) -> np.ndarray:
    """Probabilities of a row of log-probabilities, normalized."""
    shifted = np.exp(log_probs - log_probs.max())
    return shifted / shifted.sum()


def _ids(buffer: object) -> np.ndarray:
    return np.asarray(buffer, dtype=np.int64)
