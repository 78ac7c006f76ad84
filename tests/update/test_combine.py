"""Combining against dense references, and what every method must keep."""

import pytest
import torch

from loraloom.update.combine import combine

METHODS = ("linear", "ties", "dare", "core")
OUT, IN = 12, 9


def members(count, r=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [(draw(r, IN), draw(OUT, r)) for _ in range(count)]


def product(A, B):
    return B @ A


@pytest.mark.parametrize("weight", [1.0, -0.3])
@pytest.mark.parametrize("method", METHODS)
def test_one_member_is_itself_times_its_weight(method, weight):
    (member,) = members(1)
    A, B, error = combine([member], [weight], method)
    torch.testing.assert_close(B @ A, weight * product(*member))
    assert error == 0


@pytest.mark.parametrize("method", METHODS)
def test_order_does_not_matter(method):
    some, weights = members(3), [1.0, 0.5, -0.7]
    A, B, _ = combine(some, weights, method)
    A2, B2, _ = combine(some[::-1], weights[::-1], method)
    torch.testing.assert_close(B @ A, B2 @ A2)


def test_linear_adds_weights():
    some = members(2)
    A, B, error = combine([*some, some[0]], [0.4, 1.0, 0.6], "linear")
    torch.testing.assert_close(B @ A, product(*some[0]) + product(*some[1]))
    assert error == 0


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_the_algorithm_of_the_paper_entry_by_entry(density):
    some, weights = members(3), [1.0, 0.5, 2.0]
    deltas = [product(*member) for member in some]
    expected = torch.zeros(OUT, IN, dtype=torch.float64)
    trimmed = []
    for delta, weight in zip(deltas, weights, strict=True):
        keep = round(density * delta.numel())
        smallest = delta.abs().flatten().sort(descending=True).values[keep - 1]
        trimmed.append([[weight * x if abs(x) >= smallest else 0.0 for x in row] for row in delta.tolist()])
    for i in range(OUT):
        for j in range(IN):
            values = [t[i][j] for t in trimmed]
            agreeing = [x for x in values if x * sum(values) > 0]
            expected[i, j] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    A, B, error = combine(some, weights, "ties", density=density, rank=min(OUT, IN))
    torch.testing.assert_close(B @ A, expected)
    assert error < 1e-12


def test_dare_has_the_sum_as_its_expectation_and_only_masked_entries():
    some, weights = members(2), [1.0, -0.5]
    total = torch.zeros(OUT, IN, dtype=torch.float64)
    draws = 400
    for i in range(draws):
        A, B, _ = combine(some, weights, "dare", density=0.5, rank=min(OUT, IN), names=[f"a{i}", f"b{i}"])
        total += B @ A
    expected = product(*some[0]) - 0.5 * product(*some[1])
    # Each entry's standard deviation is at most its members' sizes times sqrt((1 - p) / p) = 1, over sqrt(draws).
    spread = (product(*some[0]).abs() + 0.5 * product(*some[1]).abs()) / draws**0.5
    assert ((total / draws - expected).abs() < 5 * spread).all()
    (one, _), (two, _) = (combine(some, weights, "dare", names=["x", "y"])[:2] for _ in range(2))
    assert torch.equal(one, two)


def test_core_is_the_dense_svd_result():
    some, weights = members(3, r=2), [1.0, 0.5, -2.0]
    U, S, V = [], [], []
    for member, weight in zip(some, weights, strict=True):
        u, s, vh = torch.linalg.svd(weight * product(*member), full_matrices=False)
        U, S, V = [*U, u[:, :2]], [*S, s[:2]], [*V, vh[:2].mT]
    polars = []
    for X in (torch.cat(U, 1), torch.cat(V, 1)):
        p, _, q = torch.linalg.svd(X, full_matrices=False)
        polars.append(p @ q)
    expected = polars[0] @ torch.cat(S).diag() @ polars[1].mT
    A, B, error = combine(some, weights, "core")
    torch.testing.assert_close(B @ A, expected)
    assert error == 0


@pytest.mark.parametrize("method", METHODS)
def test_a_smaller_rank_is_the_best_one_and_says_what_it_loses(method):
    some, weights = members(3), [1.0, 0.5, -0.7]
    full = product(*combine(some, weights, method, rank=min(OUT, IN))[:2])
    A, B, error = combine(some, weights, method, rank=4)
    assert A.shape == (4, IN)
    S = torch.linalg.svdvals(full)
    torch.testing.assert_close(error, float(S[4:].norm() / S.norm()), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(float((full - B @ A).norm() / full.norm()), error, rtol=1e-6, atol=1e-9)


def test_more_columns_than_rows_and_equal_members_have_a_core():
    A, B = members(1)[0]
    some = [(A, B)] * 5  # sum r = 15 > 9, and the members are all alike
    A, B, _ = combine(some, [1.0] * 5, "core")
    assert (B @ A).isfinite().all()


@pytest.mark.parametrize(
    "wrong", [{"weights": [1.0]}, {"density": 0.0}, {"method": "average"}, {"members": [], "weights": []}]
)
def test_what_cannot_be_combined_is_an_error(wrong):
    with pytest.raises(ValueError, match=r"expected|density|not known"):
        combine(**{"members": members(2), "weights": [1.0, 1.0], "method": "linear"} | wrong)
