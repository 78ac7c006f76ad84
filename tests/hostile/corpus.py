"""The hostile files: each case changes a copy of one sound folder. The list is the same every time."""

import random
from pathlib import Path

from tests.hostile import settings, weights
from tests.hostile.case import Case

FAMILIES = (
    *(settings.keys, settings.no_json, settings.index, settings.expressions, settings.runs),
    *(weights.truncated, weights.headers, weights.shapes, weights.dtypes, weights.numbers, weights.names),
    *(weights.flips, weights.links),
)


def corpus(originals: Path, seed: int = 0) -> list[Case]:
    """Every case, shuffled, so that any beginning of the list is a sample.

    Args:
        originals: the folder of :func:`tests.hostile.originals.make_originals`, whose keys and tensors are walked.
        seed: of the order.
    """
    cases = [case for family in FAMILIES for case in family(originals)]
    assert len({str(case) for case in cases}) == len(cases)
    random.Random(seed).shuffle(cases)
    return cases


def sample(cases: list[Case], per_family: int) -> list[Case]:
    """The first cases of every family."""
    taken: dict[str, int] = {}
    chosen = []
    for case in cases:
        taken[case.family] = taken.get(case.family, 0) + 1
        if taken[case.family] <= per_family:
            chosen.append(case)
    return chosen
