"""GaLore's layer-wise mode: a gradient is projected during backward and freed before the next layer's arrives.

torch calls a post-accumulate-grad hook as soon as one weight's gradient is complete, so at most the gradients being
computed exist at once: the peak is the largest layer's, not the model's. What stays until the step is the compact
gradient, r numbers for each row or column. It is a sum over micro-batches, hence gradient accumulation works; and it is
the ``.grad`` of the compact parameter, which stands in the optimizer's groups for the weight, hence zero_grad,
GradScaler and clipping over ``param_groups`` work as they do elsewhere.

The basis is renewed from the first micro-batch's gradient of a step, because the sum of all is never there.
"""

import weakref
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from loraloom.optim.galore.compact import Slot

# The hook of each weight. A second optimizer over the same model would find no gradient if the first one's stayed.
_hooks = WeakTensorKeyDictionary()


class Receiver(Protocol):
    """What takes the gradients."""

    def receive(self, slot: Slot, gradient: Tensor) -> None: ...


def project_during_backward(optimizer: Receiver, slot: Slot) -> None:
    """Have the optimizer receive and free a weight's gradient as soon as it is there, until another takes over."""
    reference = weakref.ref(optimizer)

    def receive(weight: Tensor) -> None:
        if (owner := reference()) is not None and weight.grad is not None:
            gradient, weight.grad = weight.grad, None
            with torch.no_grad():
                owner.receive(slot, gradient)

    leave_gradients(slot.weight)
    _hooks[slot.weight] = slot.weight.register_post_accumulate_grad_hook(receive)


def leave_gradients(weight: Tensor) -> None:
    """End what `project_during_backward` began for a weight, whichever optimizer began it."""
    if weight in _hooks:
        _hooks.pop(weight).remove()
