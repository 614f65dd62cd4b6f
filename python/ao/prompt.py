"""From a model's name to the framer that writes its prompts, and from a layer's depth to its index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ao._ao import Framer
from ao.config import ModelConfig
from ao.manifest import fingerprint, model_fingerprint, read_manifest

if TYPE_CHECKING:
    import numpy as np

DEFAULT_QUESTION = "What is the model thinking about?"
"""Asked where no question is given."""
YES_NO_PREFIX = "Answer with 'Yes' or 'No' only. "
"""Put before yes/no questions (arXiv 2512.15674)."""

_ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors", "ao_config.json", "*.yaml"]
_MODEL_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
]


def context_prediction_question(side: Literal["next", "previous"], num_tokens: int) -> str:
    """The question of a context-prediction example about the `num_tokens` tokens beside those that are read."""
    plural = num_tokens != 1
    tokens = f"{num_tokens} token{'s' if plural else ''}"
    if side == "next":
        return f"Can you predict the next {tokens} that {'come' if plural else 'comes'} after this?"
    return f"Can you predict the previous {tokens} that came before this?"


def model_folder(name: str, revision: str | None = None, *, local: bool = False) -> Path:
    """The folder with a model's configuration, tokenizer and template; of a Hub model only these are downloaded.

    Args:
        name: "demo" (the target embedded in the package), a folder, or a Hub id.
        revision: Hub revision of `name`.
        local: Look into the Hub's local cache only.

    Raises:
        FileNotFoundError: there is neither such a folder nor such a model within reach.
    """
    folder = Path(__file__).parent / "demo" / "model" if name == "demo" else Path(name)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"model {name!r} is a folder, which has no revision {revision!r}; leave the revision out")
        return folder
    if name == "demo":
        raise FileNotFoundError(f"model 'demo': {folder} is missing; run `ao demo --rebuild-target` or reinstall ao")
    if _is_path(name):
        raise FileNotFoundError(f"model {name!r}: there is no such folder; expected {Path(name).absolute()}")
    return _download("model", name, revision, files=_MODEL_FILES, local=local)


def adapter_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of an adapter, downloaded where `name` is a Hub id.

    Raises:
        FileNotFoundError: there is neither such a folder nor such an adapter within reach.
    """
    if Path(name).is_dir():
        return Path(name)
    if isinstance(name, Path) or _is_path(name):
        raise FileNotFoundError(f"adapter {str(name)!r}: there is no such folder; train one with `ao train`")
    return _download("adapter", name, revision, files=_ADAPTER_FILES)


def _is_path(name: str) -> bool:
    """Whether a name can only have been meant as a folder: a Hub id is NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def _download(what: str, name: str, revision: str | None, *, files: list[str], local: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    where = name if revision is None else f"{name} at {revision}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=local))
    except HFValidationError:
        raise FileNotFoundError(f"{what} {name!r}: neither a folder nor a Hub id (OWNER/NAME)") from None
    except (LocalEntryNotFoundError, ConnectionError):
        if local:
            raise FileNotFoundError(f"{what} {where}: no such folder, and not in the Hub's local cache") from None
        raise FileNotFoundError(
            f"{what} {where}: no such folder, not in the Hub's local cache, and the Hub cannot be reached; "
            "give a folder, or run once with a network"
        ) from None
    except HfHubHTTPError as error:
        raise FileNotFoundError(
            f"{what} {where}: the Hub answers {str(error).strip().splitlines()[0]!r}; check the name, "
            "and for a gated model log in with `hf auth login`"
        ) from None


def framer(name: str, revision: str | None = None, *, local: bool = False) -> Framer:
    """The framer of a model: everything that turns text into aligned token ids, by its own tokenizer and template.

    Args:
        name: As for `model_folder`.
        revision: Hub revision of `name`.
        local: Look into the Hub's local cache only.

    Raises:
        FileNotFoundError: the model, its tokenizer or its template is missing.
        ValueError: the placeholder is not one token, or the template does not render (`ao._ao.AoError`).
    """
    folder = model_folder(name, revision, local=local)
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.is_file():
        raise FileNotFoundError(
            f"model {name!r} has no tokenizer.json; save one with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    settings = _optional_json(folder / "tokenizer_config.json")
    special_tokens = _special_tokens(_optional_json(folder / "special_tokens_map.json")) | _special_tokens(settings)
    return Framer(tokenizer.read_text(encoding="utf-8"), _template(name, folder, settings), json.dumps(special_tokens))


def _optional_json(path: Path) -> dict[str, Any]:
    return read_manifest(path) if path.is_file() else {}


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """The template's token variables, each from a string or an added token's dict; unset ones are left out."""
    found = {name: value for name, value in settings.items() if name.endswith("_token")}
    for group in ("extra_special_tokens", "model_specific_special_tokens"):
        if isinstance(settings.get(group), dict):
            found |= settings[group]
    contents = {name: value["content"] if isinstance(value, dict) else value for name, value in found.items()}
    return {name: value for name, value in contents.items() if isinstance(value, str)}


def _template(name: str, folder: Path, settings: dict[str, Any]) -> str:
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    template = _optional_json(folder / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        if "default" not in named:
            raise ValueError(f"model {name!r}: none of its chat templates is called 'default', only {sorted(named)}")
        template = named["default"]
    if not isinstance(template, str):
        raise FileNotFoundError(
            f"model {name!r} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
            "an oracle is asked in chat turns: use the instruction-tuned model, or add a template"
        )
    return template


def special_ids(model: ModelConfig) -> np.ndarray:
    """Ids of a model's special tokens, those that mark turns among them; sorted.

    The controls that show text leave them out: inside a question they would end the user's turn, and a control that
    stumbles over that makes the oracle look good.
    """
    import numpy as np

    tokenizer = read_manifest(model_folder(model.name, model.revision) / "tokenizer.json")
    return np.array(sorted(token["id"] for token in tokenizer["added_tokens"] if token["special"]), dtype=np.int32)


def vocabulary_size(name: str, revision: str | None = None, *, local: bool = False) -> int:
    """One more than the greatest id of a model's tokenizer. The arguments are those of `framer`."""
    tokenizer = read_manifest(model_folder(name, revision, local=local) / "tokenizer.json")
    words = tokenizer["model"]["vocab"]
    ids = words.values() if isinstance(words, dict) else range(len(words))
    return 1 + max([*ids, *(token["id"] for token in tokenizer.get("added_tokens", []))])


