"""The gradients of an adapted linear layer by operations that autograd follows: for a second derivative.

The node's own backward pass works in place and in blocks. ``create_graph=True`` asks for one that can be differentiated
itself; then the layer is written out again, and torch's autograd takes its gradients.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def gradients(
    grad: Tensor,
    inputs: Mapping[str, Tensor | None],
    wanted: Mapping[str, bool],
    *,
    scaling: float,
    dropped: Tensor | None,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Derivatives of ``sum(grad * z)``, ``z = x W^T + g s (mask * x / (1 - p)) A^T M^T B^T``, differentiable.

    Args:
        grad: dL/dz (tokens, out).
        inputs: x (tokens, in), A (r, in), B (out, r), and M, gate and W (out, in) or None.
        wanted: of which of them the derivative is asked for.
        scaling: s.
        dropped: ``mask / (1 - p)`` (tokens, in), or None without dropout.
        dtype: of the low-rank path.

    Returns:
        The derivatives asked for, by name.
    """
    # By aliases: one input may depend on another, and only what z takes from each directly is wanted.
    own = {name: value.view_as(value) for name, value in inputs.items() if value is not None and wanted[name]}
    if not own:
        return {}
    use = {**inputs, **own}
    x, A, B, M, gate, W = (use[name] for name in ("x", "A", "B", "M", "gate", "W"))
    assert x is not None
    assert A is not None
    assert B is not None
    h = F.linear(x.to(dtype) if dropped is None else x.to(dtype) * dropped, A.to(dtype))
    if M is not None:
        h = F.linear(h, M.to(dtype))
    sigma = scaling if gate is None else (gate * scaling).to(dtype)
    z = F.linear(h * sigma, B.to(dtype)).to(grad.dtype)
    if W is not None:
        z = z + F.linear(x.to(grad.dtype), W.to(grad.dtype))
    return dict(zip(own, torch.autograd.grad(z, list(own.values()), grad, create_graph=True), strict=True))
