"""Changes to an optimizer that is running: parameters leave it, or are replaced by others of another shape.

Both work on any torch optimizer, also wrapped by accelerate. Groups keep their number and their order, because
schedulers and checkpoints count them.
"""

from collections.abc import Callable, Iterable

from torch import Tensor
from torch.optim import Optimizer

from loraloom.errors import InputError


def remove_parameters(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Take parameters out of an optimizer and free their gradients and their state.

    They never move again, neither by momentum nor by weight decay. A group left empty stays.

    Args:
        optimizer: the optimizer.
        parameters: parameters that it holds.

    Raises:
        InputError: some of them are not in the optimizer; nothing is removed then.
    """
    gone = {id(p): p for p in parameters}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missing := gone.keys() - held:
        raise InputError(
            f"{len(missing)} of {len(gone)} parameters are not in the optimizer; pass those that it holds",
            code="foreign-parameter",
        )
    for group in optimizer.param_groups:
        kept = [i for i, p in enumerate(group["params"]) if id(p) not in gone]
        for key in group.keys() & {"params", "param_names"}:
            group[key] = [group[key][i] for i in kept]
    for p in gone.values():
        optimizer.state.pop(p, None)
        p.grad = None


def replace_parameter(optimizer: Optimizer, old: Tensor, new: Tensor, carry: Callable[[Tensor], Tensor]) -> None:
    """Put a parameter in the place of another, with the state carried over, and free the gradient of the old one.

    Args:
        optimizer: the optimizer.
        old: a parameter that it holds.
        new: what takes its place in its group.
        carry: maps each tensor of the state that has old's shape to one of new's shape. Other state, such as the step
            count, is kept.

    Raises:
        InputError: the old parameter is not in the optimizer.
    """
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            if p is old:
                group["params"][i] = new
                state = optimizer.state.pop(old, {})
                if state:
                    optimizer.state[new] = {
                        key: carry(value) if isinstance(value, Tensor) and value.shape == old.shape else value
                        for key, value in state.items()
                    }
                old.grad = None
                return
    raise InputError(
        f"a parameter of shape {tuple(old.shape)} is not in the optimizer; pass one that it holds",
        code="foreign-parameter",
    )
