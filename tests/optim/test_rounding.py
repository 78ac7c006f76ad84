"""How steps are added to bfloat16 weights: what nearest rounding loses, Kahan's sum and stochastic rounding keep."""

import copy
import io

import pytest
import torch
from torch import nn

from loraloom.optim import APOLLO, Fira, GaLore, WeightAdam, expected_memory, state_bytes
from loraloom.optim.rounding import move_

from .galore.support import chain, loss_of, matrices_and_vectors, train
from .support import assert_identical, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:bfloat16 weights lose steps")  # so they do here
ULP = 2.0**-8  # of bfloat16, relative: half the distance of two neighbors above a power of two


def after(rounding: str, steps: int, step: float, decay: float = 0.0, dtype: torch.dtype = torch.bfloat16):
    W = torch.ones(4096, dtype=dtype)
    error = torch.zeros_like(W)
    for seed in range(steps):
        move_(W, torch.full((4096,), step), decay, rounding, error, seed)
    return W.float(), error.float()


def test_nearest_rounding_loses_small_steps_and_kahan_none() -> None:
    """300 steps of 2^-10 on 1, whose neighbor is 2^-7 away; what Kahan's sum still carries is half of that at most."""
    assert torch.equal(after("nearest", 300, 2.0**-10)[0], torch.ones(4096))
    W, error = after("kahan", 300, 2.0**-10)
    torch.testing.assert_close(W + error, torch.full((4096,), 1 + 300 * 2.0**-10), rtol=0, atol=0)
    assert error.abs().max() <= ULP


def test_stochastic_rounding_is_right_on_average_and_repeatable() -> None:
    """100 steps of 2^-10: each rounds up with probability 1/8, so the mean of 4096 has a deviation of
    2^-7 sqrt(100 / 8 * 7 / 8 / 4096) = 4.1e-4; five of them are allowed."""
    W, _ = after("stochastic", 100, 2.0**-10)
    assert abs(float(W.mean()) - (1 + 100 * 2.0**-10)) < 5 * 4.1e-4
    assert 0.01 < float(W.std()) < 0.05
    assert torch.equal(W, after("stochastic", 100, 2.0**-10)[0])


def test_decay_is_not_lost_either() -> None:
    """1 (1 - 1e-3)^200 with steps of zero: below half a neighbor's distance each."""
    assert torch.equal(after("nearest", 200, 0.0, 1e-3)[0], torch.ones(4096))
    W, error = after("kahan", 200, 0.0, 1e-3)
    assert float((W + error).mean()) == pytest.approx(0.999**200, rel=1e-3)
    assert float(after("stochastic", 200, 0.0, 1e-3)[0].mean()) == pytest.approx(0.999**200, rel=5e-3)


@pytest.mark.parametrize("rounding", ["nearest", "kahan", "stochastic"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so(rounding: str, value: float) -> None:
    W = torch.tensor([value, 1.0], dtype=torch.bfloat16)
    move_(W, torch.zeros(2), 0.0, rounding, torch.zeros_like(W), 0)
    assert W[0].isnan() if value != value else W[0] == value
    assert W[1] == 1


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
def test_float32_weights_are_added_to_as_always(rounding: str) -> None:
    assert torch.equal(
        after(rounding, 9, 2.0**-20, dtype=torch.float32)[0], after("nearest", 9, 2.0**-20, dtype=torch.float32)[0]
    )


@pytest.mark.filterwarnings("error:bfloat16 weights lose steps")
def test_bfloat16_weights_are_warned_of_unless_something_is_done() -> None:
    with pytest.warns(UserWarning, match="bfloat16 weights lose steps"):
        build(chain(torch.bfloat16), "galore")
    build(chain(torch.bfloat16), "galore", rounding="kahan")
    build(chain(), "galore")


VARIANTS = {
    "galore": (GaLore, {}),
    "layerwise": (GaLore, {"layerwise": True}),
    "8 bits": (GaLore, {"basis_bits": 8}),
    "full": (GaLore, {"side": "full"}),
    "fira": (Fira, {}),
    "apollo": (APOLLO, {"scale": 1.0}),
    "adafactor": (GaLore, {"inner": "adafactor"}),
    "sgd": (GaLore, {"inner": "sgd", "momentum": 0.9}),
    "AdamW": (WeightAdam, {}),
    "AdamW, fused": (WeightAdam, {"fused": True}),
}


def build(model: nn.Module, variant: str, **options) -> torch.optim.Optimizer:
    kind, settings = VARIANTS[variant]
    projected = {} if kind is WeightAdam else {"rank": 4, "update_gap": 5}
    return kind(matrices_and_vectors(model), **{"lr": 1e-4, **projected, **settings, **options})


def progress(variant: str, rounding: str, seed: int = 0) -> float:
    """How far bfloat16 weights go where float32 weights with the same start and batch go: 1 is all the way."""
    ways = []
    for dtype, how in ((torch.float32, "nearest"), (torch.bfloat16, rounding)):
        model = chain(torch.bfloat16).to(dtype)
        before = snapshot(model)
        optimizer = build(model, variant, rounding=how, lr=3e-4, seed=seed)
        for _ in range(40):
            train(model, optimizer, 1, dtype)
        ways.append(torch.cat([(p.float() - before[name].float()).flatten() for name, p in snapshot(model).items()]))
    return float(ways[0] @ ways[1] / ways[0].square().sum())


@pytest.mark.parametrize("variant", ["galore", "layerwise", "8 bits", "fira", "apollo", "AdamW", "AdamW, fused"])
def test_weights_go_where_float32_weights_go(variant: str) -> None:
    """A step of 3e-4 is below half a neighbor's distance of most weights.

    Random rounding is right on average: one run is seen to be off by up to 0.25, the mean of 16 by a quarter of that.
    """
    assert progress(variant, "nearest") < 0.7
    assert progress(variant, "kahan") == pytest.approx(1, abs=0.05)
    mean = sum(progress(variant, "stochastic", seed) for seed in range(16)) / 16
    assert mean == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one(variant: str, rounding: str) -> None:
    model, other = chain(torch.bfloat16), chain(torch.bfloat16)
    optimizer = build(model, variant, rounding=rounding)
    train(model, optimizer, 6, torch.bfloat16)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = build(other, variant, rounding=rounding)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for m, o in ((model, optimizer), (other, resumed)):
        train(m, o, range(6, 13), torch.bfloat16)
    assert_identical(snapshot(model), snapshot(other))


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_its_memory_is_announced(variant: str, rounding: str) -> None:
    model = chain(torch.bfloat16)
    optimizer = build(model, variant, rounding=rounding)
    expected = expected_memory(model, optimizer).state
    loss_of(model, 0, torch.bfloat16).backward()
    optimizer.step()
    assert expected == state_bytes(optimizer)
