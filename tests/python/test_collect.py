"""`ao collect`: what it writes equals the library's hidden states, whoever writes it and however often it was stopped."""

import copy
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import save_file

from ao import cli
from ao.cache import ActivationCache, context_keys, contract_of
from ao.cache_files import UnitFile, index_name, plain_name, rows_name, verify
from ao.collect import run, sinks, wanted
from ao.collect.handover import Handover
from ao.collect.imported import import_tensor
from ao.collect.missing import cache_share, earlier_runs, remaining
from ao.collect.run import Alike, Tally, collect, summary_text
from ao.collect.sinks import Sink
from ao.collect.wanted import Unit, Units, every_position, units_of
from ao.config import ModelConfig, Recipe, parse_recipe
from ao.distributed import Ranks, launch
from ao.inspection import inspect, text
from ao.manifest import own_digest_problem
from ao.models.load import load_model
from ao.pack import pack
from ao.residuals import Wanted
from ao.shards import PackedDataset

DEMO = ModelConfig(name="demo", precision="fp32", device="cpu")
LAYERS = [1, 3]
EXAMPLES = int(os.environ.get("AO_EXAMPLES", "100"))


def write_records(root: Path, statements: list[str]) -> Recipe:
    """A recipe whose records share the beginning of their contexts, and its packed data set in `packed`."""
    lines = []
    for number, statement in enumerate(statements):
        turns = [{"role": "system", "content": "You feel calm."}, {"role": "user", "content": statement}]
        example = {
            "id": f"{number}",
            "context": turns,
            "question": "What mood?",
            "answer": "calm",
            "positions": [-1, -2, 0],
        }
        lines.append(json.dumps(example))
    root.mkdir(parents=True, exist_ok=True)
    (root / "records.jsonl").write_text("\n".join(lines))
    source = {"name": "r", "kind": "records", "path": "records.jsonl"}
    data = {"out": str(root / "packed"), "sources": [source], "read_depths": [0.25, 0.5], "examples_per_shard": 7}
    recipe = parse_recipe({"model": {"name": "demo", "precision": "fp32", "device": "cpu"}, "data": data})
    pack(recipe, root=root)
    return recipe


STATEMENTS = [
    f"Do you like the {color} {thing}?" for color in ("red", "blue") for thing in ("kite", "hat", "boat", "cup")
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    return write_records(tmp_path_factory.mktemp("data"), STATEMENTS)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wanted, "UNIT_TOKENS", 40)
    monkeypatch.setattr(wanted, "PLAIN_UNIT_TOKENS", 40)


@pytest.fixture(scope="module")
def target() -> torch.nn.Module:
    return load_model(DEMO)


def hidden(target: torch.nn.Module, ids: np.ndarray, layer: int) -> np.ndarray:
    """Slow and obvious: one context, every layer, no packing."""
    with torch.no_grad():
        states = target(torch.from_numpy(ids.astype(np.int64))[None], output_hidden_states=True).hidden_states
    return states[layer + 1][0].float().numpy()


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".png"}


def test_rows_equal_the_librarys_hidden_states(recipe: Recipe, target: torch.nn.Module, tmp_path: Path) -> None:
    units = wanted.units(recipe)
    record = collect(recipe.model, units, out=tmp_path / "acts")
    cache = ActivationCache.open(tmp_path / "acts", contract=contract_of(recipe.model))
    data = PackedDataset.open(recipe.data.out)
    assert cache.dtype == "F32"
    read = set()
    for point in data:
        keys = context_keys(point.context_ids)[point.read_positions]
        read |= {(layer, *key) for layer, key in zip(point.layers.tolist(), keys.tolist(), strict=True)}
        got = cache.vectors(point.context_ids, point.layers, point.read_positions)
        for layer in set(point.layers.tolist()):
            here = point.layers == layer
            expected = hidden(target, point.context_ids, layer)[point.read_positions[here]]
            np.testing.assert_allclose(got[here], expected, rtol=1e-4, atol=1e-4)
    assert record["rows"] == len(read) == sum(len(cache.layer(layer)) for layer in cache.layers)
    assert record["units"] > 2
    assert verify(tmp_path / "acts") == []
    norms = np.linalg.norm(
        np.stack([cache.layer(LAYERS[0])[row] for row in range(len(cache.layer(LAYERS[0])))]), axis=1
    )
    assert record["layers"][str(LAYERS[0])]["mean"] == pytest.approx(norms.mean(), rel=1e-5)
    assert (tmp_path / "acts" / "norms.png").read_bytes().startswith(b"\x89PNG")


