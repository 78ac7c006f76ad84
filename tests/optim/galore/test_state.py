"""GaLore's state: resumed runs, files, dtypes, and what an optimizer of torch promises about its groups."""

import copy
import io
import warnings

import bitsandbytes
import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from loraloom.errors import InputError
from loraloom.optim import APOLLO, Fira, GaLore, remove_parameters, state_bytes

from ..support import assert_identical, snapshot
from .support import chain, loss_of, matrices_and_vectors, train

pytestmark = pytest.mark.filterwarnings("ignore:bfloat16 weights lose steps")  # so they do here
VARIANTS = {
    "subspace": {},
    "svd": {"refresh": "svd", "stagger": False, "side": "full"},
    "rotated": {"rotate_moments": True},
    "8 bits": {"basis_bits": 8},
    "8 bits, full": {"basis_bits": 8, "side": "full"},
    "fira": {"kind": Fira},
    "apollo": {"kind": APOLLO},
    "layerwise": {"layerwise": True},
    "sgd": {"inner": torch.optim.SGD, "momentum": 0.9},
    "adafactor": {"inner": torch.optim.Adafactor},
    "adamw_8bit": {"inner": bitsandbytes.optim.AdamW8bit, "min_8bit_size": 16},
}


def build(model: torch.nn.Module, variant: str, **options) -> GaLore:
    settings = {"lr": 1e-2, "rank": 4, "update_gap": 4, "weight_decay": 0.1, **VARIANTS[variant], **options}
    return settings.pop("kind", GaLore)(matrices_and_vectors(model), **settings)


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_uninterrupted_one(variant: str, dtype: torch.dtype) -> None:
    """Interrupted after step 6: with staggering, one of the three weights is refreshed in steps 5, 6 and 8."""
    model = chain(dtype)
    optimizer = build(model, variant)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 30)
    saved = {}
    for step in range(14):
        if step == 6:
            saved = {
                "model": copy.deepcopy(model.state_dict()),
                "optimizer": through_a_file(optimizer.state_dict()),
                "scheduler": scheduler.state_dict(),
            }
        train(model, optimizer, range(step, step + 1), dtype)
        scheduler.step()
    resumed = chain(dtype)
    resumed.load_state_dict(saved["model"])
    other = build(resumed, variant, lr=0.5)
    resumed_scheduler = LambdaLR(other, lambda step: 1 - step / 30)
    other.load_state_dict(saved["optimizer"])
    resumed_scheduler.load_state_dict(saved["scheduler"])
    for step in range(6, 14):
        train(resumed, other, range(step, step + 1), dtype)
        resumed_scheduler.step()
    assert_identical(snapshot(resumed), snapshot(model))
    assert not torch.equal(snapshot(model)["square.weight"], saved["model"]["square.weight"])


def test_a_state_with_names_for_keys_is_resumed_too() -> None:
    """What torch.distributed.checkpoint makes of an optimizer's state, as accelerate saves it under FSDP2."""
    models = [chain(), chain()]
    optimizers = [build(model, "subspace") for model in models]
    train(models[0], optimizers[0], 6)
    models[1].load_state_dict(models[0].state_dict())
    with warnings.catch_warnings():
        # It makes the state by a step with gradients of zero; GaLore says that they make no basis.
        warnings.filterwarnings("ignore", message="GaLore: a gradient was zero")
        named = copy.deepcopy(get_optimizer_state_dict(models[0], optimizers[0]))
        assert set(named["state"]) == {name for name, _ in models[0].named_parameters()}
        set_optimizer_state_dict(models[1], optimizers[1], named)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(6, 12))
    assert_identical(*map(snapshot, models))


def test_bases_and_moments_of_half_precision_weights_are_float32() -> None:
    model = chain(torch.bfloat16)
    optimizer = build(model, "subspace")
    train(model, optimizer, 2, torch.bfloat16)
    other = build(chain(torch.bfloat16), "subspace")
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for entry in [*optimizer.state_dict()["state"].values(), *other.state_dict()["state"].values()]:
        for basis in (entry.get("left"), entry.get("right")):
            if basis is not None:
                assert basis.dtype == entry["inner"]["exp_avg"].dtype == torch.float32
                torch.testing.assert_close(basis.T @ basis, torch.eye(4), rtol=0, atol=1e-5)


def test_the_state_is_as_small_as_the_paper_says() -> None:
    """Adam with an (m, n) weight, m >= n: n r for the basis, 2 m r for the moments; a vector has two of itself."""
    model = chain()
    optimizer = build(model, "subspace")
    train(model, optimizer, 1)
    numbers = sum(
        4 * min(p.shape) + 8 * max(p.shape) + 1 if p.ndim == 2 else 2 * p.numel() + 1 for p in model.parameters()
    )
    assert state_bytes(optimizer) == 4 * numbers
    for slot in optimizer.projected.values():
        assert slot.compact.grad is None
        assert slot.compact.untyped_storage().nbytes() == 0


