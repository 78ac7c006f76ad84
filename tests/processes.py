"""Several processes that are joined by gloo: a test's function on each, or a command of ours as torchrun starts it."""

import multiprocessing
import os
import socket
import sys
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
_PRELOADED = [
    "torch",
    "torch.distributed.fsdp",
    "transformers",
    "peft",
    "loraloom.tuner.model",
    "loraloom.selection",
    "loraloom.training.fit",
    "loraloom.training.tasks.causal_lm",
    "loraloom.training.tasks.text_classification",
]


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


def command_on_ranks(*words: Any, fsdp: bool = False) -> None:
    """The command `loraloom WORDS` on `WORLD` processes of the CPU, in the environment that torchrun gives.

    Forks of one process that has imported everything: what differs from torchrun is the time that it takes.

    Args:
        words: the verb and what follows it.
        fsdp: lift Accelerate's check that there is no FSDP on the CPU.

    Raises:
        ProcessExitedException: one of them ended with another code than 0.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(_PRELOADED)
    words = tuple(map(str, words))
    mp.start_processes(_command, (words, port, fsdp), nprocs=WORLD, start_method="forkserver")


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


def _command(rank: int, words: tuple[str, ...], port: int, fsdp: bool) -> None:
    from loraloom.cli.main import main

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "LOCAL_WORLD_SIZE": WORLD, "OMP_NUM_THREADS": 1}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    if fsdp:
        _allow_fsdp_on_the_cpu()
    code = main(list(words))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # as in `_rank`


def _allow_fsdp_on_the_cpu() -> None:
    """Accelerate 1.15 takes FSDP for accelerators alone, in one condition; all that comes after it runs on the CPU."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    original = AcceleratorState.__init__

    def with_fsdp(self: Any, *arguments: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp
