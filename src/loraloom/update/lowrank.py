"""The spectrum of a low-rank product B A, from its factors alone.

    B = Q_B R_B,   A^T = Q_A R_A,   R_B R_A^T = u diag(S) v^T   =>   B A = (Q_B u) diag(S) (Q_A v)^T

Two QRs of thin matrices and the SVD of an (r, r) one, O((out + in) r^2), in place of O(out in min(out, in)). Shapes are
those of LoRA, A (r, in) and B (out, r); a sum of products is one product, by :func:`loraloom.update.terms.fold`.
"""

import math

import torch
from torch import Tensor

from loraloom.update.terms import compute_dtype


def factored_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of B A, without forming it.

    Args:
        A: (r, in).
        B: (out, r).

    Returns:
        U (out, q), S (q,) descending and Vh (q, in), in at least float32, with q = min(r, out, in) and
        ``U diag(S) Vh = B A``. Columns of U and rows of Vh are orthonormal, also where S is 0.
    """
    dtype = compute_dtype(A, B)
    Q_B, R_B = torch.linalg.qr(B.to(dtype))
    Q_A, R_A = torch.linalg.qr(A.to(dtype).mT)
    u, S, vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    return Q_B @ u, S, vh @ Q_A.mT


def truncate(
    A: Tensor, B: Tensor, rank: int | None = None, energy: float | None = None
) -> tuple[Tensor, Tensor, float]:
    """The best approximation of B A with a smaller rank, as factors, and what it loses.

    The singular values are shared out evenly, ``A' = sqrt(S) Vh`` and ``B' = U sqrt(S)``. The approximation is the best
    one in the Frobenius and in the spectral norm (Eckart and Young, 1936).

    Args:
        A: (r, in).
        B: (out, r).
        rank: the largest rank wanted; None leaves it to ``energy``.
        energy: in (0, 1]: keep as few singular values as hold this share of the sum of squares. With both, the smaller
            rank is taken; with neither, A and B are returned as they are.

    Returns:
        A' (k, in), B' (out, k) in at least float32, and ``||B A - B' A'|| / ||B A||`` in the Frobenius norm, 0 for
        B A = 0. k is at least 1, and at most min(r, out, in): no rows are padded.

    Raises:
        ValueError: rank is under 1, or energy not in (0, 1].
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank!r} must be a positive integer, or None to keep all.")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy={energy!r} must lie in (0, 1]: it is the share of the squared norm to keep.")
    if rank is None and energy is None:
        return A, B, 0.0
    U, S, Vh = factored_svd(A, B)
    k = len(S) if rank is None else min(rank, len(S))
    # Summed from the small end: there lie the digits that a small error has.
    tail = [*S.double().square().flip(0).cumsum(0).flip(0).tolist(), 0.0]  # tail[i] is what rank i loses, squared
    if energy is not None:
        k = min(k, next(i for i in range(len(S) + 1) if tail[i] <= (1 - energy) * tail[0]))
    k = max(k, 1)
    root = S[:k].sqrt()
    return root[:, None] * Vh[:k], U[:, :k] * root, math.sqrt(tail[k] / tail[0]) if tail[0] else 0.0


def best_approximation(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) whose product is the best approximation of a matrix (out, in), or near it.

    Small matrices by an exact SVD, others by subspace iteration from a fixed random start (Halko et al., 0909.4061).
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= 1024:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
        Vh = V.T
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root


def effective_rank(S: Tensor) -> float:
    """``exp(-sum p log p)`` with p = S / sum(S), for singular values S (q,): 1 for one direction, q for q equal ones.

    Roy and Vetterli, "The effective rank", EUSIPCO 2007. 0 for S = 0.
    """
    total = S.double().sum()
    return float(torch.special.entr(S.double() / total).sum().exp()) if total else 0.0


def stable_rank(S: Tensor) -> float:
    """``sum(S^2) / max(S)^2``, the squared Frobenius over the squared spectral norm, for singular values S (q,).

    At most the rank, and steady under small perturbations, which the rank is not (Rudelson and Vershynin, 2007). 0 for
    S = 0.
    """
    S = S.double()
    largest = S.max()
    return float((S / largest).square().sum()) if largest else 0.0