OTHERS = {
    "rank": {"rank": 5},
    "side": {"side": "reverse_std"},
    "method": {"kind": Fira},
    "APOLLO": {"kind": APOLLO},
    "inner": {"inner": "sgd", "momentum": 0.9},
    "refresh": {"refresh": "svd"},
    "basis_bits": {"basis_bits": 8},
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_state_of_another_kind_is_refused_and_nothing_is_taken(other: str) -> None:
    model = chain()
    optimizer, foreign = build(model, "subspace"), build(chain(), "subspace", **OTHERS[other])
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(InputError) as caught:
        optimizer.load_state_dict(foreign.state_dict())
    assert caught.value.code == "other-state"
    after = optimizer.state_dict()
    assert str(after) == str(before)


def test_the_state_of_adamw_is_refused() -> None:
    optimizer = build(chain(), "subspace")
    plain = torch.optim.AdamW(matrices_and_vectors(chain()))
    with pytest.raises(InputError) as caught:
        optimizer.load_state_dict(plain.state_dict())
    assert caught.value.code == "other-state"


@pytest.mark.parametrize("option", [{"update_gap": 9}, {"scale": 1.0}, {"rotate_moments": True}, {"seed": 3}])
def test_a_state_may_be_gone_on_with_under_other_schedules(option: dict) -> None:
    optimizer = build(chain(), "subspace")
    train(chain(), optimizer, 2)
    build(chain(), "subspace", **option).load_state_dict(optimizer.state_dict())


def test_groups_have_their_own_rates_and_schedulers_change_them() -> None:
    """A rate of zero freezes a group; OneCycleLR finds the inner optimizer's betas in the groups and moves them."""
    model = chain()
    groups = [
        {"params": [model.tall.weight], "lr": 0.0, "weight_decay": 0.0},
        {"params": [model.wide.weight], "rank": 2, "scale": 1.0},
        {"params": [model.square.weight], "rank": None},
    ]
    optimizer = GaLore(groups, lr=1e-2, rank=4, betas=(0.8, 0.9))
    scheduler = OneCycleLR(optimizer, max_lr=[0.0, 0.01, 0.01], total_steps=10)
    before = snapshot(model)
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
        for group, inner in zip(optimizer.param_groups, optimizer.inner.param_groups, strict=True):
            assert group["betas"][1] == 0.9
            assert step == 4 or inner["weight_decay"] == 0.0
    assert optimizer.inner.param_groups[1]["betas"] != (0.8, 0.9)
    after = snapshot(model)
    assert torch.equal(before["tall.weight"], after["tall.weight"])
    assert not torch.equal(before["wide.weight"], after["wide.weight"])
    assert optimizer.inner.state[model.square.weight]["exp_avg"].shape == (14, 14)


def test_unprojected_parameters_are_stepped_as_torch_does() -> None:
    ours, theirs = chain(), chain()
    groups = [{"params": [p], "rank": 2 if name == "tall.weight" else None} for name, p in ours.named_parameters()]
    for model in (ours, theirs):  # the projected weight moves apart, so let nothing depend on it
        model.tall.weight.data.zero_()
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
    groups[0]["lr"] = 0.0
    mine, reference = (
        GaLore(groups, **options),
        torch.optim.AdamW([{"params": [p]} for p in theirs.parameters()], **options),
    )
    reference.param_groups[0]["lr"] = 0.0
    train(ours, mine, 10)
    train(theirs, reference, 10)
    assert_identical(snapshot(ours), snapshot(theirs))


def test_groups_can_be_added_and_parameters_removed() -> None:
    model = chain()
    optimizer = GaLore([model.tall.weight], lr=1e-2, rank=4)
    optimizer.add_param_group({"params": [model.wide.weight, model.wide.bias], "lr": 2e-2})
    train(model, optimizer, 2)
    assert optimizer.inner.param_groups[1]["lr"] == 2e-2
    assert len(optimizer.inner.state) == 3
    remove_parameters(optimizer, [model.wide.weight])
    before = snapshot(model)
    train(model, optimizer, range(2, 4))
    assert len(optimizer.inner.state) == 2
    assert torch.equal(before["wide.weight"], model.wide.weight)
    assert not torch.equal(before["wide.bias"], model.wide.bias)


def test_a_closure_is_evaluated_once_and_its_loss_returned() -> None:
    model = chain()
    optimizer = build(model, "subspace")
    losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses.append(loss_of(model, 0))
        losses[-1].backward()
        return losses[-1]

    assert optimizer.step(closure) is losses[0]
    assert len(losses) == 1


@pytest.mark.parametrize("variant", ["subspace", "adafactor", "sgd", "adamw_8bit"])
def test_it_trains_with_every_inner_optimizer(variant: str) -> None:
    model = chain()
    optimizer = build(model, variant, scale=1.0, update_gap=10, lr=0.3 if variant == "sgd" else 2e-2)
    first = loss_of(model, 0).item()
    for _ in range(40):
        train(model, optimizer, 1)
    assert loss_of(model, 0).item() < 0.8 * first
