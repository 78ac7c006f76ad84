"""Rewinding: the weight of a copy is ``W + t (W' - W)`` for every kind of layer and part, in a model and in files."""

import pytest
import torch

from loraloom.adapter.live import LiveAdapter
from loraloom.errors import InputError
from loraloom.intruders.live import sweep_intruders
from loraloom.intruders.rewind import plan_sweep, rewound_matrix
from tests.intruders.live_models import MAKERS, OPTIONS, same, state, weight_of
from tests.intruders.support import adapted as dense
from tests.intruders.support import base, update


@pytest.mark.parametrize("with_magnitude", [False, True])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
def test_a_matrix_against_the_dense_formula(with_magnitude, t):
    W = base(30, 42)
    A, B = update(W, 4)
    magnitude = torch.randn(30) if with_magnitude else None  # of either sign
    B_t, magnitude_t = rewound_matrix(W, A, B, magnitude, t)
    expected = W + t * (dense(W, A, B, magnitude) - W)
    # c_t = 1 - t + t c divides, and may cancel: rounding of float32 grows by its inverse.
    assert (dense(W, A, B_t, magnitude_t) - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_sweep_goes_from_the_adapter_to_the_base(make):
    model = make()
    W = next(iter(LiveAdapter(model, "default").modules.values())).weight().double()
    changed, before = weight_of(model).double(), state(model, "mitigated")
    seen = []

    def look(model):
        seen.append(weight_of(model, model.active_adapters[0]).double())
        return {"number": float(len(seen))}

    swept = sweep_intruders(model, "default", [0.5, 0.0], look, rewind=True, **OPTIONS)
    assert [(point.scale, point.rewound) for point in swept.points] == [
        (1, False),
        (0.5, False),
        (0.0, False),
        (0.5, True),
        (0.0, True),
    ]
    assert torch.equal(seen[0], changed)
    for t, weight in ((0.5, seen[3]), (0.0, seen[4])):
        expected = W + t * (changed - W)
        assert (weight - expected).norm() <= 1e-5 * expected.norm()
    assert same(before, state(model, "mitigated"))
    assert list(model.peft_config) == ["default"]


def test_one_is_in_the_table_once():
    assert plan_sweep([0.5], "top", "exact", rewind=True) == [(1.0, False), (0.5, False), (0.5, True)]
    assert plan_sweep([0.5, 1], "top", "exact", rewind=True) == [(0.5, False), (1, False), (0.5, True)]
    assert plan_sweep([0.5], "top", "exact", rewind=False) == [(0.5, False)]


@pytest.mark.parametrize("scale", [1.5, -0.1])
def test_what_is_no_rewinding_is_refused(scale):
    with pytest.raises(ValueError, match=r"."):
        plan_sweep([scale], "top", "exact", rewind=True)
    if scale > 1:
        with pytest.raises(InputError) as caught:
            plan_sweep([scale], "top", "exact", rewind=True)
        assert caught.value.code == "rewind"
