"""The projections of GaLore: sides, bases, rotation, and the two norms of Fira and APOLLO."""

from typing import get_args

import pytest
import torch

from loraloom.errors import InputError
from loraloom.optim.galore.bases import (
    change_of_bases,
    limit_growth,
    norm_ratio,
    project,
    project_back,
    random_bases,
    rotate_moments,
    sides_of,
    subspace_bases,
    svd_bases,
)
from loraloom.optim.options import Side

SIDES = get_args(Side)
SHAPES = [(30, 18), (18, 30), (20, 20)]


def decaying(m: int, n: int, power: float = 1.0) -> torch.Tensor:
    """A matrix with singular values 1, 2^-power, 3^-power, ..."""
    U, V = (torch.linalg.qr(torch.randn(size, min(m, n), dtype=torch.float64)).Q for size in (m, n))
    return (U * torch.arange(1, min(m, n) + 1) ** -power) @ V.T


def overlap(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a^T b||_F^2 / r: 1 for equal subspaces, r / n for random ones."""
    return float((a.T @ b).square().sum() / a.shape[1])


def test_the_side_of_each_name() -> None:
    tall, wide = (30, 18), (18, 30)
    assert [sides_of(side, tall) for side in SIDES] == [
        (False, True), (True, False), (True, False), (False, True), (True, True),
    ]  # fmt: skip
    assert [sides_of(side, wide) for side in SIDES] == [
        (True, False), (False, True), (True, False), (False, True), (True, True),
    ]  # fmt: skip


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("refresh", ["svd", "subspace"])
def test_projecting_there_and_back_is_an_orthogonal_projection(side: str, shape: tuple, refresh: str) -> None:
    G, sides = decaying(*shape), sides_of(side, shape)
    if refresh == "svd":
        bases = svd_bases(G, 5, sides)
    else:
        bases = subspace_bases(G, 5, sides, (None, None), torch.Generator().manual_seed(0))
    assert [basis is not None for basis in bases] == list(sides)
    R = project(G, bases)
    assert R.shape == (5 if sides[0] else shape[0], 5 if sides[1] else shape[1])
    once = project_back(R, bases)
    torch.testing.assert_close(project(once, bases), R)  # idempotent
    N = torch.randn_like(R)
    torch.testing.assert_close((project_back(N, bases) * G).sum(), (N * R).sum())  # back is the transpose
    best = torch.linalg.svdvals(G)[5:].square().sum()
    error = (G - once).square().sum()
    assert best * (1 - 1e-9) <= error < best * (1 + 1e-9 if refresh == "svd" else 1.01)  # Eckart and Young


def test_subspace_iteration_follows_a_turning_subspace() -> None:
    """The leading subspace turns by a few degrees between refreshes; one iteration from the old basis follows it.

    A basis that is not renewed falls behind. An iteration divides the tangent of each angle by the squared ratio of the
    singular values on both sides of the cut, here 9, or more.
    """
    generator = torch.Generator().manual_seed(0)
    values = torch.cat([torch.ones(6), torch.full((34,), 1 / 3)]).double()
    U, V = (torch.linalg.qr(torch.randn(size, 40, dtype=torch.float64)).Q for size in (60, 40))
    sides, basis, stale = (False, True), (None, None), None
    for _ in range(8):
        skew = torch.randn(40, 40, dtype=torch.float64)
        V = torch.linalg.matrix_exp(0.02 * (skew - skew.T)) @ V
        G = (U * values) @ V.T
        exact = svd_bases(G, 6, sides)[1]
        basis = subspace_bases(G, 6, sides, basis, generator)
        stale = exact if stale is None else stale
        assert overlap(basis[1], exact) > 0.998
    assert overlap(stale, exact) < 0.9


def test_the_basis_is_of_singular_vectors_and_keeps_its_signs() -> None:
    """Of one matrix, from its own basis: the exact singular vectors, each with the sign that it had."""
    G = decaying(30, 20)
    exact = svd_bases(G, 5, (True, True))
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    old = (exact[0] * signs, exact[1] * signs)
    new = subspace_bases(G, 5, (True, True), old, torch.Generator().manual_seed(0))
    torch.testing.assert_close(new, old)


def test_the_first_basis_is_the_same_from_the_same_seed() -> None:
    G = torch.randn(30, 20)
    draws = [
        subspace_bases(G, 4, (True, True), (None, None), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    ]
    for a, b, c in zip(*draws, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_random_bases_keep_norms_on_average() -> None:
    """APOLLO's entries are N(0, 1/r): E ||P^T x||^2 = ||x||^2."""
    x = torch.randn(64, 1, dtype=torch.float64)
    lengths = [project(x, random_bases((64, 1), 16, (True, False), seed, x)).norm() ** 2 for seed in range(400)]
    assert torch.stack(lengths).mean() == pytest.approx(float(x.norm() ** 2), rel=0.05)


@pytest.mark.parametrize("sides", [(True, False), (False, True), (True, True)])
def test_rotation_into_the_same_basis_changes_nothing(sides: tuple) -> None:
    bases = svd_bases(decaying(30, 18), 5, sides)
    m = project(torch.randn(30, 18, dtype=torch.float64), bases)
    v = m.square() + 0.1
    same = rotate_moments(m, v, change_of_bases(bases, bases), 7, (0.9, 0.99))
    torch.testing.assert_close(same, (m, v))


def test_rotation_written_out() -> None:
    """LDAdam (2410.16103), one entry at a time, for a left projection."""
    old, new = (svd_bases(decaying(9, 12), 3, (True, False)) for _ in range(2))
    C, t, b1, b2 = new[0].T @ old[0], 5, 0.9, 0.99
    m, v = torch.randn(3, 12, dtype=torch.float64), torch.rand(3, 12, dtype=torch.float64)
    m_hat, v_hat = m / (1 - b1**t), v / (1 - b2**t)
    turned = rotate_moments(m, v, change_of_bases(new, old), t, (b1, b2))
    for i in range(3):
        for j in range(12):
            mean = sum(C[i, k] * m_hat[k, j] for k in range(3))
            variance = sum(C[i, k] ** 2 * (v_hat[k, j] - m_hat[k, j] ** 2) for k in range(3))
            assert turned[0][i, j].item() == pytest.approx(float((1 - b1**t) * mean))
            assert turned[1][i, j].item() == pytest.approx(float((1 - b2**t) * abs(variance + mean**2)))


def test_norm_ratio_is_the_factor_by_which_channels_were_scaled() -> None:
    R = torch.randn(4, 10, dtype=torch.float64)
    factors = torch.rand(10, dtype=torch.float64) + 0.5
    torch.testing.assert_close(norm_ratio(R * factors, R, (True, False)), factors[None], rtol=1e-7, atol=0)
    torch.testing.assert_close(norm_ratio((R * factors).T, R.T, (False, True)), factors[:, None], rtol=1e-7, atol=0)
    assert norm_ratio(3 * R, R, (True, False), whole=True).item() == pytest.approx(3)


def test_growth_is_limited_to_one_percent_a_step() -> None:
    S = torch.randn(5, 5)
    _, norm = limit_growth(S, None)
    assert norm == S.norm()
    grown, limited = limit_growth(S * 3, norm)
    torch.testing.assert_close(grown, S * 1.01)
    torch.testing.assert_close(limited, norm * 1.01)
    shrunk, small = limit_growth(S * 0.5, norm)
    assert torch.equal(shrunk, S * 0.5)
    torch.testing.assert_close(small, norm * 0.5)
    assert torch.equal(limit_growth(S, torch.tensor(0.0))[0], S)  # a step of zero is not the end


def test_an_unknown_side_is_an_error() -> None:
    with pytest.raises(InputError) as caught:
        sides_of("middle", (3, 4))
    assert caught.value.code == "unknown-choice"
