"""Write the two small tokenizers of the golden tests.

One is like Gemma's: a space becomes U+2581, no split before the merges, bytes for what is unknown. One is like Qwen's:
byte-level behind the Qwen 2 split. Run only to change them; the golden hashes change with them.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = [
    "Layer: 12\n",
    "Is the user kind? Yes No",
    "Can you predict the next tokens that come after this?",
    "Can you predict the previous tokens that came before this?",
    "The weather in Paris is fine today.",
    "You are a helpful assistant who likes the sea.",
    "system user model assistant",
    "0123456789",
] * 5 + [f"{a} ?{b}" for a in "abcdefgh" for b in "ijklmnop"]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def save(tokenizer: Tokenizer, name: str, plain: set[str]) -> None:
    """Write a tokenizer compactly; special tokens in `plain` become ordinary entries, as bytes are in Gemma's."""
    config = json.loads(tokenizer.to_str())
    config["added_tokens"] = [token for token in config["added_tokens"] if token["content"] not in plain]
    text = json.dumps(config, ensure_ascii=False, separators=(",", ":"))
    Path(__file__).with_name(name).write_text(text + "\n", encoding="utf-8")


def like_gemma() -> None:
    """`gemma.json`."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    # Only while training: Gemma has no entry that reaches across a space, and no split either.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    plain = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special + plain, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("<note>", normalized=True)])
    save(tokenizer, "gemma.json", set(plain))


def like_qwen() -> None:
    """`qwen.json`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLIT), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    save(tokenizer, "qwen.json", set())


if __name__ == "__main__":
    like_gemma()
    like_qwen()
