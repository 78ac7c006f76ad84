"""One of two processes that train a small model with DDP or FSDP2 over gloo; started by test_distributed.py.

python distributed_worker.py MODE RANK DIRECTORY
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peft import get_peft_model
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from loraloom import LoomConfig
from tests.tuner.support import ALL_PARTS, Pair, randomise

MODES = ("ddp", "fsdp2")
WORLD, STEPS, BATCH = 2, 4, 8


def build() -> torch.nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(Pair(), LoomConfig(r=3, target_modules=["first", "second"], **ALL_PARTS), "one")
    model.add_adapter("two", LoomConfig(r=2, target_modules=["first"], use_dora=True))
    model.base_model.set_adapter(["one", "two"])
    randomise(model)
    return model


def train(model: torch.nn.Module, rank: int = 0, world: int = 1) -> None:
    """AdamW on this rank's share of a fixed batch, two micro-batches a step."""
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(2, STEPS, 2, BATCH, 8, generator=generator)
    adam = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        for micro in range(2):
            share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
            F.mse_loss(model(x[step, micro, share]), y[step, micro, share]).backward()
        adam.step()
        adam.zero_grad()


def train_in_mode(mode: str, rank: int) -> dict[str, torch.Tensor]:
    """Every parameter after training, unsharded."""
    model = build()
    if mode == "ddp":
        train(DistributedDataParallel(model), rank, WORLD)
    else:
        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in (model.get_base_model().first, model.get_base_model().second):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        train(model, rank, WORLD)
    state = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def main(rank: int, directory: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD)
    for mode in MODES:
        state = train_in_mode(mode, rank)
        if rank == 0:
            save_file(state, directory / f"{mode}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # DDP's and gloo's destructors, run after the group is gone, have been seen to wait for ever


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
