"""The oracle's LoRA adapter: made, saved, loaded from any published layout, and switched on and off with proof."""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import nn
from transformers import PreTrainedModel

from ao.manifest import canonical_json, read_manifest, write_atomic
from ao.models import arch

log = logging.getLogger(__name__)

NAME = "oracle"
"""Name of the oracle's adapter on the base."""

_KEY = re.compile(r"layers\.(?P<tail>\d+\..+)\.(?P<part>lora_A|lora_B)(\.[a-z_]+)?\.weight$")


def add_adapter(model: PreTrainedModel, *, rank: int, alpha: int, dropout: float) -> PeftModel:
    """Put a new LoRA on every linear of the blocks that PEFT takes; B is zero, so the output is the base's at first.

    PEFT refuses some by name: what lies behind a state-space mixer, and dense and shared experts beside fused ones. These
    are left out, with a warning.

    Raises:
        ValueError: the blocks have no linear that can be adapted.
    """
    names = arch.linears(arch.find(model))
    taken = _taken(model, names)
    if refused := sorted(set(names) - set(taken)):
        kinds = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in refused})
        log.warning(
            "PEFT adapts %d of the blocks' %d linears; these stay as they are: %s", len(taken), len(names), kinds
        )
    if not taken:
        raise ValueError(
            f"{type(model).__name__}: none of the {len(names)} linears (nn.Linear) of its blocks can be adapted; LoRA goes "
            "on linears alone, so name a model whose blocks are made of them"
        )
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=taken, bias="none", task_type="CAUSAL_LM"
    )
    return _wrap(model, config, taken)


def _taken(model: PreTrainedModel, names: list[str]) -> list[str]:
    """Those of the linears that PEFT adapts, found on a model without weights: where it refuses one, it has changed others."""
    # It refuses linears only beside fused experts or convolutions; a trial of a large model takes some seconds.
    if all(parameter.ndim <= 2 for parameter in arch.find(model).layers.parameters()):
        return names
    if len(_trial(model, names)) == len(names):
        return names
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    taken = {name for kind in kinds.values() for name in _trial(model, kind)}
    return [name for name in names if name in taken]


def _trial(model: PreTrainedModel, names: list[str]) -> set[str]:
    """Those of the linears that PEFT adapts when asked for just these; none where it raises."""
    if not names:
        return set()
    # What is drawn here must not move what is drawn later.
    with torch.random.fork_rng(devices=[]), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bare: Any = type(model)(copy.deepcopy(model.config))
        try:
            get_peft_model(bare, LoraConfig(target_modules=names), adapter_name=NAME)
        except ValueError:
            return set()
    adapted = {name for name, module in bare.named_modules() if isinstance(module, LoraLayer)}
    return adapted & set(names)


def load_adapter(model: PreTrainedModel, folder: str | Path, *, trainable: bool = False) -> PeftModel:
    """Load an adapter whatever prefix its keys have, and prove that every tensor found its place.

    Raises:
        FileNotFoundError: the folder lacks `adapter_config.json` or `adapter_model.safetensors`.
        ValueError: a key fits no block, a tensor is left over or missing, or every B is zero (such an adapter does nothing).
    """
    folder = Path(folder)
    settings = read_manifest(folder / "adapter_config.json")
    if absent := {"r", "lora_alpha"} - set(settings):
        raise ValueError(
            f"{folder}: adapter_config.json lacks {sorted(absent)}; only LoRA adapters of PEFT are supported"
        )
    if settings.get("modules_to_save"):
        raise ValueError(
            f"{folder}: trains whole modules {settings['modules_to_save']}; only LoRA adapters are supported"
        )
    path = arch.find(model).layers_path
    tensors: dict[str, torch.Tensor] = {}
    modules: dict[str, int] = {}
    with _opened(folder / "adapter_model.safetensors") as file:
        for key in sorted(file.keys()):
            if any(tower in key for tower in arch.OTHER_TOWERS):
                continue  # an "all-linear" adapter of a multimodal base; the text path never calls those
            match = _KEY.search(key)
            if match is None:
                raise ValueError(f"{folder}: key {key!r} is no LoRA tensor of a block (layers.N.*.lora_A/B.weight)")
            name = f"{path}.{match['tail']}"
            tensors[f"base_model.model.{name}.{match['part']}.weight"] = file.get_tensor(key)
            modules[name] = 1
    known = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if strangers := sorted(set(modules) - known):
        raise ValueError(
            f"{folder}: adapts {strangers[0]!r} and {len(strangers) - 1} more that {type(model).__name__} does not have; "
            f"it was trained on {settings.get('base_model_name_or_path')!r}"
        )
    config = LoraConfig(
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        lora_dropout=settings.get("lora_dropout", 0.0),
        use_rslora=settings.get("use_rslora", False),
        rank_pattern=settings.get("rank_pattern") or {},
        alpha_pattern=settings.get("alpha_pattern") or {},
        target_modules=list(modules),
        bias="none",
        task_type="CAUSAL_LM",
    )
    peft = _wrap(model, config, list(modules))
    result = set_peft_model_state_dict(peft, tensors, adapter_name=NAME)
    missing = [key for key in result.missing_keys if "lora_" in key]
    if missing or result.unexpected_keys:
        raise ValueError(f"{folder}: left over {result.unexpected_keys[:3]}, missing {missing[:3]}")
    if not any(bool(tensor.any()) for key, tensor in tensors.items() if ".lora_B." in key):
        raise ValueError(f"{folder}: every lora_B is zero, so the adapter does nothing; it was saved before training")
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.requires_grad_(trainable)
    return peft


