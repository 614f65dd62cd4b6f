"""The demo's target model: a small Gemma 4 chat model with its own tokenizer, trained from nothing on the demo world.

`rebuild` writes the Hugging Face folder that the package embeds. Architecture, tokenizer and template are those of the
real family in small; only the initialisation is ours, since the library's default barely learns at this width.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, PreTrainedTokenizerFast

from ao.demo import lessons
from ao.manifest import write_atomic

MODEL_DIR = Path(__file__).parent / "model"

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>")
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set role = "model" if message["role"] == "assistant" else message["role"] -%}
{%- if role not in ["system", "user", "model"] -%}
{{- raise_exception("unknown role " ~ message["role"] ~ ": use system, user or assistant") -}}
{%- endif -%}
{{- "<|turn>" ~ role ~ "\\n" ~ (message["content"] | trim) ~ "<turn|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|turn>model\\n" -}}
{%- if not enable_thinking | default(false) -%}
{{- "<|channel>thought\\n<channel|>" -}}
{%- endif -%}
{%- endif -%}
"""

SOFT_CAP = 30.0
LEARNING_RATE = 5e-3
WARMUP = 50
FIRST_LOSSES = 20
"""How many losses the record keeps as they are, for a test to repeat."""
LOSS_WINDOW = 50
"""Steps over which the record's other losses are averaged."""
POOL = 64
"""Steps whose documents are sorted by length together, so that a batch holds little padding."""


@dataclass(frozen=True)
class Size:
    """Widths of a target, and how long it learns."""

    hidden: int
    mlp: int
    heads: int
    key_value_heads: int
    head: int
    """Width of a head in sliding layers."""
    full_head: int
    """Width of a head in full layers."""
    steps: int
    tokens_per_step: int


SIZES = {
    "tiny": Size(
        hidden=96, mlp=192, heads=4, key_value_heads=2, head=24, full_head=32, steps=5000, tokens_per_step=1200
    ),
    "large": Size(
        hidden=1024, mlp=6144, heads=16, key_value_heads=8, head=64, full_head=128, steps=3000, tokens_per_step=4800
    ),
}
"""tiny is the embedded one; large (140 M parameters) is trained on a GPU in minutes."""


def rebuild(
    out_dir: Path, *, size: str = "tiny", seed: int = 0, device: str = "cpu", progress: bool = True
) -> dict[str, object]:
    """Trains the target from nothing and writes its Hugging Face folder with `training.json`, the record of the training.

    Files appear under their names only when all of them are complete. The record holds the seed, the first losses one by
    one, all losses as means over windows, scores on unseen documents, seconds, threads and versions.

    Args:
        out_dir: the folder; files of an earlier target are replaced.
        size: one of `SIZES`.
        seed: of the initial weights and of the documents; the world and the tokenizer do not depend on it.
        device: where it learns.
        progress: show a bar.

    Returns the record.
    """
    start = time.perf_counter()
    shape = SIZES[size]
    tokenizer = build_tokenizer()
    model = build_model(build_config(tokenizer, shape), seed=seed)
    nn.Module.to(model, torch.device(device))
    losses = list(train(model, tokenizer, shape, steps=shape.steps, seed=seed, progress=progress))
    model.bfloat16()
    windows = [losses[i : i + LOSS_WINDOW] for i in range(0, shape.steps, LOSS_WINDOW)]
    record = {
        "size": size,
        "seed": seed,
        "steps": shape.steps,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "first_losses": [round(loss, 6) for loss in losses[:FIRST_LOSSES]],
        "loss_window": LOSS_WINDOW,
        "losses": [round(sum(window) / len(window), 4) for window in windows],
        "scores": score(model, tokenizer, seed=seed + 1),
        "seconds": round(time.perf_counter() - start, 1),
        "threads": torch.get_num_threads(),
        "versions": {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)},
    }
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<turn|>")]
    _save(model, tokenizer, record, Path(out_dir))
    return record


def _save(
    model: Gemma4ForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, object], out_dir: Path
) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out_dir.parent) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for file in sorted(Path(partial).iterdir()):
            write_atomic(out_dir / file.name, file.read_bytes())
    write_atomic(out_dir / "training.json", json.dumps(record, indent=1) + "\n")


@torch.no_grad()
def score(
    model: Gemma4ForCausalLM, tokenizer: PreTrainedTokenizerFast, *, seed: int, count: int = 2000
) -> dict[str, float]:
    """Share of `count` fresh prompts whose most probable next token is right, by kind (see `lessons.quiz`)."""
    hits: dict[str, list[bool]] = {}
    quiz = list(islice(lessons.quiz(seed), count))
    for start in range(0, count, 100):
        part = quiz[start : start + 100]
        prompts = tokenizer([prompt for _, prompt, _ in part], add_special_tokens=False)["input_ids"]
        ids = torch.zeros(len(part), max(map(len, prompts)), dtype=torch.long)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        guesses = logits[torch.arange(len(part)), last].argmax(-1)
        for (kind, _, answers), guess in zip(part, guesses.tolist(), strict=True):
            hits.setdefault(kind, []).append(tokenizer.decode(guess) in answers)
    return {kind: round(sum(right) / len(right), 4) for kind, right in sorted(hits.items())}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE tokenizer in the family's style: no split before the merges, spaces as U+2581, bytes as the last resort.

    Its merges come from the world's words, each fed as a text of its own, until every word is one token.
    """
    model = tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    markup = ["Layer", "user", "model", "system", "thought", " ?"]
    characters = [chr(code) for code in range(0x20, 0x7F)] + ["\n", "\u2581"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=1,
        show_progress=False,
        special_tokens=[*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=characters,
    )
    tokenizer.train_from_iterator([*markup, *lessons.words()], trainer)
    # The trainer marks all of its special tokens as such; the byte tokens must stay ordinary ones.
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in SPECIAL]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(spec)),
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL[4:]),
        chat_template=TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_config(tokenizer: PreTrainedTokenizerFast, size: Size) -> Gemma4TextConfig:
    """The 31B's structure in small; full layers have wider heads, whose keys are also the values."""
    full_layers: dict[str, Any] = {
        "global_head_dim": size.full_head,
        "num_global_key_value_heads": size.key_value_heads,
    }
    return Gemma4TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=lessons.NUM_LAYERS,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        head_dim=size.head,
        **full_layers,
        attention_k_eq_v=True,
        layer_types=["sliding_attention", "full_attention"] * (lessons.NUM_LAYERS // 2),
        sliding_window=32,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=len(tokenizer),
        max_position_embeddings=2048,
        final_logit_softcapping=SOFT_CAP,
        tie_word_embeddings=True,
        bos_token_id=SPECIAL.index("<bos>"),
        eos_token_id=SPECIAL.index("<eos>"),
        pad_token_id=SPECIAL.index("<pad>"),
    )


