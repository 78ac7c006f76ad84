"""Where a value is on an axis, and which color it has."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loraloom.report.model import Heatmap
from loraloom.text import decimals

COLOR_STEPS = 11


@dataclass(frozen=True)
class Axis:
    """From data to a share of the axis, 0 at its beginning and 1 at its end."""

    low: float
    high: float
    ticks: list[float]
    log: bool = False

    def share(self, value: float) -> float:
        """Where `value` is on the axis."""
        if self.log:
            return (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def linear_axis(values: Sequence[float], *, tight: bool = False, count: int = 5) -> Axis:
    """An axis over `values` with about `count` ticks at round numbers.

    Args:
        values: what it has to hold; none gives 0 to 1, all equal gives room on both sides.
        tight: end at the smallest and largest value, not at the ticks around them.
        count: how many intervals to aim at.
    """
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # equal, but for rounding
        middle = (low + high) / 2
        room = abs(middle) * 0.1 or 1.0
        low, high = middle - room, middle + room
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [float(f"{i * step:.12g}") for i in range(first, last + 1)]
    if tight:
        slack = (high - low) * 1e-9
        return Axis(low, high, [tick for tick in ticks if low - slack <= tick <= high + slack])
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(values: Sequence[float]) -> Axis:
    """A logarithmic axis over positive values: ticks at powers of ten, or at 1, 2, 5 over less than two of those."""
    low, high = (min(values), max(values)) if values else (1.0, 10.0)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    decades = range(first, max(last, first + 1) + 1)
    multiples = (1, 2, 5) if math.log10(high / low) < 1.7 else (1,)
    candidates = [m * 10.0**power for power in decades for m in multiples]
    start = max((tick for tick in candidates if tick <= low * 1.0001), default=candidates[0])
    end = min((tick for tick in candidates if tick >= high * 0.9999), default=candidates[-1])
    if start == end:
        end = candidates[candidates.index(start) + 1]
    return Axis(start, end, [tick for tick in candidates if start <= tick <= end], log=True)


def color_step(value: float, low: float, high: float) -> int:
    """Which of the `COLOR_STEPS` colors from `low` to `high` a value has; all equal is the middle one."""
    if low == high:
        return COLOR_STEPS // 2
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    return min(int(share * COLOR_STEPS), COLOR_STEPS - 1)


def color_range(figure: Heatmap) -> tuple[float, float]:
    """The values of the first and the last color."""
    values = [value for row in figure.values for value in row if value is not None] or [0.0]
    largest = max(abs(value) for value in values)
    low = figure.low if figure.low is not None else (-largest if figure.signed else min(values))
    high = figure.high if figure.high is not None else (largest if figure.signed else max(values))
    return low, high


def cell_decimals(figure: Heatmap) -> int:
    """Decimals of the numbers in the cells: none for counts, else three digits of the largest."""
    values = [value for row in figure.values for value in row if value is not None]
    return 0 if all(value == int(value) for value in values) else decimals(values, 3)
