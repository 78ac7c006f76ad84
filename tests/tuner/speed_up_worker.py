"""One of two processes that train a sped-up model with DDP or FSDP2 over gloo; started by test_speed_up_routes.py.

python -m tests.tuner.speed_up_worker RANK DIRECTORY
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from loraloom import speed_up
from tests.tuner.support import Pair, randomise

MODES = ("ddp", "fsdp2")
WORLD, STEPS, BATCH = 2, 4, 8


def build() -> torch.nn.Module:
    """PEFT's model: DoRA and plain LoRA, both active on one of the layers."""
    torch.manual_seed(0)
    model = get_peft_model(Pair(), LoraConfig(r=3, target_modules=["first", "second"], use_dora=True), "one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["first"]))
    model.base_model.set_adapter(["one", "two"])
    randomise(model)
    return model


def train(model: torch.nn.Module, rank: int = 0, world: int = 1) -> None:
    """SGD on this rank's share of a fixed batch, two micro-batches a step."""
    generator = torch.Generator().manual_seed(7)
    x, y = torch.randn(2, STEPS, 2, BATCH, 8, generator=generator)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(STEPS):
        for micro in range(2):
            share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
            (model(x[step, micro, share]) - y[step, micro, share]).square().mean().backward()
        sgd.step()
        sgd.zero_grad()


def main(rank: int, directory: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD)
    for mode in MODES:
        model = build()
        assert len(speed_up(model).fast) == 2
        if mode == "ddp":
            train(DistributedDataParallel(model), rank, WORLD)
        else:
            mesh = init_device_mesh("cpu", (WORLD,))
            for layer in (model.get_base_model().first, model.get_base_model().second):
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
            train(model, rank, WORLD)
        state = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
        if rank == 0:
            save_file({n: p.detach().contiguous() for n, p in state.items()}, directory / f"{mode}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # DDP's and gloo's destructors, run after the group is gone, have been seen to wait for ever


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
