"""When the phases of a WeightLoRA run begin and end, counted in optimizer steps.

warm-up      steps 1 .. warmup_steps                   every adapter trains, every gate is free
selecting    steps warmup_steps + 1 .. select_until    every ``select_every`` steps the gates are projected
expanding    WeightLoRA+ only                          the chosen adapters get fewer and wider
fixed        the rest                                  the gates are part of B; what was not chosen is gone
"""

from dataclasses import dataclass
from typing import Literal

from loraloom.errors import InputError

Phase = Literal["warm-up", "selecting", "expanding", "fixed"]


@dataclass(frozen=True)
class HalveAndDouble:
    """WeightLoRA+ (arXiv 2506.02724): keep the better half of the chosen adapters at twice the rank, several times.

    The number of adapters times their rank stays what it was. ``every`` steps lie between two expansions, and before
    the first one; the paper uses 5 to 10, and 2 times.
    """

    times: int = 2
    every: int = 10

    def __post_init__(self) -> None:
        for name in ("times", "every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} is out of range: pass 1 or more", code="out-of-range")


@dataclass(frozen=True)
class FillBudget:
    """Once, at the end of selecting: raise all chosen adapters to the largest common rank within a budget.

    ``parameters`` counts A, B and mixers of all chosen adapters. Set to their number before selecting, the run trains
    as many parameters as LoRA on all layers, all of them in the chosen ones.
    """

    parameters: int


@dataclass(frozen=True)
class Phases:
    """The schedule in whole steps; `resolve_phases` makes one from fractions of a run."""

    warmup_steps: int
    select_every: int
    select_until: int
    expand: HalveAndDouble | FillBudget | None = None

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise InputError(f"warmup_steps={self.warmup_steps} is negative: pass 0 or more", code="out-of-range")
        if self.select_every < 1:
            raise InputError(f"select_every={self.select_every} is out of range: pass 1 or more", code="out-of-range")
        if self.select_until <= self.warmup_steps:
            raise InputError(
                f"select_until={self.select_until} leaves no step to select after warmup_steps={self.warmup_steps}: "
                "pass a later step",
                code="schedule",
            )

    @property
    def fixed_from(self) -> int:
        """The step after which nothing is selected, disconnected or expanded any more."""
        later = self.expand.times * self.expand.every if isinstance(self.expand, HalveAndDouble) else 0
        return self.select_until + later

    def phase(self, step: int) -> Phase:
        """The phase that optimizer step number ``step`` (from 1) belongs to."""
        if step <= self.warmup_steps:
            return "warm-up"
        if step <= self.select_until:
            return "selecting"
        return "expanding" if step <= self.fixed_from else "fixed"

    def selects(self, step: int) -> bool:
        """Whether the gates are projected in this step; the last one of the selecting phase always does."""
        if self.phase(step) != "selecting":
            return False
        return step == self.select_until or (step - self.warmup_steps) % self.select_every == 0

    def halves(self, step: int) -> bool:
        """Whether half of the adapters are dropped, and the others doubled, after this step."""
        return (
            isinstance(self.expand, HalveAndDouble)
            and self.phase(step) == "expanding"
            and (step - self.select_until) % self.expand.every == 0
        )


def is_fraction(value: int | float) -> bool:
    """Whether a number of steps is a fraction of the run."""
    return isinstance(value, float) and 0 < value < 1


def resolve_phases(
    warmup_steps: int | float,
    select_every: int,
    select_until: int | float,
    expand: HalveAndDouble | FillBudget | None,
    total_steps: int | None,
) -> Phases:
    """The schedule in whole steps; a float below 1 is a fraction of ``total_steps``.

    Raises:
        InputError: a fraction is given, but total_steps is not; or the schedule does not fit into total_steps.
    """
    whole = []
    for name, value in (("warmup_steps", warmup_steps), ("select_until", select_until)):
        if is_fraction(value):
            if total_steps is None:
                raise InputError(
                    f"{name}={value} is a fraction of a run of unknown length: pass total_steps, or whole steps",
                    code="unknown-length",
                )
            value = round(value * total_steps)
        whole.append(int(value))
    # In a very short run both fractions may round to the same step.
    until = max(whole[1], whole[0] + 1) if is_fraction(select_until) else whole[1]
    phases = Phases(whole[0], select_every, until, expand)
    if total_steps is not None and phases.fixed_from > total_steps:
        raise InputError(
            f"selecting and expanding take {phases.fixed_from} steps, the run has {total_steps}: "
            + _advice(phases, total_steps),
            code="schedule",
        )
    return phases


def _advice(phases: Phases, total_steps: int) -> str:
    """What makes a schedule fit that is too long."""
    expanding = phases.fixed_from - phases.select_until
    latest = total_steps - expanding
    if latest > phases.warmup_steps:
        return f"lower select_until to {latest} or less"
    if not expanding:
        return f"the warm-up alone takes {phases.warmup_steps}: lower warmup_steps, or train longer"
    return f"expanding alone takes {expanding}: lower expand_times or expand_every, or train longer"
