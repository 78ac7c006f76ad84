"""One of two processes that train a composition with DDP or FSDP2 over gloo; started by test_distributed.py.

python -m tests.composition.distributed_worker RANK DIRECTORY
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from loraloom import compose
from tests.composition.support import MEMBERS, base

WORLD, STEPS, BATCH = 2, 4, 8
MODES = {
    "ddp": {"scope": "layer"},
    "ddp, one v": {"scope": "model"},
    "fsdp2": {"scope": "layer"},
    "fsdp2, one v": {"scope": "model"},
}


def build(directory: Path, mode: str) -> PeftModel:
    return compose(base(), {name: directory / name for name in MEMBERS}, **MODES[mode]).train()


def train(model: torch.nn.Module, rank: int = 0, world: int = 1) -> None:
    """Adam on this rank's share of a fixed batch, two micro-batches a step."""
    batches = torch.randint(0, 11, (STEPS, 2, BATCH, 8), generator=torch.Generator().manual_seed(7))
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    for step in range(STEPS):
        for micro in range(2):
            model(batches[step, micro, share]).square().mean().backward()
        adam.step()
        adam.zero_grad()


def main(rank: int, directory: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD)
    for mode in MODES:
        model = build(directory, mode)
        try:
            if mode.startswith("ddp"):
                train(DistributedDataParallel(model), rank, WORLD)
            else:
                mesh = init_device_mesh("cpu", (WORLD,))
                net = model.get_base_model()
                for layer in (*net.layers, net.plain, net.conv, net.embed):
                    fully_shard(layer, mesh=mesh)
                fully_shard(model, mesh=mesh)
                train(model, rank, WORLD)
        except RuntimeError as error:
            (directory / f"{mode}.txt").write_text(str(error))
            continue
        state = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
        if rank == 0:
            state = {name: tensor.detach().contiguous() for name, tensor in state.items()}
            save_file(state, directory / f"{mode}.safetensors")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # DDP's and gloo's destructors, run after the group is gone, have been seen to wait for ever


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
