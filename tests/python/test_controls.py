from typing import Any

import numpy as np
import pytest
import torch

import tiny
from ao.config import ModelConfig
from ao.eval.controls import CONDITIONS, CONTROLS, condition, derangement, fitted
from ao.eval.tasks import Item, choices_of, draw
from ao.prompt import special_ids
from ao.residuals import Read

D_MODEL = 2


class FakePrompt:
    def __init__(self, layers: list[int], num_positions: int, question: str) -> None:
        self.text = f"{layers} {num_positions} {question}"
        self.ids = np.array([ord(char) for char in self.text], dtype=np.int32)
        self.placeholders = np.arange(len(layers) * num_positions, dtype=np.int32)


class FakeFramer:
    def prompt(self, layers: list[int], num_positions: int, question: str) -> FakePrompt:
        return FakePrompt(layers, num_positions, question)


def item(index: int, *, context: int | None = None, layers: tuple[int, ...] = (3,), num: int = 2) -> Item:
    context = index if context is None else context
    return Item(
        id=f"item-{index}",
        source="s",
        question="What?",
        answer="this",
        layers=layers,
        read=Read(
            context_ids=np.array([7, context, *range(num)]),
            layers=np.repeat(layers, num),
            positions=np.tile(np.arange(2, 2 + num), len(layers)),
        ),
        prompt_ids=np.arange(10 + index),
        placeholders=np.arange(num * len(layers)),
        read_text=f"read {index}",
        context_text=f"all {index}",
    )


def vectors_of(items: list[Item]) -> list[torch.Tensor]:
    return [torch.full((len(item.placeholders), D_MODEL), float(index)) for index, item in enumerate(items)]


def conditions(items: list[Item], *, seed: int = 0) -> dict[str, Any]:
    framer: Any = FakeFramer()
    vectors = vectors_of(items)
    return {name: condition(name, items, vectors, framer=framer, seed=seed) for name in CONDITIONS}


def test_each_control_takes_one_thing_away() -> None:
    items = [item(index, num=1 + index % 3) for index in range(6)]
    found = conditions(items)
    assert CONTROLS == ("no_activation", "shuffled", "text", "untrained")
    assert [name for name in CONDITIONS if not found[name].adapter] == ["untrained"]
    others = derangement(items, seed=0)
    for index, own in enumerate(items):
        for name in ("oracle", "no_activation", "shuffled", "untrained"):
            prompt = found[name].prompts[index]
            assert np.array_equal(prompt.input_ids, own.prompt_ids)
            assert np.array_equal(prompt.placeholders, own.placeholders)
        assert found["no_activation"].prompts[index].vectors_KD is None
        for name, shown in (("oracle", index), ("untrained", index), ("shuffled", others[index])):
            vectors = found[name].prompts[index].vectors_KD
            assert vectors.shape == (len(own.placeholders), D_MODEL)
            assert (vectors == shown).all()


def test_text_controls_show_words_instead_of_vectors() -> None:
    items = [item(0, layers=(1, 4), num=3), item(1, layers=(1, 4), num=2)]
    found = conditions(items)
    for name, text in (("text", "read 0"), ("full_text", "all 0")):
        prompt = found[name].prompts[0]
        assert "".join(map(chr, prompt.input_ids)) == f"[1, 4] 3 {text}\nWhat?"
        assert prompt.placeholders.tolist() == [0, 1, 2, 3, 4, 5]
        assert prompt.vectors_KD is None
        assert found[name].adapter


def test_unknown_condition() -> None:
    framer: Any = FakeFramer()
    with pytest.raises(ValueError, match="expected one of oracle, no_activation"):
        condition("blank", [item(0)], vectors_of([item(0)]), framer=framer, seed=0)


def test_derangement_has_no_fixed_point_and_keeps_layers() -> None:
    items = [item(index, layers=((3,), (4,), (3, 4))[index % 3]) for index in range(30)]
    others = derangement(items, seed=5)
    assert sorted(others) == list(range(30))
    assert all(index != other for index, other in enumerate(others))
    assert all(items[index].layers == items[other].layers for index, other in enumerate(others))


def test_derangement_is_keyed() -> None:
    items = [item(index) for index in range(40)]
    pairs = {items[index].id: items[other].id for index, other in enumerate(derangement(items, seed=1))}
    backwards = items[::-1]
    turned = derangement(backwards, seed=1)
    assert pairs == {backwards[index].id: backwards[other].id for index, other in enumerate(turned)}
    assert derangement(items, seed=2) != derangement(items, seed=1)


def test_derangement_leaves_the_context() -> None:
    items = [item(index, context=index // 3) for index in range(12)]
    for seed in range(20):
        others = derangement(items, seed=seed)
        assert all(index // 3 != other // 3 for index, other in enumerate(others))


@pytest.mark.parametrize("contexts", [[0], [0, 0], [0, 0, 1]])
def test_nothing_to_shuffle_with(contexts: list[int]) -> None:
    items = [item(index, context=context) for index, context in enumerate(contexts)]
    with pytest.raises(ValueError, match=r"of the \d items that read layers \[3\] have the same context"):
        derangement([*items, item(8, layers=(5,)), item(9, layers=(5,))], seed=0)


def test_other_vectors_fit_the_slots() -> None:
    given = torch.arange(10.0)[:, None]
    assert fitted(item(0, num=4), given).flatten().tolist() == [0, 3, 6, 9]
    assert fitted(item(0, num=10), given).flatten().tolist() == list(range(10))
    assert fitted(item(0, num=4), given[:2]).flatten().tolist() == [0, 0, 1, 1]
    two_layers = fitted(item(0, layers=(1, 2), num=3), given)
    assert two_layers.flatten().tolist() == [0, 2, 4, 5, 7, 9]


def test_draw_is_even_over_sources() -> None:
    assert draw({"a": [5, 1, 2, 3], "b": [9, 8, 7, 6]}, 4) == [1, 5, 8, 9]
    assert draw({"a": [0], "b": [9, 8, 7], "c": [4, 5, 6, 10]}, 7) == [0, 4, 5, 6, 7, 8, 9]
    assert draw({"a": [0], "b": [1]}, 5) == [0, 1]


def test_choices_are_the_answers_of_a_question() -> None:
    answers = {"Which?": {"b", "a", "c"}, "Is it?": {"Yes", "No"}}
    assert choices_of(answers, "t") == {"Is it?": ("No", "Yes"), "Which?": ("a", "b", "c")}
    with pytest.raises(ValueError, match="task 't': question 'Is it\\?' has one answer in all its data, 'Yes'"):
        choices_of({"Is it?": {"Yes"}}, "t")


def test_special_tokens_are_known(tmp_path: Any) -> None:
    model = tiny.save_model(tmp_path / "tiny")
    assert special_ids(ModelConfig(name=str(model))).tolist() == list(range(len(tiny.SPECIAL)))
