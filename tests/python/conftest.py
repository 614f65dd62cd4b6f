"""Small models of real architectures, with random weights."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

import ao.distributed
from ao.checkpoint import OracleConfig
from ao.config import ModelConfig
from ao.models import arch as archs
from ao.models.adapters import add_adapter, save_adapter
from ao.models.load import load_model
from ao.prompt import framer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those with many: the file that is begun last decides when several processes end."""
    counts = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -counts[item.path], item.path))


@pytest.fixture(autouse=True, scope="session")
def ranks_begin_with_torch_loaded() -> Iterator[None]:
    """Loading it is most of what a launched rank does here: one process does so, and the ranks are its forks.

    They have the environment of the first launch. Not where there is a GPU, which libraries ask about when they are loaded:
    forks could not use it.
    """
    with pytest.MonkeyPatch.context() as patch:
        if "forkserver" in multiprocessing.get_all_start_methods() and not torch.cuda.is_available():
            multiprocessing.set_forkserver_preload(["ao.train", "ao.collect.run"])
            patch.setattr(ao.distributed, "START_METHOD", "forkserver")
        yield


SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GEMMA_4 = {
    **SMALL,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 97,
    "num_kv_shared_layers": 0,
    "final_logit_softcapping": 30.0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
}
FAMILIES = {
    "gemma4_text": GEMMA_4,
    "gemma2": {**SMALL, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SMALL, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "llama": SMALL,
    "granite": {**SMALL, "logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "cohere": {**SMALL, "logit_scale": 0.25},
    "mistral": {**SMALL, "sliding_window": 6},
    "qwen3": SMALL,
    "qwen3_next": {
        **SMALL,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 0,
        "mlp_only_layers": [0, 1, 2, 3],
    },
}


def small_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random-weight model of a family, frozen, in eval mode."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[family](**FAMILIES[family])
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager" if getattr(config, "attn_logit_softcapping", None) else None
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.fixture
def gemma() -> PreTrainedModel:
    return small_model("gemma4_text")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def sequences(rng: np.random.Generator, lengths: list[int]) -> list[np.ndarray]:
    return [rng.integers(3, 97, size=length) for length in lengths]


def save_demo_adapter(folder: Path, *, seed: int = 0, std: float = 0.1, **contract: object) -> Path:
    """An adapter of the embedded model with random weights, as training leaves one; `contract` changes its settings."""
    model = load_model(ModelConfig(name="demo", precision="fp32", device="cpu"))
    torch.manual_seed(seed)
    peft = add_adapter(model, rank=4, alpha=8, dropout=0.0)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    settings = {
        "model": "demo",
        "injection": "norm_matched_add",
        "injection_layer": 1,
        "layer_combinations": ((1,), (3,), (4,)),
        "num_layers": archs.find(model).num_layers,
        "framing": framer("demo").fingerprint,
    }
    save_adapter(peft, folder, base="demo", ao_config=OracleConfig(**{**settings, **contract}).to_json())
    return folder


@pytest.fixture(scope="session")
def demo_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_demo_adapter(tmp_path_factory.mktemp("adapters") / "random")
