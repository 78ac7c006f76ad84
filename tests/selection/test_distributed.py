"""Selecting, disconnecting and expanding on two processes: the ranks agree, and equal one process on whole batches."""

import copy
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from loraloom.optim import build_optimizer
from loraloom.selection import AdapterSelection, FillBudget, HalveAndDouble
from tests.processes import run_on_ranks

from .support import adapted, batch, tensors

SCHEDULE = {"warmup_steps": 1, "select_every": 2, "select_until": 6}
EXPANSIONS = {"none": None, "halve and double": HalveAndDouble(times=2, every=2), "fill": FillBudget(400)}


def train(
    model: nn.Module, wrapped: nn.Module, rows: slice, expand: HalveAndDouble | FillBudget | None, parts: int
) -> AdapterSelection:
    """13 steps on these rows of each batch, in micro-batches of which only the last one synchronizes, as accelerate."""
    optimizer = build_optimizer(model, "weight_adam", lr=1e-2, gate_lr=0.3)
    selection = AdapterSelection(model, optimizer, 4, **SCHEDULE, expand=expand)
    for step in range(13):
        ids, y = (values[rows] for values in batch(step))
        optimizer.zero_grad()
        pieces = list(zip(ids.chunk(parts), y.chunk(parts), strict=True))
        for i, (x, target) in enumerate(pieces):
            last = i == len(pieces) - 1
            with nullcontext() if last else getattr(wrapped, "no_sync", nullcontext)():
                ((wrapped(x) - target.double()).square().mean() / parts).backward()
        optimizer.step()
    return selection


def worker(rank: int, start: nn.Module) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, int]]]:
    results = {}
    for name, expand in EXPANSIONS.items():
        for parts in (1, 2):
            model = copy.deepcopy(start)
            wrapped = DistributedDataParallel(model, find_unused_parameters=True)
            selection = train(model, wrapped, slice(2 * rank, 2 * rank + 2), expand, parts)
            results[f"{name}, {parts}"] = tensors(model), selection.kept
    return results


def test_ddp_equals_one_process() -> None:
    """Also after an expansion, whose new parameters DDP does not know."""
    start = adapted().double()
    ranks = run_on_ranks(worker, start)
    assert len(ranks[0]) == 6
    for name, expand in EXPANSIONS.items():
        single = copy.deepcopy(start)
        kept = train(single, single, slice(None), expand, 1).kept
        assert (len(kept), max(kept.values())) == {"none": (4, 2), "halve and double": (1, 8), "fill": (4, 4)}[name]
        for parts in (1, 2):
            results = [rank[f"{name}, {parts}"] for rank in ranks]
            for weights, kept_there in results:
                assert kept_there == kept
                for parameter, expected in tensors(single).items():
                    torch.testing.assert_close(weights[parameter], expected, rtol=1e-7, atol=1e-9)
            assert all(torch.equal(a, b) for a, b in zip(results[0][0].values(), results[1][0].values(), strict=True))
