"""Ranks under a budget, against brute force."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraloom.update.allocate import ranks_for_energy, ranks_for_parameters

spectrum = st.lists(st.floats(0, 10), min_size=1, max_size=4).map(lambda v: torch.tensor(sorted(v, reverse=True)))


def kept(spectra, ranks):
    return sum(float(S[: ranks[name]].double().square().sum()) for name, S in spectra.items())


@given(st.lists(spectrum, min_size=1, max_size=3), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_equal_costs_give_the_best_ranks_there_are(values, extra):
    spectra = {str(i): S for i, S in enumerate(values)}
    costs = dict.fromkeys(spectra, 5)
    budget = 5 * len(spectra) + extra
    ranks = ranks_for_parameters(spectra, costs, budget)
    choices = itertools.product(*(range(1, len(S) + 1) for S in values))
    best = max(kept(spectra, dict(zip(spectra, c, strict=True))) for c in choices if 5 * sum(c) <= budget)
    assert kept(spectra, ranks) == pytest.approx(best)
    assert sum(5 * r for r in ranks.values()) <= budget


def test_a_value_that_is_cheaper_for_its_norm_goes_first():
    spectra = {"wide": torch.tensor([3.0, 2.0]), "narrow": torch.tensor([3.0, 2.0])}
    assert ranks_for_parameters(spectra, {"wide": 10, "narrow": 2}, 14) == {"wide": 1, "narrow": 2}
    assert ranks_for_parameters(spectra, {"wide": 10, "narrow": 2}, 4, least=0) == {"wide": 0, "narrow": 2}


def test_a_budget_under_rank_one_is_an_error():
    with pytest.raises(ValueError, match="parameters=3"):
        ranks_for_parameters({"a": torch.ones(2)}, {"a": 4}, 3)


@given(spectrum, st.floats(0.01, 1.0))
@settings(max_examples=200, deadline=None)
def test_energy_is_held_by_the_smallest_rank_that_can(S, energy):
    r = ranks_for_energy({"a": S}, energy)["a"]
    squares = S.double().square()
    total = float(squares.sum())
    assert float(squares[r:].sum()) <= (1 - energy) * total * (1 + 1e-12) + 1e-300
    if r > 1:
        assert float(squares[r - 1 :].sum()) > (1 - energy) * total


def test_energy_out_of_range_is_an_error():
    with pytest.raises(ValueError, match=r"energy=1\.5"):
        ranks_for_energy({"a": torch.ones(2)}, 1.5)
