"""WeightAdam on two processes: DDP and FSDP2 take the steps that one process takes on the whole batch."""

import copy

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from loraloom.optim import KSparse, WeightAdam
from tests.processes import run_on_ranks, whole

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


def worker(rank: int, start: GatedModel) -> dict[str, dict[str, torch.Tensor]]:
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

    return {"ddp": whole(replicated), "fsdp": whole(sharded)}


def test_ddp_and_fsdp2_equal_one_process() -> None:
    start = gated_model(dtype=torch.float64)
    single = copy.deepcopy(start)
    train(single, build(single), slice(None))
    assert sum(bool(gate != 0) for gate in single.gates) == 2

    first, second = run_on_ranks(worker, start)
    for kind in ("ddp", "fsdp"):
        for name, expected in whole(single).items():
            assert torch.equal(first[kind][name], second[kind][name]), f"{kind}: {name} differs between the ranks"
            torch.testing.assert_close(first[kind][name], expected, rtol=1e-9, atol=1e-11)