def num_layers(name: str, revision: str | None = None) -> int:
    """Number of decoder blocks of a model's text part, from its config.json.

    Raises:
        ValueError: the configuration does not say.
    """
    config = read_manifest(model_folder(name, revision) / "config.json")
    text = config.get("text_config", config)
    value = text.get("num_hidden_layers", text.get("n_layer"))
    if not isinstance(value, int):
        raise ValueError(f"model {name!r}: config.json has no num_hidden_layers; ao reads decoder-only language models")
    return value


def resolve_layer(layer: float, num_layers: int) -> int:
    """Index of the block whose output is read: an int is that index, a float the depth in [0, 1).

    Layer k is the output of block k counted from 0, `hidden_states[k + 1]` in transformers. A depth f is
    `int(num_layers * round(100 f, 6) / 100)`, the published oracles' rule.

    Raises:
        ValueError: there is no such layer.
    """
    if isinstance(layer, bool) or not isinstance(layer, int | float):
        raise ValueError(f"layer {layer!r}: expected an index (int) or a depth (float)")
    if isinstance(layer, int):
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer {layer} is out of range: the model has layers 0 to {num_layers - 1}")
        return layer
    if not 0 <= layer < 1:
        raise ValueError(f"depth {layer} is out of range: a depth lies in [0, 1); for an index give an int")
    return int(num_layers * round(100 * layer, 6) / 100)


def identity(name: str, revision: str | None = None, *, framer: Framer) -> dict[str, str | int]:
    """What a manifest records of a model: name, weights, number of layers, and the framer's fingerprint.

    A folder is named by its last part, so that a manifest holds no path.
    """
    folder = model_folder(name, revision)
    if name == "demo" or Path(name).is_dir():
        weights = model_fingerprint(folder)
        label = name if name == "demo" else folder.resolve().name
    else:
        weights = fingerprint("hub", name, folder.name)
        label = name
    return {"model": label, "weights": weights, "num_layers": num_layers(name, revision), **framer.fingerprint}


def fingerprints(model: ModelConfig) -> dict[str, dict[str, str | int]]:
    """What a data set for a model must have been packed with, for `PackedDataset.require`: what decides ids and layers.

    Not the weights: shards hold no activations, so a data set serves every checkpoint with the same tokenizer, template
    and number of layers.
    """
    oracle = _framing(model.name, model.revision)
    target = oracle if model.target is None else _framing(model.target, model.target_revision)
    return {"oracle": oracle, "target": target}


def _framing(name: str, revision: str | None) -> dict[str, str | int]:
    return {**framer(name, revision).fingerprint, "num_layers": num_layers(name, revision)}


def target_of(model: ModelConfig) -> tuple[str, str | None]:
    """Name and revision of the model that is read."""
    return (model.name, model.revision) if model.target is None else (model.target, model.target_revision)
