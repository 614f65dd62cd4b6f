"""The oracle's LoRA adapter: made, saved, loaded from any published layout, and switched on and off with proof."""

from __future__ import annotations

import copy
import json
import logging
import re
import warnings
from collections.abc import Iterator
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


def lean_forward(peft: nn.Module) -> list[LeanLora]:
    """Let LoRA layers compute in the base's own precision and keep little; returns their forwards.

    PEFT's forward casts the whole input to the adapter's fp32, looks at every adapter at every call, and keeps a dropped-out
    copy of every input. Here the two small matrices are cast instead, so weights and their gradients stay fp32, and of the
    dropout only its mask is kept. Where base and adapter agree in precision the numbers are the same.
    """
    found = []
    for layer in peft.modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not isinstance(layer, nn.Module) or set(layer.lora_A) != {NAME}:
            raise ValueError(f"LoRA layers carry the adapters {sorted(layer.lora_A)}, expected only {NAME!r}")
        layer.forward = LeanLora(layer)
        found.append(layer.forward)
    return found


class LeanLora:
    """The forward of a LoRA layer with one adapter; the layer keeps its weights and its switch."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.base = layer.get_base_layer()
        self.down, self.up = layer.lora_A[NAME], layer.lora_B[NAME]
        self.dropout = layer.lora_dropout[NAME]
        self.scaling = layer.scaling[NAME]
        self.cast: tuple[torch.Tensor, torch.Tensor] | None = None
        """Both matrices as they are multiplied, on the device of the base, where a learner keeps them so at every row and holds
        both gradients; else they are cast at every call."""

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The layer's output."""
        if self.layer.disable_adapters:
            return self.base(x)
        p = self.dropout.p if self.layer.training and isinstance(self.dropout, nn.Dropout) else 0.0
        is_plain = type(self.base) is nn.Linear and self.base.bias is None and not self.base.weight.requires_grad
        # A plain linear's product is made, and its gradient added up, in the kernels of the LoRA's own.
        weight, y = (self.base.weight, None) if is_plain else (None, self.base(x))
        if self.cast is not None and x.dtype == self.cast[0].dtype:
            return _CastLoraLinear.apply(x, y, weight, self.down.weight, self.up.weight, *self.cast, self.scaling, p)
        return _LoraLinear.apply(x, y, weight, self.down.weight, self.up.weight, self.scaling, p)


