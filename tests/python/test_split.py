"""Where the parts of a model go that is spread over several GPUs; `test_cuda` runs one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ao.config import ModelConfig
from ao.distributed import Ranks
from ao.models import arch as archs
from ao.models.split import connect, device_map, devices_of
from ao.replica import load_replica
from conftest import FAMILIES, small_model

DEVICES = [torch.device("cuda", index) for index in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_has_a_place_and_blocks_stand_in_order(family: str) -> None:
    model = small_model(family)
    places, path = device_map(model.config, DEVICES), archs.find(model).layers_path
    for name, _ in model.named_parameters():
        assert sum(name.startswith(f"{place}.") for place in places) == 1, name
    assert [places[f"{path}.{index}"].index for index in range(4)] == [0, 0, 1, 2]
    assert {device for name, device in places.items() if not name.startswith(path)} == {DEVICES[0]}


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_number_of_devices_that_makes_no_sense_is_refused(gemma: nn.Module, count: int) -> None:
    with pytest.raises(ValueError, match=f"spreads 4 blocks over all GPUs that are visible, and there are {count}"):
        device_map(gemma.config, [torch.device("cuda", index) for index in range(count)])


def test_blocks_move_what_they_are_given(gemma: nn.Module) -> None:
    """A model on one device, whose hooks move nothing, gives the same; and a block of another device moves everything."""
    ids = torch.arange(3, 9)[None]
    before = gemma(input_ids=ids, use_cache=False).logits
    connect(gemma)
    assert torch.equal(gemma(input_ids=ids, use_cache=False).logits, before)
    assert devices_of(gemma) == [torch.device("cpu")]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1, device="meta"))

        def forward(self, x: torch.Tensor, pair: tuple[torch.Tensor, ...], **kwargs: object) -> tuple[object, ...]:
            return x, *pair, kwargs

    layers = archs.find(gemma).layers
    layers[3] = Block()
    connect(gemma)
    shared: dict[str, torch.Tensor] = {}
    x, cos, sin, kwargs = layers[3](torch.ones(1), (torch.ones(1), torch.ones(1)), shared=shared, flag=True)
    assert {each.device.type for each in (x, cos, sin)} == {"meta"}
    assert kwargs["shared"] is shared
    assert kwargs["flag"] is True
    # The block before hands its output over already.
    angles = torch.ones(1, 5, 8)
    layers[2].forward = lambda hidden_states, **kwargs: hidden_states
    assert layers[2](torch.ones(1, 5, 32), position_embeddings=(angles, angles)).device.type == "meta"


def test_several_ranks_cannot_split() -> None:
    with pytest.raises(ValueError, match="2 ranks were started"):
        load_replica(ModelConfig(device="split"), Ranks(rank=0, world=2, device=torch.device("cpu")))
