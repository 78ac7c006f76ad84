"""The schedule in numbers."""

import pytest

from loraloom.errors import InputError
from loraloom.selection.phases import FillBudget, HalveAndDouble, Phases, resolve_phases


def test_steps_fall_into_their_phases() -> None:
    phases = Phases(warmup_steps=2, select_every=3, select_until=10, expand=HalveAndDouble(times=2, every=4))
    assert [phases.phase(step) for step in range(1, 21)] == (
        ["warm-up"] * 2 + ["selecting"] * 8 + ["expanding"] * 8 + ["fixed"] * 2
    )
    assert [step for step in range(1, 30) if phases.selects(step)] == [5, 8, 10]
    assert [step for step in range(1, 30) if phases.halves(step)] == [14, 18]
    assert phases.fixed_from == 18


def test_without_expansion_the_gates_are_fixed_after_selecting() -> None:
    for expand in (None, FillBudget(100)):
        phases = Phases(0, 1, 5, expand)
        assert [step for step in range(1, 9) if phases.selects(step)] == [1, 2, 3, 4, 5]
        assert phases.fixed_from == 5
        assert phases.phase(6) == "fixed"


def test_fractions_are_of_the_whole_run() -> None:
    assert resolve_phases(0.05, 1, 0.3, None, 1000) == Phases(50, 1, 300)
    assert resolve_phases(7, 2, 0.5, None, 20) == Phases(7, 2, 10)
    assert resolve_phases(0.05, 1, 0.3, None, 3) == Phases(0, 1, 1)
    assert resolve_phases(0.1, 1, 0.2, None, 4) == Phases(0, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((0.1, 1, 20, None, None), "unknown-length"),
        ((-1, 1, 20, None, None), "out-of-range"),
        ((2, 0, 20, None, None), "out-of-range"),
        ((5, 1, 5, None, None), "schedule"),
        ((2, 1, 20, None, 19), "schedule"),
        ((2, 1, 20, HalveAndDouble(2, 10), 39), "schedule"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(arguments: tuple, code: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve_phases(*arguments)
    assert caught.value.code == code


@pytest.mark.parametrize("options", [{"times": 0}, {"every": 0}], ids=str)
def test_expansions_are_at_least_one_step_and_one_time(options: dict) -> None:
    with pytest.raises(InputError) as caught:
        HalveAndDouble(**options)
    assert caught.value.code == "out-of-range"


@pytest.mark.parametrize(
    ("arguments", "said", "fits"),
    [
        ((2, 1, 20, None, 19), "lower select_until to 19", (2, 1, 19, None, 19)),
        ((2, 1, 20, HalveAndDouble(2, 10), 39), "lower select_until to 19", (2, 1, 19, HalveAndDouble(2, 10), 39)),
        (
            (2, 1, 5, HalveAndDouble(2, 10), 15),
            "lower expand_times or expand_every",
            (2, 1, 5, HalveAndDouble(1, 10), 15),
        ),
        ((30, 1, 40, None, 20), "lower warmup_steps, or train longer", (10, 1, 20, None, 20)),
    ],
)
def test_advice_can_be_followed(arguments: tuple, said: str, fits: tuple) -> None:
    with pytest.raises(InputError, match=said):
        resolve_phases(*arguments)
    assert resolve_phases(*fits).fixed_from <= fits[-1]
