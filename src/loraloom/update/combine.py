"""Several updates as one, without training: exact sums, TIES, DARE, and task singular vectors in a core space.

All work on the updates ``D_n = B_n A_n``, never on A and B apart, which would add cross terms ``B_i A_j``. Shapes: A_n
(r_n, in), B_n (out, r_n), D (out, in). With one member there is nothing to reconcile, so every method gives ``w D``.
None depends on the order of the members. Scales and gates are in the factors already (:func:`~.terms.fold`).
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from loraloom.update.lowrank import best_approximation, factored_svd, truncate
from loraloom.update.terms import compute_dtype

Method = Literal["linear", "ties", "dare", "core"]
Factors = tuple[Tensor, Tensor]


def combine(
    members: Sequence[Factors],
    weights: Sequence[float],
    method: Method = "linear",
    *,
    rank: int | None = None,
    density: float = 0.5,
    names: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor, float]:
    """One pair of factors for ``sum_n w_n D_n``, or for what a method makes of it.

    Args:
        members: (A_n, B_n) of each member, one layer's.
        weights: one number per member.
        method: "linear": the sum, exact at rank ``sum r_n``. "ties" (2306.01708): trims each D_n to its largest
            entries, elects a sign per entry, averages what agrees. "dare" (2311.03099): drops entries at random and
            rescales the rest. "core": task singular vectors (2412.00081), orthogonalised, computed in the members'
            shared bases (Core Space, 2509.17786), so that nothing of size (out, in) is formed.
        rank: of the result; None keeps all of "linear" and "core", and takes ``sum r_n`` for the others, whose results
            have full rank.
        density: share of the entries that "ties" and "dare" keep, in (0, 1].
        names: what the random masks of "dare" are drawn from, one per member; None: the factors themselves.

    Returns:
        A' (k, in), B' (out, k) in at least float32, and ``||B' A' - D|| / ||D||`` of the truncation, 0 for D = 0.

    Raises:
        ValueError: nothing to combine, not one weight per member, density out of range, or an unknown method.
    """
    if not members or len(weights) != len(members):
        raise ValueError(f"got {len(weights)} weights for {len(members)} members: expected one each, and a member.")
    if not 0 < density <= 1:
        raise ValueError(f"density={density!r} must lie in (0, 1]: it is the share of the entries to keep.")
    dtype = compute_dtype(*(factor for member in members for factor in member))
    pairs = [(A.to(dtype), B.to(dtype)) for A, B in members]
    if method not in ("linear", "ties", "dare", "core"):
        raise ValueError(f"method={method!r} is not known: expected linear, ties, dare or core.")
    if method == "linear" or len(pairs) == 1:
        return truncate(*linear(pairs, weights), rank)
    if method == "core":
        return truncate(*core(pairs, weights), rank)
    if method == "ties":
        D = ties(lambda: (B @ A for A, B in pairs), weights, density)
    else:
        keys = names or [_digest(member) for member in pairs]
        D = dare(((B @ A, key) for (A, B), key in zip(pairs, keys, strict=True)), weights, density)
    A, B = best_approximation(D, rank or sum(A.shape[0] for A, _ in pairs))
    norm = torch.linalg.vector_norm(D)
    return A, B, float(torch.linalg.vector_norm(torch.addmm(D, B, A, alpha=-1)) / norm) if norm else 0.0


def linear(members: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """``sum_n w_n B_n A_n``, exactly: the As above each other, the Bs side by side, weights in B."""
    return (
        torch.cat([A for A, _ in members]),
        torch.cat([B * weight for (_, B), weight in zip(members, weights, strict=True)], dim=1),
    )


def ties(deltas: Callable[[], Iterator[Tensor]], weights: Sequence[float], density: float) -> Tensor:
    """TIES (2306.01708, algorithm 1) of weighted updates, as D (out, in).

    Each D_n keeps its largest entries by magnitude; each entry takes the sign of the kept entries' weighted sum; the
    result is the mean, over the members that have a kept entry of that sign, of w_n D_n.

    Args:
        deltas: gives the updates (out, in), each time it is called; it is called twice, and one update at a time is
            held, so memory is four matrices however many members there are.
        weights: one per member.
        density: share of the entries to keep.
    """
    total: Tensor | None = None
    thresholds = []
    for delta, weight in zip(deltas(), weights, strict=True):
        thresholds.append(_threshold(delta, density))
        kept = torch.where(delta.abs() >= thresholds[-1], delta, 0).mul_(weight)
        total = kept if total is None else total.add_(kept)
    assert total is not None
    sign = total.sign()
    total.zero_()
    count = torch.zeros_like(total)
    for delta, weight, threshold in zip(deltas(), weights, thresholds, strict=True):
        kept = torch.where(delta.abs() >= threshold, delta, 0).mul_(weight)
        agrees = kept.sign().eq_(sign).logical_and_(sign != 0)
        total.add_(kept.mul_(agrees))
        count.add_(agrees)
    return total.div_(count.clamp_min_(1))


def _threshold(delta: Tensor, density: float) -> Tensor:
    """The magnitude at which the largest ``density`` of the entries begin."""
    count = delta.numel()
    keep = max(1, round(density * count))
    return delta.abs().flatten().kthvalue(count - keep + 1).values


def dare(deltas: Iterator[tuple[Tensor, str]], weights: Sequence[float], density: float) -> Tensor:
    """DARE (2311.03099, equation 3) of weighted updates, as D (out, in): each entry stays with probability `density`.

    Args:
        deltas: updates (out, in), each with the text that its mask is drawn from: the same text, the same mask.
        weights: one per member.
        density: 1 - p; what stays is divided by it, so that the expectation is the sum.
    """
    total: Tensor | None = None
    for (delta, key), weight in zip(deltas, weights, strict=True):
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7])
        mask = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed)).to(delta.device) < density
        kept = (delta * mask).mul_(weight / density)
        total = kept if total is None else total.add_(kept)
    assert total is not None
    return total


def core(members: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Task singular vectors (TSV-M, 2412.00081, section 4) of weighted updates, as factors of rank ``<= sum r_n``.

    With ``w_n D_n = U_n S_n V_n^T``: the U_n side by side, and the V_n, are each replaced by the nearest matrix with
    orthonormal columns (their polar factor), which takes interference between the members away;

        D = polar([U_1 ... U_N]) diag(S_1 ... S_N) polar([V_1 ... V_N])^T

    Every U_n lies in the span of the Bs and every V_n in that of the As, so the polar factors come from SVDs of
    ``sum r_n`` columns (Core Space, 2509.17786: lossless).
    """
    U, S, V = [], [], []
    for (A, B), weight in zip(members, weights, strict=True):
        u, s, vh = factored_svd(A, B)
        U.append(u if weight >= 0 else -u)
        S.append(s * abs(weight))
        V.append(vh.mT)
    root = torch.cat(S).sqrt()
    return (_polar(torch.cat(V, 1)) * root).mT, _polar(torch.cat(U, 1)) * root


def _polar(X: Tensor) -> Tensor:
    """The matrix with orthonormal columns nearest to X (n, k); where k > n, or ranks lack, a partial isometry."""
    Q, R = torch.linalg.qr(X)
    u, s, vh = torch.linalg.svd(R, full_matrices=False)
    rank = int((s > s[0] * max(X.shape) * torch.finfo(s.dtype).eps).sum()) if s.numel() else 0
    return Q @ (u[:, :rank] @ vh[:rank])


def _digest(member: Factors) -> str:
    digest = hashlib.sha256()
    for factor in member:
        digest.update(factor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
