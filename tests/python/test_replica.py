"""Several ranks in 4 bits: one quantizes, the others read what it left, and all hold the same numbers."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from ao import replica
from ao.config import ModelConfig
from ao.distributed import Ranks, launch, ranks
from ao.models.arch import layers_in_whole
from ao.models.load import load_model
from ao.replica import load_replica
from conftest import GEMMA_4, SMALL, VISION

CPU = torch.device("cpu")
FIRST, SECOND = (Ranks(rank=rank, world=2, device=CPU, local=rank) for rank in range(2))
# Blocks of 64 weights.
TEXT = {**GEMMA_4, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32, "global_head_dim": 32}


def text_only() -> PreTrainedModel:
    return Gemma4ForCausalLM(Gemma4TextConfig(**TEXT))


def multimodal() -> PreTrainedModel:
    return Gemma4ForConditionalGeneration(Gemma4Config(text_config=TEXT, vision_config=VISION, audio_config=None))


def experts() -> PreTrainedModel:
    """A checkpoint holds its experts one by one, a model side by side."""
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SMALL, "hidden_size": 64, "head_dim": 32, **sizes}))


@pytest.fixture(params=[text_only])
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModelConfig:
    monkeypatch.setenv("AO_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    request.param().bfloat16().save_pretrained(tmp_path / "model")
    return ModelConfig(name=str(tmp_path / "model"), precision="nf4", device="cpu")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The checkpoints that are read, in order."""
    names: list[str] = []

    def reading(config: ModelConfig, **options: str) -> torch.nn.Module:
        names.append(config.name)
        return load_model(config, **options)

    monkeypatch.setattr(replica, "load_model", reading)
    return names


def numbers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("config", [text_only, multimodal, experts], indirect=True)
@pytest.mark.parametrize("precision", ["nf4", "nf4-dequantized"])
def test_one_rank_reads_the_original_and_all_have_its_numbers(
    precision: str, config: ModelConfig, read: list[str]
) -> None:
    config = replace(config, precision=precision)
    models = []
    second = threading.Thread(target=lambda: models.append(load_replica(config, SECOND)))
    second.start()
    models.append(load_replica(config, FIRST))
    second.join()
    later = load_replica(config, FIRST)
    assert read[0] == config.name
    assert config.name not in read[1:]
    assert len(read) == 4  # the first rank looks whether what it kept can be read
    one = load_model(config)
    alone = numbers(one)
    for model in (*models, later):
        assert layers_in_whole(model) == layers_in_whole(one)
        found = numbers(model)
        assert found.keys() == alone.keys()
        assert all(torch.equal(found[name], alone[name]) for name in alone)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not model.training


def load_behind_the_other(config: ModelConfig, cache: str) -> tuple[float, float]:
    """Rank 1 comes first; the sum of rank 0's numbers, and of both."""
    os.environ["AO_CACHE"] = cache
    with ranks(CPU) as here:
        if here.first:
            here.wait()
        model = load_replica(config, here)
        if not here.first:
            here.wait()
        own = sum(tensor.double().sum() for tensor in model.state_dict().values())
        return float(own), float(here.sum_(torch.as_tensor([own])))


def test_the_first_to_come_need_not_be_the_first_rank(config: ModelConfig, read: list[str]) -> None:
    own, both = launch(load_behind_the_other, config, os.environ["AO_CACHE"], processes=2)
    assert config.name not in read  # here, which is rank 0
    assert both == 2 * own != 0


def test_changed_weights_are_quantized_again(config: ModelConfig, read: list[str]) -> None:
    load_replica(config, FIRST)
    torch.manual_seed(1)
    Gemma4ForCausalLM(Gemma4TextConfig(**TEXT)).bfloat16().save_pretrained(config.name)
    load_replica(config, FIRST)
    assert read[::2] == [config.name] * 2
    assert len(read) == 4


def test_what_cannot_be_read_is_not_kept(config: ModelConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save = Gemma4ForCausalLM.save_pretrained

    def lossy(model: Gemma4ForCausalLM, folder: Path, **options: bool) -> None:
        save(model, folder, **options)
        weights = load_file(folder / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(Gemma4ForCausalLM, "save_pretrained", lossy)
    with pytest.raises(ValueError, match=r"missing \['model\.norm\.weight'\]"):
        load_replica(config, FIRST)
    assert not list((tmp_path / "cache" / "quantized").iterdir())


def test_a_full_cache_is_told(config: ModelConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Gemma4ForCausalLM, "save_pretrained", full)
    with pytest.raises(OSError, match=r"No space left on device.*AO_CACHE"):
        load_replica(config, FIRST)
    assert not list((tmp_path / "cache" / "quantized").iterdir())


def test_others_read_the_original(config: ModelConfig, read: list[str], tmp_path: Path) -> None:
    """One rank, weights in full precision, a checkpoint that is quantized already."""
    load_replica(config, Ranks(rank=0, world=1, device=CPU))
    load_replica(replace(config, precision="bf16"), SECOND)
    load_model(config).save_pretrained(tmp_path / "quantized")
    load_replica(replace(config, name=str(tmp_path / "quantized")), SECOND)
    assert read == [config.name, config.name, str(tmp_path / "quantized")]
    assert not (tmp_path / "cache").exists()
