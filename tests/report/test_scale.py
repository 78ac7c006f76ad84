"""Axes hold what they show, numbers keep their digits, and every color can be read."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraloom.report.model import Heatmap
from loraloom.report.palette import DARK, LIGHT, contrast, luminance, text_on
from loraloom.report.scale import COLOR_STEPS, color_range, color_step, linear_axis, log_axis
from loraloom.text import MINUS, MISSING, column, fixed, number

finite = st.floats(-1e12, 1e12, allow_subnormal=False).filter(lambda x: x == 0 or abs(x) > 1e-12)


@given(st.lists(finite, min_size=1, max_size=8), st.booleans())
def test_a_linear_axis_holds_its_values_and_has_round_ticks(values, tight):
    axis = linear_axis(values, tight=tight)
    assert all(-1e-6 <= axis.share(value) <= 1 + 1e-6 for value in values)
    assert all(-1e-6 <= axis.share(tick) <= 1 + 1e-6 for tick in axis.ticks)
    assert axis.ticks == sorted(set(axis.ticks))
    assert (1 if tight else 2) <= len(axis.ticks) <= 9


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=8))
def test_a_log_axis_holds_its_values(values):
    axis = log_axis(values)
    assert axis.low > 0
    assert all(-1e-3 <= axis.share(value) <= 1 + 1e-3 for value in values)
    assert 2 <= len(axis.ticks) <= 21


@given(finite, finite, finite)
def test_colors_follow_the_values(low, high, value):
    low, high = sorted((low, high))
    step = color_step(value, low, high)
    assert 0 <= step < COLOR_STEPS
    if low < high:
        assert color_step(low, low, high) == 0
        assert color_step(high, low, high) == COLOR_STEPS - 1


def test_zero_is_the_middle_of_signed_colors():
    low, high = color_range(Heatmap("r", "c", ["a"], ["b", "c"], [[-3.0, 1.0]], signed=True))
    assert (low, high) == (-3.0, 3.0)
    assert color_step(0.0, low, high) == COLOR_STEPS // 2


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.88534, "0.8853"),
        (0.5, "0.5"),
        (-0.25, f"{MINUS}0.25"),
        (1234567, "1,234,567"),
        (12345.678, "12,346"),
        (1.5e-5, f"1.5e{MINUS}5"),
        (0.0, "0"),
        (None, MISSING),
        (3.0, "3"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


def test_units():
    assert number(3 * 2**29, "bytes") == "1.50 GiB"
    assert number(512, "bytes") == "512 B"
    assert number(1.5, "s") == "1.5 s"
    assert number(12.5, "%") == "12.5%"


@given(st.floats(1e-3, 1e9) | st.floats(-1e9, -1e-3))
def test_four_digits_are_kept(value):
    shown = float(number(value).replace(",", "").replace(MINUS, "-"))
    assert math.isclose(shown, value, rel_tol=5.1e-4)


def test_a_column_has_the_same_decimals_unless_that_hides_a_value():
    assert column([2.468, 1.83, None, 0.0]) == ["2.468", "1.830", MISSING, "0"]
    assert column([1.0, 1e-7]) == ["1", f"1e{MINUS}7"]
    assert column([1, 20, 300]) == ["1", "20", "300"]
    assert column([]) == []
    assert fixed(-0.0004, 2) == "0.00"


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_everything_can_be_read(palette):
    for text in (palette.ink, palette.muted, *palette.series):
        assert contrast(text, palette.paper) >= 4.5
    assert contrast(palette.ink, palette.raised) >= 4.5
    for color in (*palette.sequential, *palette.diverging):
        assert contrast(text_on(color), color) >= 4.5


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_the_ramps_also_read_in_grey(palette):
    assert len(palette.sequential) == len(palette.diverging) == COLOR_STEPS
    steps = [abs(b - a) for a, b in itertools.pairwise(map(luminance, palette.sequential))]
    rising = [luminance(color) for color in palette.sequential]
    assert rising in (sorted(rising), sorted(rising, reverse=True))
    assert min(steps) > 0
    middle = COLOR_STEPS // 2
    for half in (palette.diverging[: middle + 1], palette.diverging[middle:]):
        values = [luminance(color) for color in half]
        assert values in (sorted(values), sorted(values, reverse=True))


def test_values_that_differ_by_rounding_have_room_on_both_sides():
    axis = linear_axis([0.2, 0.2 + 3e-17, 0.20000000000000004])
    assert axis.low < 0.2 < axis.high
    assert 0 < axis.share(0.2) < 1
