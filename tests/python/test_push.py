"""Pushing an adapter: what is checked first, what goes up and what stays, with the Hub's client replaced."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file

from ao.card import card_of, evaluation
from ao.cli import main
from ao.config import load_recipe, to_toml
from ao.push import check_adapter, push, summary_text
from test_card import RECORD, REPORT

RECIPES = Path(__file__).parents[2] / "recipes"
UPLOADED = [
    "adapter_model.safetensors",
    "adapter_config.json",
    "ao_config.json",
    "training.json",
    "recipe.toml",
    "README.md",
]


@pytest.fixture
def folder(demo_adapter: Path, tmp_path: Path) -> Path:
    """As a finished run leaves it."""
    folder = Path(shutil.copytree(demo_adapter, tmp_path / "adapter"))
    (folder / "recipe.toml").write_text(to_toml(load_recipe(RECIPES / "demo.toml")))
    (folder / "training.json").write_text(json.dumps(RECORD))
    (folder / "README.md").write_text(card_of(folder))
    (folder / "log.jsonl").write_text("{}\n")
    (folder / "checkpoints/step-000002").mkdir(parents=True)
    (folder / "checkpoints/step-000002/state.safetensors").write_bytes(b"...")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The Hub's client: what was asked of it, and how it answers."""
    hub = SimpleNamespace(calls=[], private=False, token="hf_x", error=None)

    class Api:
        def create_repo(self, repository: str, **options: Any) -> None:
            hub.calls.append(("create_repo", repository, options))

        def repo_info(self, repository: str) -> SimpleNamespace:
            return SimpleNamespace(private=hub.private)

        def create_commit(self, repository: str, operations: list[Any], *, commit_message: str) -> SimpleNamespace:
            if hub.error is not None:
                raise hub.error
            hub.calls.append(("create_commit", repository, operations))
            return SimpleNamespace(commit_url=f"https://hub/{repository}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: hub.token)
    return hub


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(huggingface_hub, "HfApi", refused)
    monkeypatch.setattr(huggingface_hub, "get_token", refused)


def content_of(operation: Any) -> bytes:
    source = operation.path_or_fileobj
    return source if isinstance(source, bytes) else Path(source).read_bytes()


# --- what goes up ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_network")
def test_a_dry_run_tells_the_files_and_opens_no_connection(folder, capsys):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    main(["push", str(folder), "me/oracle", "--dry-run", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert [file["name"] for file in result["files"]] == UPLOADED
    weights = (folder / "adapter_model.safetensors").stat().st_size
    assert result["files"][0]["bytes"] == weights
    assert result["bytes"] == sum(file["bytes"] for file in result["files"])
    assert (result["uploaded"], result["private"]) == (False, False)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    main(["push", str(folder), "me/oracle", "--dry-run", "--private"])
    shown = capsys.readouterr().out
    assert f"{weights:,}  adapter_model.safetensors" in shown
    assert "would be uploaded to the private repository me/oracle" in shown
    for note in ("'demo' is no model of the Hub", "names no license", "no scores"):
        assert note in shown


def test_one_commit_holds_the_files_and_no_more(folder, hub):
    result = push(folder, "me/oracle")
    (_, repository, options), (_, _, operations) = hub.calls
    assert (repository, options) == ("me/oracle", {"private": None, "exist_ok": True})
    assert [operation.path_in_repo for operation in operations] == UPLOADED
    for operation in operations[:-1]:
        assert content_of(operation) == (folder / operation.path_in_repo).read_bytes()
    card = content_of(operations[-1]).decode()
    assert 'adapter="me/oracle"' in card
    assert "OWNER/NAME" not in card
    assert (result["uploaded"], result["url"]) == (True, "https://hub/me/oracle/commit/1")
    assert result["url"] in summary_text(result)


@pytest.mark.parametrize("where", ["given", "in the folder"])
def test_a_report_goes_into_the_card_and_up(where, folder, hub, tmp_path):
    path = (tmp_path if where == "given" else folder) / "report.json"
    path.write_text(json.dumps(REPORT))
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("library_name: peft", "library_name: peft\nlicense: mit"))
    result = push(folder, "me/oracle", report=path if where == "given" else None)
    operations = {operation.path_in_repo: content_of(operation) for operation in hub.calls[1][2]}
    assert operations["report.json"] == path.read_bytes()
    assert evaluation(REPORT) in operations["README.md"].decode()
    assert "\nlicense: mit\n" in operations["README.md"].decode()
    assert not [note for note in result["notes"] if "license" in note or "scores" in note]


def test_a_folder_without_a_card_gets_one(folder, hub):
    card = (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    push(folder, "me/oracle")
    assert content_of(hub.calls[1][2][-1]).decode() == card.replace("OWNER/NAME", "me/oracle")
    (folder / "training.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"training\.json"):
        push(folder, "me/oracle", dry_run=True)


def test_notes_name_what_others_should_not_see(folder):
    recipe = (folder / "recipe.toml").read_text()
    (folder / "recipe.toml").write_text(recipe.replace('path = "world/', 'path = "/home/me/world/'))
    assert any("'/home/me/world/" in note for note in push(folder, "me/oracle", dry_run=True)["notes"])


# --- the Hub ---------------------------------------------------------------------------------------------------------


def test_without_a_token_it_says_how_to_get_one(folder, hub, capsys):
    hub.token = None
    with pytest.raises(SystemExit) as stop:
        main(["push", str(folder), "me/oracle"])
    assert stop.value.code == 2
    assert "hf auth login" in capsys.readouterr().err
    assert hub.calls == []


def test_private_never_adds_to_a_public_repository(folder, hub):
    with pytest.raises(ValueError, match="me/oracle is public already"):
        push(folder, "me/oracle", private=True)
    assert [call[0] for call in hub.calls] == ["create_repo"]
    hub.private = True
    push(folder, "me/oracle", private=True)
    assert hub.calls[1][2] == {"private": True, "exist_ok": True}


def test_a_hub_that_refuses_ends_with_its_words(folder, hub, capsys):
    # The client's errors of the way there are its HTTP library's, whatever that is called.
    http_error = next(kind for kind in HfHubHTTPError.__mro__ if kind.__module__.startswith("httpx"))
    for error in (http_error("403 Forbidden"), OSError("403 Forbidden")):
        hub.error = error
        with pytest.raises(SystemExit) as stop:
            main(["push", str(folder), "me/oracle"])
        assert stop.value.code == 3
        assert "refused: '403 Forbidden'; nothing was uploaded" in capsys.readouterr().err
    hub.error = KeyError("ours")
    with pytest.raises(KeyError):
        push(folder, "me/oracle")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repository", ["oracle", "me/", "me/oracle/x", "../x", "me/a b"])
def test_a_name_that_is_no_repository_is_refused(repository, folder):
    with pytest.raises(ValueError, match="expected OWNER/NAME"):
        push(folder, repository, dry_run=True)


@pytest.mark.parametrize("name", UPLOADED[:3])
def test_a_missing_file_is_refused(name, folder):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {name}, so no whole adapter; the run is not finished"):
        push(folder, "me/oracle", dry_run=True)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(FileNotFoundError, match="train or copy it again"):
        push(folder, "me/oracle", dry_run=True)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        push(folder / "none", "me/oracle", dry_run=True)


def change_weights(folder: Path, change: str) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(key for key in sorted(tensors) if "lora_B" in key)
    if change == "zero":
        tensors = {key: tensor * 0 if "lora_B" in key else tensor for key, tensor in tensors.items()}
    elif change == "half":
        del tensors[first]
    elif change == "module":
        del tensors[first], tensors[first.replace("lora_B", "lora_A")]
    elif change == "shape":
        tensors[first] = tensors[first][:, :-1].contiguous()
    elif change == "nan":
        tensors[first][0, 0] = torch.nan
    elif change == "stranger":
        tensors["lm_head.weight"] = torch.zeros(2)
    save_file(tensors, path)
    if change == "cut":
        path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("zero", "every lora_B is zero"),
        ("half", "lacks its lora_B"),
        ("module", "no tensors of .* and 0 more, which adapter_config.json names"),
        ("shape", r"expected A \[r, in\] and B \[out, r\]"),
        ("nan", "not finite"),
        ("stranger", "'lm_head.weight' is no tensor of a LoRA"),
        ("cut", "damaged, not a whole safetensors file"),
    ],
)
def test_an_adapter_that_is_not_whole_is_refused(change, problem, folder):
    assert check_adapter(folder).layers == (1, 3, 4)
    change_weights(folder, change)
    with pytest.raises(ValueError, match=problem):
        push(folder, "me/oracle", dry_run=True)


@pytest.mark.parametrize(
    ("name", "key", "value", "problem"),
    [
        ("ao_config.json", "schema_version", 2, "schema_version: expected 1, got 2"),
        ("ao_config.json", "model_name", "other", "names the base 'demo', ao_config.json 'other'"),
        ("ao_config.json", "ao", {}, r"ao\.num_layers: expected a number, got None"),
        ("ao_config.json", "hook_onto_layer", 6, "has 6"),
        ("adapter_config.json", "base_model_name_or_path", "other", "names the base 'other'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(name, key, value, problem, folder):
    values = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**values, key: value}))
    with pytest.raises(ValueError, match=problem):
        push(folder, "me/oracle", dry_run=True)


def test_a_report_of_something_else_is_refused(folder):
    with pytest.raises(ValueError, match="expected a report of `ao eval`"):
        push(folder, "me/oracle", report=folder / "training.json", dry_run=True)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        push(folder, "me/oracle", report=folder / "none.json", dry_run=True)


def test_a_folder_that_lacks_what_its_card_is_drafted_from_is_named(folder):
    (folder / "README.md").unlink()
    (folder / "recipe.toml").unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter: no recipe\.toml, which the card is drafted from; push the"):
        push(folder, "me/oracle", dry_run=True)
