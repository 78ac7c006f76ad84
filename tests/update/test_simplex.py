"""Each projection is feasible, idempotent and nearest; the references are brute force over supports and bisection."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loraloom.optim import (
    KSparse,
    Simplex,
    SimplexKSparse,
    project_k_sparse,
    project_simplex,
    project_simplex_k_sparse,
)

reproducible = settings(derandomize=True, deadline=None, max_examples=80, database=None)

# Small integers among the floats, so that ties are common.
ENTRY = st.one_of(st.integers(-3, 3).map(float), st.floats(-10, 10, allow_subnormal=False))
VECTOR = st.lists(ENTRY, min_size=1, max_size=7).map(lambda v: torch.tensor(v, dtype=torch.float64))
RADIUS = st.sampled_from([1e-3, 1.0, 7.5])


@st.composite
def vector_and_k(draw: st.DrawFn) -> tuple[Tensor, int]:
    w = draw(VECTOR)
    return w, draw(st.integers(1, len(w)))


def supports(n: int, k: int) -> list[tuple[int, ...]]:
    return list(itertools.combinations(range(n), k))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).square().sum())


def simplex_by_bisection(w: Tensor, radius: float) -> Tensor:
    """max(w - theta, 0) with theta found by bisection on the sum, which decreases in theta."""
    low, high = float(w.min()) - radius, float(w.max())
    for _ in range(200):
        theta = (low + high) / 2
        if float((w - theta).clamp(min=0).sum()) > radius:
            low = theta
        else:
            high = theta
    return (w - (low + high) / 2).clamp(min=0)


@reproducible
@given(vector_and_k())
def test_magnitude_k_sparse_is_the_nearest_sparse_point(case: tuple[Tensor, int]) -> None:
    w, k = case
    out = project_k_sparse(w, k, by="magnitude")
    assert int((out != 0).sum()) <= k
    assert torch.equal(project_k_sparse(out, k, by="magnitude"), out)
    best = min(distance(w, torch.zeros_like(w).index_copy(0, s, w[s])) for s in map(torch.tensor, supports(len(w), k)))
    assert distance(w, out) <= best + 1e-12


@reproducible
@given(vector_and_k(), st.sampled_from(["signed", "magnitude"]))
def test_nonnegative_k_sparse_is_the_nearest_sparse_nonnegative_point(case: tuple[Tensor, int], by: str) -> None:
    w, k = case
    out = project_k_sparse(w, k, by=by, nonnegative=True)
    assert int((out != 0).sum()) <= k
    assert (out >= 0).all()
    assert torch.equal(project_k_sparse(out, k, by=by, nonnegative=True), out)
    positive = w.clamp(min=0)
    best = min(
        distance(w, torch.zeros_like(w).index_copy(0, s, positive[s])) for s in map(torch.tensor, supports(len(w), k))
    )
    assert distance(w, out) <= best + 1e-12


@reproducible
@given(vector_and_k())
def test_signed_k_sparse_keeps_the_k_largest_values(case: tuple[Tensor, int]) -> None:
    w, k = case
    out = project_k_sparse(w, k)
    # The reference rule in plain Python: sort by value, then by index.
    kept = sorted(range(len(w)), key=lambda i: (-float(w[i]), i))[:k]
    assert torch.equal(out, torch.tensor([float(w[i]) if i in kept else 0.0 for i in range(len(w))], dtype=w.dtype))
    if int((w >= 0).sum()) >= k:
        assert torch.equal(project_k_sparse(out, k), out)
        assert torch.equal(out, project_k_sparse(w, k, nonnegative=True))


def test_signed_k_sparse_keeps_negative_entries_when_it_must() -> None:
    # As the docstring warns: the zeros outrank the entry that the first application kept.
    once = project_k_sparse(torch.tensor([-1.0, -2.0]), 1)
    assert once.tolist() == [-1.0, 0.0]
    assert project_k_sparse(once, 1).tolist() == [0.0, 0.0]


@reproducible
@given(VECTOR, RADIUS)
def test_simplex_is_feasible_idempotent_and_agrees_with_bisection(w: Tensor, radius: float) -> None:
    out = project_simplex(w, radius)
    assert (out >= 0).all()
    assert float(out.sum()) == pytest.approx(radius, rel=1e-13)
    torch.testing.assert_close(project_simplex(out, radius), out, rtol=1e-12, atol=1e-13 * radius)
    torch.testing.assert_close(out, simplex_by_bisection(w, radius), rtol=0, atol=1e-13 * max(radius, 10))


@reproducible
@given(VECTOR, RADIUS, st.integers(0, 2**31))
def test_no_point_of_the_simplex_is_closer(w: Tensor, radius: float, seed: int) -> None:
    # The variational inequality <w - P(w), v - P(w)> <= 0 for every v in the set holds for the nearest point alone.
    # It is linear in v, so that the vertices decide for the whole simplex.
    out = project_simplex(w, radius)
    for i in range(len(w)):
        vertex = torch.zeros_like(w)
        vertex[i] = radius
        assert float((w - out) @ (vertex - out)) <= 1e-11 * radius
    random = torch.rand(len(w), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    feasible = radius * random / random.sum()
    assert distance(w, out) <= distance(w, feasible) + 1e-12


@reproducible
@given(vector_and_k(), RADIUS)
def test_k_sparse_simplex_is_the_best_of_all_supports(case: tuple[Tensor, int], radius: float) -> None:
    w, k = case
    out = project_simplex_k_sparse(w, k, radius)
    assert int((out != 0).sum()) <= k
    assert (out >= 0).all()
    assert float(out.sum()) == pytest.approx(radius, rel=1e-13)
    torch.testing.assert_close(project_simplex_k_sparse(out, k, radius), out, rtol=1e-12, atol=1e-13 * radius)
    candidates = (
        torch.zeros_like(w).index_copy(0, s, simplex_by_bisection(w[s], radius))
        for s in map(torch.tensor, supports(len(w), k))
    )
    assert distance(w, out) <= min(distance(w, c) for c in candidates) + 1e-9


@pytest.mark.parametrize("w", [[1e308, -1e308, 1e308], [-3e38, 3e38], [1e-310, 0.0], [5.0]])
def test_simplex_of_extreme_finite_values_stays_feasible(w: list[float]) -> None:
    vector = torch.tensor(w, dtype=torch.float64)
    out = project_simplex(vector)
    largest = [x for x in w if math.isclose(x, max(w), abs_tol=1e-300)]
    assert out.tolist() == pytest.approx([1 / len(largest) if x in largest else 0.0 for x in w], abs=1e-15)


def test_simplex_keeps_float64_accuracy_for_many_float32_entries() -> None:
    w = torch.randn(4096, generator=torch.Generator().manual_seed(0))
    expected = simplex_by_bisection(w.double(), 1.0)
    torch.testing.assert_close(project_simplex(w).double(), expected, rtol=6e-8, atol=1e-13)


PROJECTIONS = [
    lambda w: project_k_sparse(w, 2),
    lambda w: project_k_sparse(w, 2, by="magnitude"),
    lambda w: project_simplex(w),
    lambda w: project_simplex_k_sparse(w, 2),
]


@pytest.mark.parametrize("project", PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_kept_and_the_input_is_not_touched(project, dtype: torch.dtype) -> None:
    w = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=dtype)
    before = w.clone()
    out = project(w)
    assert out.dtype == dtype
    assert torch.equal(w, before)
    assert out.data_ptr() != w.data_ptr()


def test_ties_go_to_the_lowest_index() -> None:
    # 300 equal entries: an unstable sort or top-k shows itself beyond the lengths that it sorts by insertion.
    w = torch.ones(300)
    assert project_k_sparse(w, 7).nonzero().flatten().tolist() == list(range(7))
    assert project_k_sparse(-w, 7, by="magnitude").nonzero().flatten().tolist() == list(range(7))
    assert project_simplex_k_sparse(w, 7).nonzero().flatten().tolist() == list(range(7))


@pytest.mark.parametrize("project", PROJECTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_entries_are_named(project, bad: float) -> None:
    with pytest.raises(ValueError, match=r"w\[1\] is -?(nan|inf); a projection needs finite values"):
        project(torch.tensor([1.0, bad, 3.0]))


@pytest.mark.parametrize("project", PROJECTIONS)
@pytest.mark.parametrize("w", [torch.zeros(0), torch.zeros(2, 2), torch.tensor(1.0), torch.tensor([1, 2])])
def test_only_floating_point_vectors_are_accepted(project, w: Tensor) -> None:
    with pytest.raises(ValueError, match="pass a floating-point vector"):
        project(w)


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_out_of_range_is_refused(k: int) -> None:
    for project in (project_k_sparse, project_simplex_k_sparse):
        with pytest.raises(ValueError, match=f"k={k} is out of range: pass 1 to 3"):
            project(torch.ones(3), k)


@pytest.mark.parametrize("radius", [0.0, -1.0, math.inf, math.nan])
def test_radius_out_of_range_is_refused(radius: float) -> None:
    with pytest.raises(ValueError, match="pass a positive, finite number"):
        project_simplex(torch.ones(3), radius)
    with pytest.raises(ValueError, match="pass a positive, finite number"):
        project_simplex_k_sparse(torch.ones(3), 2, radius)


def test_unknown_ranking_is_refused() -> None:
    with pytest.raises(ValueError, match="by='absolute' is not a ranking; use 'signed' or 'magnitude'"):
        project_k_sparse(torch.ones(3), 2, by="absolute")


def test_constraints_are_their_projections() -> None:
    w = torch.tensor([0.3, -2.0, 0.9, 0.1])
    assert torch.equal(KSparse(2).project(w), project_k_sparse(w, 2))
    assert torch.equal(KSparse(2, by="magnitude").project(w), project_k_sparse(w, 2, by="magnitude"))
    assert torch.equal(KSparse(3, nonnegative=True).project(w), project_k_sparse(w, 3, nonnegative=True))
    assert torch.equal(Simplex(2.0).project(w), project_simplex(w, 2.0))
    assert torch.equal(SimplexKSparse(2, 3.0).project(w), project_simplex_k_sparse(w, 2, 3.0))
