"""Block bidiagonalisation against torch's full SVD."""

import pytest
import torch

from loraloom.intruders.solvers.matrix import AdaptedMatrix, TiledMatrix
from loraloom.intruders.solvers.topk import extend, top_singular
from tests.intruders.support import SHAPES, adapted, base, update


def angles(found, true):
    """Sine of the angle between columns, up to sign."""
    return (found - true * (found * true).sum(0)).norm(dim=0)


@pytest.mark.parametrize("shape", [*SHAPES, (12, 9), (9, 12), (5, 40), (1, 7)], ids=str)
@pytest.mark.parametrize("kind", ["flat", "decaying", "low rank"])
def test_triplets_are_those_of_a_full_svd(shape, kind):
    W = base(*shape, kind)
    A, B = update(W, r=min(8, *shape))
    k = min(10, *shape)
    U, S, Vh = torch.linalg.svd(adapted(W, A, B), full_matrices=False)
    top = top_singular(AdaptedMatrix(W, A, B), 10)
    assert top.U.shape == (shape[0], k)
    assert top.Vh.shape == (k, shape[1])
    torch.testing.assert_close(top.S.double(), S[:k], rtol=0, atol=1e-5 * float(S[0]))
    distinct = top.error < 0.1
    assert (angles(top.U.double(), U[:, :k])[distinct] <= top.error[distinct] + 1e-5).all()
    assert (angles(top.Vh.T.double(), Vh[:k].T)[distinct] <= top.error[distinct] + 1e-5).all()
    assert top.error[S[:k] > 1e-3].max() < 2e-3


def test_float64_is_accurate_where_singular_values_are_near_each_other():
    W = base(120, 90, "clustered")
    A, B = update(W, r=4, strength=0.01)
    U, S, _ = torch.linalg.svd(adapted(W, A, B), full_matrices=False)
    top = top_singular(AdaptedMatrix(W.double(), A.double(), B.double()), 10, tolerance=1e-9, dtype=torch.float64)
    torch.testing.assert_close(top.S, S[:10], rtol=1e-12, atol=0)
    assert angles(top.U, U[:, :10]).max() < 1e-8


def test_residuals_are_what_the_error_promises():
    W = base(400, 300)
    A, B = update(W)
    top = top_singular(AdaptedMatrix(W, A, B), 10)
    M, U, V = adapted(W, A, B), top.U.double(), top.Vh.T.double()
    assert (M @ V - U * top.S).norm(dim=0).max() < 1e-5 * top.S[0]
    assert (M.T @ U - V * top.S).norm(dim=0).max() < 1e-5 * top.S[0]
    torch.testing.assert_close(U.T @ U, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(V.T @ V, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_scaled_as_in_dora(shape):
    W = base(*shape)
    A, B = update(W)
    m = torch.rand(shape[0]) + 0.5
    changed = adapted(W, A, B, m)
    c = (m / adapted(W, A, B).norm(dim=1)).float()
    top = top_singular(AdaptedMatrix(W, A, B, c), 5)
    torch.testing.assert_close(top.S.double(), torch.linalg.svdvals(changed)[:5], rtol=1e-5, atol=0)


def test_a_tiled_weight_gives_what_the_tensor_gives(monkeypatch):
    monkeypatch.setattr("loraloom.intruders.solvers.matrix.TILE_ROWS", 64)
    W = base(300, 200).bfloat16()
    A, B = update(W)
    tiled = TiledMatrix((300, 200), lambda start, stop: W[start:stop], W.device)
    whole, parts = (top_singular(AdaptedMatrix(w, A, B), 5) for w in (W.float(), tiled))
    torch.testing.assert_close(parts.S, whole.S, rtol=1e-5, atol=0)
    torch.testing.assert_close(parts.U.abs(), whole.U.abs(), rtol=0, atol=1e-4)


def test_the_result_is_the_same_every_time_and_leaves_the_random_state_alone():
    W = base(100, 80)
    A, B = update(W)
    state = torch.get_rng_state()
    first, second = (top_singular(AdaptedMatrix(W, A, B), 5) for _ in range(2))
    assert torch.equal(first.U, second.U)
    assert torch.equal(state, torch.get_rng_state())


def test_a_zero_matrix_has_zero_singular_values():
    top = top_singular(AdaptedMatrix(torch.zeros(30, 20), torch.zeros(2, 20), torch.zeros(30, 2)), 3)
    assert not top.S.any()
    assert top.U.isfinite().all()


@pytest.mark.parametrize("rank", [0, 1, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_passes_beyond_the_rank_add_nothing(rank, dtype):
    W = base(300, 320)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    W = U[:, :rank] * S[:rank] @ Vh[:rank]
    A, B = update(base(300, 320), r=4)
    true = torch.linalg.svdvals(adapted(W, A, B))[:10]
    # Passes are taken until residuals have met rounding, by then in a space with directions that W' does not reach.
    top = top_singular(AdaptedMatrix(W.to(dtype), A.to(dtype), B.to(dtype)), 10, tolerance=0.0, dtype=dtype)
    torch.testing.assert_close(top.S.double(), true, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(top.U.T @ top.U, torch.eye(10, dtype=dtype), rtol=0, atol=1e-5)


def test_a_block_that_adds_nothing_is_extended_by_orthogonal_columns():
    basis = torch.linalg.qr(torch.randn(200, 60)).Q
    Y = basis @ torch.randn(60, 8)
    Q, R, along = extend(Y, basis)
    torch.testing.assert_close(basis.T @ Q, torch.zeros(60, 8), rtol=0, atol=1e-5)
    torch.testing.assert_close(Q.T @ Q, torch.eye(8), rtol=0, atol=1e-5)
    torch.testing.assert_close(basis @ along + Q @ R, Y, rtol=0, atol=1e-5)
    assert extend(torch.zeros(200, 8), basis)[1].abs().max() == 0
