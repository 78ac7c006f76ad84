"""GaLore on two processes: DDP, FSDP2 and the compressed all-reduce take the steps of one on the whole batch."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from loraloom.errors import InputError
from loraloom.optim import Fira, GaLore
from tests.processes import run_on_ranks, whole

from .support import Chain, chain, loss_of, matrices_and_vectors

STEPS = 8


def build(model: nn.Module, **options) -> GaLore:
    return GaLore(matrices_and_vectors(model), lr=1e-2, rank=4, update_gap=3, weight_decay=0.1, **options)


def train(model: nn.Module, optimizer: GaLore, rows: slice) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, torch.float64, rows).backward()
        optimizer.step()


def shard(model: Chain, mesh: DeviceMesh) -> Chain:
    model = copy.deepcopy(model)
    for layer in (model.tall, model.wide):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def worker(rank: int, start: Chain) -> dict[str, dict[str, torch.Tensor]]:
    rows, results = slice(4 * rank, 4 * rank + 4), {}

    replicated = DistributedDataParallel(copy.deepcopy(start))
    train(replicated, build(replicated), rows)
    results["ddp"] = whole(replicated)

    for name, layerwise in (("compressed", False), ("layerwise", True)):
        bare = copy.deepcopy(start)
        train(bare, build(bare, process_group=dist.group.WORLD, layerwise=layerwise), rows)
        results[name] = whole(bare)

    mesh = dist.init_device_mesh("cpu", (2,))
    for side in ("std", "reverse_std", "full"):
        sharded = shard(start, mesh)
        optimizer = build(sharded, side=side)
        train(sharded, optimizer, rows)
        results[f"fsdp_{side}"] = whole(sharded)
        moments = optimizer.inner.state[optimizer.projected[sharded.tall.weight].compact]["exp_avg"]
        # Each rank has half of the moments, except where both axes are projected.
        assert moments.to_local().numel() * (1 if side == "full" else 2) == moments.numel()
        if side == "std":
            resumed = shard(start, mesh)
            resumed.load_state_dict(copy.deepcopy(sharded.state_dict()))
            other = build(resumed)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            train(resumed, other, rows)
            train(sharded, optimizer, rows)
            for p, q in zip(resumed.parameters(), sharded.parameters(), strict=True):
                assert torch.equal(p.to_local(), q.to_local())
    with pytest.raises(InputError) as caught:
        Fira(matrices_and_vectors(sharded), lr=1e-2, rank=4)
    assert caught.value.code == "sharded"
    return results


def test_two_processes_equal_one() -> None:
    start = chain(torch.float64)
    expected = {}
    for side in ("std", "reverse_std", "full"):
        single = copy.deepcopy(start)
        train(single, build(single, side=side), slice(None))
        expected[side] = whole(single)

    first, second = run_on_ranks(worker, start)
    assert len(first) == 6
    for kind, weights in first.items():
        side = kind.removeprefix("fsdp_") if kind.startswith("fsdp_") else "std"
        for name, value in expected[side].items():
            assert torch.equal(weights[name], second[kind][name]), f"{kind}: {name} differs between the ranks"
            torch.testing.assert_close(
                weights[name], value, rtol=1e-6, atol=1e-8, msg=lambda m, k=kind, n=name: f"{k}, {n}: {m}"
            )
