"""What GaLore, Fira and APOLLO refuse: arguments that exclude each other, and weights that they can't project."""

from typing import Any, ClassVar, Protocol

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from loraloom.errors import InputError
from loraloom.optim.options import Side


class Checked(Protocol):
    """What the checks read of an optimizer."""

    needs_gradient: ClassVar[bool]
    process_group: Any
    max_grad_norm: float | None

    @property
    def layerwise(self) -> bool: ...


def check_arguments(optimizer: Checked, weight_decay: float) -> None:
    """Refuse arguments that are out of range, or that exclude each other.

    Raises:
        InputError: "out-of-range", "needs-gradient", "needs-layerwise" or "needs-process-group".
    """
    if not weight_decay >= 0:
        raise InputError(f"weight_decay={weight_decay} is out of range; pass 0 or more", code="out-of-range")
    if optimizer.needs_gradient and optimizer.process_group is not None:
        raise InputError(
            f"{type(optimizer).__name__} needs the whole gradient at the step, which process_group never has; leave it "
            "out and use DDP",
            code="needs-gradient",
        )
    if optimizer.max_grad_norm is not None and not optimizer.layerwise:
        raise InputError(
            f"max_grad_norm={optimizer.max_grad_norm} is for layerwise=True; clip with clip_grad_norm_ instead",
            code="needs-layerwise",
        )
    many = dist.is_initialized() and dist.get_world_size() > 1
    if optimizer.layerwise and optimizer.process_group is None and many:
        raise InputError(
            f"layerwise=True on {dist.get_world_size()} processes frees gradients before DistributedDataParallel "
            "averages them; pass process_group=torch.distributed.group.WORLD and do not wrap the model",
            code="needs-process-group",
        )


def check_weight(optimizer: Checked, weight: Tensor, side: Side) -> None:
    """Refuse a weight that the method can't project.

    Raises:
        InputError: "sharded" or "side-full".
    """
    apart = optimizer.needs_gradient or optimizer.layerwise or optimizer.process_group is not None
    if isinstance(weight, DTensor) and apart:
        raise InputError(
            "a weight is sharded by FSDP2, where Fira, APOLLO, layerwise=True and process_group can't be used; leave "
            "them out, or use DDP",
            code="sharded",
        )
    if optimizer.needs_gradient and side == "full":
        raise InputError(
            f"{type(optimizer).__name__} scales channels, and side='full' leaves none; use side='std'", code="side-full"
        )
