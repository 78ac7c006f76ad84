"""The adapted weight against float64, where rows all but cancel and where they are zero."""

import pytest
import torch

from loraloom.update.terms import Term, alpha_of, scaling
from loraloom.update.update import Update, row_norm, row_scale

OUT, IN, R = 200, 48, 4
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def cancelling(left, rows, dtype=torch.float32):
    """W (OUT, IN) of rank R, A and B with ``B A = -(1 - left) W`` in the first rows, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(R, IN, generator=generator)
    X = torch.randn(OUT, R, generator=generator)
    W = (X @ A).to(dtype)
    B = torch.randn(OUT, R, generator=generator)
    B[:rows] = -(1 - left) * X[:rows]
    return W, A, B


def exact_norm(W, A, B):
    return (W.double() + B.double() @ A.double()).norm(dim=1)


@dtypes
@pytest.mark.parametrize("rows", [1, 30, OUT])
@pytest.mark.parametrize("left", [0.3, 0.1, 1e-2, 1e-3, 1e-4])
def test_the_norm_of_rows_that_all_but_cancel(left, rows, dtype):
    """No worse than measuring W + B A in float32, whose entries are off by R units in the last place of W's."""
    W, A, B = cancelling(left, rows, dtype)
    exact = exact_norm(W, A, B)
    direct = R * torch.finfo(torch.float32).eps * W.double().norm(dim=1)
    tolerance = torch.maximum(direct, 3e-5 * exact)  # the bound that row_norm derives for the others
    assert ((row_norm(W, A, B) - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("rows", [1, 30, 60])
@pytest.mark.parametrize("left", [1e-2, 1e-4])
def test_the_norm_where_a_branch_would_wait_for_the_device(monkeypatch, left, rows):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    W, A, B = cancelling(left, rows)
    exact = exact_norm(W, A, B)
    direct = R * torch.finfo(torch.float32).eps * W.double().norm(dim=1)
    assert ((row_norm(W, A, B) - exact).abs() <= torch.maximum(direct, 3e-5 * exact)).all()


def test_every_row_cancels_where_a_branch_would_wait_for_the_device(monkeypatch):
    """More rows than are measured: the others are at least kept where rounding leaves them."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    W, A, B = cancelling(1e-4, OUT)
    assert (row_norm(W, A, B) >= 0.9e-4 * W.norm(dim=1)).all()
    assert (row_norm(W, A, B) <= 3e-3 * W.norm(dim=1)).all()


@pytest.mark.parametrize("left", [1e-2, 1e-4])
def test_the_adapted_weight_of_rows_that_all_but_cancel(left):
    W, A, B = cancelling(left, OUT)
    m = torch.rand(OUT) + 0.5
    W64 = W.double() + B.double() @ A.double()
    exact = m.double()[:, None] * W64 / W64.norm(dim=1, keepdim=True)
    # Each entry of W + B A is off by R units of W's, relative to a row of length `left`.
    units = R * torch.finfo(torch.float32).eps / left
    for weight in (
        Update([Term(A, B)], m).adapted_weight(W),
        row_scale(m, row_norm(W, A, B))[:, None] * (W + B @ A),
        W + Update([Term(A, B)], m).change(W),
    ):
        torch.testing.assert_close(weight.double(), exact, rtol=0, atol=4 * units * m.max().item())


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("magnitude", [0.0, 1.0, 1e30])
def test_a_row_of_zeros_stays_one(monkeypatch, magnitude, compiling):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    W, A, B = cancelling(0.5, 0)
    W[3], B[3] = 0, 0
    m = torch.full((OUT,), magnitude)
    update = Update([Term(A, B)], m)
    assert update.row_norm(W)[3] == 0
    assert row_scale(m, update.row_norm(W))[3] == 0
    assert (update.adapted_weight(W)[3] == 0).all()
    assert update.adapted_weight(W).isfinite().all()


def test_the_scale_has_a_finite_gradient_at_a_row_of_zeros():
    m = torch.ones(3, requires_grad=True)
    row_scale(m, torch.tensor([2.0, 0.0, 4.0])).sum().backward()
    assert m.grad.tolist() == [0.5, 0.0, 0.25]


def test_a_row_whose_base_is_zero_is_the_update_at_the_length_m():
    W, A, B = cancelling(0.5, 0)
    W[3] = 0
    m = torch.full((OUT,), 2.0)
    weight = Update([Term(A, B)], m).adapted_weight(W)
    torch.testing.assert_close(weight[3], 2 * (B[3] @ A) / (B[3] @ A).norm())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("r", [1, 3, 8, 64])
@pytest.mark.parametrize("alpha", [1, 16, 7, 0.3])
def test_alpha_is_the_inverse_of_scaling(alpha, r, rslora):
    again = alpha_of(scaling(r, alpha, rslora), r, rslora)
    assert again == pytest.approx(alpha, rel=1e-15)
    assert isinstance(again, int) == isinstance(alpha, int)
