"""Is a unit vector u near one left singular vector of W? Decided from products with W, without decomposing it.

The squared cosines of u with the left singular vectors of W are its spectral measure: mass cos_i^2 at s_i^2.
Golub-Kahan bidiagonalisation from u,

    W^T U_j = V_j L^T,    W V_j = U_j L + rest,    L lower bidiagonal,    L = X diag(theta) Y^T,

gives the first orthonormal polynomials p_0, ..., p_{j-1} of that measure, by the recurrence with the tridiagonal
L L^T, and its Gauss quadrature, nodes theta_i^2 with weights X[0, i]^2 (Golub and Meurant, "Matrices, Moments and
Quadrature", 1994). No point x has more mass than the Christoffel function there:

    cos_i^2 <= rho(s_i^2),    rho(x) = 1 / (p_0(x)^2 + ... + p_{j-1}(x)^2).

If rho is below epsilon^2 everywhere, u is an intruder. A converged node, whose residual is at rounding, is a singular
value with the node's weight as mass: at or above epsilon^2, u is none. Both take some tens of products with W.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from loraloom.intruders.solvers.matrix import RELATIVE_ZERO, Weight, times, transposed_times

MAX_STEPS = 100
_CHECK_EVERY = 5
# Where rho is evaluated, from each node to the next; its peaks are near nodes, and narrow where one converges.
_HALF_WAY = (0.001, 0.01, 0.03, 0.07, 0.15, 0.3, 0.5)
_POINTS = (*_HALF_WAY, *(1 - x for x in _HALF_WAY[:-1]))
# Residual, relative to the largest singular value, at which a node counts as converged: what float32 allows. Singular
# values nearer to each other than this look like one.
_CONVERGED = 5e-6
# What rounding, the points between the points, and the rest of a converged node may do to a cosine.
_MARGIN = 1e-2


class Decision(NamedTuple):
    """What is known of the cosines of k vectors."""

    intruder: Tensor
    """(k,) bool"""
    decided: Tensor
    """(k,) bool; False where the steps did not suffice"""
    cosine: Tensor
    """(k,) the largest cosine: an upper bound for an intruder, an estimate from below otherwise"""


def decide(W: Weight, U: Tensor, epsilon: float, error: Tensor) -> Decision:
    """Whether each column of U (out, k) has a cosine of at least epsilon with some left singular vector of W.

    Args:
        W: (out, in).
        U: (out, k) in float32, columns of length 1.
        epsilon: the threshold, in (0, 1).
        error: (k,) what each column may be off; a decision within it of the threshold is not taken.
    """
    k = U.shape[1]
    cosine, intruder, decided = (U.new_zeros(k, dtype=d) for d in (torch.float32, torch.bool, torch.bool))
    going = torch.arange(k, device=U.device)  # the vectors that are not decided yet
    lefts, rights = U.T[:, None], U.new_zeros(k, 0, W.shape[1])
    alphas, betas = U.new_zeros(k, 0), U.new_zeros(k, 0)
    steps = min(MAX_STEPS, *W.shape)
    for step in range(1, steps + 1):
        v, alpha = _next(transposed_times(W, lefts[:, -1]), rights)
        rights, alphas = torch.cat([rights, v], 1), torch.cat([alphas, alpha], 1)
        u, beta = _next(times(W, rights[:, -1]), lefts)
        if step % _CHECK_EVERY == 0 or step == steps:
            upper, lower = _bounds(alphas.double(), betas.double(), beta.double())
            slack = _MARGIN + error[going]
            yes, no = upper + slack < epsilon, lower - slack >= epsilon
            cosine[going] = torch.where(no, lower, upper).to(cosine.dtype)
            intruder[going], decided[going] = yes, yes | no
            left = ~(yes | no)
            if not left.any():
                break
            going, u, lefts, rights = going[left], u[left], lefts[left], rights[left]
            alphas, betas, beta = alphas[left], betas[left], beta[left]
        lefts, betas = torch.cat([lefts, u], 1), torch.cat([betas, beta], 1)
    return Decision(intruder, decided, cosine)


def _next(y: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """The part of each row of y (k, n) orthogonal to its own basis (k, j, n), normalised (k, 1, n), and its length.

    Orthogonalised twice against all of the basis: vectors that return would split a weight among copies of its node.
    """
    y = y[:, None]
    for _ in range(2):
        y = y - (y @ basis.mT) @ basis
    length = torch.linalg.vector_norm(y, dim=2)
    return y / length[:, None].clamp_min(torch.finfo(y.dtype).tiny), length


def _bounds(alphas: Tensor, betas: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower bounds (k,) on the largest cosine, from L's diagonals (k, j), (k, j - 1) and the next beta."""
    tiny = torch.finfo(alphas.dtype).tiny
    X, theta, _ = torch.linalg.svd(torch.diag_embed(alphas) + torch.diag_embed(betas, offset=-1))
    nodes, weights = theta.square(), X[:, 0].square()
    top = nodes[:, :1].clamp_min(tiny)
    # The residual is one of s^2; that of s is smaller by s.
    length = theta.clamp_min(RELATIVE_ZERO * theta[:, :1]) * theta[:, :1]
    converged = alphas[:, -1:] * beta * X[:, -1].abs() <= _CONVERGED * length
    # The part of u outside the column space of W: mass at zero, which belongs to no singular vector.
    outside = converged & (theta <= RELATIVE_ZERO * theta[:, :1])
    lower = weights.masked_fill(~converged | outside, 0.0).amax(1).sqrt()

    fractions = torch.tensor(_POINTS, device=nodes.device, dtype=nodes.dtype)
    # Outside of its nodes rho falls. Next to the node that stands for the outside of W nothing but that node has mass.
    between = nodes[:, :-1, None] + (nodes[:, 1:] - nodes[:, :-1])[:, :, None] * fractions
    between = torch.where(outside[:, 1:, None], nodes[:, :-1, None], between)
    x = between.flatten(1) / top  # scaled, so that the recurrence stays in range
    diagonal = (alphas.square() + torch.nn.functional.pad(betas, (1, 0)).square()) / top
    beside = (alphas[:, :-1] * betas / top).clamp_min(tiny)
    before, p, total = torch.zeros_like(x), torch.ones_like(x), torch.ones_like(x)
    for i in range(betas.shape[1]):
        carried = beside[:, i - 1 : i] * before if i else 0.0
        before, p = p, ((x - diagonal[:, i : i + 1]) * p - carried) / beside[:, i : i + 1]
        total += p.square()
    # An overflow is a mass of zero; inf - inf can only follow one.
    rho = (1 / total).nan_to_num(0.0)
    # On a node rho is its weight, which for a converged one the recurrence loses in rounding.
    return torch.cat([rho, weights.masked_fill(outside, 0.0)], 1).amax(1).sqrt(), lower
