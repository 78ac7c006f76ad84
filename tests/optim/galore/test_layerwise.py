"""Layer-wise GaLore: the same steps as the ordinary mode, without ever holding the model's gradients."""

import gc
import warnings

import pytest
import torch
from torch import nn

from loraloom.errors import InputError
from loraloom.optim import GaLore

from ..support import assert_identical, snapshot
from .support import chain, loss_of, matrices_and_vectors


def build(model: nn.Module, layerwise: bool, **options) -> GaLore:
    settings = {"lr": 1e-2, "rank": 4, "update_gap": 4, "weight_decay": 0.1, **options}
    return GaLore(matrices_and_vectors(model), **settings, layerwise=layerwise)


def test_it_takes_the_steps_of_the_ordinary_mode() -> None:
    models = [chain(), chain()]
    for model, layerwise in zip(models, (False, True), strict=True):
        optimizer = build(model, layerwise)
        for step in range(10):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    assert_identical(*map(snapshot, models))


def test_micro_batches_add_up() -> None:
    """Between refreshes, two halves are the whole batch, because projecting is linear; nothing is kept of a skip."""
    models = [chain(torch.float64), chain(torch.float64)]
    for model, parts in zip(models, ([slice(None)], [slice(0, 4), slice(4, 8)]), strict=True):
        optimizer = build(model, layerwise=True, update_gap=100, stagger=False)
        for step in range(6):
            rows = [slice(None)] if step == 0 else parts  # the first basis is of the same gradient
            if step == 2:
                loss_of(model, 99, torch.float64).backward()  # as GradScaler does when it skips a step
            optimizer.zero_grad()
            for part in rows:
                (loss_of(model, step, torch.float64, part) / len(rows)).backward()
            optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_one_layers_gradient_exists_at_a_time() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    optimizer = GaLore(layers.parameters(), lr=1e-2, rank=4, layerwise=True)
    alive = []
    for layer in layers:
        layer.weight.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(other.weight.grad is not None for other in layers))
        )
    for _ in range(2):
        layers(torch.randn(3, 64)).square().mean().backward()
    assert alive == [0] * 16
    assert {slot.compact.grad.shape for slot in optimizer.projected.values()} == {(64, 4)}
    optimizer.zero_grad()
    assert all(slot.compact.grad is None for slot in optimizer.projected.values())


def test_clipping_is_by_the_norm_of_all_projected_gradients() -> None:
    """SGD without momentum: the compact step is -lr R, so its length is lr times the clipped norm."""
    model = chain(torch.float64)
    optimizer = build(
        model, True, inner=torch.optim.SGD, lr=0.5, scale=1.0, weight_decay=0.0, max_grad_norm=0.01, refresh="svd"
    )
    before = snapshot(model)
    loss_of(model, 0, torch.float64).backward()
    optimizer.step()
    moved = torch.cat([(p - before[name]).flatten() for name, p in model.named_parameters()])
    assert moved.norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)


class Overflow(torch.autograd.Function):
    """The identity, with a gradient that overflows where it is told to."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple:
        return gradients[0] * ctx.factor, None


def scaled_run(layerwise: bool, overflows: tuple[int, ...], clear: str, model: nn.Module | None = None) -> nn.Module:
    """Eight steps under a GradScaler, as accelerate takes them: the whole gradient of a step in `overflows` is inf.

    Args:
        layerwise: the mode.
        overflows: numbers of steps, each of which is taken again after it was skipped.
        clear: who clears the gradients: "model" as transformers' Trainer does, "optimizer" as torch's documentation.
        model: as `chain`.
    """
    model = model or chain()
    optimizer = build(model, layerwise, stagger=False, update_gap=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(8):
        for factor in [float("inf"), 1.0] if step in overflows else [1.0]:
            before, scale = snapshot(model), scaler.get_scale()
            scaler.scale(Overflow.apply(loss_of(model, step), factor)).backward()
            scaler.step(optimizer)
            scaler.update()
            (model if clear == "model" else optimizer).zero_grad()
            if factor != 1.0:
                assert_identical(before, snapshot(model))
                assert scaler.get_scale() == scale / 2  # the scaler was told
    return model


@pytest.mark.parametrize("clear", ["model", "optimizer"])
@pytest.mark.parametrize("overflows", [(), (0,), (1,), (4,), (0, 1, 4, 5)], ids=str)
def test_grad_scaler_unscales_and_skips(overflows: tuple[int, ...], clear: str) -> None:
    """Scales are powers of two, so unscaling is exact: all runs are the run without a scaler, and without overflows.

    With 0 the first gradient of every weight overflows, before there is a basis; with 4, one of a refresh.
    """
    plain = chain()
    optimizer = build(plain, layerwise=True, stagger=False, update_gap=4)
    for step in range(8):
        loss_of(plain, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="GaLore: a gradient was not finite")
        scaled = scaled_run(True, overflows, clear)
        assert_identical(snapshot(scaled), snapshot(plain))
        if 0 not in overflows:  # the ordinary mode has its bases of scaled gradients, which span the same space
            for a, b in zip(scaled.parameters(), scaled_run(False, overflows, clear).parameters(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_overflow_of_one_weight_alone_reaches_the_scaler() -> None:
    """Its first gradient: without a basis there is no projected gradient to look at."""
    model = chain()
    optimizer = build(model, layerwise=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    slot = next(iter(optimizer.projected.values()))
    with pytest.warns(UserWarning, match="a gradient was not finite"):
        optimizer.receive(slot, torch.full(slot.shape, float("inf")))
    before = snapshot(model)
    scaler.scale(loss_of(model, 0)).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 512.0
    assert_identical(before, snapshot(model))


def test_clipping_after_unscaling_is_the_users_own() -> None:
    """scaler.unscale_ before the step, as for clip_grad_norm_ over the optimizer's parameters."""
    models = [chain(), chain()]
    for model, scale in zip(models, (1.0, 1024.0), strict=True):
        optimizer = build(model, layerwise=True, stagger=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)
            scaler.step(optimizer)
            scaler.update()
    assert_identical(*map(snapshot, models))


def test_many_processes_need_a_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(InputError) as caught:
        build(chain(), layerwise=True)
    assert caught.value.code == "needs-process-group"


def test_an_overflow_without_a_scaler_leaves_the_weight_out() -> None:
    model = chain()
    optimizer = build(model, layerwise=True)
    before = snapshot(model)
    loss_of(model, 0).backward()
    next(iter(optimizer.projected.values())).compact.grad[0, 0] = float("inf")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert ["1 gradients are not finite" in str(warning.message) for warning in caught] == [True]
    changed = [name for name, p in model.named_parameters() if p.ndim == 2 and not torch.equal(p, before[name])]
    assert changed == ["wide.weight", "square.weight"]


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_second_optimizer_takes_over(layerwise: bool) -> None:
    """As when a Trainer trains twice: the first optimizer is still alive, and must not eat the second's gradients."""
    model, fresh = chain(), chain()
    first = build(model, layerwise=True)
    for m, optimizer in ((model, build(model, layerwise)), (fresh, build(fresh, layerwise))):
        for step in range(3):
            optimizer.zero_grad()
            loss_of(m, step).backward()
            optimizer.step()
    assert_identical(snapshot(model), snapshot(fresh))
    assert all(slot.compact.grad is None for slot in first.projected.values())


def test_a_dropped_optimizer_leaves_gradients_to_others() -> None:
    model = chain()
    optimizer = build(model, layerwise=True)
    del optimizer
    gc.collect()
    loss_of(model, 0).backward()
    assert all(p.grad is not None for p in model.parameters())
