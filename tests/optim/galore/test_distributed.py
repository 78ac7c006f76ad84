"""GaLore on two processes: DDP, FSDP2 and the compressed all-reduce take the steps of one on the whole batch."""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from loraloom.errors import InputError
from loraloom.optim import Fira, GaLore

from .support import Chain, chain, loss_of, matrices_and_vectors

STEPS = 8


def build(model: nn.Module, **options) -> GaLore:
    return GaLore(matrices_and_vectors(model), lr=1e-2, rank=4, update_gap=3, weight_decay=0.1, **options)


def train(model: nn.Module, optimizer: GaLore, rows: slice) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step, torch.float64, rows).backward()
        optimizer.step()


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def shard(model: Chain, mesh: DeviceMesh) -> Chain:
    model = copy.deepcopy(model)
    for layer in (model.tall, model.wide):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def worker(rank: int, start: Chain, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
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

    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # DDP's and gloo's destructors, run after the group is gone, have been seen to wait for ever


def test_two_processes_equal_one(tmp_path: Path) -> None:
    start = chain(torch.float64)
    expected = {}
    for side in ("std", "reverse_std", "full"):
        single = copy.deepcopy(start)
        train(single, build(single, side=side), slice(None))
        expected[side] = whole(single)

    mp.spawn(worker, args=(start, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert len(first) == 6
    for kind, weights in first.items():
        side = kind.removeprefix("fsdp_") if kind.startswith("fsdp_") else "std"
        for name, value in expected[side].items():
            assert torch.equal(weights[name], second[kind][name]), f"{kind}: {name} differs between the ranks"
            torch.testing.assert_close(
                weights[name], value, rtol=1e-6, atol=1e-8, msg=lambda m, k=kind, n=name: f"{k}, {n}: {m}"
            )
