"""Matrices with known spectra, and intruders by torch's full SVD in float64 as the reference."""

import torch
from torch import Tensor

SHAPES = [(320, 320), (300, 420), (420, 300)]  # the shorter side is long enough to be decided without a decomposition


def orthonormal(rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, dtype=torch.float64)).Q


def base(out: int, width: int, kind: str = "flat") -> Tensor:
    """A float32 weight of norm 1: Gaussian, with a fast decay, of low rank, or with near equal singular values."""
    q = min(out, width)
    i = torch.arange(q, dtype=torch.float64)
    S = {
        "flat": 1 - 0.999 * i / q,  # like the trained weights of MiniLM
        "decaying": 0.98**i,
        "low rank": (1 - i / q) * (i < q // 3),
        "clustered": (0.9 ** (i // 4)) * (1 + 1e-4 * (i % 4)),
    }[kind]
    return ((orthonormal(out, q) * S) @ orthonormal(width, q).T).float()


def update(W: Tensor, r: int = 8, strength: float = 1.5, overlap: float = 0.5) -> tuple[Tensor, Tensor]:
    """Factors A, B whose directions run from new ones to those that W already has, half way at ``overlap`` 0.5."""
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    new_left, new_right = orthonormal(len(W), r), orthonormal(W.shape[1], r)
    mix = torch.linspace(0, 1, r, dtype=torch.float64) ** (overlap / (1 - overlap))
    left = (1 - mix) * new_left + mix * U[:, :r]
    right = (1 - mix) * new_right + mix * Vh[:r].T
    S = strength * torch.linspace(1, 0.4, r, dtype=torch.float64)
    left, right = left / left.norm(dim=0), right / right.norm(dim=0)
    return (right.T * S.sqrt()[:, None]).float(), (left * S.sqrt()).float()


def adapted(W: Tensor, A: Tensor, B: Tensor, magnitude: Tensor | None = None) -> Tensor:
    """W' in float64."""
    total = W.double() + B.double() @ A.double()
    return total if magnitude is None else magnitude.double()[:, None] * total / total.norm(dim=1, keepdim=True)


def cosines(W: Tensor, changed: Tensor, top_k: int = 10) -> Tensor:
    """The largest cosine of each of the first top_k left singular vectors of `changed` with one of W."""
    U0, S0, _ = torch.linalg.svd(W.double(), full_matrices=False)
    U = torch.linalg.svd(changed.double(), full_matrices=False).U[:, :top_k]
    return (U0[:, 1e-5 * S0[0] < S0].T @ U).abs().amax(0)


def mitigated(
    W: Tensor, changed: Tensor, scale: float, scope: str, top_k: int = 10, epsilon: float = 0.5
) -> tuple[Tensor, int]:
    """``W' + (scale - 1) sum s u v^T`` in float64, and over how many intruders."""
    found = (cosines(W, changed, top_k) < epsilon).nonzero()[:, 0]
    found = found[:1] if scope == "top" else found
    U, S, Vh = torch.linalg.svd(changed.double(), full_matrices=False)
    return changed + (scale - 1) * (U[:, found] * S[found]) @ Vh[found], len(found)
