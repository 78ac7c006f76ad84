"""Products of bfloat16 activations with float32 factors, on the units that multiply bfloat16.

x is bfloat16 already, so no copy of it in float32 is needed: a float32 factor is the sum of two bfloat16 parts up to
2^-17, ``A = A1 + A2``, and a device multiplies bfloat16 exactly and adds in float32. Hence

    h = x A^T       = [x A1^T, x A2^T, x A1^T]            one product, (tokens, 3r) in float32
    y = z + s h B^T = z + s [h1, x A2^T, h1, h2] [B1, B1, B2, B1]^T,      h1 + h2 = x A1^T

which is one more, with a relative error of the update of about 2^-17. Gradients are products of parts of one bfloat16
number each, as exact as the gradient that arrives in bfloat16.
"""

import functools

import torch
from torch import Tensor


def supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies matrices of this dtype into float32. On a CPU float32 is the faster way."""
    if dtype is not torch.bfloat16 or device.type == "cpu":
        return False
    return device.type == "meta" or _multiplies_into_float32(device.type, device.index)


@functools.cache
def _multiplies_into_float32(kind: str, index: int | None) -> bool:
    """Tried once, and checked: the operator is newer than the oldest torch, and not every backend has it."""
    probe = torch.full((16, 16), 1.0 + 2**-7, device=torch.device(kind, index or 0), dtype=torch.bfloat16)
    try:
        result = product(probe, probe, 2.0)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return result.dtype is torch.float32 and bool((result == 32 * (1.0 + 2**-7) ** 2).all())


def product(a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """``alpha a b`` in float32, of bfloat16 matrices."""
    if alpha == 1.0:
        return torch.mm(a, b, out_dtype=torch.float32)
    nothing = torch.empty(a.shape[0], b.shape[1], device=a.device, dtype=torch.float32)
    return torch.addmm(nothing, a, b, out_dtype=torch.float32, beta=0.0, alpha=alpha)


def split_rows(A: Tensor) -> Tensor:
    """[A1; A2; A1] (3r, in) in bfloat16 of A (r, in) in float32."""
    r = len(A)
    parts = A.new_empty(3, *A.shape, dtype=torch.bfloat16)
    parts[::2].copy_(A.expand(2, *A.shape))
    torch.sub(A, parts[0], out=parts[1])
    return parts.view(3 * r, -1)


def split_columns(B: Tensor) -> Tensor:
    """[B1, B1, B2, B1] (out, 4r) in bfloat16 of B (out, r) in float32."""
    parts = B.new_empty(B.shape[0], 4, B.shape[1], dtype=torch.bfloat16)
    parts.copy_(B[:, None].expand(parts.shape))
    torch.sub(B, parts[:, 0], out=parts[:, 2])
    return parts.view(B.shape[0], -1)


def split_hidden(h: Tensor, r: int) -> Tensor:
    """[h1, x A2^T, h1, h2] (tokens, 4r) in bfloat16 of [x A1^T, x A2^T, x A1^T] (tokens, 3r) in float32."""
    parts = h.new_empty(h.shape[0], 4 * r, dtype=torch.bfloat16)
    parts[:, : 3 * r].copy_(h)
    torch.sub(h[:, :r], parts[:, :r], out=parts[:, 3 * r :])
    return parts