def build_model(config: Gemma4TextConfig, *, seed: int) -> Gemma4ForCausalLM:
    """A fresh float32 model with unit-variance embeddings and products, and damped block outputs."""
    torch.manual_seed(seed)
    model = Gemma4ForCausalLM(config)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_tokens" in name:
                weight.normal_(0, config.hidden_size**-0.5)
            elif weight.ndim == 2:
                weight.normal_(0, weight.shape[1] ** -0.5)
            elif "post_" in name:
                weight.fill_(0.3)
            elif "q_norm" in name or "k_norm" in name:
                weight.fill_(weight.shape[0] ** -0.25)
    return model


def _use_fused_norms(model: nn.Module) -> None:
    """Same values as the library's norm, a third less time on a CPU."""

    def forward(self: Any, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, hidden.shape[-1:], getattr(self, "weight", None), self.eps)

    for module in model.modules():
        if type(module).__name__ == "Gemma4RMSNorm":
            module.forward = MethodType(forward, module)


def batches(tokenizer: PreTrainedTokenizerFast, *, tokens_per_step: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless right-padded batches of about so many tokens: ids [B, T] and the loss weight of each token [B, T]."""
    documents = lessons.documents(seed)
    generator = torch.Generator().manual_seed(seed)
    while True:
        pool = list(islice(documents, POOL * tokens_per_step // 48))
        texts = [text for document in pool for text, _ in document]
        encoded = iter(tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
        rows = []
        for document in pool:
            parts = [(next(encoded).ids, weight) for _, weight in document]
            ids = [token for part, _ in parts for token in part]
            rows.append((ids, [weight for part, weight in parts for _ in part]))
        rows.sort(key=lambda row: len(row[0]))
        groups: list[list[tuple[list[int], list[float]]]] = [[]]
        for row in rows:
            if groups[-1] and (len(groups[-1]) + 1) * len(row[0]) > tokens_per_step:
                groups.append([])
            groups[-1].append(row)
        for index in torch.randperm(len(groups), generator=generator).tolist():
            width = len(groups[index][-1][0])
            ids = torch.zeros(len(groups[index]), width, dtype=torch.long)
            weights = torch.zeros(len(groups[index]), width)
            for i, (row_ids, row_weights) in enumerate(groups[index]):
                ids[i, : len(row_ids)] = torch.tensor(row_ids)
                weights[i, : len(row_ids)] = torch.tensor(row_weights)
            yield ids, weights


def loss_of(model: Gemma4ForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean cross entropy in nats; only tokens that carry weight reach the vocabulary."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    weights, labels = weights[:, 1:], ids[:, 1:]
    kept = weights > 0
    logits = SOFT_CAP * torch.tanh(model.lm_head(hidden[kept]) / SOFT_CAP)
    losses = F.cross_entropy(logits, labels[kept], reduction="none")
    return (losses * weights[kept]).sum() / weights.sum()


def train(
    model: Gemma4ForCausalLM, tokenizer: PreTrainedTokenizerFast, size: Size, *, steps: int, seed: int, progress: bool
) -> Iterator[float]:
    """Trains in place; yields the loss of each step."""
    _use_fused_norms(model)
    optimizer = torch.optim.AdamW(
        _by_rate(model, size), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 1.0, 2.0 * (size.steps - step) / size.steps)
    )
    stream = batches(tokenizer, tokens_per_step=size.tokens_per_step, seed=seed)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if model.device.type == "cuda" else before)
    try:
        for _ in tqdm(range(steps), desc="target", disable=not progress):
            ids, weights = (each.to(model.device, non_blocking=True) for each in next(stream))
            loss = loss_of(model, ids, weights)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            yield loss.item()
    finally:
        torch.set_float32_matmul_precision(before)


def _by_rate(model: Gemma4ForCausalLM, size: Size) -> list[dict[str, Any]]:
    """Parameters with their rates: a matrix's falls with the width that it reads, as arXiv 2203.03466 has it for Adam, so
    that the rate found for the tiny target holds for others."""
    times = SIZES["tiny"].hidden / size.hidden
    matrices = [weight for name, weight in model.named_parameters() if weight.ndim == 2 and "embed_tokens" not in name]
    tables = [weight for name, weight in model.named_parameters() if "embed_tokens" in name]
    others = [weight for weight in model.parameters() if weight.ndim != 2]
    # The tied table is both: its values are as large as 1 / sqrt(width), and so are their steps.
    rates = ((matrices, times), (tables, times**0.5), (others, 1.0))
    return [{"params": weights, "lr": LEARNING_RATE * factor} for weights, factor in rates]
