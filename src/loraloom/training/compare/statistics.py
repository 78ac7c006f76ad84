"""Mean, spread and two paired tests, on plain numbers.

Two methods that train with the same seeds see the same rows in the same order, so their results are compared pair by
pair: d_s = x_s - y_s for each seed s. Both tests are two-sided against "the difference is 0".

- Sign flips (Fisher, The Design of Experiments, 1935): if the methods are alike, each d_s could as well have had the
  other sign. p is the share of the 2^n signings whose sum is at least as far from 0 as the observed one. It assumes no
  distribution, and cannot be below 2 / 2^n: 0.25 with three seeds, 0.0625 with five.
- Student's t (1908): t = mean(d) / (sd(d) / sqrt(n)) with n - 1 degrees of freedom. It has more to say with few seeds,
  if the differences are normally distributed, which few seeds cannot show.
"""

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

MOST_PAIRS = 32  # 2^16 sums of each half; with more pairs the t test is as good


@dataclass(frozen=True)
class PairedTest:
    """A method against the baseline, over the seeds that both have finished."""

    n: int
    """Pairs."""
    difference: float
    """Mean of method minus baseline."""
    p_sign_flip: float | None
    """None above `MOST_PAIRS` pairs."""
    p_t: float | None
    """None with a single pair, or where all differences are equal and not 0."""
    smallest_p_sign_flip: float
    """2 / 2^n: what the exact test can reach at best with these pairs."""


def standard_deviation(values: Sequence[float]) -> float | None:
    """The sample's standard deviation, sqrt(sum (x - mean)^2 / (n - 1)); None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def paired_test(values: Sequence[float], baseline: Sequence[float]) -> PairedTest:
    """Both tests for `values` against `baseline`, pair by pair.

    Raises:
        ValueError: not equally many values, or none; or a difference that is not finite, as a run leaves that diverged:
            no p means anything there.
    """
    if len(values) != len(baseline) or not values:
        raise ValueError(f"expected pairs, got {len(values)} values and {len(baseline)} of the baseline")
    differences = [x - y for x, y in zip(values, baseline, strict=True)]
    if not all(map(math.isfinite, differences)):
        raise ValueError(f"expected finite values, got the differences {differences}")
    n = len(differences)
    return PairedTest(
        n, statistics.fmean(differences), sign_flip_p(differences), t_test_p(differences), min(1.0, 2.0 ** (1 - n))
    )


def sign_flip_p(differences: Sequence[float]) -> float | None:
    """Exact two-sided p of the sign-flip test; None above `MOST_PAIRS` differences.

    The 2^n signed sums are not listed: each is a sum of one half of the differences and one of the other, and the
    second halves that are far enough from 0 with a given first one are counted in their sorted list.
    """
    if len(differences) > MOST_PAIRS:
        return None
    # Equal sums may differ by rounding, and accuracies of a small test set tie often.
    observed = abs(math.fsum(differences)) - 1e-9 * max(map(abs, differences), default=0.0)
    if observed <= 0.0:
        return 1.0
    half = len(differences) // 2
    first, second = _signed_sums(differences[:half]), sorted(_signed_sums(differences[half:]))
    far = sum(len(second) - bisect_left(second, observed - x) + bisect_right(second, -observed - x) for x in first)
    return far / 2 ** len(differences)


def _signed_sums(differences: Sequence[float]) -> list[float]:
    sums = [0.0]
    for difference in differences:
        sums = [signed for total in sums for signed in (total + difference, total - difference)]
    return sums


def t_test_p(differences: Sequence[float]) -> float | None:
    """Two-sided p of the paired t test; None where the differences have no spread that it could measure against."""
    spread = standard_deviation(differences)
    if spread is None:
        return None
    centre = statistics.fmean(differences)
    if spread <= 1e-12 * abs(centre) or spread == 0.0:
        return 1.0 if centre == 0.0 else None
    return student_t_two_sided(centre / (spread / math.sqrt(len(differences))), len(differences) - 1)


def student_t_two_sided(t: float, degrees: int) -> float:
    """P(|T| >= |t|) for Student's t with a whole number of degrees of freedom.

    With theta = atan(|t| / sqrt(degrees)) the probability P(|T| < |t|) is a finite sum (Abramowitz and Stegun, 26.7.3
    for odd and 26.7.4 for even degrees).
    """
    theta = math.atan(abs(t) / math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1, degrees // 2 + 1):
        total += term
        term *= cosine**2 * ((2 * k) / (2 * k + 1) if odd else (2 * k - 1) / (2 * k))
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return max(0.0, 1.0 - inside)
