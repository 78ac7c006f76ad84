"""DDP and FSDP2 on two processes give what one process gives on the whole batch."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from loraloom import compose
from tests.composition.support import MEMBERS, base, save_members
from tests.processes import WORLD, run_on_ranks, whole

STEPS, BATCH = 4, 8
MODES = {
    "ddp": {"scope": "layer"},
    "ddp, one v": {"scope": "model"},
    "fsdp2": {"scope": "layer"},
    "fsdp2, one v": {"scope": "model"},
}


def build(directory: Path, mode: str) -> PeftModel:
    return compose(base(), {name: directory / name for name in MEMBERS}, **MODES[mode]).train()


def train(model: torch.nn.Module, rank: int = 0, world: int = 1) -> None:
    """Adam on this rank's share of a fixed batch, two micro-batches a step."""
    batches = torch.randint(0, 11, (STEPS, 2, BATCH, 8), generator=torch.Generator().manual_seed(7))
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for step in range(STEPS):
        for micro in range(2):
            model(batches[step, micro, share]).square().mean().backward()
        adam.step()
        adam.zero_grad()


def train_in_mode(rank: int, directory: Path, mode: str) -> dict[str, torch.Tensor]:
    model = build(directory, mode)
    if mode.startswith("ddp"):
        train(DistributedDataParallel(model), rank, WORLD)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        net = model.get_base_model()
        for layer in (*net.layers, net.plain, net.conv, net.embed):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, rank, WORLD)
    return whole(model)


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    directory = tmp_path_factory.mktemp("members")
    save_members(directory)
    return directory


@pytest.mark.parametrize("mode", ["ddp", "ddp, one v", "fsdp2"])
def test_two_processes_equal_one(mode, members):
    model = build(members, mode)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    state, _ = run_on_ranks(train_in_mode, members, mode)
    assert state.keys() == before.keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(state[name], parameter.detach(), rtol=1e-3, atol=1e-4)
        if not parameter.requires_grad:
            assert torch.equal(state[name], before[name])
    moved = [name for name in state if not torch.equal(state[name], before[name])]
    assert len(moved) == 5  # the embedding's too: it has one member, whose total trains
    if mode == "ddp, one v":
        copies = [state[name] for name, p in model.named_parameters() if p.requires_grad]
        assert all(torch.equal(copy, copies[0]) for copy in copies)


def test_one_v_sharded_is_an_error(members):
    with pytest.raises(Exception, match="scope='layer', or DDP"):
        run_on_ranks(train_in_mode, members, "fsdp2, one v")
