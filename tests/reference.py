"""The slow, obvious way to a datapoint: transformers' templates and offsets, one example at a time, no Rust.

Draws (which window, which layer) are given, not made: tests take them from the packed datapoint and check them apart.
"""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

PLACEHOLDER = " ?"


class Reference:
    def __init__(self, folder: Path, *, end_of_turn: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.end_of_turn = end_of_turn

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and spans in code points."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), list(encoded["offset_mapping"])

    def render(self, messages: list[dict[str, str]], *, generation: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation, enable_thinking=False
        )

    def context(self, context: str | list[dict[str, str]]) -> tuple[str, list[int], list[tuple[int, int]]]:
        """Text, ids and spans of what the target reads."""
        if isinstance(context, str):
            text = (self.tokenizer.bos_token or "") + context
        else:
            text = self.render(context, generation=context[-1]["role"] != "assistant")
        return (text, *self.encode(text))

    def readable(self, example: dict[str, Any]) -> list[int]:
        """Indices of the tokens that overlap the spans of `read`."""
        context = example["context"]
        text, ids, spans = self.context(context)
        if "read" not in example:
            return list(range(len(ids)))
        wanted = [self.span(context, text, read) for read in example["read"]]
        return [
            index
            for index, (start, end) in enumerate(spans)
            if any(start < stop and end > first for first, stop in wanted)
        ]

    def span(self, context: str | list[dict[str, str]], text: str, read: dict[str, Any]) -> tuple[int, int]:
        """Code points of the rendered text that one entry of `read` means."""
        if isinstance(context, str):
            before = len(self.tokenizer.bos_token or "")
            return before + read["start"], before + read["end"]
        message = read["message"]
        before = self.render(context[:message], generation=False) if message else self.tokenizer.bos_token or ""
        first = len(before)
        if read.get("onwards"):
            return first, len(text)
        after = len(self.render(context[: message + 1], generation=False))
        if "start" not in read:
            return first, after
        # The template strips the content; the spans count from its first character as the example has it.
        content = context[message]["content"]
        stripped = text.rindex(content.strip(), first, after)
        start = stripped - (len(content) - len(content.lstrip()))
        return max(start + read["start"], stripped), min(start + read["end"], stripped + len(content.strip()))

    def prompt(self, layers: list[int], num_positions: int, question: str) -> tuple[list[int], list[int]]:
        """Prompt ids and the indices of the placeholders, layer by layer."""
        blocks = [f"Layer: {layer}\n{PLACEHOLDER * num_positions} \n" for layer in layers]
        text = self.render([{"role": "user", "content": "".join(blocks) + question}], generation=True)
        ids, spans = self.encode(text)
        placeholders = []
        start = text.index(blocks[0])
        for block in blocks:
            run = start + block.index("\n") + 1
            end = run + len(PLACEHOLDER) * num_positions
            placeholders += [index for index, (first, stop) in enumerate(spans) if first >= run and stop <= end]
            start += len(block)
        assert len(placeholders) == len(layers) * num_positions
        assert len({ids[index] for index in placeholders}) == 1
        return ids, placeholders

    def answer(self, answer: str) -> list[int]:
        return self.encode(answer + self.end_of_turn)[0]

    def datapoint(self, example: dict[str, Any], *, layers: list[int], positions: list[int]) -> dict[str, list[int]]:
        """All arrays of a datapoint that reads `positions` of the context at each of `layers`."""
        prompt, placeholders = self.prompt(layers, len(positions), example["question"])
        _, ids, _ = self.context(example["context"])
        return {
            "input_ids": prompt + self.answer(example["answer"]),
            "answer_start": [len(prompt)],
            "placeholders": placeholders,
            "layers": [layer for layer in layers for _ in positions],
            "context_ids": ids[: max(positions) + 1],
            "read_positions": positions * len(layers),
        }
