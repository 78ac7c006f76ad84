"""Both paired tests against scipy, and what they must and cannot say with few seeds."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from loraloom.training.compare.statistics import (
    MOST_PAIRS,
    paired_test,
    sign_flip_p,
    standard_deviation,
    student_t_two_sided,
    t_test_p,
)

DIFFERENCES = [[0.1, 0.2, 0.3], [0.1, -0.2, 0.3, 0.05], [1.0, 1.0, 2.0, -1.0, 0.5, 0.25, 3.0], [-0.01, -0.02]]
BROKEN = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 9, 10, 31])
@pytest.mark.parametrize("t", [0.0, 0.1, -1.0, 2.776, 12.706])
def test_student_t_is_scipys(t, degrees):
    assert student_t_two_sided(t, degrees) == pytest.approx(2 * stats.t.sf(abs(t), degrees), abs=1e-13)


@pytest.mark.parametrize("differences", DIFFERENCES)
def test_paired_t_is_scipys(differences):
    assert t_test_p(differences) == pytest.approx(stats.ttest_1samp(differences, 0.0).pvalue, rel=1e-9)


@pytest.mark.parametrize("differences", DIFFERENCES)
def test_sign_flip_is_scipys_exact_permutation_test(differences):
    zeros = [0.0] * len(differences)
    reference = stats.permutation_test(
        (differences, zeros),
        lambda x, y, axis: (x - y).mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=math.inf,
    )
    assert sign_flip_p(differences) == reference.pvalue


@settings(deadline=None, derandomize=True, database=None, max_examples=50)
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=8), st.floats(0.001, 100))
def test_sign_flip_does_not_depend_on_scale_or_sign(counts, scale):
    """Also where sums tie up to rounding: the differences are multiples of one number, as accuracies are."""
    p = sign_flip_p([float(count) for count in counts])
    assert sign_flip_p([count * scale for count in counts]) == p
    assert sign_flip_p([-count * scale for count in counts]) == p
    assert p >= min(1.0, 2.0 ** (1 - len(counts)))


@pytest.mark.parametrize(("n", "smallest"), [(1, 1.0), (2, 0.5), (3, 0.25), (5, 0.0625), (6, 0.03125)])
def test_the_smallest_exact_p_is_reached_and_reported(n, smallest):
    test = paired_test([1.0 + 0.01 * i for i in range(n)], [0.0] * n)
    assert (test.n, test.p_sign_flip, test.smallest_p_sign_flip) == (n, smallest, smallest)
    assert test.difference == pytest.approx(1 + 0.005 * (n - 1))


def test_equal_results_are_no_evidence():
    test = paired_test([0.5, 0.7, 0.9], [0.5, 0.7, 0.9])
    assert (test.difference, test.p_sign_flip, test.p_t) == (0.0, 1.0, 1.0)


def test_without_spread_the_t_test_says_nothing():
    assert t_test_p([0.5]) is None
    assert t_test_p([0.5, 0.5, 0.5]) is None
    assert t_test_p([0.1 + 0.2, 0.3, 0.3]) is None  # equal up to rounding


@pytest.mark.parametrize("counts", [range(-4, 20), [3, -1] * 12, [1] * MOST_PAIRS])
def test_many_pairs_are_counted_exactly(counts):
    """Against the distribution of the signed sum of whole numbers, by convolution."""
    sums = {0: 1}
    for count in counts:
        reached = {old + sign * count for old in sums for sign in (-1, 1)}
        sums = {total: sums.get(total - count, 0) + sums.get(total + count, 0) for total in reached}
    observed = abs(sum(counts))
    far = sum(ways for total, ways in sums.items() if abs(total) >= observed)
    assert sign_flip_p([0.005 * count for count in counts]) == far / sum(sums.values())


@pytest.mark.parametrize("broken", BROKEN)
def test_a_run_that_diverged_is_no_evidence(broken):
    with pytest.raises(ValueError, match="finite"):
        paired_test([0.9, broken, 0.8], [0.5, 0.5, 0.5])


def test_too_many_pairs_to_enumerate():
    assert sign_flip_p([1.0] * (MOST_PAIRS + 1)) is None


def test_spread_of_a_sample():
    values = [0.81, 0.84, 0.9]
    assert standard_deviation(values) == pytest.approx(stats.tstd(values))
    assert standard_deviation([0.81]) is None


def test_pairs_are_needed():
    with pytest.raises(ValueError, match="got 2 values and 1 of the baseline"):
        paired_test([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="got 0 values"):
        paired_test([], [])
