from pathlib import Path

import pytest

from ao.config import ReadConfig, load_recipe, parse_recipe, to_dict, to_toml

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_of_the_repository_load(path: Path) -> None:
    load_recipe(path)


def test_a_recipe_survives_toml(tmp_path: Path) -> None:
    source = {"name": "a", "kind": "latentqa", "path": "x", "reads": [{"window": [1, 3]}]}
    lens = {"name": "b", "kind": "context_prediction", "path": "y.jsonl"}
    recipe = parse_recipe({"model": {"name": "demo"}, "data": {"sources": [source, lens]}, "train": {"steps": 5}})
    (tmp_path / "recipe.toml").write_text(to_toml(recipe))
    assert load_recipe(tmp_path / "recipe.toml") == recipe
    assert to_dict(recipe)["data"]["sources"][0]["reads"] == [
        {"share": 1.0, "all": False, "window": [1, 3], "before_end": [0, 0]}
    ]


def source(**values: object) -> dict[str, object]:
    return {"data": {"sources": [{"name": "a", "path": "x", **values}]}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"stepz": 1}}, "train.stepz: unknown key"),
        (source(kind="records", foo=1), "foo: unknown key"),
        (source(kind="latentq"), "latentq"),
        (source(kind="classification"), "questions"),
        (source(kind="records", count=0), "count must be positive, got 0"),
        (source(kind="records", reads=[{}]), "either all = true or window"),
        (source(kind="records", reads=[{"window": [3, 1]}]), "1 <= min <= max"),
        ({"data": {"read_depths": [1.0]}}, "a depth lies in"),
        ({"data": {"read_depths": []}}, "read_depths is empty"),
        ({"data": {"seed": -1}}, "data.seed must not be negative"),
        ({"data": {"examples_per_shard": 0}}, "data.examples_per_shard must be positive"),
        ({"train": {"steps": "many"}}, "train.steps"),
    ],
)
def test_bad_recipes_name_the_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=r"^recipe: ") as error:
        parse_recipe(values)
    assert message in str(error.value)


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[train")
    with pytest.raises(ValueError, match=r"bad\.toml: not a TOML file"):
        load_recipe(tmp_path / "bad.toml")
    with pytest.raises(FileNotFoundError):
        load_recipe(tmp_path / "none.toml")


def test_a_read_is_one_of_two_ways() -> None:
    assert ReadConfig(all=True).window is None
    with pytest.raises(ValueError, match="either"):
        ReadConfig(all=True, window=(1, 2))
