"""Loading: 4-bit weights that no read changes, the text tower of a multimodal checkpoint, and no random weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, has_avx512bf16
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
)

from ao.batch import lay_out, layout
from ao.config import ModelConfig
from ao.loss import answer_loss, labels_of
from ao.models import arch as archs
from ao.models.adapters import add_adapter, as_oracle, load_adapter, save_adapter
from ao.models.fused import fuse
from ao.models.load import load_model
from ao.residuals import Read, read_vectors
from ao.selftest import check_model
from conftest import GEMMA_4, VISION, sequences

# Blocks of 64 weights, and rows in the multiples of 32 that the repacking takes.
TEXT = {**GEMMA_4, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "global_head_dim": 32}


def randomized(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.bfloat16().eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "text"
    randomized(Gemma4ForCausalLM(Gemma4TextConfig(**TEXT))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "multimodal"
    config = Gemma4Config(text_config=TEXT, vision_config=VISION, audio_config=None)
    randomized(Gemma4ForConditionalGeneration(config)).save_pretrained(folder)
    return folder


def load(folder: Path, precision: str = "nf4") -> torch.nn.Module:
    return load_model(ModelConfig(name=str(folder), precision=precision, device="cpu"))


def quantized(model: torch.nn.Module) -> dict[str, Linear4bit]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}


def contents(model: torch.nn.Module) -> dict[str, list[bytes]]:
    """Weights and scales of every 4-bit layer."""
    return {
        name.removesuffix(".base_layer"): [
            layer.weight.data.numpy().tobytes(),
            layer.weight.quant_state.absmax.float().numpy().tobytes(),
        ]
        for name, layer in quantized(model).items()
    }


def read(model: torch.nn.Module, rng: np.random.Generator) -> torch.Tensor:
    arch = archs.find(model)
    reads = [Read(ids, np.array([1, 3]), np.array([0, -1]) % len(ids)) for ids in sequences(rng, [9, 14])]
    return read_vectors(model, arch, reads)[0]


def gradients(model: torch.nn.Module) -> torch.Tensor:
    """Gradients of a new adapter, its B made random, for one answer."""
    arch = archs.find(model)
    torch.manual_seed(1)
    peft = add_adapter(model, rank=4, alpha=8, dropout=0.0)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.train()
    documents = sequences(np.random.default_rng(1), [10, 7])
    with layout(model, arch), as_oracle(model):
        batch = lay_out(documents, packed=True, device=torch.device("cpu"))
        labels = labels_of(batch, documents, [6, 5])
        answer_loss(arch, arch.decoder(**batch.model_inputs).last_hidden_state, labels).backward()
    return torch.cat([parameter.grad.flatten() for parameter in peft.parameters() if parameter.requires_grad])


def test_the_linears_of_the_blocks_are_held_in_four_bits(folder):
    model = load(folder)
    assert set(quantized(model)) == set(archs.linears(archs.find(model)))
    original = load_file(folder / "model.safetensors")
    for name, layer in quantized(model).items():
        state = layer.weight.quant_state
        assert (state.quant_type, state.nested, layer.compute_dtype) == ("nf4", True, torch.bfloat16)
        found = dequantize_4bit(layer.weight.data, state).float()
        expected = original[f"{name}.weight"].float()
        assert (found - expected).norm() < 0.12 * expected.norm()
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(model.lm_head.weight, original["model.embed_tokens.weight"])
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_a_read_changes_neither_weights_nor_the_gradients_after_it(folder, rng):
    """Where the CPU has AVX512-BF16 the library repacks 4-bit weights in the first forward without gradients, for good."""
    fresh, used = load(folder), load(folder)
    before = contents(used)
    read(used, rng)
    check_model(used, archs.find(used), sequences(rng, [9, 5]))
    used.generate(input_ids=torch.tensor([[3, 4, 5]]), max_new_tokens=2)
    assert contents(used) == before
    assert all(layer.support_avx512bf16_for_cpu is False for layer in quantized(used).values())
    expected, found = gradients(fresh), gradients(used)
    assert expected.norm() > 0
    assert torch.equal(found, expected)
    assert contents(used) == before


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU does not repack")
def test_the_test_above_can_fail(folder, rng):
    model = load(folder)
    for layer in quantized(model).values():
        layer.support_avx512bf16_for_cpu = True
    before = contents(model)
    read(model, rng)
    assert contents(model) != before


def test_four_bits_read_what_their_weights_say(folder):
    """Against a model in bf16 that holds the very weights which the four bits stand for."""
    model, plain = load(folder), load(folder, "bf16")
    fuse(model)
    for name, layer in quantized(model).items():
        weight = plain.get_submodule(name).weight
        weight.data.copy_(dequantize_4bit(layer.weight.data, layer.weight.quant_state))
    found, expected = (read(each, np.random.default_rng(2)) for each in (model, plain))
    assert found.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(found.float(), expected.float()).min() > 0.99


@pytest.mark.parametrize("precision", ["fp32", "nf4"])
def test_a_multimodal_checkpoint_loads_its_text_tower_alone(multimodal, precision, rng):
    model = load(multimodal, precision)
    assert type(model) is Gemma4ForCausalLM
    assert not any(tower in name for name, _ in model.named_modules() for tower in ("vision", "audio", "embed_vision"))
    ids = torch.from_numpy(sequences(rng, [12])[0])[None]
    with torch.no_grad():
        found = model(input_ids=ids, use_cache=False).logits
        if precision == "fp32":
            whole = Gemma4ForConditionalGeneration.from_pretrained(multimodal, dtype=torch.float32).eval()
            assert torch.equal(found, whole(input_ids=ids, use_cache=False).logits)
    if precision == "nf4":
        assert set(quantized(model)) == set(archs.linears(archs.find(model)))
    check_model(model, archs.find(model), sequences(rng, [9, 5]))


def requantized(source: Path, folder: Path, **settings: object) -> Path:
    """A checkpoint that is quantized already, by whoever published it."""
    loaded = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    loaded.save_pretrained(folder)
    return folder


def test_a_multimodal_checkpoint_that_is_quantized_already(multimodal, tmp_path):
    published = requantized(
        multimodal,
        tmp_path / "published",
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=["lm_head", ".*vision_tower", ".*embed_vision", "model.language_model.layers.1.mlp"],
    )
    model, ours = load(published), contents(load(multimodal))
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert type(model.get_submodule(f"model.layers.1.mlp.{name}")) is torch.nn.Linear
        del ours[f"model.layers.1.mlp.{name}"]
    assert contents(model) == ours
    # Whoever published it computes in fp32.
    assert all(layer.compute_dtype == torch.bfloat16 for layer in quantized(model).values())
    plain = load(published, "nf4-dequantized")
    assert not quantized(plain)
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "precision", "message"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bf16", 'held in nf4; ask for "nf4"'),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "nf4", "held in fp4; name a checkpoint that is not"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "nf4-dequantized", "held in fp4"),
        ({"load_in_8bit": True}, "nf4", "held in int8"),
        ({"load_in_8bit": True}, "fp32", "held in int8"),
    ],
)
def test_a_checkpoint_that_is_quantized_otherwise_is_refused(folder, tmp_path, settings, precision, message):
    published = requantized(folder, tmp_path / "published", **settings)
    with pytest.raises(ValueError, match=rf"'{precision}' was asked for, but the linears of .* are {message}"):
        load(published, precision)


def test_peft_reads_an_adapter_of_a_text_tower_on_the_whole_model(multimodal, tmp_path, rng):
    model = load(multimodal, "fp32")
    torch.manual_seed(1)
    peft = add_adapter(model, rank=4, alpha=8, dropout=0.0)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(peft, tmp_path, base=str(multimodal), ao_config={"schema_version": 1})
    ids = torch.from_numpy(sequences(rng, [12])[0])[None]
    with torch.no_grad(), as_oracle(model):
        expected = model(input_ids=ids, use_cache=False).logits
    whole = AutoModelForCausalLM.from_pretrained(multimodal, dtype=torch.float32)
    assert type(whole) is Gemma4ForConditionalGeneration
    peft = PeftModel.from_pretrained(whole, tmp_path).eval()
    again = load(multimodal, "fp32")
    load_adapter(again, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(peft(input_ids=ids, use_cache=False).logits, expected)
        with as_oracle(again):
            torch.testing.assert_close(again(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("which", ["folder", "multimodal"])
def test_a_missing_weight_is_an_error(which, tmp_path, request):
    source = request.getfixturevalue(which)
    weights = load_file(source / "model.safetensors")
    lost = next(name for name in weights if name.endswith("layers.2.mlp.up_proj.weight"))
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"missing \['model\.layers\.2\.mlp\.up_proj\.weight'\].*random weights"):
        load(tmp_path, "fp32")


def test_a_weight_that_finds_no_place_is_an_error(folder, tmp_path):
    weights = load_file(folder / "model.safetensors") | {"model.layers.4.mlp.up_proj.weight": torch.ones(2, 2)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"were not used: \['model\.layers\.4\.mlp\.up_proj\.weight'\]"):
        load(tmp_path, "fp32")


def test_cut_weights_are_an_error(folder, multimodal, tmp_path):
    for source in (folder, multimodal):
        whole = (source / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[:-10])
        (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
        with pytest.raises(ValueError, match="a file of weights is damaged"):
            load(tmp_path, "fp32")


def test_pickled_weights_are_not_read(folder, tmp_path):
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors; pickled weights are not read"):
        load(tmp_path, "fp32")


def test_dequantized_weights_are_the_same_numbers(folder):
    packed, held = load(folder), load(folder, "nf4-dequantized")
    assert quantized(packed)
    assert not quantized(held)
    for name, module in quantized(packed).items():
        linear = held.get_submodule(name)
        assert linear.weight.dtype == torch.bfloat16
        assert torch.equal(linear.weight, dequantize_4bit(module.weight.data, module.weight.quant_state))
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        expected, found = (model(input_ids=ids, use_cache=False).logits.float() for model in (packed, held))
    assert float((found - expected).norm() / expected.norm()) < 0.02
