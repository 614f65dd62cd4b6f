"""Small models' folders for tests: a tokenizer trained on a few sentences, a template, a configuration; no weights."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|begin|>", "<|end|>", "<|start|>", "<|stop|>", "<|think|>", "<|/think|>"]

# Qwen's: byte level, words with their space, punctuation that swallows line breaks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Like Gemma 4's 31B: the generation prompt ends in an empty thought that a rendered conversation lacks.
TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- "<|start|>" ~ message.role ~ "\n" ~ (message.content | trim) ~ "<|stop|>\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|start|>assistant\n" -}}
{%- if not enable_thinking | default(false) -%}
{{- "<|think|>\n\n<|/think|>" -}}
{%- endif -%}
{%- endif -%}
"""

SENTENCES = [
    "Layer: 0\n",
    "The city of Paris is in France. Is this statement true?",
    "She will go to the park tomorrow, and he went there yesterday.",
    "Yes No user assistant system What does the model think about this text?",
    "Can you predict the next token that comes after this? 1 2 3 4 5 6 7 8 9",
]


def save_model(folder: Path, *, placeholder: bool = True, template: str | None = TEMPLATE, num_layers: int = 8) -> Path:
    """Write a folder; without `placeholder`, " ?" takes two tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(SENTENCES + (["a ? b ? c ?\n", "d ? e"] if placeholder else []), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|begin|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>", "special": True},
        "pad_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (folder / "config.json").write_text(json.dumps({"text_config": {"num_hidden_layers": num_layers}}))
    return folder
