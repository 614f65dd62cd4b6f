"""Adapters: every published key layout loads with the same result; what would do nothing is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from ao.config import TrainConfig
from ao.distributed import Ranks
from ao.models import arch as archs
from ao.models import lora
from ao.models.adapters import _taken, add_adapter, as_oracle, as_target, load_adapter, save_adapter
from ao.models.lora import lean_forward
from ao.shards import Datapoint
from ao.training.step import Learner
from conftest import FAMILIES, SMALL, sequences, small_model


def trained(folder):
    model = small_model("gemma4_text")
    peft = add_adapter(model, rank=4, alpha=8, dropout=0.0)
    torch.manual_seed(3)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    save_adapter(peft, folder, base="small", ao_config={"schema_version": 1})
    return model


def logits_of(model):
    ids = torch.from_numpy(sequences(np.random.default_rng(0), [9])[0])[None]
    with torch.no_grad(), as_oracle(model):
        return model(input_ids=ids, use_cache=False).logits


def test_every_linear_of_the_blocks_is_adapted_and_nothing_else(gemma):
    names = archs.linears(archs.find(gemma))
    # Full layers share K and V, so they lack v_proj: 2 * 7 + 2 * 6.
    assert len(names) == 26
    assert all(name.startswith("model.layers.") for name in names)
    peft = add_adapter(gemma, rank=2, alpha=4, dropout=0.0)
    trainable = [name for name, parameter in peft.named_parameters() if parameter.requires_grad]
    assert len(trainable) == 52
    assert all("lora_" in name for name in trainable)


def test_a_new_adapter_changes_nothing_and_a_trained_one_does(tmp_path, gemma, rng):
    ids = torch.from_numpy(sequences(rng, [9])[0])[None]
    plain = gemma(input_ids=ids, use_cache=False).logits
    add_adapter(gemma, rank=4, alpha=8, dropout=0.0)
    with as_oracle(gemma):
        assert_close(gemma(input_ids=ids, use_cache=False).logits, plain)
    model = trained(tmp_path)
    with as_oracle(model):
        assert not torch.allclose(model(input_ids=ids, use_cache=False).logits, plain, atol=1e-2)


class SameDraws(torch.nn.Dropout):
    """Dropout with the masks of the lean forward."""

    def forward(self, x):
        dropped, _, keep = lora._dropout(x.reshape(-1, x.shape[-1]), self.p)
        return dropped.view(x.shape) / keep


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_lean_forward_is_pefts(tmp_path, dropout, rng):
    model = small_model("gemma4_text")
    peft = add_adapter(model, rank=4, alpha=8, dropout=dropout).train()
    torch.manual_seed(3)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    for module in peft.modules():
        if dropout and isinstance(module, LoraLayer):
            module.lora_dropout[lora.NAME] = SameDraws(dropout)
    ids = torch.from_numpy(sequences(rng, [9])[0])[None]

    def run():
        torch.manual_seed(5)
        peft.zero_grad()
        logits = model(input_ids=ids, use_cache=False).logits
        logits.square().mean().backward()
        return logits, [p.grad.clone() for p in peft.parameters() if p.grad is not None]

    expected = run()
    assert len(lean_forward(peft)) == 26
    assert_close(run(), expected)
    # Half precision: weights and gradients stay fp32.
    model.to(torch.bfloat16)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    logits, gradients = run()
    assert logits.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    with as_target(model):
        bare = model(input_ids=ids, use_cache=False).logits
    assert not torch.equal(bare, logits)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("is_plain", [True, False])
def test_matrices_that_are_cast_already_give_the_same(dropout, is_plain):
    """Against plain autograd, with the dropout's draws; gradients are added to what is there."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, 12, requires_grad=True), torch.randn(7, 12)
    down, up = (torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 12), (7, 3)))

    def run(forward):
        torch.manual_seed(1)
        x.grad = None
        down.grad, up.grad = torch.ones_like(down), torch.ones_like(up)
        out = forward(*((None, weight) if is_plain else (x @ weight.t(), None)))
        (out * torch.arange(70.0).view(2, 5, 7)).sum().backward()
        return out.detach(), x.grad, down.grad, up.grad

    def plain(y, weight):
        dropped = torch.native_dropout(x.reshape(-1, 12), dropout, True)[0].view(x.shape) if dropout else x
        return (x @ weight.t() if y is None else y) + 2.0 * dropped @ down.t() @ up.t()

    def ours(y, weight):
        matrices = down.detach().clone(), up.detach().clone()
        cast = lora.CastMatrices(*matrices, *(matrix.t() for matrix in matrices))
        layer: Any = SimpleNamespace(cast=cast, scaling=2.0, down=down, up=up)
        return lora._CastLoraLinear.apply(x, y, down, layer, weight, dropout)

    assert_close(run(ours), run(plain), rtol=1e-5, atol=1e-4)