def test_only_what_is_new_is_collected(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "acts"
    first = collect(recipe.model, wanted.units(recipe), out=out)
    before = content(out)
    again = collect(recipe.model, wanted.units(recipe), out=out)
    assert (again["rows"], again["tokens"]) == (0, 0)
    assert content(out) == before
    more = write_records(tmp_path / "more", [*STATEMENTS, "Do you like the green kite?"])
    units = wanted.units(more)
    second = collect(more.model, units, out=out)
    cache = ActivationCache.open(out)
    assert 0 < second["rows"] <= 6 < first["rows"]
    assert all(
        (cache.layer(layer).find(unit.keys()[unit.wanted.layers == layer]) >= 0).all()
        for unit in units
        for layer in LAYERS
    )


def test_a_stopped_run_goes_on_to_the_same_bytes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = wanted.units(recipe)
    collect(recipe.model, units, out=tmp_path / "whole")
    finish, finished = sinks.CacheSink.finish, []

    def stop(sink: sinks.CacheSink) -> None:
        if len(finished) == 2:
            raise KeyboardInterrupt
        finished.append(sink)
        finish(sink)

    monkeypatch.setattr(sinks.CacheSink, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        collect(recipe.model, units, out=tmp_path / "stopped")
    monkeypatch.undo()
    assert not (tmp_path / "stopped" / "manifest.json").exists()
    assert not list((tmp_path / "stopped").glob(".*"))
    assert len(ActivationCache.open(tmp_path / "stopped").units) == 2
    record = collect(recipe.model, units, out=tmp_path / "stopped")
    assert record["units_before"] == 2
    assert content(tmp_path / "stopped") == content(tmp_path / "whole")


def test_two_ranks_write_what_one_writes(recipe: Recipe, tmp_path: Path) -> None:
    units = wanted.units(recipe)
    one = collect(recipe.model, units, out=tmp_path / "one")
    two = launch(collect_into, recipe, tmp_path / "two", processes=2)
    for name in ("run", "rows", "tokens", "units", "units_before"):
        assert one[name] == two[name]
    assert content(tmp_path / "one") == content(tmp_path / "two")


def collect_into(recipe: Recipe, out: Path) -> dict[str, object]:
    wanted.UNIT_TOKENS = 40  # in a process of its own
    return collect(recipe.model, wanted.units(recipe), out=out)


def test_what_is_there_already_needs_no_unit_and_no_model(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collect(recipe.model, wanted.units(recipe), out=tmp_path / "acts")
    before = content(tmp_path / "acts")
    monkeypatch.setattr(run, "load_replica", None)
    # Another run by its digest, of which earlier ones hold all or nothing is left.
    record = collect(recipe.model, wanted.units(recipe), out=tmp_path / "acts", tokens_per_row=99)
    assert (record["rows"], content(tmp_path / "acts")) == (0, before)


@pytest.mark.parametrize("damage", ["missing", "cut", "index", "leaned on"])
def test_a_unit_that_is_not_whole_is_collected_again(recipe: Recipe, tmp_path: Path, damage: str) -> None:
    out, units = tmp_path / "acts", wanted.units(recipe)
    if damage == "leaned on":
        first = collect(recipe.model, units[:1], out=out)
        collect(recipe.model, units, out=out)
        for file in out.glob(f"{first['run']}-*"):
            file.unlink()
    else:
        collect(recipe.model, units, out=out)
        before = content(out)
        file = sorted(out.glob("*-00001-*.safetensors" if damage != "index" else "*-00001.index.safetensors"))[0]
        file.write_bytes(file.read_bytes()[:-5])
        if damage == "missing":
            file.unlink()
    collect(recipe.model, units, out=out)
    cache = ActivationCache.open(out)
    assert all(
        (cache.layer(layer).find(u.keys()[u.wanted.layers == layer]) >= 0).all() for u in units for layer in LAYERS
    )
    assert verify(out) == []
    assert damage == "leaned on" or content(out) == before


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_rows_that_are_not_there_are_not_leaned_on(
    recipe: Recipe, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    out, hello = tmp_path / "acts", wanted.units(recipe, prompt="Hello?")
    first = collect(recipe.model, hello, out=out)
    file = out / rows_name(first["run"], 0, LAYERS[0])
    file.write_bytes(file.read_bytes()[:-5])
    if damage == "missing":
        file.unlink()
    assert str(file) in text(inspect(out))
    # Another run by its digest.
    second = collect(recipe.model, hello, out=out, tokens_per_row=99)
    assert second["rows"] == first["rows"]
    assert any(str(file) in told and "counts as not collected" in told for told in caplog.messages)
    assert verify(out) != []
    # Nothing is left of the first run, so nothing of it stays.
    assert collect(recipe.model, hello, out=out)["rows"] == 0
    assert not list(out.glob(f"{first['run']}-*"))
    assert verify(out) == []
    ids = hello[0].contexts[0]
    ActivationCache.open(out).vectors(ids, np.full(len(ids), LAYERS[0]), np.arange(len(ids)))


def test_every_unit_is_some_ranks_whenever_it_looks(tmp_path: Path) -> None:
    contexts = [np.arange(start, start + 10, dtype=np.int32) for start in (1, 50, 90)]
    units = every_position(contexts, [1], unit_tokens=10)

    def share(rank: int, old: Path) -> list[int]:
        here = Ranks(rank=rank, world=2, device=torch.device("cpu"))
        earlier = ActivationCache.open(old) if old.exists() else None
        return list(cache_share(units, earlier, tmp_path, "f" * 16, here).numbers)

    assert [share(rank, tmp_path / "none") for rank in range(2)] == [[0, 2], [1]]
    # Another run finishes the first unit after the first rank has looked.
    sink = sinks.CacheSink(tmp_path / "old", "0" * 16, 0, {"m": 1}, units[0], dtype="F32", width=4)
    sink.append(1, np.arange(10), torch.ones(10), torch.ones(10, 4))
    sink.finish()
    assert [share(rank, tmp_path / "old") for rank in range(2)] == [[2], [1]]


def test_rows_without_an_index_are_told_and_removed_with_their_run(recipe: Recipe, tmp_path: Path) -> None:
    out, hello = tmp_path / "acts", wanted.units(recipe, prompt="Hello?")
    run = collect(recipe.model, hello, out=out)["run"]
    lost, others = out / rows_name(run, 100_000, 1), out / rows_name("0123456789abcdef", 7, 3)
    for file in (lost, others):
        shutil.copy(out / rows_name(run, 0, LAYERS[0]), file)
    assert f"2 files of rows are in no index ({others.name})" in text(inspect(out))
    assert [line.split(": ")[0] for line in verify(out)] == [str(others), str(lost)]
    assert f"{lost}: no index lists its rows" in text(inspect(out, check=True, progress=True))
    assert collect(recipe.model, hello, out=out)["rows"] == 0
    assert [line.split(": ")[0] for line in verify(out)] == [str(others)]


def test_units_of_six_digits_are_ours(tmp_path: Path) -> None:
    [unit] = every_position([np.arange(5, dtype=np.int32)], [1], unit_tokens=10)
    sink = sinks.CacheSink(tmp_path, "0" * 16, 100_000, {"m": 1}, unit, dtype="F32", width=4)
    sink.append(1, np.arange(5), torch.ones(5), torch.ones(5, 4))
    sink.finish()
    assert sorted(content(tmp_path)) == [rows_name("0" * 16, 100_000, 1), index_name("0" * 16, 100_000)]
    assert earlier_runs(tmp_path, "f" * 16, {"m": 1}, dtype="F32") is not None
    assert len(ActivationCache.open(tmp_path, unit=100_000).layer(1)) == 5
    assert UnitFile.named(plain_name("0" * 16, 100_000)) == ("0" * 16, 100_000, "plain")


def test_an_adapter_is_another_target(recipe: Recipe, tmp_path: Path, demo_adapter: Path) -> None:
    units = wanted.units(recipe)
    collect(recipe.model, units, out=tmp_path / "base")
    collect(recipe.model, units, out=tmp_path / "worn", adapter=demo_adapter)
    base, worn = (ActivationCache.open(tmp_path / name).layer(LAYERS[1]) for name in ("base", "worn"))
    assert len(base) == len(worn)
    assert not np.allclose(base.gather(np.arange(len(base))), worn.gather(np.arange(len(worn))), atol=1e-3)
    with pytest.raises(ValueError, match=r"collected from.*adapter"):
        collect(recipe.model, units, out=tmp_path / "base", adapter=demo_adapter)
    with pytest.raises(ValueError, match="rows of F32 and 96 values, asked for were BF16"):
        collect(recipe.model, units, out=tmp_path / "base", dtype="BF16")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json there"):
        collect(recipe.model, units, out=tmp_path / "other", adapter=tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="no activation cache"):
        collect(recipe.model, units, out=tmp_path / "mine")


def test_every_token_of_texts_and_prompts(recipe: Recipe, target: torch.nn.Module, tmp_path: Path) -> None:
    lines = [{"text": "The cat sat."}, {"messages": [{"role": "user", "content": "Hello?"}]}]
    (tmp_path / "texts.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    [*units] = wanted.units(recipe, texts=tmp_path / "texts.jsonl", layers=[2])
    collect(recipe.model, units, out=tmp_path / "acts")
    cache = ActivationCache.open(tmp_path / "acts")
    contexts = [ids for unit in units for ids in unit.contexts]
    assert len(contexts) == 2
    for ids in contexts:
        got = cache.vectors(ids, np.full(len(ids), 2), np.arange(len(ids)))
        np.testing.assert_allclose(got, hidden(target, ids, 2), rtol=1e-4, atol=1e-4)
    [unit] = wanted.units(recipe, prompt="Hello?")
    assert np.array_equal(unit.contexts[0], contexts[1])
    assert np.unique(unit.wanted.layers).tolist() == LAYERS
    (tmp_path / "texts.jsonl").write_text('{"text": "fine"}\n{"body": "x"}\n')
    with pytest.raises(ValueError, match=r"texts\.jsonl: line 2: expected an object with text or messages"):
        wanted.units(recipe, texts=tmp_path / "texts.jsonl")
    (tmp_path / "texts.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "fine"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"texts\.jsonl: line 2: expected .*, got '.*' \(.*can't decode byte 0xff"):
        wanted.units(recipe, texts=tmp_path / "texts.jsonl")
    (tmp_path / "texts.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"texts\.jsonl: no contexts; expected one object"):
        wanted.units(recipe, texts=tmp_path / "texts.jsonl")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: there is no such file; texts are a JSONL file"):
        wanted.units(recipe, texts=tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"expected one of data, texts and prompt, got .*leave out all but one"):
        wanted.units(recipe, texts=tmp_path / "texts.jsonl", prompt="x")
    everywhere = wanted.units(recipe, positions="all")
    assert sum(map(len, (unit.keys() for unit in everywhere))) == 2 * sum(unit.num_tokens for unit in everywhere)


def test_plain_files_are_read_with_numpy_alone(recipe: Recipe, target: torch.nn.Module, tmp_path: Path) -> None:
    collect(recipe.model, wanted.units(recipe), out=tmp_path / "plain", plain=True)
    files = sorted((tmp_path / "plain").glob("*.safetensors"))
    assert len(files) > 2
    for file in files:
        arrays = load_file(file)
        for row, layer, context, position in zip(
            *(arrays[n] for n in ("activations", "layer", "context", "position")), strict=True
        ):
            ids = arrays["ids"][slice(*arrays["offsets"][context : context + 2])]
            np.testing.assert_allclose(row, hidden(target, ids, layer)[position], rtol=1e-4, atol=1e-4)
    with safe_open(files[0], framework="np") as file:
        about = json.loads(file.metadata()["ao"])
    assert (about["kind"], about["schema"], about["unit"]) == ("plain_activations", 1, 0)
    assert about["contract"] == contract_of(recipe.model)
    assert {"model", "weights", "revision", "precision", "tokenizer", "template", "reads"} < set(about["contract"])
    rows = load_file(files[0])
    assert [about["dtype"], about["width"]] == ["F32", rows["activations"].shape[1]]
    assert about["rows"] == {str(layer): int((rows["layer"] == layer).sum()) for layer in np.unique(rows["layer"])}
    before = content(tmp_path / "plain")
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-1])
    files[2].write_bytes(b"")
    left = tmp_path / "plain" / f".{files[2].name}.123.tmp"
    left.write_bytes(b"killed")
    record = collect(recipe.model, wanted.units(recipe), out=tmp_path / "plain", plain=True)
    assert record["units_before"] == len(files) - 3
    assert content(tmp_path / "plain") == before


def test_plain_files_are_inspected(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    record = collect(recipe.model, wanted.units(recipe), out=out, plain=True)
    files = sorted(out.iterdir())
    page = text(inspect(files[1]))
    assert page.startswith(f"{files[1]}: plain activations\n")
    assert re.search(r"\n  model +demo\n", page)
    assert re.search(r"\n  rows +F32, 96 values\n", page)
    shown = [int(rows) for rows in re.findall(r"layer \d +(\d+) rows", text(inspect(out)))]
    assert (len(shown), sum(shown)) == (len(LAYERS), record["rows"])
    assert re.search(rf"\n  files +{len(files)}\n", text(inspect(out)))
    save_file({"x": torch.zeros(1)}, tmp_path / "bare", metadata={"ao": '{"kind": "plain_activations"}'})
    with pytest.raises(ValueError, match=r"bare: its header lacks contract, dtype, width, rows; collect it again"):
        inspect(tmp_path / "bare")
    with pytest.raises(ValueError, match="plain activations, without datapoints; --row, --id and --plot are"):
        inspect(out, rows=[0])
    collect(recipe.model, wanted.units(recipe, prompt="Hello?"), out=out, plain=True, dtype="F16")
    with pytest.raises(ValueError, match=r"plain\.safetensors: of the files in .*dtype 'F.*one by one"):
        inspect(out)


def test_other_tools_tensors_are_imported(tmp_path: Path) -> None:
    contexts = [[1, 2, 3], [1, 2, 4, 5]]
    values = torch.randn(7, 2, 6).to(torch.bfloat16)
    values[3:5] = values[:2]  # what both contexts begin with
    save_file({"resid": values}, tmp_path / "resid.safetensors")
    about = {"tensor": "resid", "layers": [4, 9], "ids": contexts, "contract": {"model": "m"}}
    (tmp_path / "about.json").write_text(json.dumps(about))
    record = import_tensor(tmp_path / "resid.safetensors", tmp_path / "about.json", out=tmp_path / "acts")
    assert {layer: of["rows"] for layer, of in record["layers"].items()} == {"4": 5, "9": 5}
    assert (record["rows"], record["units_before"]) == (10, 0)
    assert summary_text("acts", record).startswith("acts: 10 rows imported, ")
    record = import_tensor(tmp_path / "resid.safetensors", tmp_path / "about.json", out=tmp_path / "acts")
    assert (record["rows"], record["units_before"]) == (0, 1)
    assert summary_text("acts", record).startswith("acts: nothing was missing\n")
    cache = ActivationCache.open(tmp_path / "acts", contract={"model": "m"})
    ids = np.array(contexts[1], dtype=np.int32)
    got = torch.empty(4, 6, dtype=torch.bfloat16)
    cache.layer(9).gather(cache.layer(9).find(context_keys(ids)), got)
    assert torch.equal(got, values[3:, 1])
    for wrong, message in [
        ({"layers": [4]}, r"resid is torch.bfloat16 \[7, 2, 6\].*\[7 tokens, 1 layers, D\]"),
        ({"tensor": "x"}, r"no tensor 'x', only \['resid'\]"),
        ({"ids": [[1, 2]]}, r"\[2 tokens, 2 layers, D\]"),
        (
            {"ids": [[1, 2, 3], [1, 2, 3, 5]]},
            r"tokens 2 and 5 were read after the same ids, and have other activations",
        ),
        ({"ids": [[1.5]]}, r"about\.json: ids\.0\.0: .*integer"),
        ({"ids": [[]]}, r"about\.json: ids\.0: .*at least 1"),
        ({"layers": [-1, 4]}, r"about\.json: layers\.0: "),
        ({"layers": [4, 4]}, r"each layer once, got layers \[4, 4\]"),
        ({"contract": "m"}, r"about\.json: contract: "),
        ({"more": 1}, r"about\.json: more: "),
    ]:
        (tmp_path / "about.json").write_text(json.dumps(about | wrong))
        with pytest.raises(ValueError, match=message):
            import_tensor(tmp_path / "resid.safetensors", tmp_path / "about.json", out=tmp_path / "other")
    (tmp_path / "about.json").write_text(json.dumps(about))
    (tmp_path / "torn.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match=r"torn\.safetensors: not a safetensors file .*; save the tensor with"):
        import_tensor(tmp_path / "torn.safetensors", tmp_path / "about.json", out=tmp_path / "other")
    # Into a cache of other rows nothing is written.
    before = content(tmp_path / "acts")
    (tmp_path / "about.json").write_text(json.dumps(about))
    save_file({"resid": values[..., :4].contiguous()}, tmp_path / "narrow.safetensors")
    with pytest.raises(
        ValueError, match=r"rows of BF16 and 6 values, asked for were BF16 and 4; choose another --out$"
    ):
        import_tensor(tmp_path / "narrow.safetensors", tmp_path / "about.json", out=tmp_path / "acts")
    assert content(tmp_path / "acts") == before


@pytest.mark.parametrize(("dtype", "below"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_forwards_of_other_lengths_are_imported(
    target: torch.nn.Module, tmp_path: Path, dtype: torch.dtype, below: float
) -> None:
    """The same beginning, read alone and in longer contexts, differs in its last bits."""
    target = copy.deepcopy(target).to(dtype)
    contexts = [[*range(40, 48)], [*range(40, 71)], [*range(40, 45)], [*range(40, 46), *range(90, 180)]]
    values = [
        torch.stack([torch.from_numpy(hidden(target, np.array(ids), layer)) for layer in LAYERS], dim=1).to(dtype)
        for ids in contexts
    ]
    record = imported(tmp_path, torch.cat(values), contexts)
    assert 0 < record["difference"] < below
    assert "rows read after the same ids differ by up to" in summary_text("acts", record)
    layer = ActivationCache.open(tmp_path / "acts").layer(0)
    kept = torch.empty(8, values[0].shape[2], dtype=dtype)
    layer.gather(layer.find(context_keys(np.array(contexts[0]))), kept)
    assert torch.equal(kept, values[0][:, 0]), "the first ones"


def imported(folder: Path, values: torch.Tensor, ids: list[list[int]]) -> dict[str, Any]:
    """Import values [tokens, layers, D] of layers from 0 on into `acts`."""
    save_file({"resid": values}, folder / "resid.safetensors")
    about = {"tensor": "resid", "layers": list(range(values.shape[1])), "ids": ids, "contract": {"model": "m"}}
    (folder / "about.json").write_text(json.dumps(about))
    return import_tensor(folder / "resid.safetensors", folder / "about.json", out=folder / "acts")


def test_an_import_tells_of_rows_that_are_alike_or_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ao.collect.imported.ROWS", 2)
    values = torch.randn(7, 2, 6)
    values[:, 1] = torch.arange(1, 7)
    values[1, 0, 3] = torch.nan
    values[3:5] = values[:2]
    with caplog.at_level(logging.WARNING):
        record = imported(tmp_path, values, [[1, 2, 3], [1, 2, 4, 5]])
    assert {layer: of["not_finite"] for layer, of in record["layers"].items()} == {"0": 1, "1": 0}
    [warning] = caplog.messages
    assert warning.startswith("layer 1: its 5 rows are all alike")
    assert verify(tmp_path / "acts") == []
    values[3, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="tokens 0 and 3 were read after the same ids"):
        imported(tmp_path, values, [[1, 2, 3], [1, 2, 4, 5]])


def test_the_first_rank_alone_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert imported(tmp_path, torch.randn(1, 1, 6), [[1]]) == {"first_rank": False}
    assert not (tmp_path / "acts").exists()
    monkeypatch.setenv("RANK", "0")
    assert imported(tmp_path, torch.randn(1, 1, 6), [[1]])["first_rank"]


def test_vectors_that_are_all_alike_are_told(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = run.collected

    def dead(*args: object, **options: object) -> object:
        for row in honest(*args, **options):
            yield [
                (layer, indices, resid_KD[:1].expand_as(resid_KD) if layer == LAYERS[1] else resid_KD)
                for layer, indices, resid_KD in row
            ]

    same, other = Alike(), Alike()
    for value in (0.0, 1.0):
        same.see(torch.full((3, 4), value * 2), torch.full((3,), value * 4))
    assert same.found() == (6, 0.0)  # zeros, and then something else
    zeros = Alike()
    zeros.see(torch.zeros(3, 4), torch.zeros(3))
    assert zeros.found() == (3, 1.0)
    rows = torch.eye(4)
    rows[0, 0] = torch.nan
    other.see(rows, rows.norm(dim=1))
    assert other.found() == (3, 0.0)
    monkeypatch.setattr(run, "collected", dead)
    one_context = wanted.units(recipe)[0]
    with caplog.at_level(logging.WARNING):
        collect(recipe.model, [one_context], out=tmp_path / "acts")
    assert next(text for text in caplog.messages if "all alike" in text).startswith(f"layer {LAYERS[1]}:")
    assert not any(text.startswith(f"layer {LAYERS[0]}:") for text in caplog.messages)


class Slow(Sink):
    """Tells how many rows had been handed over when it took each, and may fail."""

    def __init__(self, given: list[int], *, fails_at: int | None = None) -> None:
        self.given, self.fails_at = given, fails_at
        self.ahead: list[int] = []
        self.calls: list[str] = []

    def append(self, layer: int, indices: np.ndarray, norms_K: torch.Tensor, rows_KD: torch.Tensor) -> None:
        time.sleep(0.01)
        if len(self.ahead) == self.fails_at:
            raise OSError("disk full")
        self.ahead.append(len(self.given) - len(self.ahead))
        self.calls.append(f"append {layer} {indices.tolist()} {norms_K.tolist()} {rows_KD.tolist()}")

    def finish(self) -> None:
        self.calls.append("finish")

    def abandon(self) -> None:
        self.calls.append("abandon")


def test_forwards_run_ahead_of_a_sink_by_so_much_and_rows_come_in_order() -> None:
    given: list[int] = []
    sink = Slow(given)
    with Handover(dtype="F32", pending_bytes=3 * 4) as handover:
        for number in range(8):
            row = torch.full((1, 1), float(number))
            handover.give(sink, 5, np.array([number]), row, row[0])
            given.append(number)
        handover.finish(sink)
    assert sink.calls == [*(f"append 5 [{n}] [{float(n)}] [[{float(n)}]]" for n in range(8)), "finish"]
    assert 1 <= max(sink.ahead) <= 3
    assert handover.blocked_seconds > 0


@pytest.mark.parametrize(("fails_at", "error"), [(1, OSError), (None, KeyError)])
def test_a_sink_that_lacks_rows_never_finishes(fails_at: int | None, error: type[Exception]) -> None:
    """Whether its own rows fail, or what comes while they are under way."""
    sink = Slow([], fails_at=fails_at)

    def hand_over() -> None:
        with Handover(dtype="F32") as handover:
            for number in range(4):
                handover.give(sink, 5, np.array([number]), torch.ones(1, 1), torch.ones(1))
            if fails_at is None:
                raise KeyError("the next forward")
            handover.finish(sink)

    with pytest.raises(error):
        hand_over()
    assert sink.calls[-1] == "abandon"
    assert "finish" not in sink.calls


def test_values_beyond_half_precision_are_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = run.collected

    def large(*args: object, **options: object) -> object:
        for row in honest(*args, **options):
            for _, _, resid_KD in row:
                resid_KD[0, 0] = torch.inf  # which is none that was lost
            yield [(layer, indices, resid_KD * 1e5) for layer, indices, resid_KD in row]

    monkeypatch.setattr(run, "collected", large)
    with pytest.raises(ValueError, match=r"layer [13]: values up to .* do not fit F16.*use BF16 or F32"):
        collect(recipe.model, wanted.units(recipe), out=tmp_path / "acts", dtype="F16")
    assert not list((tmp_path / "acts").glob(".*"))


def test_a_unit_knows_its_keys_and_parts() -> None:
    contexts = [np.array([5, 6, 7], np.int32), np.array([5, 6, 8, 9], np.int32)]
    [unit] = units_of(contexts, Wanted(np.array([1, 0, 1]), np.array([2, 2, 2]), np.array([3, 1, 1])), unit_tokens=40)
    keys = unit.keys()
    assert keys.tolist() == [context_keys(contexts[c])[p].tolist() for c, p in [(0, 1), (1, 1), (1, 3)]]
    assert keys[0].tolist() == keys[1].tolist()
    [left] = remaining([unit], None).units
    assert left.wanted.positions.tolist() == [1, 3]
    assert [len(ids) for ids in left.contexts] == [2, 4]
    assert list(units_of([], Wanted(*(np.empty(0, int),) * 3), unit_tokens=40)) == []


def test_units_are_built_when_they_are_asked_for_and_a_part_is_held() -> None:
    built: list[int] = []
    one = Unit.whole([np.array([1, 2], np.int32)], [0])

    def build(part: int) -> list[Unit]:
        built.append(part)
        return [one] * [2, 0, 1][part]

    several = Units([2, 0, 1], build)
    assert len(several) == 3
    assert built == []
    assert list(several) == [one] * 3
    assert built == [0, 2]
    assert (several[-1], several[2:]) == (one, [one])
    assert built == [0, 2]
    with pytest.raises(IndexError, match="unit 3 of 3"):
        _ = several[3]
    left = remaining(several, None)
    assert list(left.numbers) == [0]  # the others want the same
    assert [len(unit.wanted.layers) for unit in left.units] == [2, 0, 0]


@pytest.mark.parametrize("unit_tokens", [1, 4, 7, 100])
def test_units_do_not_depend_on_how_they_are_built(recipe: Recipe, unit_tokens: int) -> None:
    contexts = [np.arange(length, dtype=np.int32) for length in (3, 1, 9, 2, 2, 5)]
    at_once = units_of(contexts, Unit.whole(contexts, [1, 4]).wanted, unit_tokens=unit_tokens)
    one_by_one = every_position(contexts, [1, 4], unit_tokens=unit_tokens)
    assert [unit.digest for unit in one_by_one] == [unit.digest for unit in at_once]
    assert len(every_position([], [1], unit_tokens=unit_tokens)) == 0
    units = wanted.units(recipe)
    assert [units[number].digest for number in reversed(range(len(units)))] == [unit.digest for unit in units][::-1]


def test_what_a_kill_left_is_removed(recipe: Recipe, tmp_path: Path) -> None:
    out, units, other = tmp_path / "acts", wanted.units(recipe), "0123456789abcdef"
    out.mkdir()
    rows, index = f".{other}-00000-L001.safetensors.5.0.partial", f".{other}-00000.index.safetensors.5.1.partial"
    held, fresh = rows.replace("L001", "L003"), index.replace("00000", "00001")
    for name in (".manifest.json.5.tmp", ".norms.png.5.tmp", rows, index, held, fresh):
        (out / name).write_bytes(b"half")
    os.utime(out / index, (0, 0))
    with open(out / held, "rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        collect(recipe.model, units, out=out)
    assert sorted(path.name for path in out.glob(".*")) == sorted([held, fresh])
    assert verify(out) == []
    assert collect(recipe.model, units, out=out)["rows"] == 0
    assert [path.name for path in out.glob(".*")] == [fresh]


def test_ranks_tell_the_speed_of_all_and_the_time_of_the_slowest(monkeypatch: pytest.MonkeyPatch) -> None:
    other = torch.tensor([1.0, 5, 300, 10, 4], dtype=torch.float64)
    monkeypatch.setattr(Ranks, "sum_", lambda here, counts: counts + torch.stack([torch.zeros(5), other]))
    tally = Tally(units_before=2, rows=3, tokens=100, collect_seconds=2, writer_seconds=2)
    record = run._together(tally, Ranks(rank=0, world=2, device=torch.device("cpu")))
    counts = {"units_before": 3, "rows": 8, "tokens": 400, "tokens_per_second": 40}
    assert record == {**counts, "collect_seconds": 10, "writer_seconds": 4}
    line = summary_text("acts", {**record, "seconds": 12.5})
    assert line == (
        "acts: 8 rows of 400 context tokens, 12.5 s; 40 tokens/s in 10.0 s of collecting, 40.0% of them waiting for the disk"
    )
    quick = {**record, "seconds": 1, "collect_seconds": 0.5, "writer_seconds": 0.4}
    assert "waiting" not in summary_text("acts", quick)


GOLDEN = {
    "0123456789abcdef-00000-L001.safetensors": "8dfae387f50760c9",
    "0123456789abcdef-00000-L003.safetensors": "d55aacbeb43b8b14",
    "0123456789abcdef-00000.index.safetensors": "1e1c05bc13ab074a",
    "0123456789abcdef-00000.plain.safetensors": "66a724298ba43733",
    "manifest.json": "8ad178893a9dbc8f",
}


def test_bytes_are_golden(tmp_path: Path) -> None:
    """Of rows that no model's rounding touches; a change of theirs is a new version of the format."""
    contexts = [np.array([5, 6, 7], np.int32), np.array([9], np.int32)]
    [unit] = every_position(contexts, LAYERS, unit_tokens=40)
    for kind in (sinks.PlainSink, sinks.CacheSink):
        sink = kind(tmp_path, "0123456789abcdef", 0, {"model": "golden"}, unit, dtype="BF16", width=4)
        for layer in LAYERS:
            indices = np.flatnonzero(unit.wanted.layers == layer)
            rows_KD = torch.from_numpy(indices[:, None] + np.arange(4)).bfloat16()
            sink.append(layer, indices, torch.from_numpy(indices.astype(np.float32)), rows_KD)
        sink.finish()
    ActivationCache.open(tmp_path).write_manifest()
    assert {name: hashlib.sha256(found).hexdigest()[:16] for name, found in content(tmp_path).items()} == GOLDEN


def test_every_flipped_byte_of_a_plain_file_is_found(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    collect(recipe.model, wanted.units(recipe, prompt="Hello?"), out=out, plain=True)
    [file] = out.iterdir()
    whole = file.read_bytes()
    assert text(inspect(out, check=True)) == f"{out}: checked 1 files: all is well"
    assert inspect(file, check=True)["ok"]
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(0, header, 7), *range(header, len(whole), 997), len(whole) - 1]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        problem = own_digest_problem(file, remedy="collect it again")
        assert problem is not None, place
        assert str(file) in problem, place
    result = inspect(out, check=True)
    assert not result["ok"]
    assert f"{file}: damaged: it has sha256" in text(result)
    (out / file.name.replace("00000.", "00001.")).write_bytes(whole[:100])
    assert len(inspect(out, check=True)["problems"]) == 2
    assert "00001.plain.safetensors: damaged: its header cannot be read" in text(inspect(out))


@pytest.fixture(scope="module")
def some_cache(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A cache and its manifest."""
    folder = tmp_path_factory.mktemp("cache")
    imported(folder, torch.randn(4, 2, 6), [[1, 2, 3, 4]])
    return folder / "acts", (folder / "acts" / "manifest.json").read_bytes()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["units", "index", "xxh3", "rows"]) | st.text(), inner)
    ),
    max_leaves=12,
)
MANIFESTS = (
    ANYTHING
    | st.fixed_dictionaries({"units": ANYTHING})
    | st.fixed_dictionaries({"units": st.lists(st.fixed_dictionaries({"index": ANYTHING, "xxh3": ANYTHING}))})
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=EXAMPLES)
@given(drawn=st.data())
def test_no_manifest_breaks_a_cache(some_cache: tuple[Path, bytes], drawn: st.DataObject) -> None:
    """Rows are found without it; whoever reads it names it, or passes."""
    out, whole = some_cache
    manifest = out / "manifest.json"
    if drawn.draw(st.booleans()):
        manifest.write_text(json.dumps(drawn.draw(MANIFESTS)))
    else:
        start, end = sorted(drawn.draw(st.integers(0, len(whole))) for _ in range(2))
        manifest.write_bytes(whole[:start] + drawn.draw(st.binary(max_size=8)) + whole[end:])
    assert len(ActivationCache.open(out).layer(0)) == 4
    assert all(line.startswith(str(out)) or "missing, though manifest.json lists it" in line for line in verify(out))
    text(inspect(out))
    text(inspect(out, check=True))


def test_a_cache_is_inspected(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "acts"
    collect(recipe.model, wanted.units(recipe), out=out)
    page = text(inspect(out))
    assert re.search(r"acts: an activation cache\n", page)
    assert re.search(r"\n  layer 3 +\d+ rows, norms [\d.]+ \[", page)
    assert inspect(out, check=True)["ok"]
    assert re.search(r"\n  norms +mean \[1 %, 25 %, median, 75 %, 99 %\]\n", page)
    assert "norms" not in text(inspect(out, check=True))
    inspect(out, plot=tmp_path / "norms.png")
    assert (tmp_path / "norms.png").read_bytes() == (out / "norms.png").read_bytes()
    (out / "manifest.json").unlink()
    assert "not in the manifest yet: it is being collected, or was stopped" in text(inspect(out))
    with pytest.raises(ValueError, match="a file of an activation cache; inspect its folder"):
        inspect(next(out.glob("*-L003.safetensors")))
    damaged = next(out.glob("*-L003.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x99")
    result = inspect(out, check=True)
    assert not result["ok"]
    assert f"{damaged}: damaged: rows 0 to" in text(result)
    with pytest.raises(ValueError, match="an activation cache, without datapoints"):
        inspect(out, rows=[0])


def test_the_command(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(recipe.data.out).parent / "recipe.toml"
    path.write_text(f'[model]\nname = "demo"\nprecision = "fp32"\ndevice = "cpu"\n[data]\nout = "{recipe.data.out}"\n')
    cli.main(["collect", str(path), "--out", str(tmp_path / "acts"), "--layers", "0.5", "2", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert sorted(result["layers"]) == ["2", "3"]
    cli.main(["collect", str(path), "--out", str(tmp_path / "acts"), "--prompt", "Hello?"])
    assert "rows of" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        cli.main(["collect", str(path), "--import-tensor", "x.safetensors"])
    assert stop.value.code == 2
    capsys.readouterr()
    for flags in (["--format", "safetensors"], ["--positions", "all"], ["--tokens-per-row", "99"]):
        with pytest.raises(SystemExit):
            cli.main(["collect", str(path), "--import-tensor", "x.safetensors", "--sidecar", "x.json", *flags])
        assert f"runs no model and writes a cache; leave {flags[0]} out" in capsys.readouterr().err
    assert replace(recipe.model, target=None) == recipe.model
