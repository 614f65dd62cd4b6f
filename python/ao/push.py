"""Upload an adapter to the Hugging Face Hub: first proved whole, then in one commit.

Only what an oracle is asked with and what says how it was made goes up; checkpoints and logs stay.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ao.card import FILE as CARD
from ao.card import REPOSITORY, card_of, is_hub_id, with_report
from ao.checkpoint import FILE as CONTRACT
from ao.checkpoint import OracleConfig
from ao.manifest import read_manifest

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
REPORT = "report.json"
FILES = (WEIGHTS, SETTINGS, CONTRACT, "training.json", "recipe.toml", CARD)
"""What is uploaded of a folder, beside the report where there is one."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])(\.\w+)?\.weight")
_ABSOLUTE = re.compile(r"""^\s*\w+ = "((?:/|~|[A-Za-z]:\\).*)"\s*$""", re.MULTILINE)


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    report: str | Path | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Check an adapter's folder and upload it.

    Args:
        folder: what `ao train` wrote.
        repository: OWNER/NAME on the Hub; made if it does not exist.
        private: the repository is made private, and one that exists must be.
        report: `report.json` of `ao eval`, whose table goes into the card; the folder's own where there is one.
        dry_run: check and say what would be uploaded, without any network.

    Returns:
        `repository`, `private`, `files` (name and bytes each), `bytes` of all of them, `notes` for the author, `uploaded`,
        and after an upload `url` of its commit.

    Raises:
        FileNotFoundError: the folder lacks a file.
        OSError: the Hub could not be reached, or refused.
        ValueError: the adapter is not whole, does nothing or lacks its contract; the repository's name is none or it is
            public where a private one was asked for; or there is no token.
    """
    folder = Path(folder)
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(f"repository {repository!r}: expected OWNER/NAME, as in you/gemma-4-31b-oracle")
    contract = check_adapter(folder)
    made_of = () if (folder / CARD).is_file() else ("recipe.toml", "training.json")
    if missing := [name for name in made_of if not (folder / name).is_file()]:
        raise FileNotFoundError(
            f"{folder}: no {missing[0]}, which the card is drafted from; push the folder that `ao train` wrote, or its best/"
        )
    found = _report(folder, report)
    contents, card = _contents(folder, repository, found)
    result: dict[str, Any] = {
        "repository": repository,
        "private": private,
        "files": [{"name": name, "bytes": _size(content)} for name, content in contents.items()],
        "bytes": sum(map(_size, contents.values())),
        "notes": _notes(folder, contract, card, found),
        "uploaded": False,
    }
    if not dry_run:
        result |= {"uploaded": True, "url": _upload(contents, repository, private=private)}
    return result


def summary_text(result: Mapping[str, Any]) -> str:
    """The result as a person reads it, without a newline at the end."""
    kind = "private repository" if result["private"] else "repository"
    did = "uploaded to" if result["uploaded"] else "would be uploaded to"
    lines = [f"  {file['bytes']:>14,}  {file['name']}" for file in result["files"]]
    lines.append(f"  {result['bytes']:>14,}  bytes, {did} the {kind} {result['repository']}")
    lines += [f"note: {note}" for note in result["notes"]]
    if result["uploaded"]:
        lines.append(result["url"])
    return "\n".join(lines)


def check_adapter(folder: str | Path) -> OracleConfig:
    """Prove without its base that an adapter is whole, and give its contract.

    Raises:
        FileNotFoundError: the folder or one of the adapter's three files is missing.
        ValueError: a tensor is missing, left over, of a wrong shape or not finite; every B is zero; or the contract is not
            valid or of another base.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder; give the one that `ao train` wrote")
    for name in (WEIGHTS, SETTINGS, CONTRACT):
        if not (folder / name).is_file():
            unfinished = (folder / "checkpoints").is_dir()
            remedy = "the run is not finished, ao train --resume ends it" if unfinished else "train or copy it again"
            raise FileNotFoundError(f"{folder}: no {name}, so no whole adapter; {remedy}")
    settings, values = read_manifest(folder / SETTINGS), read_manifest(folder / CONTRACT)
    num_layers = values.get("ao", {}).get("num_layers") if isinstance(values.get("ao", {}), dict) else None
    if not isinstance(num_layers, int):
        raise ValueError(f"{folder / CONTRACT}: ao.num_layers: expected a number, got {num_layers!r}; mend the file")
    contract = OracleConfig.from_json(values, num_layers=num_layers, origin=str(folder / CONTRACT))
    if (base := settings.get("base_model_name_or_path")) != contract.model:
        raise ValueError(
            f"{folder}: {SETTINGS} names the base {base!r}, {CONTRACT} {contract.model!r}; mend one of them"
        )
    _check_tensors(folder / WEIGHTS, settings)
    return contract