def test_a_learner_casts_at_every_row_outside_of_autograd(gemma, rng):
    """As on a GPU, with copies in the precision that the weights have, so that the numbers are those of the other way."""
    config = TrainConfig(rank=4, dropout=0.0, recompute="off", injection_layer=1)
    learner = Learner.of(gemma, config, Ranks(rank=0, world=1, device=torch.device("cpu")))
    forwards = [module.forward for module in gemma.modules() if isinstance(module, LoraLayer)]
    points, vectors = [small_datapoint(rng)], {"one": torch.randn(2, 32)}

    def gradient():
        with learner.ready():
            learner.backward([points], vectors)
        return learner.gradient.clone()

    for _ in range(2):
        for forward in forwards:
            forward.cast = None
        learner._casts = []
        expected = gradient()
        learner._casts = lora.cast_ahead(learner.weights, forwards, dtype=torch.float32)
        learner._casts[0].values.fill_(torch.nan)
        assert_close(gradient(), expected)
        assert learner._casts[0].values.grad_fn is None
        learner.weights.data += 0.1 * torch.randn_like(learner.weights)
        assert_close(gradient(), gradient())
        assert not torch.equal(gradient(), expected)


def small_datapoint(rng):
    return Datapoint(
        id="one", source="s", input_ids=rng.integers(3, 97, size=12), answer_start=8, placeholders=np.array([2, 3]),
        layers=np.array([1, 1]), context_ids=rng.integers(3, 97, size=5), read_positions=np.array([3, 4]), question="",
        answer="", kind="base", meta={},
    )  # fmt: skip


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_drops_its_share(p):
    torch.manual_seed(0)
    x = torch.ones(999, 1001)
    dropped, mask, keep = lora._dropout(x, p)
    assert abs(keep - (1 - p)) < 1e-5
    assert torch.equal(dropped, mask.float())
    assert abs(mask.float().mean() - keep) < 4 * (p * (1 - p) / x.numel()) ** 0.5
    # Neighbours come from one draw, and are independent all the same.
    neighbours = mask.flatten()[:-1] & mask.flatten()[1:]
    assert abs(neighbours.float().mean() - keep**2) < 8 * (p / x.numel()) ** 0.5


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MAMBA = {"layers_block_type": ["mamba", "attention", "mlp", "mamba"], "mamba_num_heads": 4, "mamba_head_dim": 16}
REFUSED = {
    "qwen3_next": (
        {**FAMILIES["qwen3_next"], **EXPERTS, "mlp_only_layers": [0], "shared_expert_intermediate_size": 16},
        {"mlp.shared_expert.down_proj", "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"}
        | {"mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"},
    ),
    "nemotron_h": ({**SMALL, **MAMBA, "ssm_state_size": 16, "n_groups": 2}, {"mixer.out_proj"}),
}


