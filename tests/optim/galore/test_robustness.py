"""What GaLore does with odd gradients, odd shapes and options that do not go together."""

import copy
import warnings

import pytest
import torch
from torch import nn

from loraloom.optim import GaLore

from ..support import assert_identical, snapshot
from .support import chain, loss_of, matrices_and_vectors, train


def build(model: nn.Module, **options) -> GaLore:
    return GaLore(matrices_and_vectors(model), **{"lr": 1e-2, "rank": 4, "update_gap": 3, "stagger": False, **options})


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
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 is out of range; pass 1 or more"),
        ({"update_gap": 0}, "update_gap=0 is out of range"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is out of range"),
        ({"side": "top"}, "side='top' is unknown; use one of std, reverse_std, left, right, full"),
        ({"refresh": "qr"}, "refresh='qr' is unknown; use 'subspace', 'svd' or 'random'"),
        ({"residual": True, "side": "full"}, "residual=True scales channels, and side='full' leaves none"),
        ({"residual": True, "layerwise": True}, "residual=True needs the whole gradient .* layerwise=True"),
        ({"refresh": "random", "residual": True}, "refresh='random' does not use residual=True"),
        ({"refresh": "random", "rotate_moments": True}, "refresh='random' does not use rotate_moments=True"),
        ({"max_grad_norm": 1.0}, "max_grad_norm=1.0 is for layerwise=True"),
    ],
)
def test_options_out_of_range_or_against_each_other_are_errors(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(chain(), **options)


def test_flattened_weights_are_errors_that_say_so() -> None:
    flat = nn.Parameter(torch.randn(64))
    with pytest.raises(ValueError, match=r"found no matrix .* DeepSpeed ZeRO and FSDP1 flatten weights"):
        GaLore([flat], lr=1e-2, rank=4)
    model = chain()
    optimizer = build(model)
    optimizer.param_groups[0]["params"] = [flat]  # as DeepSpeed does
    flat.grad = torch.ones(64)
    with pytest.raises(ValueError, match=r"a parameter that GaLore was not given.*DeepSpeed ZeRO"):
        optimizer.step()
    optimizer = build(model)
    model.wide.weight.data = model.wide.weight.data.flatten()  # as FSDP1 does
    model.wide.weight.grad = torch.ones(240)
    with pytest.raises(ValueError, match=r"a gradient of shape \(240,\) is not that of the weight"):
        optimizer.step()


def test_rotation_of_a_state_that_it_does_not_know_is_an_error() -> None:
    model = chain()
    optimizer = build(model, inner=torch.optim.Adafactor, rotate_moments=True)
    with pytest.raises(ValueError, match=r"rotate_moments=True can't rotate .*col_var.*set it to False"):
        train(model, optimizer, 5)
