"""Selecting and disconnecting on two processes: the ranks agree, and equal one process on the whole batch."""

import copy
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from loraloom.optim import build_optimizer
from loraloom.selection import AdapterSelection, HalveAndDouble

from .support import adapted, batch, tensors

SCHEDULE = {"warmup_steps": 1, "select_every": 2, "select_until": 6}


def train(model: torch.nn.Module, wrapped: torch.nn.Module, rows: slice) -> AdapterSelection:
    optimizer = build_optimizer(model, "weight_adam", lr=1e-2, gate_lr=0.3)
    selection = AdapterSelection(model, optimizer, 2, **SCHEDULE)
    for step in range(9):
        ids, y = batch(step)
        optimizer.zero_grad()
        (wrapped(ids[rows]) - y[rows].double()).square().mean().backward()
        optimizer.step()
    return selection


def worker(rank: int, start: torch.nn.Module, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = copy.deepcopy(start)
    optimizer = build_optimizer(model, "weight_adam", lr=1e-2)
    with pytest.raises(ValueError, match="replaces parameters, which DDP does not follow"):
        AdapterSelection(model, optimizer, 2, **SCHEDULE, expand=HalveAndDouble(times=1))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    selection = train(model, wrapped, slice(2 * rank, 2 * rank + 2))
    torch.save([tensors(model), selection.kept], Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)  # DDP's and gloo's destructors, run after the group is gone, have been seen to wait for ever


def test_ddp_equals_one_process(tmp_path: Path) -> None:
    start = adapted().double()
    single = copy.deepcopy(start)
    kept = train(single, single, slice(None)).kept
    assert len(kept) == 2
    mp.spawn(worker, args=(start, str(tmp_path)), nprocs=2)
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    for weights, kept_there in results:
        assert kept_there == kept
        for name, expected in tensors(single).items():
            torch.testing.assert_close(weights[name], expected, rtol=1e-8, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(results[0][0].values(), results[1][0].values(), strict=True))
