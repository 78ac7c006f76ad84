"""A sped-up model on two processes, DDP and FSDP2, gives what PEFT's gives on one."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from loraloom import speed_up
from tests.processes import WORLD, run_on_ranks, whole
from tests.tuner.support import Pair, randomise

STEPS, BATCH = 4, 8


def build() -> torch.nn.Module:
    """PEFT's model: DoRA and plain LoRA, both active on one of the layers."""
    torch.manual_seed(0)
    model = get_peft_model(Pair(), LoraConfig(r=3, target_modules=["first", "second"], use_dora=True), "one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["first"]))
    model.base_model.set_adapter(["one", "two"])
    randomise(model)
    return model


def train(model: torch.nn.Module, rank: int = 0, world: int = 1) -> None:
    """SGD on this rank's share of a fixed batch, two micro-batches a step."""
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(2, STEPS, 2, BATCH, 8, generator=generator)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        for micro in range(2):
            share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
            (model(x[step, micro, share]) - y[step, micro, share]).square().mean().backward()
        sgd.step()
        sgd.zero_grad()


def train_in_mode(rank: int, mode: str) -> dict[str, torch.Tensor]:
    model = build()
    assert len(speed_up(model).fast) == 2
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
def test_two_processes_equal_pefts_one(mode):
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    state, _ = run_on_ranks(train_in_mode, mode)
    assert state.keys() == before.keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-4, atol=1e-5)
        assert torch.equal(state[name], before[name]) != parameter.requires_grad
