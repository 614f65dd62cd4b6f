import re
from dataclasses import replace
from pathlib import Path

import pytest

from ao.config import ReadConfig, load_recipe, parse_recipe, source_counts, to_dict, to_toml

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_of_the_repository_load(path: Path) -> None:
    load_recipe(path)


FAMILIES = ["geometry_of_truth", "relations", "sst2", "md_gender", "snli", "ner", "tense"]


FOLDER = RECIPES[0].parent


def test_one_card_runs_the_same_steps_on_less_memory() -> None:
    whole, small = (load_recipe(FOLDER / f"gemma-4-31b-it{name}.toml") for name in ("", "-24gb"))
    assert (small.data, small.eval) == (whole.data, whole.eval)
    # The same values, held in fewer bits.
    assert whole.model == replace(small.model, precision="nf4-dequantized")
    assert small.model.precision == "nf4"
    own = {"out", "optimizer", "tokens_per_row", "context_tokens_per_row"}
    differ = {name for name, value in vars(small.train).items() if value != getattr(whole.train, name)}
    assert differ == own


@pytest.mark.parametrize("name", ["gemma-4-31b-it-paper", "qwen3-8b"])
def test_the_papers_recipes_have_its_numbers(name: str) -> None:
    train = load_recipe(FOLDER / f"{name}.toml").train
    assert (train.rank, train.alpha, train.dropout) == (64, 128, 0.05)
    assert (train.learning_rate, train.warmup, train.max_grad_norm, train.optimizer) == (1e-5, 0.1, 1.0, "adamw")
    assert train.steps * train.examples_per_step == 1_000_000


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "demo"], ids=lambda path: path.stem)
def test_recipes_hold_out_and_save(path: Path) -> None:
    recipe = load_recipe(path)
    train = recipe.train
    # Scores take two forwards of each held-out datapoint, which is less than a step's work for it.
    assert 2 * train.held_out / (train.eval_every * train.examples_per_step) < 0.15
    assert train.held_out > 0
    assert 0 < train.save_every <= train.steps // 5
    gated = {source.dataset for source in recipe.data.sources} & {"lmsys/lmsys-chat-1m"}
    assert bool(gated) == ("paper" in path.stem)


def test_the_papers_mixture_is_shared_out_as_in_the_paper() -> None:
    recipe = load_recipe(FOLDER / "gemma-4-31b-it.toml")
    sources = recipe.data.sources
    assert [source.name for source in sources if source.kind == "classification"] == FAMILIES
    for total, datapoints in ((recipe.data.examples, 27_500), (600_000, 1_000_000)):
        counts = dict(zip((source.name for source in sources), source_counts(sources, total), strict=True))
        made = {
            source.name: counts[source.name] * (3 if source.layers_per_example == "each" else 1) for source in sources
        }
        assert sum(made.values()) == datapoints
        assert made["web_text"] + made["chats"] == datapoints * 0.6
        assert all(made[name] == datapoints * 0.048 for name in FAMILIES)
        assert made["latentqa"] == datapoints * 0.064
    assert recipe.train.steps * recipe.train.examples_per_step + recipe.train.held_out < 27_500
    for source in sources:
        if source.kind == "classification":
            assert len(set(source.questions)) == 20
    assert [task.name for task in recipe.eval.tasks][:3] == ["language", "news_topic", "singular_plural"]
    assert len(recipe.eval.tasks) == 7
    assert all(len(task.sources[0].questions) == 3 for task in recipe.eval.tasks)
    # Paths are those that the included file means, seen from the recipe.
    latentqa = next(source for source in sources if source.kind == "latentqa")
    assert Path(latentqa.path) == Path("data/../../data/latentqa")


