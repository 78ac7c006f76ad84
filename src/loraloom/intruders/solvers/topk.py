"""The largest singular triplets of an adapted weight, by block Golub-Kahan bidiagonalisation.

    P_1 = orth(start),   M P = Q T,   M^T Q = P T^T + P_next C,   T = X diag(s) Y^T,   u = Q X,  v = P Y

M is W', or its transpose where that is the one with fewer columns, so that P can fill its space. P and Q have
orthonormal columns and grow by one block a pass, which costs two products with W'. For the triplets so found
``M v = s u`` holds exactly and ``||M^T u - s v||`` is the norm of C times the last rows of X: the residual is known
without another product (Golub, Luk and Overton, ACM TOMS 1981).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from loraloom.intruders.solvers.matrix import AdaptedMatrix

OVERSAMPLING = 6  # columns of a block beyond the k wanted
FLOOR = 16  # how far a residual can fall, in units of rounding of the largest singular value
_CHECK_EVERY = 5  # passes: the SVD of T costs as much as some of them
_REPEATS = 5  # of an orthogonalisation; one is the rule


class Triplets(NamedTuple):
    """Singular triplets in descending order of S."""

    U: Tensor
    """(out, k)"""
    S: Tensor
    """(k,)"""
    Vh: Tensor
    """(k, in)"""
    error: Tensor
    """(k,) bound on the sine of the angle between a vector and the true one: the residual, at least rounding, over the
    distance to the nearest other singular value (Wedin, 1972), as far as the values found tell."""


def top_singular(
    matrix: AdaptedMatrix, k: int, tolerance: float = 1e-4, dtype: torch.dtype = torch.float32
) -> Triplets:
    """The k largest singular triplets of W'.

    Passes are taken until every residual is under ``tolerance`` times the distance to the nearest other singular value,
    or has met rounding. The start is drawn from a generator of its own: the result is the same every time, and no
    global random state is touched.

    Args:
        matrix: W'.
        k: how many; at most min(out, in) are returned.
        tolerance: bound on the vectors' error.
        dtype: of the computation, float32 or float64.
    """
    transposed = matrix.shape[0] < matrix.shape[1]
    products = (matrix.times, matrix.transposed_times)
    forward, back = products[::-1] if transposed else products
    width = min(matrix.shape)
    k = min(k, width)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(width, min(k + OVERSAMPLING, width), generator=generator).to(matrix.device, dtype)
    P_new = torch.linalg.qr(start).Q
    P, Q, T = P_new, P_new.new_empty(max(matrix.shape), 0), P_new.new_empty(0, 0)
    passes = 0
    while True:
        Q_new, R, along = extend(forward(P_new.T.contiguous()).T, Q)
        T = torch.cat([torch.cat([T, along], 1), torch.cat([R.new_zeros(len(R), T.shape[1]), R], 1)])
        Q = torch.cat([Q, Q_new], 1)
        passes += 1
        room = width - P.shape[1]
        if room:
            P_new, C, _ = extend(back(Q_new.T.contiguous()).T, P)
        if passes % _CHECK_EVERY == 0 or not room:
            X, S, Yh = torch.linalg.svd(T)
            floor = FLOOR * torch.finfo(dtype).eps * S[0]
            residual = torch.linalg.vector_norm(C @ X[-C.shape[1] :, :k], dim=0) if room else torch.zeros_like(S[:k])
            distance = gaps(S, k)
            if not room or bool((residual <= torch.maximum(tolerance * distance, floor)).all()):
                break
        P_new = P_new[:, :room]
        P = torch.cat([P, P_new], 1)
    U, V = Q @ X[:, :k], P @ Yh[:k].T
    if transposed:
        U, V = V, U
    return Triplets(U, S[:k], V.T, relative_error(residual, distance, S[0]))


def relative_error(residual: Tensor, distance: Tensor, largest: Tensor) -> Tensor:
    """``Triplets.error`` (k,) from residuals (k,), :func:`gaps` (k,) and the largest singular value."""
    rounding = 8 * torch.finfo(residual.dtype).eps * largest
    return (torch.maximum(residual, rounding) / distance.clamp_min(torch.finfo(residual.dtype).tiny)).clamp_max(1.0)


def extend(Y: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal Q, R and a with ``Y = basis a + Q R`` and Q orthogonal to the basis, also where Y adds nothing."""
    along = basis.T @ Y
    Q, R = torch.linalg.qr(Y - basis @ along)
    for _ in range(_REPEATS):
        # QR amplifies rounding, so repeat: one pass may leave Q not orthogonal to the basis; two may not be enough if Y
        # lay almost entirely in it.
        again = basis.T @ Q
        along = along + again @ R
        Q, change = torch.linalg.qr(Q - basis @ again)
        R = change @ R
        if bool((torch.linalg.vector_norm(again, dim=0) < 0.5).all()):
            break
    return Q, R, along


def gaps(S: Tensor, k: int) -> Tensor:
    """Distance of each of the first k singular values to its nearest neighbour; below the last one comes 0."""
    below = torch.cat([S, S.new_zeros(1)])[1 : k + 1]
    down = S[:k] - below
    up = torch.cat([S.new_full((1,), torch.inf), down[:-1]])
    return torch.minimum(up, down)
