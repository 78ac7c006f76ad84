"""GaLore's layer-wise mode: a gradient is projected during backward and freed before the next layer's arrives.

torch calls a post-accumulate-grad hook as soon as one weight's gradient is complete, so at most the gradients being
computed exist at once: the peak is the largest layer's, not the model's. What stays until the step is the compact
gradient, r numbers for each row or column. It is a sum over micro-batches, hence gradient accumulation works; and it is
the ``.grad`` of the compact parameter, which stands in the optimizer's groups for the weight, hence zero_grad,
GradScaler and clipping over ``param_groups`` work as they do elsewhere.

The basis is renewed from the first micro-batch's gradient of a step, because the sum of all is never there.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loraloom.optim.galore_compact import Projected

if TYPE_CHECKING:
    from loraloom.optim.galore import GaLore


def project_during_backward(optimizer: "GaLore", slot: Projected) -> None:
    """Have the optimizer receive and free a weight's gradient as soon as it is there."""

    def receive(weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is not None:
            with torch.no_grad():
                optimizer.receive(slot, gradient)

    slot.weight.register_post_accumulate_grad_hook(receive)