def save_adapter(peft: PeftModel, folder: str | Path, *, base: str, ao_config: dict[str, object]) -> None:
    """Write `adapter_model.safetensors`, `adapter_config.json` and, last, `ao_config.json`.

    Keys and `target_modules` are PEFT's own, in the names of the whole model where `base` is multimodal, so that
    `PeftModel.from_pretrained` reads the folder on what `AutoModelForCausalLM` makes of `base`.
    """
    model: Any = peft.get_base_model()
    text, whole = (f"base_model.model.{path}." for path in (arch.find(model).layers_path, arch.layers_in_whole(model)))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(peft, adapter_name=NAME, save_embedding_layers=False)
    tensors = {key.replace(text, whole, 1): state[key].detach().cpu().contiguous() for key in sorted(state)}
    settings = peft.peft_config[NAME].to_dict()
    settings["base_model_name_or_path"] = base
    settings["inference_mode"] = True
    settings["target_modules"] = sorted(
        {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in tensors}
    )
    # Without its contract an adapter is refused, so a crash in between cannot leave new weights under an old one.
    (folder / "ao_config.json").unlink(missing_ok=True)
    write_atomic(folder / "adapter_model.safetensors", serialize(tensors, metadata={"format": "pt"}))
    write_atomic(folder / "adapter_config.json", json.dumps(settings, indent=2, sort_keys=True, default=_plain) + "\n")
    write_atomic(folder / "ao_config.json", json.dumps(json.loads(canonical_json(ao_config)), indent=2) + "\n")


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)


class as_target:  # noqa: N801 - used as the function it would be
    """Every forward inside runs on the bare base: in eval mode; the adapter is off, which is checked, and comes back after.

    May be entered again and again, for each of many forwards: the model is walked once, and each switch takes a few
    milliseconds, where those of the libraries walk it and set every parameter, a tenth of a second for a large model.

    Raises:
        RuntimeError: a LoRA layer is still on; its reads would be of the oracle's own edits.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._layers: list[BaseTunerLayer] = [module for module in self._modules if isinstance(module, BaseTunerLayer)]
        self._before: list[tuple[list[nn.Module], list[BaseTunerLayer]]] = []

    def __enter__(self) -> None:
        trained = [module for module in self._modules if module.training]
        switched_on: list[BaseTunerLayer] = [layer for layer in self._layers if not layer.disable_adapters]
        self._before.append((trained, switched_on))
        _set_plain(trained, "training", False)
        _set_plain(switched_on, "_disable_adapters", True)
        # PEFT's own switch does this, too, but also freezes the adapter; what it reads is asked for below.
        if any(not layer.disable_adapters or layer.merged for layer in self._layers):
            self.__exit__()
            raise RuntimeError("the oracle's adapter cannot be switched off: a layer is merged or ignores the switch")

    def __exit__(self, *error: object) -> None:
        trained, switched_on = self._before.pop()
        _set_plain(trained, "training", True)
        _set_plain(switched_on, "_disable_adapters", False)


def _set_plain(objects: Iterable[object], name: str, value: bool) -> None:
    """Set a plain attribute; a module's own way looks first whether it is a parameter, a buffer or a module."""
    for each in objects:
        object.__setattr__(each, name, value)


@contextmanager
def as_oracle(model: nn.Module, *, adapter: bool = True) -> Iterator[None]:
    """Every forward inside runs with the oracle's adapter, which is checked.

    Args:
        model: the base with its adapter.
        adapter: False for the untrained control: the same prompts and injection with the adapter off.

    Raises:
        RuntimeError: the adapter is missing or off.
    """
    if not adapter:
        with as_target(model):
            yield
        return
    layers = _lora_layers(model)
    if not layers:
        raise RuntimeError("the model has no LoRA layer: load or add an oracle adapter before asking it")
    if any(layer.disable_adapters or list(layer.active_adapters) != [NAME] for layer in layers):
        raise RuntimeError(f"the adapter {NAME!r} is not the one active adapter on every layer")
    yield


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged, not a whole safetensors file: {error}; copy or train it again") from None


def _lora_layers(model: nn.Module) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _wrap(model: PreTrainedModel, config: LoraConfig, names: list[str]) -> PeftModel:
    with warnings.catch_warnings():
        # PEFT asks for a property that transformers has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        peft = get_peft_model(model, config, adapter_name=NAME)
    adapted = {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if adapted != set(names):
        raise ValueError(
            f"LoRA was to go on {len(names)} linears of {type(model).__name__}, but PEFT put it on {len(adapted)}; "
            f"without it: {sorted(set(names) - adapted)[:3]}, beside them: {sorted(adapted - set(names))[:3]}"
        )
    return peft
