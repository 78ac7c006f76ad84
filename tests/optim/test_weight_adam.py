"""WeightAdam against torch's AdamW (bit for bit) and against the algorithm written out from its formulas."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from loraloom.errors import InputError, RunFailedError
from loraloom.optim import KSparse, Simplex, SimplexKSparse, WeightAdam, build_param_groups, remove_parameters

from .support import assert_identical, backward, batch, gated_model, snapshot


def schedule(step: int) -> float:
    return min(1.0, (step + 1) / 5) * (1 - step / 40)


def plain_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))


def set_gates(model: nn.Module, values: list[float]) -> None:
    with torch.no_grad():
        for gate, value in zip(model.gates, values, strict=True):
            gate.fill_(value)


def gates_of(model: nn.Module) -> Tensor:
    return torch.cat([gate.detach() for gate in model.gates])


FLAGS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.filterwarnings("ignore:bfloat16 weights lose steps")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gates_it_is_torch_adamw_bit_for_bit(flags: dict, dtype: torch.dtype) -> None:
    options = {"lr": 3e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, **flags}
    ours, theirs = plain_model().to(dtype), plain_model().to(dtype)
    pairs = [
        (ours, WeightAdam(ours.parameters(), **options)),
        (theirs, torch.optim.AdamW(theirs.parameters(), **options)),
    ]
    for model, optimizer in pairs:
        scheduler = LambdaLR(optimizer, schedule)
        for step in range(40):
            optimizer.zero_grad()
            backward(model, step, dtype)
            if step == 7:
                model[0].bias.grad = None  # a parameter without a gradient is left alone, and counts no step
            optimizer.step()
            scheduler.step()
    assert_identical(snapshot(ours), snapshot(theirs))
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        a, b = pairs[0][1].state[p], pairs[1][1].state[q]
        assert_identical(a, b)
        assert {k: v.dtype for k, v in a.items()} == {k: v.dtype for k, v in b.items()}


def test_groups_of_a_gated_model_without_its_gates_are_stepped_as_adamw_does() -> None:
    ours, theirs = gated_model(), gated_model()
    for model in (ours, theirs):
        for gate in model.gates:
            gate.requires_grad_(False)
    settings = {"lr": 1e-2, "lora_plus_ratio": 4.0, "head_lr": 3e-3}
    for model, cls in ((ours, WeightAdam), (theirs, torch.optim.AdamW)):
        optimizer = cls(build_param_groups(model, **settings))
        for step in range(20):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    assert_identical(snapshot(ours), snapshot(theirs))


def signed_top_k(w: Tensor, k: int) -> Tensor:
    kept = sorted(range(len(w)), key=lambda i: (-float(w[i]), i))[:k]
    return torch.stack([w[i] if i in kept else torch.zeros((), dtype=w.dtype) for i in range(len(w))])


def test_equals_the_reference_algorithm_written_out() -> None:
    """A, B: Adam with decoupled decay. w: SGD with a rate of its own, then the k largest signed values, each step."""
    lr, gate_lr, beta1, beta2, eps, decay, k = 1e-2, 0.5, 0.9, 0.999, 1e-6, 0.01, 2
    model, reference = gated_model(dtype=torch.float64), gated_model(dtype=torch.float64)
    optimizer = WeightAdam(
        build_param_groups(model, lr, gate_lr=gate_lr, weight_decay=decay), lr=lr, eps=eps, constraint=KSparse(k)
    )
    scheduler = LambdaLR(optimizer, schedule)
    m = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    v = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    kept = []
    for t in range(1, 31):
        optimizer.zero_grad()
        backward(model, t, torch.float64)
        optimizer.step()
        scheduler.step()

        rate = schedule(t - 1)
        reference.zero_grad()
        backward(reference, t, torch.float64)
        with torch.no_grad():
            for name, p in reference.named_parameters():
                if not p.requires_grad or "gate" in name:
                    continue
                m[name] = beta1 * m[name] + (1 - beta1) * p.grad
                v[name] = beta2 * v[name] + (1 - beta2) * p.grad**2
                if p.ndim == 2:
                    p -= rate * lr * decay * p
                m_hat, v_hat = m[name] / (1 - beta1**t), v[name] / (1 - beta2**t)
                p -= rate * lr * m_hat / (v_hat.sqrt() + eps)
            w = torch.cat(reference.gates) - rate * gate_lr * torch.cat([gate.grad for gate in reference.gates])
            if any(gate.grad != 0 for gate in reference.gates):
                w = signed_top_k(w, k)
            set_gates(reference, w.tolist())
        kept.append(tuple(gates_of(model).nonzero().flatten().tolist()))
    for name, p in reference.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], p, rtol=1e-10, atol=1e-12)
    assert len(kept[0]) == 4  # B = 0: no gate has a gradient yet
    assert {len(kept_now) for kept_now in kept[1:]} == {k}


@pytest.mark.parametrize("method", ["sgd", "adam"])
def test_gates_wait_for_their_first_nonzero_gradient(method: str) -> None:
    model = gated_model()
    optimizer = WeightAdam(model, lr=1e-2, constraint=KSparse(2), gate_method=method)
    backward(model, 0)  # B = 0, so every gate's gradient is exactly zero
    optimizer.step()
    assert gates_of(model).tolist() == [1.0] * 4
    assert not any(p in optimizer.state for p in model.gates)
    optimizer.zero_grad()
    backward(model, 1)
    optimizer.step()
    assert int((gates_of(model) != 0).sum()) == 2
    # Once started, zero gradients no longer hold the projection back.
    set_gates(model, [1.0, 2.0, 3.0, 4.0])
    for gate in model.gates:
        gate.grad.zero_()
        optimizer.state.pop(gate, None)
    optimizer.step()
    assert gates_of(model).tolist() == [0.0, 0.0, 3.0, 4.0]


@pytest.mark.parametrize("constraint", [KSparse(2, nonnegative=True), Simplex(2.0), SimplexKSparse(3, 1.5)], ids=str)
def test_after_every_step_the_gates_are_in_the_set_and_in_their_storage(constraint) -> None:
    model = gated_model()
    optimizer = WeightAdam(model, lr=1e-2, gate_lr=0.3, constraint=constraint)
    storages = [gate.data_ptr() for gate in model.gates]
    seen = []
    for step in range(12):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        w = gates_of(model).double()
        if step >= 1:
            torch.testing.assert_close(constraint.project(w), w, rtol=0, atol=1e-6)
        seen.append(w)
    assert [gate.data_ptr() for gate in model.gates] == storages
    assert not torch.equal(seen[-1], seen[-2])


def test_gate_momentum_is_heavy_ball() -> None:
    model = gated_model(dtype=torch.float64)
    optimizer = WeightAdam(model, gate_lr=0.1, gate_momentum=0.9)
    set_gates(model, [1.0, 1.0, 1.0, 1.0])
    w, momentum = gates_of(model), torch.zeros(4, dtype=torch.float64)
    for step in range(6):
        gradient = torch.randn(4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for gate, g in zip(model.gates, gradient, strict=True):
            gate.grad = g.view(1).clone()
        optimizer.step()
        momentum = 0.9 * momentum + gradient
        w = w - 0.1 * momentum
    torch.testing.assert_close(gates_of(model), w)


def test_gate_adam_is_torch_adam() -> None:
    model = gated_model(dtype=torch.float64)
    w = nn.Parameter(gates_of(model))
    optimizer, reference = WeightAdam(model, gate_method="adam"), torch.optim.Adam([w], lr=0.05)
    for step in range(6):
        w.grad = torch.randn(4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for gate, g in zip(model.gates, w.grad, strict=True):
            gate.grad = g.view(1).clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(gates_of(model), w.detach())


def test_gates_without_a_gradient_stand_still_but_count_in_the_projection() -> None:
    model = gated_model()
    optimizer = WeightAdam(model, gate_lr=1.0, constraint=KSparse(2))
    set_gates(model, [4.0, 3.0, 2.0, 1.0])
    model.gates[3].grad = torch.tensor([-1.5])
    optimizer.step()
    assert gates_of(model).tolist() == [4.0, 3.0, 0.0, 0.0]
    model.gates[3].grad = torch.tensor([-9.0])
    optimizer.step()
    assert gates_of(model).tolist() == [4.0, 0.0, 0.0, 9.0]


def test_schedulers_multiply_both_rates() -> None:
    model = gated_model()
    optimizer = WeightAdam(model, lr=1e-3, gate_lr=8.0)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    for factor in (1.0, 0.5, 0.25):
        rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        assert rates["gates"] == 8.0 * factor
        assert rates["lora_A"] == rates["lora_B"] == 1e-3 * factor
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("steps_before", [1, 4])
@pytest.mark.parametrize(
    "options", [{}, {"gate_momentum": 0.9}, {"gate_method": "adam"}, {"fused": True}, {"foreach": True}], ids=str
)
def test_resumed_equals_uninterrupted_bit_for_bit(options: dict, steps_before: int, tmp_path) -> None:
    def build(seed: int):
        model = gated_model(seed)
        optimizer = WeightAdam(model, lr=1e-2, gate_lr=0.2, constraint=KSparse(2), **options)
        return model, optimizer, LambdaLR(optimizer, schedule)

    def run(model, optimizer, scheduler, steps) -> None:
        for step in steps:
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            scheduler.step()

    straight = build(0)
    run(*straight, range(9))
    first = build(0)
    run(*first, range(steps_before))
    torch.save([part.state_dict() for part in first], tmp_path / "checkpoint.pt")
    resumed = build(1)
    for part, state in zip(resumed, torch.load(tmp_path / "checkpoint.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    run(*resumed, range(steps_before, 9))
    assert_identical(snapshot(resumed[0]), snapshot(straight[0]))
    for p, q in zip(resumed[0].parameters(), straight[0].parameters(), strict=True):
        assert_identical(resumed[1].state.get(p, {}), straight[1].state.get(q, {}))


@pytest.mark.filterwarnings("ignore:bfloat16 weights lose steps")
def test_a_bfloat16_model_resumes_though_torch_casts_the_state() -> None:
    def run(model, optimizer, steps) -> None:
        for step in steps:
            optimizer.zero_grad()
            backward(model, step, torch.bfloat16)
            optimizer.step()

    models = [gated_model(dtype=torch.bfloat16) for _ in range(2)]
    straight, resumed = [
        (model, WeightAdam(model, lr=1e-2, gate_lr=0.2, constraint=KSparse(2), gate_momentum=0.5)) for model in models
    ]
    run(*straight, range(8))
    run(*resumed, range(3))
    fresh = WeightAdam(resumed[0], lr=1e-2, gate_lr=0.2, constraint=KSparse(2), gate_momentum=0.5)
    fresh.load_state_dict(resumed[1].state_dict())
    run(resumed[0], fresh, range(3, 8))
    assert_identical(snapshot(resumed[0]), snapshot(straight[0]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device: CUDA")
def test_gates_spread_over_devices_are_one_vector() -> None:
    spread, whole = gated_model(), gated_model()
    for layer in spread.layers[2:]:
        layer.to("cuda")
    optimizers = [WeightAdam(m, lr=1e-2, gate_lr=0.2, constraint=KSparse(2)) for m in (spread, whole)]
    for step in range(4):
        for i in range(4):
            gradient = torch.randn(1, generator=torch.Generator().manual_seed(10 * step + i))
            whole.gates[i].grad = gradient
            spread.gates[i].grad = gradient.to(spread.gates[i].device)
        for optimizer in optimizers:
            optimizer.step()
        assert [float(g) for g in spread.gates] == pytest.approx(gates_of(whole).tolist(), rel=1e-6)
        assert sum(float(g) != 0 for g in spread.gates) == 2


def test_a_closure_is_evaluated_once_with_gradients_enabled() -> None:
    model, other = gated_model(), gated_model()
    optimizer = WeightAdam(model, lr=1e-2, gate_lr=0.2, constraint=KSparse(2))
    plain = WeightAdam(other, lr=1e-2, gate_lr=0.2, constraint=KSparse(2))
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            return backward(model, step)

        loss = optimizer.step(closure)
        plain.zero_grad()
        assert torch.equal(loss, backward(other, step))
        plain.step()
    assert_identical(snapshot(model), snapshot(other))


def test_accumulated_gradients_step_as_their_sum() -> None:
    model, other = gated_model(dtype=torch.float64), gated_model(dtype=torch.float64)
    optimizer = WeightAdam(model, lr=1e-2, gate_lr=0.2, constraint=KSparse(2))
    reference = WeightAdam(other, lr=1e-2, gate_lr=0.2, constraint=KSparse(2))
    for step in range(0, 8, 2):
        for current in (optimizer, reference):
            current.zero_grad()
        for micro in (step, step + 1):
            backward(model, micro, torch.float64)
        gradients = []
        for micro in (step, step + 1):
            other.zero_grad()
            backward(other, micro, torch.float64)
            gradients.append([p.grad for p in other.parameters() if p.requires_grad])
        for p, a, b in zip((p for p in other.parameters() if p.requires_grad), *gradients, strict=True):
            p.grad = a + b
        optimizer.step()
        reference.step()
    assert_identical(snapshot(model), snapshot(other))


@pytest.mark.parametrize("flags", [{}, {"fused": True}], ids=str)
def test_grad_scaler_unscales_and_skips_overflowing_steps(flags: dict) -> None:
    model, other = gated_model(), gated_model()
    build = {"lr": 1e-2, "gate_lr": 0.2, "constraint": KSparse(2), **flags}
    optimizer, plain = WeightAdam(model, **build), WeightAdam(other, **build)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    for step in range(6):
        for current in (optimizer, plain):
            current.zero_grad()
        backward(other, step)
        plain.step()
        # A power of two scales gradients exactly, so that the two runs agree to the bit.
        x, y = batch(step)
        scaler.scale((model(x) - y).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert_identical(snapshot(model), snapshot(other))

    before = snapshot(model)
    optimizer.zero_grad()
    backward(model, 6)
    model.gates[0].grad.fill_(math.inf)
    scaler.step(optimizer)
    scaler.update()
    assert_identical(snapshot(model), before)
    assert scaler.get_scale() == 2.0**11


def test_removed_parameters_are_freed_and_never_move_again() -> None:
    model = gated_model()
    optimizer = WeightAdam(model, lr=1e-2, gate_lr=0.2, constraint=KSparse(3), gate_momentum=0.9)
    scheduler = LambdaLR(optimizer, schedule)

    def run(steps) -> None:
        for step in steps:
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
            scheduler.step()

    run(range(4))
    dropped = [p for p in model.layers[1].parameters() if p.requires_grad]
    kept = [p for p in model.parameters() if p.requires_grad and all(p is not d for d in dropped)]
    remove_parameters(optimizer, dropped)
    for p in dropped:
        p.requires_grad_(False)
    assert all(p.grad is None for p in dropped)
    assert set(optimizer.state) == set(kept)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in kept}
    before = [p.clone() for p in dropped]
    run(range(4, 8))
    assert all(torch.equal(p, b) for p, b in zip(dropped, before, strict=True))
    assert int((gates_of(model)[[0, 2, 3]] != 0).sum()) == 3

    # All gates gone: the group stays for the scheduler, and steps and round trips still work.
    remove_parameters(optimizer, [gate for gate in model.gates if gate.requires_grad])
    optimizer.constraint = None
    run(range(8, 10))
    optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(InputError) as caught:
        remove_parameters(optimizer, [dropped[0]])
    assert caught.value.code == "foreign-parameter"


def test_a_copy_steps_like_the_original() -> None:
    model = gated_model()
    optimizer = WeightAdam(model, lr=1e-2, gate_lr=0.2, constraint=KSparse(2))
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    other, copied = copy.deepcopy((model, optimizer))
    for current, stepper in ((model, optimizer), (other, copied)):
        stepper.zero_grad()
        backward(current, 3)
        stepper.step()
    assert_identical(snapshot(model), snapshot(other))
    assert not torch.equal(
        model.layers[0].loom_lora_A["default"].weight, gated_model().layers[0].loom_lora_A["default"].weight
    )


@pytest.mark.parametrize("where", ["gradient", "gate"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"gate_momentum": 0.9}, {"gate_method": "adam"}], ids=str)
def test_a_gate_that_is_not_finite_is_an_error_before_anything_moved(where: str, value: float, options: dict) -> None:
    model = gated_model()
    optimizer = WeightAdam(model, constraint=KSparse(2), **options)
    for step in range(3):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    backward(model, 3)
    gate = model.gates[1]
    (gate.data if where == "gate" else gate.grad).fill_(value)
    before, state = snapshot(model), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(RunFailedError) as caught:
        optimizer.step()
    assert caught.value.code == "not-finite"
    assert "gate 2 of 4" in str(caught.value)
    after = snapshot(model)
    assert all(torch.equal(after[name], before[name]) or before[name].isnan().any() for name in before)
    for i, entry in optimizer.state_dict()["state"].items():
        assert_identical(entry, state[i])


@pytest.mark.parametrize("options", [{}, {"gate_momentum": 0.9}, {"gate_method": "adam"}], ids=str)
def test_the_state_of_adamw_is_taken(options: dict) -> None:
    """A run of AdamW goes on with WeightAdam: without a constraint, and gates by Adam, it is the same run."""
    model, other = gated_model(), gated_model()
    groups = build_param_groups(model, 1e-3)
    plain = torch.optim.AdamW([{k: v for k, v in g.items() if k != "is_gate"} for g in groups], lr=1e-3)
    for step in range(4):
        plain.zero_grad()
        backward(model, step)
        plain.step()
    other.load_state_dict(model.state_dict())
    optimizer = WeightAdam(other, lr=1e-3, constraint=None if options.get("gate_method") else KSparse(2), **options)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    for step in range(4, 8):
        for m, o in ((model, plain), (other, optimizer)):
            o.zero_grad()
            backward(m, step)
            o.step()
    if options.get("gate_method") == "adam":
        assert_identical(snapshot(model), snapshot(other))
    else:
        assert int((gates_of(other) != 0).sum()) == 2


def test_a_state_with_other_gates_or_rounding_is_refused() -> None:
    gates = WeightAdam(gated_model())
    without = WeightAdam([{"params": group["params"]} for group in gates.param_groups])
    with pytest.raises(InputError) as caught:
        gates.load_state_dict(without.state_dict())
    assert caught.value.code == "other-state"
    rounded = WeightAdam([nn.Parameter(torch.ones(3, dtype=torch.bfloat16))], rounding="kahan")
    usual = WeightAdam([nn.Parameter(torch.ones(3))])
    with pytest.raises(InputError) as caught:
        usual.load_state_dict(rounded.state_dict())
    assert caught.value.code == "other-state"


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"constraint": KSparse(5)}, "out-of-range"),
        ({"lr": -1.0}, "out-of-range"),
        ({"gate_lr": -1.0}, "out-of-range"),
        ({"betas": (0.9, 1.0)}, "out-of-range"),
        ({"gate_momentum": 1.5}, "out-of-range"),
        ({"gate_method": "lion"}, "unknown-choice"),
        ({"rounding": "up"}, "unknown-choice"),
        ({"rounding": "kahan"}, "not-bfloat16"),
        ({"gate_method": "adam", "gate_momentum": 0.9}, "exclusive"),
        ({"foreach": True, "fused": True}, "exclusive"),
    ],
)
def test_bad_arguments_are_named(options: dict, code: str) -> None:
    with pytest.raises(InputError) as caught:
        WeightAdam(gated_model(), **options)
    assert caught.value.code == code


@pytest.mark.parametrize("option", [{"constraint": KSparse(1)}, {"gate_lr": 5.0}], ids=str)
def test_gate_options_without_gates_are_an_error(option: dict) -> None:
    with pytest.raises(InputError) as caught:
        WeightAdam(plain_model(), **option)
    assert caught.value.code == "nothing-for-rate"


def test_gates_may_not_decay() -> None:
    model = gated_model()
    with pytest.raises(InputError) as caught:
        WeightAdam([{"params": model.gates, "is_gate": True, "weight_decay": 0.1}])
    assert caught.value.code == "gates-decay"


def test_gates_added_by_hand_take_the_gate_rate_and_no_decay() -> None:
    model = gated_model()
    adapters = [p for name, p in model.named_parameters() if p.requires_grad and "gate" not in name]
    optimizer = WeightAdam([{"params": adapters}, {"params": model.gates, "is_gate": True}], lr=1e-3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(1e-3, 1e-2), (5.0, 0.0)]
    optimizer = WeightAdam(adapters, lr=1e-3, gate_method="adam")
    optimizer.add_param_group({"params": model.gates, "is_gate": True})
    assert optimizer.param_groups[1]["lr"] == 5e-2