class _LoraLinear(torch.autograd.Function):
    """W x + s B A dropout(x), with s the scaling; or y + s B A dropout(x) where the base has made y = W x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor | None,
        weight: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
        p: float,
    ) -> torch.Tensor:
        # Of a model on several GPUs the adapter lies on the first, in one buffer.
        a, b = down.to(x.device, x.dtype), up.to(x.device, x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        dropped, mask, keep = (flat, None, 1.0) if p == 0.0 else _dropout(flat, p)
        low = dropped @ a.t()
        if mask is not None and not x.is_cuda:
            low /= keep
        if weight is not None:
            out = (flat @ weight.t()).addmm_(low, b.t(), alpha=scaling)
        else:
            assert y is not None
            out = torch.addmm(y.reshape(-1, y.shape[-1]), low, b.t(), alpha=scaling)
        ctx.save_for_backward(flat, mask, low, a, b, weight)
        ctx.kinds = tuple((each.device, each.dtype) for each in (down, up))
        ctx.scaling, ctx.keep, ctx.shape = scaling, keep, x.shape
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        flat, mask, low, a, b, weight = ctx.saved_tensors
        gradient = upstream[0].reshape(-1, upstream[0].shape[-1])
        # The factors go into the narrow matrices.
        of_low = (gradient @ b) * (ctx.scaling / ctx.keep)
        of_up = (gradient.t() @ (low * ctx.scaling)).to(*ctx.kinds[1])
        of_down = (of_low.t() @ (flat if mask is None else flat * mask)).to(*ctx.kinds[0])
        of_x = of_y = None
        if ctx.needs_input_grad[0]:
            of_x = of_low @ a
            if mask is not None:
                of_x.mul_(mask)
            if weight is not None:
                of_x.addmm_(gradient, weight)
            of_x = of_x.view(ctx.shape)
        if weight is None:
            of_y = upstream[0]
        return of_x, of_y, None, of_down, of_up, None, None


class _CastLoraLinear(torch.autograd.Function):
    """The same of matrices `a` and `b` that are cast already, on a GPU, in little more than half the kernels: a step of a few
    hundred tokens waits for launches. The gradients of both are added to what the parameters have."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        y: torch.Tensor | None,
        weight: torch.Tensor | None,
        down: nn.Parameter,
        up: nn.Parameter,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        p: float,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        dropped, mask = (flat, None) if p == 0.0 else torch.native_dropout(flat, p, True)
        low = dropped @ a.t()
        if weight is not None:
            y = flat @ weight.t()
        assert y is not None
        out = torch.addmm(y.reshape(-1, y.shape[-1]), low, b.t(), alpha=scaling)
        ctx.save_for_backward(flat, mask, low, a, b, weight)
        ctx.parameters, ctx.shape = (down, up), x.shape
        ctx.scaling, ctx.per_kept = scaling, 1 / (1 - p)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[Any, ...]:
        flat, mask, low, a, b, weight = ctx.saved_tensors
        down, up = ctx.parameters
        gradient = upstream[0].reshape(-1, upstream[0].shape[-1])
        of_low = gradient @ b
        kept = flat if mask is None else torch.ops.aten.native_dropout_backward(flat, mask, ctx.per_kept)
        for parameter, product in ((up, gradient.t() @ low), (down, of_low.t() @ kept)):
            # Of a model on several GPUs the adapter lies on the first.
            parameter.grad.add_(product.to(parameter.device), alpha=ctx.scaling)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = of_low @ a
            if mask is not None:
                of_x = torch.ops.aten.native_dropout_backward(of_x, mask, ctx.per_kept)
            if weight is not None:
                of_x = torch.addmm(of_x, gradient, weight, beta=ctx.scaling)
            else:
                of_x *= ctx.scaling
            of_x = of_x.view(ctx.shape)
        return of_x, None if weight is not None else upstream[0], *[None] * 7


def _dropout(x: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """What dropout leaves of `x`, on a GPU divided by the share that stays; the mask of what stays; and that share."""
    if x.is_cuda:
        return *torch.native_dropout(x, p, True), 1 - p
    # Sixteen random bits decide on a value: torch draws on one thread, and a draw for each took an eighth of a step.
    draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    out_of_65536 = min(round(p * 2**16), 2**16 - 1)
    mask = (draws.view(torch.int16)[: x.numel()] >= out_of_65536 - 2**15).view(x.shape)
    return x * mask, mask, 1 - out_of_65536 / 2**16


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


@contextmanager
def as_target(model: nn.Module) -> Iterator[None]:
    """Every forward inside runs on the bare base: in eval mode; the adapter is off, which is checked, and comes back after.

    Raises:
        RuntimeError: a LoRA layer is still on; its reads would be of the oracle's own edits.
    """
    layers = _lora_layers(model)
    before, was_training = [layer.disable_adapters for layer in layers], model.training
    # Switching an adapter on makes it trainable, also one that was frozen.
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.eval()
    for layer in layers:
        layer.enable_adapters(False)
    try:
        if any(not layer.disable_adapters or layer.merged for layer in layers):
            raise RuntimeError("the oracle's adapter cannot be switched off: a layer is merged or ignores the switch")
        yield
    finally:
        model.train(was_training)
        for layer, was_off in zip(layers, before, strict=True):
            layer.enable_adapters(not was_off)
        for parameter, was_trainable in trainable:
            parameter.requires_grad_(was_trainable)


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
