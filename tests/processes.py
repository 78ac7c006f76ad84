"""Runs a test's function on several processes that are joined by gloo, and gives back what each of them returned."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

WORLD = 2
# One process imports these, and every worker of the session is a fork of it.
_PRELOADED = ["torch", "torch.distributed.fsdp", "transformers", "peft", "loraloom.tuner.model", "loraloom.selection"]


def run_on_ranks(work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """``work(rank, *arguments)`` on `WORLD` processes; the results (tensors in plain containers) by rank.

    Args:
        work: a function of a module, so that it can be pickled.
        arguments: what it gets after its rank; pickled too.

    Raises:
        ProcessRaisedException: one of them failed, with its traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(_PRELOADED)
        mp.start_processes(_rank, (work, arguments, folder), nprocs=WORLD, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter by its name without DDP's prefix, unsharded."""
    return {
        name.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }


def _rank(rank: int, work: Callable[..., Any], arguments: tuple, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    torch.save(work(rank, *arguments), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # DDP's and gloo's destructors, run after the group is gone, have been seen to wait for ever
