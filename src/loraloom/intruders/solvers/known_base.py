"""The largest singular triplets of W + B A where the left singular vectors of W are known.

With W = U0 diag(s0) V0^T, in the basis [U0, Z], Z an orthonormal basis of what B has outside of U0,

    W' W'^T  =  diag(s0^2, 0) + F Q^T + Q F^T,    Q = [U0, Z]^T B,    F = [U0, Z]^T W A^T + Q A A^T / 2,

a diagonal plus a matrix of rank 2 r. Its eigenvectors have theta y = d y + F (Q^T y) + Q (F^T y) in each coordinate d,
so y follows from theta and the 2r numbers Q^T y, F^T y; we iterate on those: Davidson's method
(J. Comput. Phys. 1975), with a
preconditioner that is exact. The change has at most r negative eigenvalues, so theta_k is at least the (k + r)-th d.
These coordinates and the ranges of F and Q in the others are what the search starts from; no other d reaches theta_k.
It takes some passes of O(n (r + k)^2), in float64, and no product with W. The largest cosine of a vector with U0 is
the largest of its coordinates.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from loraloom.intruders.solvers.basis import LeftBasis
from loraloom.intruders.solvers.matrix import RELATIVE_ZERO, AdaptedMatrix, times
from loraloom.intruders.solvers.topk import Triplets, extend, gaps, relative_error

_TOLERANCE = 1e-6  # residual of an eigenvector over the distance to the nearest other eigenvalue
_MAX_PASSES = 20


class Known(NamedTuple):
    """Singular triplets of W', and what their left vectors have in common with those of W."""

    top: Triplets
    cosine: Tensor
    """(k,) the largest cosine of each."""


def applicable(matrix: AdaptedMatrix, base: LeftBasis, k: int) -> bool:
    """Whether :func:`top_of_update` can be used: no rows are rescaled, and r and k are small beside W's rank."""
    return matrix.c is None and len(base.S) > 4 * (k + len(matrix.A))


def top_of_update(matrix: AdaptedMatrix, base: LeftBasis, k: int) -> Known:
    """The k largest singular triplets of ``W' = W + B A``, from a few thin products with W and its left basis.

    The error is that of the result, from its residual: it covers whatever the basis is off.

    Args:
        matrix: W' (out, in).
        base: of W.
        k: how many; see :func:`applicable`.
    """
    left, p = base.U.to(matrix.device), len(base.S)
    A, B = matrix.A.float(), matrix.B.float()
    r = len(A)
    # Thin matrices lie in rows throughout, see matrix.times. W A^T has no part outside.
    inside = torch.cat([times(matrix.W, A), B.T]) @ left
    Z = _outside(left, B.T, inside[r:])
    beyond = torch.cat([B.new_zeros(r, len(Z)), B.T @ Z.T])
    F, Q = torch.cat([inside, beyond], 1).double().T.split(r, dim=1)
    F = F + Q @ (A.double() @ A.double().T) / 2
    d = torch.cat([base.S.to(F).square(), F.new_zeros(len(Z))])
    values, Y = _eigenvectors(d, F, Q, k)
    rows = Y[:p].T.float() @ left.T + Y[p:].T.float() @ Z
    U = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    V = matrix.transposed_times(U)
    S = torch.linalg.vector_norm(V, dim=1)
    V = V / S.clamp_min(torch.finfo(S.dtype).tiny)[:, None]
    residual = torch.linalg.vector_norm(matrix.times(V) - U * S[:, None], dim=1)
    error = relative_error(residual, gaps(values.clamp_min(0).sqrt(), k).float(), S[0])
    return Known(Triplets(U.T, S, V, error), Y[:p].abs().amax(0).clamp_max(1).float())


def _outside(left: Tensor, rows: Tensor, inside: Tensor) -> Tensor:
    """An orthonormal basis (q, out) of what rows (r, out) have outside left (out, p), given ``inside = rows left``."""
    if left.shape[0] == left.shape[1]:
        return rows[:0]
    rest = rows - inside @ left.T
    _, S, basis = torch.linalg.svd(rest, full_matrices=False)
    basis = basis[torch.linalg.matrix_norm(rows) * RELATIVE_ZERO < S]
    # Where little is outside, rounding is a part of it.
    return torch.linalg.qr((basis - (basis @ left) @ left.T).T).Q.T


def _eigenvectors(d: Tensor, F: Tensor, Q: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest eigenpairs of ``diag(d) + F Q^T + Q F^T``, d (n,) descending, F and Q (n, r).

    Returns:
        The eigenvalues found, descending, more than k of them, and the eigenvectors of the first k (n, k).
    """
    axes = k + F.shape[1]
    d_rest, F_rest, Q_rest = d[axes:, None], F[axes:], Q[axes:]
    basis = torch.linalg.qr(torch.cat([F_rest, Q_rest], 1)).Q
    for _ in range(_MAX_PASSES):
        f, q = (torch.cat([X[:axes], basis.T @ X[axes:]]) for X in (F, Q))
        diagonal = torch.block_diag(d[:axes].diag(), basis.T @ (d_rest * basis))
        values, Y = torch.linalg.eigh(diagonal + f @ q.T + q @ f.T)
        values, Y = values.flip(0), Y.flip(1)[:, :k]
        y = basis @ Y[axes:]
        change = F_rest @ (q.T @ Y) + Q_rest @ (f.T @ Y)
        residual = torch.linalg.vector_norm(change - (values[:k] - d_rest) * y, dim=0)
        floor = torch.finfo(d.dtype).eps * len(d) * values[0]
        if bool((residual <= torch.maximum(_TOLERANCE * gaps(values, k), floor)).all()):
            break
        room = len(basis) - basis.shape[1]
        towards = change / (values[:k] - d_rest).clamp_min(torch.finfo(d.dtype).eps * values[0])
        towards = towards / torch.linalg.vector_norm(towards, dim=0).clamp_min(torch.finfo(d.dtype).tiny)
        basis = torch.cat([basis, extend(towards[:, :room], basis)[0]], 1)
    return values, torch.cat([Y[:axes], y])
