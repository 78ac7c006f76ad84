"""Intruders from a known basis of W against full SVDs in float64, and where that way is left."""

import pytest
import torch

from loraloom.intruders.find import analyse_matrix
from loraloom.intruders.solvers.basis import left_basis
from loraloom.intruders.solvers.known_base import applicable, top_of_update
from loraloom.intruders.solvers.matrix import AdaptedMatrix, TiledMatrix
from tests.intruders.support import SHAPES, adapted, base, cosines, orthonormal, update


def one_direction_short(n=300):
    """A square weight whose last singular value counts as zero."""
    S = torch.linspace(1, 0.01, n, dtype=torch.float64)
    S[-1] = 1e-7
    return ((orthonormal(n, n) * S) @ orthonormal(n, n).T).float()


WEIGHTS = {
    **{f"{kind} {shape}": (base, (*shape, kind)) for shape in SHAPES for kind in ("flat", "decaying", "low rank")},
    "one direction short": (one_direction_short, ()),
}


def angles(found, true):
    """Sine of the angle between columns, up to sign."""
    return (found - true * (found * true).sum(0)).norm(dim=0)


@pytest.fixture(params=WEIGHTS)
def weight(request):
    make, arguments = WEIGHTS[request.param]
    return make(*arguments)


@pytest.mark.parametrize("strength", [0.05, 1.0, 20.0])
def test_triplets_and_cosines_are_those_of_full_svds(weight, strength):
    A, B = update(weight, strength=strength)
    changed = adapted(weight, A, B)
    U, S, Vh = torch.linalg.svd(changed, full_matrices=False)
    top, cosine = top_of_update(AdaptedMatrix(weight, A, B), left_basis(weight), 10)
    torch.testing.assert_close(top.S.double(), S[:10], rtol=1e-5, atol=0)
    assert (angles(top.U.double(), U[:, :10]) <= top.error + 1e-6).all()
    assert (angles(top.Vh.T.double(), Vh[:10].T) <= top.error + 1e-6).all()
    assert top.error.max() < 0.05
    torch.testing.assert_close(cosine.double(), cosines(weight, changed), rtol=0, atol=1e-4)


@pytest.mark.parametrize("inside", [True, False])
def test_an_update_within_or_without_the_column_space(inside):
    W = base(320, 320, "low rank")
    U = torch.linalg.svd(W.double()).U
    B = (U[:, 5:9] + U[:, 20:24] if inside else U[:, -4:]).float() * 3
    A = orthonormal(320, 4).T.float() * torch.tensor([1.0, 0.9, 0.8, 0.7])[:, None]
    top, cosine = top_of_update(AdaptedMatrix(W, A, B), left_basis(W), 6)
    torch.testing.assert_close(cosine.double(), cosines(W, adapted(W, A, B), 6), rtol=0, atol=1e-4)
    assert (cosine[:4].max() > 0.5) == inside
    torch.testing.assert_close(top.U.T @ top.U, torch.eye(6), rtol=0, atol=1e-5)


def test_nothing_added_gives_the_base():
    W = base(300, 420)
    left = left_basis(W)
    top, cosine = top_of_update(AdaptedMatrix(W, torch.zeros(8, 420), torch.zeros(300, 8)), left, 10)
    torch.testing.assert_close(top.S.double(), left.S[:10], rtol=1e-5, atol=0)
    torch.testing.assert_close(cosine, torch.ones(10))


@pytest.mark.parametrize("distance", [2e-3, 1e-5])
@pytest.mark.parametrize("side", [-1, 1])
def test_a_threshold_near_a_cosine(distance, side):
    W = base(420, 300)
    A, B = update(W, strength=1.0)
    exact = cosines(W, adapted(W, A, B))
    near = int((exact - 0.5).abs().argmin())
    epsilon = float(exact[near]) + side * distance
    found = analyse_matrix(W, A, B, base_left=left_basis(W), epsilon=epsilon)
    assert found.intruders == (exact < epsilon).nonzero()[:, 0].tolist()


def test_three_products_with_the_weight_are_enough():
    W = base(320, 320)
    A, B = update(W)
    left, passes = left_basis(W), []

    def rows(start, stop):
        passes.append(start)
        return W[start:stop]

    top_of_update(AdaptedMatrix(TiledMatrix((320, 320), rows, W.device), A, B), left, 10)
    assert len(passes) == 3


def test_the_error_tells_of_a_basis_that_is_off():
    W = base(320, 320)
    A, B = update(W)
    left = left_basis(W + 1e-2 * base(320, 320))
    matrix = AdaptedMatrix(W, A, B)
    top, _ = top_of_update(matrix, left, 10)
    assert top.error.max() > 1e-3
    true = torch.linalg.svd(adapted(W, A, B)).U[:, :10]
    found = analyse_matrix(W, A, B, base_left=left)
    assert (angles(found.vectors.U.double(), true[:, found.intruders]) < 1e-3).all()


def test_where_it_does_not_apply():
    W = base(320, 320)
    A, B = update(W)
    assert applicable(AdaptedMatrix(W, A, B), left_basis(W), 10)
    assert not applicable(AdaptedMatrix(W, A, B, torch.ones(320)), left_basis(W), 10)  # DoRA
    for small in (torch.zeros(320, 320), base(320, 20)):
        left = left_basis(small)
        A = update(small)[0] if small.any() else A
        assert not applicable(AdaptedMatrix(small, A, B), left, 10)
        expected = torch.linalg.svdvals(adapted(small, A, B))[:10]
        found = analyse_matrix(small, A, B, base_left=left)
        assert found.singular_values == pytest.approx(expected.tolist(), abs=1e-5)