def test_included_sources_come_first(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    source = '[[data.sources]]\nname = "{}"\nkind = "records"\npath = "{}"\n'
    (tmp_path / "parts/one.toml").write_text(source.format("one", "one.jsonl"))
    (tmp_path / "parts/two.toml").write_text(source.format("two", "/far/two.jsonl"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('include = ["parts/one.toml", "parts/two.toml"]\n' + source.format("own", "own.jsonl"))
    found = [(each.name, each.path) for each in load_recipe(recipe).data.sources]
    assert found == [("one", "parts/one.jsonl"), ("two", "/far/two.jsonl"), ("own", "own.jsonl")]
    (tmp_path / "parts/two.toml").write_text("[data]\nseed = 3\n")
    with pytest.raises(ValueError, match=r"two\.toml: an included file has \[\[data\.sources\]\] and .* got 'data'"):
        load_recipe(recipe)
    recipe.write_text('include = ["none.toml"]')
    with pytest.raises(FileNotFoundError, match=r"include: .*none\.toml does not exist"):
        load_recipe(recipe)
    recipe.write_text('include = "parts/one.toml"')
    with pytest.raises(ValueError, match=r"include: expected a list of file names, got 'parts/one\.toml'"):
        load_recipe(recipe)


def records(**values: object) -> dict[str, object]:
    return {"kind": "records", "path": "x", **values}


@pytest.mark.parametrize(
    ("examples", "sources", "expected"),
    [
        (10, [{"share": 1}, {"share": 1}, {"share": 1}], [3, 4, 3]),
        (100, [{"share": 2}, {"count": 40}, {"share": 1}], [40, 40, 20]),
        (None, [{"count": 3}, {}], [3, None]),
    ],
)
def test_counts_of_sources(examples: int | None, sources: list[dict[str, object]], expected: list[int | None]) -> None:
    named = [records(name=str(index), **source) for index, source in enumerate(sources)]
    data = parse_recipe({"data": {"sources": named} | ({} if examples is None else {"examples": examples})}).data
    assert source_counts(data.sources, data.examples) == expected


@pytest.mark.parametrize(
    ("examples", "sources", "message"),
    [
        (None, [{"share": 1}], "data.examples is missing: 0 give a share, expected the total to part"),
        (9, [{"share": 1}, {}], "data.examples is a total of 9: 1 must give a share or a count"),
        (9, [{"count": 3}], "no source gives a share"),
        (9, [{"count": 9}, {"share": 1}], "the sources' own counts leave 0 for 1"),
        (9, [{"share": 1}, {"share": 1000}], "the share of '0' is less than one example"),
    ],
)
def test_totals_that_cannot_be_parted(examples: int | None, sources: list[dict[str, object]], message: str) -> None:
    named = [records(name=str(index), **source) for index, source in enumerate(sources)]
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_recipe({"data": {"sources": named} | ({} if examples is None else {"examples": examples})})


def test_a_recipe_survives_toml(tmp_path: Path) -> None:
    source = {"name": "a", "kind": "latentqa", "path": "x", "reads": [{"window": [1, 3]}]}
    lens = {"name": "b", "kind": "context_prediction", "dataset": "o/n", "rows": 9, "within": "assistant"}
    labels = {"a": ["x", "y"], "b": "z", "c": []}
    asked = {
        "name": "c",
        "kind": "classification",
        "path": "z",
        "questions": ["?"],
        "labels": labels,
        "unanswerable": {},
    }
    recipe = parse_recipe(
        {"model": {"name": "demo"}, "data": {"sources": [source, lens, asked]}, "train": {"steps": 5}}
    )
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
        ({"train": {"stepz": 1}}, "train.stepz: unknown key; see `ao train --help`"),
        ({"data": {"sed": 1}}, "data.sed: unknown key; see `ao-pack --help`"),
        ({"eval": {"sed": 1}}, "eval.sed: unknown key; see `ao eval --help`"),
        ({"modle": {}}, "modle: unknown key; a recipe has model, data, train, eval"),
        (source(kind="records", foo=1), "foo: unknown key; docs/packing.md has those of sources"),
        (source(kind="latentq"), "latentq"),
        (source(kind="classification"), "questions"),
        (source(kind="records", count=0), "count must be positive, got 0"),
        (source(kind="records", rows=0), "rows must be positive, got 0"),
        (source(kind="records", path=None), "expected either path or dataset, got neither"),
        (source(kind="records", dataset="o/n"), "expected either path or dataset, got path='x' and dataset='o/n'"),
        (source(kind="records", subset="s"), "subset belongs to a Hugging Face data set"),
        (source(kind="records", share=1, count=2), "expected count or share, got both"),
        (source(kind="records", share=-1), "share must be a positive weight"),
        (source(kind="records", layers_per_example="all"), "layers_per_example"),
        (source(kind="records", unanswerable={"share": 1.5}), "unanswerable.share lies between 0 and 1, got 1.5"),
        (source(kind="records", unanswerable={"answer": " "}), "unanswerable.answer is empty"),
        (source(kind="context_prediction", unanswerable={}), "unanswerable: unknown key"),
        (source(kind="context_prediction", within="user"), "within"),
        (source(kind="context_prediction", draws_per_text=0), "draws_per_text must be positive, got 0"),
        (source(kind="context_prediction", predict=[3, 1]), "predict: expected 1 <= min <= max, got [3, 1]"),
        (source(kind="context_prediction", single_share=2), "single_share lies in [0, 1], got 2"),
        (source(kind="latentqa", path=None, dataset="o/n"), "LatentQA is a folder of JSON files"),
        (source(kind="latentqa", types=[]), "types: expected different types"),
        (source(kind="classification", questions=[]), "questions is empty"),
        (
            source(kind="records", name="a/b"),
            "source 'a/b': a name has no '/', which parts the names in ids; write 'a_b'",
        ),
        (
            source(kind="classification", questions=["Is it {label?"]),
            "questions: expected columns as in {label}, got '{label'",
        ),
        (source(kind="classification", questions=["Is it label}?"]), "got 'label}' in 'Is it label}?'"),
        (
            source(kind="classification", questions=["?"], text="{title. {b}"),
            "text: expected columns as in {label}, got '{title'",
        ),
        (
            source(kind="classification", questions=["?"], prefix="Of {a}: "),
            "prefix: expected no columns, they go into questions",
        ),
        (source(kind="classification", questions=["?"], labels={"a": [""]}), "labels.a: a phrasing is empty"),
        (source(kind="classification", questions=["?"], labels={"a": 1}), "labels.a"),
        ({"eval": {"tasks": [{"name": "t", "sources": [records(name="a", share=1)]}]}}, "a share is for data.sources"),
        (source(kind="records", reads=[{}]), "either all = true or window"),
        (source(kind="records", reads=[{"window": [3, 1]}]), "1 <= min <= max"),
        ({"data": {"read_depths": [1.0]}}, "a depth lies in"),
        ({"data": {"read_depths": []}}, "read_depths is empty"),
        ({"data": {"seed": -1}}, "data.seed must not be negative"),
        ({"data": {"examples_per_shard": 0}}, "data.examples_per_shard must be positive"),
        ({"train": {"steps": "many"}}, "train.steps"),
        ({"train": {"betas": [1.5, 2]}}, "train.betas lie in [0, 1), got [1.5, 2.0]"),
        ({"train": {"weight_decay": -1}}, "train.weight_decay must not be negative, got -1.0"),
        ({"train": {"seed": -1}}, "train.seed must not be negative, got -1"),
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