def _check_tensors(path: Path, settings: Mapping[str, Any]) -> None:
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    works = False
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - the file is no mapping
                match = _TENSOR.fullmatch(key)
                if match is None:
                    raise ValueError(f"{path}: {key!r} is no tensor of a LoRA; expected MODULE.lora_A or lora_B.weight")
                tensor = file.get_tensor(key)
                if not bool(tensor.isfinite().all()):
                    raise ValueError(
                        f"{path}: {key} holds a number that is not finite; the training broke, train it again"
                    )
                shapes.setdefault(match["module"], {})[match["part"]] = tuple(tensor.shape)
                works = works or (match["part"] == "B" and bool(tensor.any()))
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, not a whole safetensors file: {error}; copy or train it again") from None
    for module, parts in shapes.items():
        if set(parts) != {"A", "B"}:
            lacking = "B" if "A" in parts else "A"
            raise ValueError(f"{path}: {module} lacks its lora_{lacking}; copy or train it again")
        if len(parts["A"]) != 2 or len(parts["B"]) != 2 or parts["A"][0] != parts["B"][1]:
            raise ValueError(f"{path}: {module}: expected A [r, in] and B [out, r], got {parts['A']} and {parts['B']}")
    targets = settings.get("target_modules")
    wanted = targets if isinstance(targets, list) else []
    absent = [name for name in wanted if not any(f".{module}".endswith(f".{name}") for module in shapes)]
    if absent or not shapes:
        what = f"{absent[0]} and {len(absent) - 1} more" if absent else "every module"
        raise ValueError(f"{path}: no tensors of {what}, which {SETTINGS} names; copy or train it again")
    if not works:
        raise ValueError(f"{path}: every lora_B is zero, so the adapter does nothing; it was saved before training")


def _report(folder: Path, given: str | Path | None) -> Path | None:
    path = folder / REPORT if given is None else Path(given)
    if given is None and not path.is_file():
        return None
    values = read_manifest(path)
    if values.get("schema") != 1 or not values.get("tasks"):
        raise ValueError(f"{path}: expected a report of `ao eval` with schema 1 and tasks, got {sorted(values)[:8]}")
    return path


def _contents(folder: Path, repository: str, report: Path | None) -> tuple[dict[str, Path | bytes], str]:
    """What goes up, by name, files as they are, but for the card; and the card."""
    card = (folder / CARD).read_text(encoding="utf-8") if (folder / CARD).is_file() else card_of(folder)
    if report is not None:
        card = with_report(card, read_manifest(report))
    # A draft cannot know where it will lie.
    card = card.replace(f'adapter="{REPOSITORY}"', f'adapter="{repository}"')
    contents: dict[str, Path | bytes] = {}
    for name in FILES:
        if name == CARD:
            contents[name] = card.encode()
        elif (folder / name).is_file():
            contents[name] = folder / name
    if report is not None:
        contents[REPORT] = report
    return contents, card


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _notes(folder: Path, contract: OracleConfig, card: str, report: Path | None) -> list[str]:
    """What an author may want to mend before others see it."""
    notes = []
    if not is_hub_id(contract.model):
        notes.append(f"the base {contract.model!r} is no model of the Hub; others cannot load it by this name")
    if not re.search(r"^license:", card, re.MULTILINE):
        notes.append(f"{CARD} names no license; add one to its front matter")
    if report is None:
        notes.append("no scores: `ao eval` writes a report.json, and --report puts its table into the card")
    elif report.stat().st_mtime < (folder / WEIGHTS).stat().st_mtime:
        notes.append(f"{report} is older than the adapter; are its scores this adapter's?")
    recipe = folder / "recipe.toml"
    if recipe.is_file() and (paths := _ABSOLUTE.findall(recipe.read_text(encoding="utf-8"))):
        notes.append(f"recipe.toml names folders of this machine, {paths[0]!r} and {len(paths) - 1} more")
    return notes


def _upload(contents: Mapping[str, Path | bytes], repository: str, *, private: bool) -> str:
    """One commit with every file; its address."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if get_token() is None:
        raise ValueError(
            "no token of the Hub: run `hf auth login`, or set HF_TOKEN to one with the right to write; --dry-run needs none"
        )
    api = HfApi()
    operations = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in contents.items()
    ]
    try:
        # Without a wish the owner's own default holds.
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.repo_info(repository).private:
            raise ValueError(
                f"{repository} is public already; make it private on the Hub first, or leave --private out"
            )
        commit = api.create_commit(repository, operations, commit_message="Activation Oracle, uploaded by ao push")
    except Exception as error:
        # The client's HTTP library goes by different names, and its errors are no OSError.
        of_the_network = any(kind.__module__.startswith("httpx") for kind in type(error).__mro__)
        if not (of_the_network or isinstance(error, OSError)):
            raise
        said = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConnectionError(
            f"{repository}: the Hub could not be reached, or refused: {said!r}; nothing was uploaded. A token needs the "
            "right to write there: `hf auth login`"
        ) from error
    return commit.commit_url