@pytest.mark.parametrize("family", REFUSED)
def test_what_peft_refuses_is_left_out_and_named(family, caplog, tmp_path):
    settings, refused = REFUSED[family]
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings))
    names = archs.linears(archs.find(model))
    expected = {name for name in names if not any(name.endswith(f".{kind}") for kind in refused)}
    state = torch.get_rng_state()
    assert set(_taken(model, names)) == expected
    assert torch.equal(torch.get_rng_state(), state)
    peft = add_adapter(model, rank=2, alpha=4, dropout=0.0)
    assert f"these stay as they are: {sorted(refused)}" in caplog.text
    assert len(lean_forward(peft)) == len(expected)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    save_adapter(peft, tmp_path, base="small", ao_config={"schema_version": 1})
    for read in (load_adapter, PeftModel.from_pretrained):
        bare = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**settings))
        read(bare, tmp_path)
        found = {name: module for name, module in bare.named_modules() if isinstance(module, LoraLayer)}
        assert set(found) == expected
        for name, module in found.items():
            (weight,) = (up.weight for up in module.lora_B.values())
            assert torch.equal(weight, model.get_submodule(name).lora_B["oracle"].weight)


def test_blocks_without_linears_are_refused():
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gpt2"](vocab_size=97, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel: none of the 0 linears .* can be adapted"):
        add_adapter(model, rank=2, alpha=4, dropout=0.0)


PREFIXES = [
    "base_model.model.model.layers.",
    "base_model.model.layers.",
    "base_model.model.model.language_model.layers.",
    "base_model.model.language_model.layers.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("infix", ["", ".default"])
def test_every_key_layout_loads(tmp_path, prefix, infix):
    expected = logits_of(trained(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {
        key.replace("base_model.model.model.layers.", prefix).replace(".weight", f"{infix}.weight"): value
        for key, value in tensors.items()
    }
    renamed["base_model.model.model.vision_tower.encoder.layers.0.q_proj.linear.lora_A.weight"] = torch.zeros(4, 8)
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    model = small_model("gemma4_text")
    peft = load_adapter(model, tmp_path)
    assert not any(parameter.requires_grad for parameter in peft.parameters())
    assert_close(logits_of(model), expected)


def test_peft_itself_reads_what_we_save(tmp_path):
    expected = logits_of(trained(tmp_path))
    peft = PeftModel.from_pretrained(small_model("gemma4_text"), tmp_path)
    ids = torch.from_numpy(sequences(np.random.default_rng(0), [9])[0])[None]
    with torch.no_grad():
        assert_close(peft(input_ids=ids, use_cache=False).logits, expected)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == "small"


def test_rank_stabilized_scale_is_honoured(tmp_path):
    trained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "use_rslora": True}))
    model = small_model("gemma4_text")
    peft = load_adapter(model, tmp_path)
    scalings = {module.scaling["oracle"] for module in peft.modules() if isinstance(module, LoraLayer)}
    assert scalings == {8 / 4**0.5}


def test_adapters_that_would_do_nothing_are_refused(tmp_path, gemma):
    trained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    path = tmp_path / "adapter_model.safetensors"

    save_file({key: torch.zeros_like(value) if "lora_B" in key else value for key, value in tensors.items()}, path)
    with pytest.raises(ValueError, match="every lora_B is zero"):
        load_adapter(small_model("gemma4_text"), tmp_path)

    save_file({key.replace("layers.3.", "layers.7."): value for key, value in tensors.items()}, path)
    with pytest.raises(ValueError, match=r"adapts 'model\.layers\.7\.mlp\.down_proj' and 6 more|and 5 more"):
        load_adapter(small_model("gemma4_text"), tmp_path)

    save_file({**tensors, "base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}, path)
    with pytest.raises(ValueError, match="is no LoRA tensor of a block"):
        load_adapter(small_model("gemma4_text"), tmp_path)

    first = next(key for key in tensors if "lora_B" in key)
    save_file({key: value for key, value in tensors.items() if key != first}, path)
    with pytest.raises(ValueError, match="missing"):
        load_adapter(gemma, tmp_path)
