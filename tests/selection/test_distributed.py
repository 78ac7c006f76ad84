"""Selecting and disconnecting on two processes: the ranks agree, and equal one process on the whole batch."""

import copy

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from loraloom.optim import build_optimizer
from loraloom.selection import AdapterSelection, HalveAndDouble
from tests.processes import run_on_ranks

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


def worker(rank: int, start: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
    model = copy.deepcopy(start)
    optimizer = build_optimizer(model, "weight_adam", lr=1e-2)
    with pytest.raises(ValueError, match="replaces parameters, which DDP does not follow"):
        AdapterSelection(model, optimizer, 2, **SCHEDULE, expand=HalveAndDouble(times=1))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    selection = train(model, wrapped, slice(2 * rank, 2 * rank + 2))
    return tensors(model), selection.kept


def test_ddp_equals_one_process() -> None:
    start = adapted().double()
    single = copy.deepcopy(start)
    kept = train(single, single, slice(None)).kept
    assert len(kept) == 2
    results = run_on_ranks(worker, start)
    for weights, kept_there in results:
        assert kept_there == kept
        for name, expected in tensors(single).items():
            torch.testing.assert_close(weights[name], expected, rtol=1e-8, atol=1e-10)
    assert all(torch.equal(a, b) for a, b in zip(results[0][0].values(), results[1][0].values(), strict=True))
