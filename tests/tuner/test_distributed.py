"""DDP and FSDP2 on two processes give what one process gives on the whole batch."""

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from loraloom import LoomConfig
from tests.processes import WORLD, run_on_ranks, whole
from tests.tuner.support import ALL_PARTS, Pair, randomise

STEPS, BATCH = 4, 8


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(Pair(), LoomConfig(r=3, target_modules=["first", "second"], **ALL_PARTS), "one")
    model.add_adapter("two", LoomConfig(r=2, target_modules=["first"], use_dora=True))
    model.base_model.set_adapter(["one", "two"])
    randomise(model)
    return model


def train(model: torch.nn.Module, rank: int = 0, world: int = 1) -> None:
    """AdamW on this rank's share of a fixed batch, two micro-batches a step."""
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(2, STEPS, 2, BATCH, 8, generator=generator)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        for micro in range(2):
            share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
            F.mse_loss(model(x[step, micro, share]), y[step, micro, share]).backward()
        adam.step()
        adam.zero_grad()


def train_in_mode(rank: int, mode: str) -> dict[str, torch.Tensor]:
    model = build()
    if mode == "ddp":
        train(DistributedDataParallel(model), rank, WORLD)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in (model.get_base_model().first, model.get_base_model().second):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, rank, WORLD)
    return whole(model)


@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_two_processes_equal_one(mode):
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    state, _ = run_on_ranks(train_in_mode, mode)
    assert state.keys() == before.keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(state[name], before[name]) != parameter.requires_grad
