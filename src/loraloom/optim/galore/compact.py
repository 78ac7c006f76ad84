"""Compact parameters of GaLore: what the inner optimizer holds in place of a weight.

A compact parameter has the projected gradient's shape, at least float32, and memory only during a step. For a weight
that FSDP2 has sharded (a DTensor) it is sharded along the axis that is not projected, and the basis is replicated; so a
right-side projection of row shards needs no communication.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor import zeros as sharded_zeros

from loraloom.errors import InputError
from loraloom.optim.galore.bases import Bases, rotate, rotate_moments, sides_of
from loraloom.optim.options import Side


@dataclass(eq=False)
class Slot:
    """A weight that is trained through a compact parameter.

    Attributes:
        weight: (m, n), or of any shape where neither side is projected.
        shape: its shape at the start; wrappers that flatten weights change it.
        compact: (m, rank), (rank, n) or (rank, rank); the weight's shape where neither side is projected.
        held: what stands in ``param_groups``: the weight, or in layer-wise mode the compact parameter.
        index: its place among the slots; decides its seed and, with `stagger`, the step of its refresh.
        group: its place in ``param_groups``.
        rank: columns of each basis; None where neither side is projected.
        sides: which sides are projected, (left, right).
    """

    weight: Tensor
    shape: tuple[int, ...]
    compact: nn.Parameter
    held: Tensor
    index: int
    group: int
    rank: int | None
    sides: tuple[bool, bool]


def projected_slot(weight: Tensor, index: int, group: int, rank: int, side: Side, layerwise: bool) -> Slot:
    """A slot for a weight (m, n) and a new compact parameter, which has no memory yet."""
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
    return Slot(weight, (m, n), compact, compact if layerwise else weight, index, group, rank, sides)


def float32_slot(weight: Tensor, index: int, group: int) -> Slot:
    """A slot for a weight of any shape that is not projected: its compact parameter is as large, in float32."""
    compact = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))
    free(compact)
    return Slot(weight, tuple(weight.shape), compact, weight, index, group, None, (False, False))


def free(compact: Tensor) -> None:
    """Give the memory of a compact parameter back; its shape stays."""
    _local(compact).untyped_storage().resize_(0)


def fill(compact: Tensor, start: Tensor | None) -> None:
    """Take memory for a compact parameter again, and set it to a value, or to zero."""
    local = _local(compact)
    local.untyped_storage().resize_(local.numel() * local.element_size())
    if start is None:
        local.zero_()
    else:
        local.copy_(_local(start))


def finite(slots: list[Slot]) -> list[Slot]:
    """Those with a finite compact gradient; the others lose it. Waits for the device once."""
    if not slots:
        return slots
    norms = [whole(torch.linalg.vector_norm(cast(Tensor, slot.compact.grad), float("inf"))) for slot in slots]
    good = torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms]).isfinite().tolist()
    for slot, is_good in zip(slots, good, strict=True):
        if not is_good:
            slot.compact.grad = None
    return [slot for slot, is_good in zip(slots, good, strict=True) if is_good]


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
        InputError: it has neither Adam's averages nor a momentum buffer, or has them quantized.
    """
    if betas is not None and "exp_avg" in state and "exp_avg_sq" in state:
        moments = rotate_moments(state["exp_avg"], state["exp_avg_sq"], change, float(state["step"]), betas)
        state["exp_avg"].copy_(moments[0])
        state["exp_avg_sq"].copy_(moments[1])
    elif state.get("momentum_buffer") is not None:
        state["momentum_buffer"].copy_(rotate(state["momentum_buffer"], change))
    elif state:
        raise InputError(
            f"rotate_moments=True can't rotate the inner optimizer's state {sorted(state)}; it knows exp_avg with "
            "exp_avg_sq, and momentum_buffer; set it to False",
            code="unknown-state",
        )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.data
