"""One model over several GPUs: the first blocks on the first, and so on; all else, and what goes in and comes out, on the
first. For a model that does not fit one: each waits for the one before it, so this costs all but one GPU's time.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from ao.models import arch as archs

SPLIT = "split"
"""The device of such a model in a recipe."""


def visible() -> list[torch.device]:
    """All GPUs that this process may use."""
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def device_map(config: PretrainedConfig, devices: list[torch.device]) -> dict[str, torch.device]:
    """Where each part of a text model goes: as many blocks on each device, in order.

    Args:
        config: of the text model.
        devices: the devices; the first also holds what is no block.

    Raises:
        ValueError: there are fewer than two devices, or fewer blocks than devices.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = archs.find(model)
    if not 2 <= len(devices) <= found.num_layers:
        raise ValueError(
            f'model.device: "split" spreads {found.num_layers} blocks over all GPUs that are visible, and there are '
            f'{len(devices)}; take "cuda" for one, and hide some with CUDA_VISIBLE_DEVICES where there are too many'
        )
    places: dict[str, torch.device] = {}
    of_layers = found.layers_path.split(".")
    for depth in range(len(of_layers)):
        parent = model.get_submodule(".".join(of_layers[:depth]))
        for name, _ in parent.named_children():
            if name != of_layers[depth]:
                places[".".join((*of_layers[:depth], name))] = devices[0]
    for index in range(found.num_layers):
        places[f"{found.layers_path}.{index}"] = devices[index * len(devices) // found.num_layers]
    return places


def connect(model: PreTrainedModel) -> None:
    """Let each part of a model that lies on several devices take its inputs from wherever they are.

    These hooks replace those of the library, which wrap the forward of every single module: ours stand at the blocks, and
    leave what is inside to be fused and adapted.
    """
    remove_hook_from_submodules(model)
    for module in model.modules():
        # What those hooks wrapped stays behind as the module's own.
        vars(module).pop("forward", None)
    # The adapter's gradient comes from every device to the first, which torch takes for an oversight.
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    found = archs.find(model)
    for layer in found.layers:
        layer.register_forward_pre_hook(_moving_to(next(layer.parameters()).device), with_kwargs=True)
    for layer, following in pairwise(found.layers):
        # Moved here, not only before the next block: checkpointing may stand before that block's hooks, and keeps the random
        # state of those devices alone that a block's arguments lie on.
        if (device := next(following.parameters()).device) != next(layer.parameters()).device:
            layer.register_forward_hook(_handing_to(device))
    for child in found.decoder.children():
        if child is not found.layers and (parameter := next(child.parameters(), None)) is not None:
            child.register_forward_pre_hook(_moving_to(parameter.device), with_kwargs=True)


def devices_of(model: nn.Module) -> list[torch.device]:
    """The devices that a model lies on, the first one first."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def _moving_to(device: torch.device) -> Callable[..., tuple[Any, Any]]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return _moved(args, device), {name: _moved(value, device) for name, value in kwargs.items()}

    return hook


def _handing_to(device: torch.device) -> Callable[..., Any]:
    return lambda module, args, output: _moved(output, device)


def _moved(value: Any, device: torch.device) -> Any:
    """A tensor, or what else can be moved, on the device; dictionaries stay what they are, as blocks write into them."""
    if isinstance(value, tuple):
        return tuple(_moved(each, device) for each in value)
    return value.to(device) if hasattr(value, "to") else value
