"""What GaLore does with odd gradients, odd shapes and options that do not go together."""

import copy
import warnings

import pytest
import torch
from torch import nn

from loraloom.errors import InputError
from loraloom.optim import APOLLO, Fira, GaLore

from ..support import assert_identical, snapshot
from .support import chain, loss_of, matrices_and_vectors, train


def build(model: nn.Module, kind: type = GaLore, **options) -> GaLore:
    spread = {} if kind is APOLLO else {"stagger": False}
    return kind(matrices_and_vectors(model), **{"lr": 1e-2, "rank": 4, "update_gap": 3, **spread, **options})


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("refresh", ["subspace", "svd"])
def test_a_gradient_of_zero_keeps_the_basis_and_is_reported_once(refresh: str, layerwise: bool) -> None:
    model = chain()
    optimizer = build(model, refresh=refresh, layerwise=layerwise)
    train(model, optimizer, 3)
    bases = {id(p): copy.deepcopy(state) for p, state in optimizer.state.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):  # two refreshes were due
            optimizer.zero_grad()
            (loss_of(model, 0) * 0).backward()
            optimizer.step()
    assert ["a gradient was zero when its basis was to be renewed" in str(w.message) for w in caught] == [True]
    for p, state in optimizer.state.items():
        for side in state.keys() & {"left", "right"}:
            assert torch.equal(state[side], bases[id(p)][side])
    train(model, optimizer, range(3))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("at_refresh", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_whose_gradient_is_not_finite_sits_out(value: float, at_refresh: bool) -> None:
    model = chain()
    optimizer = build(model)
    train(model, optimizer, 3 if at_refresh else 4)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict()["state"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            model.wide.weight.grad[3, 5] = value
            optimizer.step()
    messages = [str(warning.message) for warning in caught]
    assert sum("1 gradients are not finite; their weights are left out" in message for message in messages) == 1
    assert sum("not finite when its basis was to be renewed" in message for message in messages) == at_refresh
    assert len(messages) == 1 + at_refresh
    after = snapshot(model)
    assert torch.equal(before["wide.weight"], after["wide.weight"])
    assert not torch.equal(before["square.weight"], after["square.weight"])
    assert_identical(optimizer.state_dict()["state"][1]["inner"], state[1]["inner"])
    train(model, optimizer, 2)
    assert not torch.equal(before["wide.weight"], model.wide.weight)


def test_a_zero_first_gradient_moves_nothing_and_the_next_one_starts() -> None:
    weight = nn.Parameter(torch.randn(8, 6))
    optimizer = GaLore([weight], lr=0.1, rank=2)
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    with pytest.warns(UserWarning, match="a gradient was zero"):
        optimizer.step()
    assert torch.equal(weight, before)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    assert not torch.equal(weight, before)


def test_tiny_and_huge_gradients_have_the_basis_of_ordinary_ones() -> None:
    G = torch.randn(20, 4) @ torch.randn(4, 12)
    bases = []
    for size in (1e-30, 1.0, 1e15):
        weight = nn.Parameter(torch.zeros(20, 12))
        optimizer = GaLore([weight], lr=1e-3, rank=4)
        weight.grad = G * size
        optimizer.step()
        bases.append(optimizer.state[weight]["right"])
    for basis in bases:
        torch.testing.assert_close(basis @ basis.T, bases[1] @ bases[1].T, rtol=0, atol=1e-4)


def test_small_matrices_go_to_the_inner_optimizer_with_a_message() -> None:
    ours, theirs = chain(), chain()
    with pytest.warns(UserWarning, match=r"2 matrices with a side of rank=14 or less .* for example \(12, 20\)"):
        mine = GaLore(matrices_and_vectors(ours), lr=1e-2, rank=14, weight_decay=0.1)
    assert [slot.weight.shape for slot in mine.projected.values()] == [(20, 16)]
    ours.tall.weight.requires_grad_(False)
    theirs.tall.weight.requires_grad_(False)
    reference = torch.optim.AdamW(matrices_and_vectors(theirs), lr=1e-2, weight_decay=0.1)
    train(ours, mine, 10)
    train(theirs, reference, 10)
    assert_identical(snapshot(ours), snapshot(theirs))


def test_a_parameter_without_a_gradient_is_left_alone_and_counts_no_step() -> None:
    model = chain()
    optimizer = build(model, weight_decay=0.1)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        if step == 1:
            before = snapshot(model)
            model.tall.weight.grad = model.tall.bias.grad = None
        optimizer.step()
        if step == 1:
            assert torch.equal(before["tall.weight"], model.tall.weight)
            assert torch.equal(before["tall.bias"], model.tall.bias)
    assert optimizer.state[model.tall.weight]["step"] == 2
    assert optimizer.state[model.wide.weight]["step"] == 3


def test_refreshes_are_spread_over_the_steps() -> None:
    model = chain()
    optimizer = build(model, update_gap=6, stagger=True)
    changes = []
    for step in range(19):
        old = {p: state.get("left", state.get("right")) for p, state in optimizer.state.items()}
        train(model, optimizer, range(step, step + 1))
        new = {p: state.get("left", state.get("right")) for p, state in optimizer.state.items()}
        changes.append(sum(new[p] is not old.get(p) for p in new))
    assert changes == [3, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("kind", "options", "code"),
    [
        (GaLore, {"rank": 0}, "out-of-range"),
        (GaLore, {"update_gap": 0}, "out-of-range"),
        (GaLore, {"rank_pattern": {"*": 0}}, "out-of-range"),
        (GaLore, {"weight_decay": -0.1}, "out-of-range"),
        (GaLore, {"side": "top"}, "unknown-choice"),
        (GaLore, {"refresh": "qr"}, "unknown-choice"),
        (GaLore, {"basis_bits": 4}, "unknown-choice"),
        (GaLore, {"inner": "adam"}, "unknown-optimizer"),
        (GaLore, {"max_grad_norm": 1.0}, "needs-layerwise"),
        (GaLore, {"rounding": "kahan"}, "not-bfloat16"),
        (GaLore, {"target_modules": ["*"]}, "no-model"),
        (GaLore, {"rank": 20}, "nothing-to-project"),
        (Fira, {"side": "full"}, "side-full"),
        (APOLLO, {"side": "full"}, "side-full"),
        (Fira, {"process_group": object()}, "needs-gradient"),
        (APOLLO, {"process_group": object()}, "needs-gradient"),
    ],
)
@pytest.mark.filterwarnings("ignore:GaLore. 3 matrices with a side of rank=20")
def test_options_out_of_range_or_against_each_other_are_errors(kind: type, options: dict, code: str) -> None:
    with pytest.raises(InputError) as caught:
        build(chain(), kind, **options)
    assert caught.value.code == code


@pytest.mark.parametrize(("kind", "option"), [(Fira, "layerwise"), (APOLLO, "refresh"), (APOLLO, "rotate_moments")])
def test_an_option_of_another_method_is_none(kind: type, option: str) -> None:
    """It goes to the inner optimizer's class, which says what every class says."""
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
        build(chain(), kind, **{option: True})


def test_flattened_weights_are_errors_that_say_so() -> None:
    flat = nn.Parameter(torch.randn(64))
    with pytest.raises(InputError) as caught:
        GaLore([flat], lr=1e-2, rank=4)
    assert caught.value.code == "nothing-to-project"
    model = chain()
    optimizer = build(model)
    optimizer.param_groups[0]["params"] = [flat]  # as DeepSpeed does
    flat.grad = torch.ones(64)
    with pytest.raises(InputError) as caught:
        optimizer.step()
    assert caught.value.code == "foreign-parameter"
    optimizer = build(model)
    model.wide.weight.data = model.wide.weight.data.flatten()  # as FSDP1 does
    model.wide.weight.grad = torch.ones(240)
    with pytest.raises(InputError) as caught:
        optimizer.step()
    assert caught.value.code == "flattened"


def test_rotation_of_a_state_that_it_does_not_know_is_an_error() -> None:
    model = chain()
    optimizer = build(model, inner=torch.optim.Adafactor, rotate_moments=True)
    with pytest.raises(InputError) as caught:
        train(model, optimizer, 5)
    assert caught.value.code == "unknown-state"
