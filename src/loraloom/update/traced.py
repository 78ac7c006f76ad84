"""Whether torch looks at the operations rather than at the numbers: then no cache, no branch on a value, no node."""

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.autograd import forward_ad

_functorch_is_active = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def is_traced(*tensors: Tensor) -> bool:
    """True under torch.compile, torch.export, torch.jit.trace, torch.func and forward-mode differentiation, and for
    tensors without numbers.

    Args:
        tensors: looked at for being on the meta device.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _functorch_is_active()
        or forward_ad._current_level >= 0
        or any(tensor.is_meta for tensor in tensors)
        or (torch._C._len_torch_dispatch_stack() > 0 and detect_fake_mode() is not None)
    )
