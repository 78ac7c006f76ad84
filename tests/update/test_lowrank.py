"""SVDs of low-rank products against torch's SVD of the dense product."""

import math

import pytest
import torch

from loraloom.update.lowrank import effective_rank, factored_svd, stable_rank, truncate
from loraloom.update.terms import Term, fold
from loraloom.update.update import Update

# r less than, between, and more than both sides.
SHAPES = [(4, 30, 20), (4, 20, 30), (25, 20, 30), (40, 20, 30), (1, 5, 1)]


def factors(r, out, width, dtype=torch.float64):
    return torch.randn(r, width, dtype=dtype), torch.randn(out, r, dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factored_svd_is_the_svd_of_the_product(shape):
    A, B = factors(*shape)
    U, S, Vh = factored_svd(A, B)
    q = min(shape)
    identity = torch.eye(q, dtype=torch.float64)
    torch.testing.assert_close(S, torch.linalg.svdvals(B @ A)[:q])
    torch.testing.assert_close(U * S @ Vh, B @ A)
    torch.testing.assert_close(U.T @ U, identity)
    torch.testing.assert_close(Vh @ Vh.T, identity)


@pytest.mark.parametrize("which", ["zero B", "repeated rows"])
def test_vectors_are_orthonormal_where_the_product_has_a_lower_rank(which):
    A, B = factors(6, 30, 20)
    if which == "zero B":
        B.zero_()
    else:
        A[3:] = A[:3]
    U, S, Vh = factored_svd(A, B)
    assert S[3:].max() < 1e-12 * max(1.0, float(S[0]))
    torch.testing.assert_close(U.T @ U, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(6, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_factors_are_decomposed_in_float32(dtype):
    A, B = factors(4, 30, 20, dtype)
    U, S, Vh = factored_svd(A, B)
    assert U.dtype == S.dtype == Vh.dtype == torch.float32
    torch.testing.assert_close(U * S @ Vh, B.float() @ A.float(), rtol=0, atol=1e-5 * float(S[0]))


def test_a_sum_of_products_is_one_product():
    mixer, gate = torch.randn(3, 3, dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    terms = [Term(*factors(3, 30, 20), mixer, gate, 2.0), Term(*factors(5, 30, 20), scaling=-0.5)]
    _, S, _ = factored_svd(*fold(terms))
    torch.testing.assert_close(S, torch.linalg.svdvals(Update(terms).delta())[:8])


@pytest.mark.parametrize("rank", [1, 3, 6, 100])
def test_truncation_is_the_best_and_reports_its_error(rank):
    A, B = factors(6, 30, 20)
    A2, B2, error = truncate(A, B, rank)
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    k = min(rank, 6)
    assert A2.shape == (k, 20)
    assert B2.shape == (30, k)
    torch.testing.assert_close(B2 @ A2, U[:, :k] * S[:k] @ Vh[:k])
    assert error == pytest.approx(float((B @ A - B2 @ A2).norm() / (B @ A).norm()), abs=1e-7)
    torch.testing.assert_close(A2 @ A2.T, B2.T @ B2)  # evenly shared out


def test_truncating_again_changes_nothing():
    A, B, _ = truncate(*factors(6, 30, 20), rank=3)
    A2, B2, error = truncate(A, B, rank=3)
    torch.testing.assert_close(B2 @ A2, B @ A)
    assert error == 0


def test_without_a_limit_the_factors_stay_as_they_are():
    A, B = factors(6, 30, 20)
    A2, B2, error = truncate(A, B)
    assert torch.equal(A, A2)
    assert torch.equal(B, B2)
    assert error == 0


def test_energy_keeps_the_fewest_singular_values_that_hold_it():
    Q_B, Q_A = (torch.linalg.qr(torch.randn(n, 4, dtype=torch.float64)).Q for n in (30, 20))
    S = torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    A, B = Q_A.T, Q_B * S
    share = (S.square().cumsum(0) / S.square().sum()).tolist()
    for energy, k in [(share[0] - 0.01, 1), (share[0] + 0.01, 2), (share[1] + 0.01, 3), (share[2] + 0.001, 4), (1, 4)]:
        A2, _, error = truncate(A, B, energy=energy)
        assert len(A2) == k
        assert error**2 <= 1 - energy + 1e-12
    assert len(truncate(A, B, rank=2, energy=1)[0]) == len(truncate(A, B, rank=3, energy=share[0] + 0.01)[0]) == 2


def test_a_zero_product_truncates_to_zero():
    A, B = factors(6, 30, 20)
    A2, B2, error = truncate(A, B * 0, rank=2)
    assert error == 0
    assert not (B2 @ A2).any()
    assert len(truncate(A, B * 0, energy=0.9)[0]) == 1


@pytest.mark.parametrize("bad", [{"rank": 0}, {"energy": 0.0}, {"energy": 1.5}])
def test_a_limit_out_of_range_is_an_error(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        truncate(*factors(2, 5, 5), **bad)


def test_ranks_of_known_spectra():
    equal, single = torch.ones(5), torch.tensor([3.0, 0.0, 0.0])
    assert effective_rank(equal) == pytest.approx(5)
    assert stable_rank(equal) == pytest.approx(5)
    assert effective_rank(single) == pytest.approx(1)
    assert stable_rank(single) == pytest.approx(1)
    assert effective_rank(equal * 0) == stable_rank(equal * 0) == 0
    # p = (2/3, 1/3): entropy log 3 - 2/3 log 2.
    assert effective_rank(torch.tensor([2.0, 1.0])) == pytest.approx(3 * math.exp(-2 / 3 * math.log(2)))
    assert stable_rank(torch.tensor([2.0, 1.0])) == pytest.approx(1.25)


def test_ranks_do_not_depend_on_scale():
    S = torch.rand(7)
    for rank in (effective_rank, stable_rank):
        assert rank(S * 1e-20) == pytest.approx(rank(S), rel=1e-5)
