"""WeightAdam on two processes: DDP and FSDP2 take the steps that one process takes on the whole batch."""

import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from loraloom.optim import KSparse, WeightAdam

from .support import GatedModel, batch, gated_model

STEPS = 6


def build(model: torch.nn.Module) -> WeightAdam:
    return WeightAdam(model, lr=1e-2, gate_lr=0.2, constraint=KSparse(2), gate_momentum=0.5)


def train(model: torch.nn.Module, optimizer: WeightAdam, rows: slice) -> None:
    for step in range(STEPS):
        x, y = batch(step, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x[rows]) - y[rows]).square().mean().backward()
        optimizer.step()


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def worker(rank: int, start: GatedModel, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows = slice(4 * rank, 4 * rank + 4)

    replicated = DistributedDataParallel(copy.deepcopy(start))
    train(replicated, build(replicated), rows)

    sharded = copy.deepcopy(start)
    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(gate, DTensor) for gate in sharded.gates)
    train(sharded, build(sharded), rows)

    torch.save({"ddp": whole(replicated), "fsdp": whole(sharded)}, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # DDP's and gloo's destructors, run after the group is gone, have been seen to wait for ever


def test_ddp_and_fsdp2_equal_one_process(tmp_path: Path) -> None:
    start = gated_model(dtype=torch.float64)
    single = copy.deepcopy(start)
    train(single, build(single), slice(None))
    assert sum(bool(gate != 0) for gate in single.gates) == 2

    mp.spawn(worker, args=(start, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for kind in ("ddp", "fsdp"):
        for name, expected in whole(single).items():
            assert torch.equal(first[kind][name], second[kind][name]), f"{kind}: {name} differs between the ranks"
            torch.testing.assert_close(first[kind][name], expected, rtol=1e-9, atol=1e-11)
