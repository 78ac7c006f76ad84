"""Compact parameters of GaLore: what the inner optimizer holds in place of a projected weight.

A compact parameter has the projected gradient's shape, at least float32, and memory only during a step. For a weight
that FSDP2 has sharded (a DTensor) it is sharded along the axis that is not projected, and the basis is replicated; so a
right-side projection of row shards needs no communication.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor import zeros as sharded_zeros

from loraloom.optim.galore.bases import Bases, Side, rotate, rotate_moments, sides_of


@dataclass(eq=False)
class Projected:
    """A weight that is trained through a compact parameter.

    Attributes:
        weight: (m, n).
        shape: (m, n), as it was at the start; wrappers that flatten weights change it.
        compact: (m, rank), (rank, n) or (rank, rank).
        index: its place among the projected weights; decides its seed and, with `stagger`, the step of its refresh.
        group: its place in ``param_groups``.
        rank: columns of each basis.
        sides: which sides are projected, (left, right).
    """

    weight: Tensor
    shape: tuple[int, int]
    compact: nn.Parameter
    index: int
    group: int
    rank: int
    sides: tuple[bool, bool]


def projected(weight: Tensor, index: int, group: int, rank: int, side: Side) -> Projected:
    """A weight (m, n) with a new compact parameter, which has no memory yet."""
    m, n = weight.shape
    sides = sides_of(side, (m, n))
    shape = (rank if sides[0] else m, rank if sides[1] else n)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(weight, DTensor):
        free_axis: Placement = Replicate() if all(sides) else Shard(1 if sides[0] else 0)
        placements = [free_axis if placement.is_shard() else Replicate() for placement in weight.placements]
        zeros: Tensor = sharded_zeros(*shape, dtype=dtype, device_mesh=weight.device_mesh, placements=placements)
    else:
        zeros = torch.zeros(shape, dtype=dtype, device=weight.device)
    compact = nn.Parameter(zeros)
    free(compact)
    return Projected(weight, (m, n), compact, index, group, rank, sides)


def free(compact: Tensor) -> None:
    """Give the memory of a compact parameter back; its shape stays."""
    _local(compact).untyped_storage().resize_(0)


def fill_with_zeros(compact: Tensor) -> None:
    """Take memory for a compact parameter again, and set it to zero."""
    local = _local(compact)
    local.untyped_storage().resize_(local.numel() * local.element_size())
    local.zero_()


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what its shards make up, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def replicated_like(basis: Tensor | None, other: Tensor) -> Tensor | None:
    """The basis as a DTensor of other's mesh, if other is one. Every rank holds the same basis; nothing is sent."""
    if basis is None or not isinstance(other, DTensor):
        return basis
    return DTensor.from_local(basis, other.device_mesh, [Replicate()] * other.device_mesh.ndim, run_check=False)


def laid_out_like(tensor: Tensor, other: Tensor) -> Tensor:
    """The tensor with the shards of other, if they are DTensors."""
    if isinstance(tensor, DTensor) and isinstance(other, DTensor):
        return tensor.redistribute(placements=other.placements)
    return tensor


def average_(tensor: Tensor, group: dist.ProcessGroup) -> None:
    """Replace the tensor by its mean over the group's processes."""
    dist.all_reduce(tensor, group=group)  # gloo has no ReduceOp.AVG
    tensor.div_(group.size())


def rotate_state(state: dict[str, Any], change: Bases, betas: tuple[float, float] | None) -> None:
    """Carry an inner optimizer's state of one compact parameter into new bases.

    Raises:
        ValueError: it has neither Adam's averages nor a momentum buffer, or has them quantised.
    """
    if betas is not None and "exp_avg" in state and "exp_avg_sq" in state:
        moments = rotate_moments(state["exp_avg"], state["exp_avg_sq"], change, float(state["step"]), betas)
        state["exp_avg"].copy_(moments[0])
        state["exp_avg_sq"].copy_(moments[1])
    elif state.get("momentum_buffer") is not None:
        state["momentum_buffer"].copy_(rotate(state["momentum_buffer"], change))
    elif state:
        raise ValueError(
            f"rotate_moments=True can't rotate the inner optimizer's state {sorted(state)}; it knows exp_avg with "
            "exp_avg_sq, and momentum_buffer; set it to False"
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.data
