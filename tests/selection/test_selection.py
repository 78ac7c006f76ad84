"""The phases on a model: what trains, what is freed, and that a resumed run is the uninterrupted one."""

import json

import peft
import pytest
import torch
from torch import nn

from loraloom import LoomConfig
from loraloom.errors import InputError, RunFailedError
from loraloom.optim import KSparse, Simplex, SimplexKSparse, build_optimizer
from loraloom.selection import AdapterSelection, FillBudget, HalveAndDouble, format_selection
from loraloom.selection.rewire import adapted_layers, count_parameters, factors
from loraloom.tuner.layer import LoomLayer

from .support import Net, adapted, assert_identical, optimizer_for, outputs, run, tensors, train

SCHEDULE = {"warmup_steps": 2, "select_every": 2, "select_until": 8}


def nonzero(selection: AdapterSelection) -> int:
    return sum(gate != 0 for gate in selection.gates().values())


def test_the_phases_in_order() -> None:
    model = adapted()
    selection = AdapterSelection(model, optimizer_for(model), 2, **SCHEDULE)
    assert len(selection.modules) == 6
    seen = []
    for step in range(1, 12):
        seen.append(selection.phase)
        train(model, selection.optimizer, [step])
        if step <= 3:
            assert nonzero(selection) == 6
            assert not selection.frozen
        elif step in (4, 6):
            assert nonzero(selection) == 2
            assert len(selection.frozen) == 4
        elif step in (5, 7):  # between two projections the gates are free, but what was dropped stands still
            assert nonzero(selection) == 6
            assert len(selection.frozen) == 4
        else:
            assert len(selection.kept) == 2
            assert selection.gates() == {}
            assert not selection.frozen
    assert seen == ["warm-up"] * 2 + ["selecting"] * 6 + ["fixed"] * 3
    assert [record["step"] for record in selection.history] == [2, 4, 6, 8]
    assert [event["event"] for event in selection.events] == ["disconnect"]
    assert model.peft_config["default"].use_gate is False
    assert sum(isinstance(module, LoomLayer) for module in model.modules()) == 2


def layers(model: nn.Module) -> dict[str, LoomLayer]:
    return adapted_layers(model, "default")


def gate_vector(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().clone() for name, p in model.named_parameters() if "gate" in name])


def test_gates_take_projected_gradient_steps_while_selecting_and_plain_ones_before() -> None:
    model = adapted()
    optimizer = optimizer_for(model)
    AdapterSelection(model, optimizer, 2, warmup_steps=3, select_every=1, select_until=20)
    for step in range(1, 10):
        before = gate_vector(model)
        train(model, optimizer, [step])
        gradient = torch.cat([p.grad for name, p in model.named_parameters() if "gate" in name])
        expected = before - 0.3 * gradient
        torch.testing.assert_close(gate_vector(model), KSparse(2).project(expected) if step > 3 else expected)


def test_a_dropped_adapter_does_not_move_until_it_is_chosen_again() -> None:
    model = adapted()
    optimizer = optimizer_for(model)
    selection = AdapterSelection(model, optimizer, 2, warmup_steps=1, select_every=2, select_until=30)
    moved, returned = 0, 0
    for step in range(1, 25):
        frozen = set(selection.frozen)
        before = {n: [p.detach().clone() for p in factors(layer, "default")] for n, layer in layers(model).items()}
        train(model, optimizer, [step])
        for name, layer in layers(model).items():
            same = [torch.equal(p, old) for p, old in zip(factors(layer, "default"), before[name], strict=True)]
            if name in frozen:
                assert all(same), f"{name} moved in step {step}"
            elif step > 1:
                moved += not any(same)
        returned += len(frozen - selection.frozen)
        if step == 12:  # bring one back by hand, as a large gradient would
            with torch.no_grad():
                layers(model)[min(selection.frozen)].factor("gate", "default").fill_(50.0)
    assert moved
    assert returned


def test_switching_the_adapter_off_and_on_does_not_wake_the_dropped() -> None:
    """As a preference trainer does for its reference: PEFT then makes the whole adapter trainable."""
    model = adapted()
    optimizer = optimizer_for(model)
    selection = AdapterSelection(model, optimizer, 2, warmup_steps=1, select_every=10, select_until=40)
    train(model, optimizer, range(12))
    before = {n: [p.detach().clone() for p in factors(layers(model)[n], "default")] for n in selection.frozen}
    assert len(before) == 4
    with model.disable_adapter():
        pass
    train(model, optimizer, [12])
    for name, olds in before.items():
        for parameter, old in zip(factors(layers(model)[name], "default"), olds, strict=True):
            assert torch.equal(parameter, old)


def test_without_reentry_the_dropped_are_disconnected_at_once() -> None:
    selection = run(2, 3, warmup_steps=1, select_every=2, select_until=9, reentry=False)
    assert len(selection.kept) == 2
    assert selection.phase == "selecting"
    assert len(selection.gates()) == 2
    kept = dict(selection.kept)
    train(selection.model, selection.optimizer, range(3, 12))
    assert selection.kept == kept
    assert selection.gates() == {}


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))


def gradient_bytes(model: nn.Module) -> int:
    return sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("options", [{}, {"use_mixer": "orthogonal"}], ids=str)
def test_after_disconnecting_memory_is_that_of_the_kept_adapters_alone(options: dict) -> None:
    selection = run(2, 12, options, **SCHEDULE)
    model, optimizer = selection.model, selection.optimizer
    # The same adapters, made by a user who knew them from the start.
    torch.manual_seed(0)
    parts = {"r": 2, "modules_to_save": ["head"], **options}
    alone = peft.get_peft_model(Net(), LoomConfig(target_modules=list(selection.kept), **parts))
    other = optimizer_for(alone, gate_lr=None)
    train(alone, other, range(3))
    assert state_bytes(optimizer) == state_bytes(other) > 0
    assert gradient_bytes(model) == gradient_bytes(alone) > 0
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, p in alone.named_parameters() if p.requires_grad
    ]
    assert sum(p.nbytes for p in model.parameters()) == sum(p.nbytes for p in alone.parameters())


def test_disconnecting_and_folding_change_no_output() -> None:
    model, seen = adapted(), []
    optimizer = optimizer_for(model)
    # Registered before the selection's own hook: when it is called, gates are projected and nothing is disconnected.
    optimizer.register_step_post_hook(lambda *_: seen.append(outputs(model)))
    selection = AdapterSelection(model, optimizer, 2, **SCHEDULE)
    train(model, selection.optimizer, range(8))
    assert len(selection.kept) == 2
    torch.testing.assert_close(outputs(model), seen[-1], rtol=1e-5, atol=1e-6)


def test_fractions_and_sets_choose_how_many_to_keep() -> None:
    assert len(run(0.5, 9, **SCHEDULE).kept) == 3
    assert len(run(1, 9, **SCHEDULE).kept) == 1
    selection = run(Simplex(0.02), 9, **SCHEDULE)
    last = [gate for gate in selection.history[-1]["gates"] if gate]
    assert len(selection.kept) == len(last) < 6
    assert sum(last) == pytest.approx(0.02, rel=1e-5)


def test_halving_and_doubling_keeps_adapters_times_rank() -> None:
    model = adapted()
    expand = HalveAndDouble(times=2, every=3)
    selection = AdapterSelection(model, optimizer_for(model), 4, **SCHEDULE, expand=expand)
    train(model, selection.optimizer, range(8))
    assert sorted(selection.kept.values()) == [2] * 4
    assert selection.phase == "expanding"
    for step, (count, rank) in {11: (2, 4), 14: (1, 8)}.items():
        train(model, selection.optimizer, range(step - 3, step))
        assert list(selection.kept.values()) == [rank] * count
    assert selection.gates() == {}
    assert [event["event"] for event in selection.events] == [
        "disconnect",
        "disconnect",
        "expand",
        "disconnect",
        "expand",
    ]
    assert all(1 <= c < 10 for e in selection.events for c in e.get("condition_numbers", {}).values())
    assert model.peft_config["default"].r == 8
    train(model, selection.optimizer, range(14, 17))


def test_a_budget_is_filled_but_not_exceeded() -> None:
    budget = sum(count_parameters(layer, "default", 2) for layer in layers(adapted()).values())
    selection = run(2, 8, **SCHEDULE, expand=FillBudget(budget))
    assert list(selection.kept.values()) == [6, 6]
    held = sum(p.numel() for layer in layers(selection.model).values() for p in factors(layer, "default"))
    assert held <= budget < sum(count_parameters(layer, "default", 7) for layer in layers(selection.model).values())
    train(selection.model, selection.optimizer, range(8, 11))
    # Too small a budget changes nothing.
    assert list(run(2, 8, **SCHEDULE, expand=FillBudget(10)).kept.values()) == [2, 2]


def test_the_checkpoint_of_a_finished_run_is_a_plain_adapter(tmp_path) -> None:
    selection = run(3, 16, **SCHEDULE, expand=HalveAndDouble(times=1, every=4))
    selection.model.save_pretrained(str(tmp_path))
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Net(), str(tmp_path), is_trainable=True)
    torch.testing.assert_close(outputs(loaded), outputs(selection.model), rtol=1e-6, atol=1e-6)
    assert {name: layer.r["default"] for name, layer in layers(loaded).items()} == selection.kept
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(outputs(merged), outputs(selection.model), rtol=1e-4, atol=1e-5)


EXPANDED = {**SCHEDULE, "expand": HalveAndDouble(times=2, every=3)}


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 8, 9, 11, 13, 14, 16])
@pytest.mark.parametrize("options", [{}, {"gate_momentum": 0.5}, {"gate_method": "adam", "gate_lr": 0.1}], ids=str)
def test_resumed_in_any_phase_equals_uninterrupted_bit_for_bit(stop: int, options: dict, tmp_path) -> None:
    def build(seed: int) -> AdapterSelection:
        model = adapted(seed, use_mixer="orthogonal")
        return AdapterSelection(model, optimizer_for(model, **options), 4, **EXPANDED)

    straight = build(0)
    train(straight.model, straight.optimizer, range(18))

    first = build(0)
    train(first.model, first.optimizer, range(stop))
    first.save(tmp_path)
    torch.save([first.model.state_dict(), first.optimizer.state_dict()], tmp_path / "state.pt")

    resumed = build(0)
    torch.manual_seed(1)
    resumed.restore(tmp_path)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.model.load_state_dict(weights)
    resumed.optimizer.load_state_dict(state)
    assert resumed.kept == first.kept
    train(resumed.model, resumed.optimizer, range(stop, 18))
    assert_identical(tensors(resumed.model), tensors(straight.model))
    assert resumed.state_dict() == straight.state_dict()
    for p, q in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert_identical(resumed.optimizer.state.get(p, {}), straight.optimizer.state.get(q, {}))
    assert resumed.model.peft_config["default"].to_dict() == straight.model.peft_config["default"].to_dict()


def test_the_state_is_plain_json_with_a_gate_per_module_and_step(tmp_path) -> None:
    selection = run(2, 10, **SCHEDULE)
    selection.save(tmp_path)
    state = json.loads((tmp_path / "selection.json").read_text())
    assert state == selection.state_dict()
    assert state["modules"] == [f"layers.{i}.{m}" for i in range(3) for m in ("up", "down")]
    assert all(len(record["gates"]) == 6 for record in state["history"])
    assert set(state["kept"]) == {n for n, g in zip(state["modules"], state["history"][-1]["gates"], strict=True) if g}


def test_the_table_shows_layers_by_modules() -> None:
    selection = run(2, 10, **SCHEDULE)
    lines = format_selection(selection).splitlines()
    assert lines[0].split() == ["layer", "up", "down"]
    assert [line.split()[0] for line in lines[1:4]] == ["0", "1", "2"]
    rows = [line.split() for line in lines[1:4]]
    cells = {f"layers.{layer}.up": up for layer, up, _ in rows} | {
        f"layers.{layer}.down": down for layer, _, down in rows
    }
    assert {name for name, cell in cells.items() if cell != "."} == set(selection.kept)
    assert lines[4] == "2 of 6 adapters kept, rank 2"
    whole = adapted(target_modules=["embed", "up"])
    table = format_selection(AdapterSelection(whole, optimizer_for(whole), 2, **SCHEDULE))
    assert table.splitlines()[1].split() == ["-", "1.00"]


def test_no_gradient_for_any_gate_is_an_error_not_a_selection_by_index() -> None:
    with pytest.raises(RunFailedError) as caught:
        run(2, 1, warmup_steps=0, select_until=1)
    assert caught.value.code == "no-gradient"


def test_an_unknown_length_is_an_error_at_the_first_step_and_start_sets_it() -> None:
    model = adapted()
    selection = AdapterSelection(model, optimizer_for(model), 2)
    with pytest.raises(InputError) as caught:
        train(model, selection.optimizer, [0])
    assert caught.value.code == "unknown-length"
    selection.start(20)
    train(model, selection.optimizer, range(20))
    assert len(selection.kept) == 2
    with pytest.raises(InputError) as caught:
        AdapterSelection(model := adapted(), optimizer_for(model), 2, select_until=9, total_steps=5)
    assert caught.value.code == "schedule"


def build_with(**changes) -> AdapterSelection:
    model = adapted(**changes.pop("model", {}))
    optimizer = build_optimizer(model, changes.pop("optimizer", "weight_adam"), lr=1e-3)
    return AdapterSelection(model, optimizer, changes.pop("keep", None), **{**SCHEDULE, **changes})


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"optimizer": "adamw"}, "optimizer"),
        ({"model": {"use_gate": False}}, "no-gates"),
        ({"model": {"use_dora": True}}, "dora"),
        ({"model": {"bias": "loom_only"}}, "bias"),
        ({"keep": 7}, "out-of-range"),
        ({"keep": 0}, "out-of-range"),
        ({"keep": 1.5}, "out-of-range"),
        ({"constraint": "l1"}, "unknown-choice"),
        ({"keep": 2, "constraint": "simplex"}, "exclusive"),
        ({"constraint": "sparse_simplex", "by": "magnitude"}, "exclusive"),
        ({"radius": 3.0}, "exclusive"),
        ({"expand": HalveAndDouble(times=3)}, "out-of-range"),
    ],
    ids=str,
)
def test_what_cannot_be_selected_is_refused(changes: dict, code: str) -> None:
    with pytest.raises(InputError) as caught:
        build_with(**changes)
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("options", "constraint"),
    [
        ({}, KSparse(3)),
        ({"keep": 2, "by": "magnitude"}, KSparse(2, "magnitude")),
        ({"keep": KSparse(4, nonnegative=True)}, KSparse(4, nonnegative=True)),
        ({"constraint": "simplex", "radius": 2.0}, Simplex(2.0)),
        ({"constraint": "sparse_simplex", "keep": 0.34, "radius": 2.0}, SimplexKSparse(2, 2.0)),
    ],
    ids=str,
)
def test_each_set_is_what_the_gates_end_in(options: dict, constraint) -> None:
    selection = run(steps=9, **{"keep": None, **options}, **SCHEDULE)
    assert selection.constraint == constraint
    last = torch.tensor([gate for gate in selection.history[-1]["gates"] if gate])
    assert len(selection.kept) == len(last) <= 6
    assert len(last) <= getattr(constraint, "k", 6)
    if hasattr(constraint, "radius"):
        assert float(last.sum()) == pytest.approx(constraint.radius, rel=1e-5)
        assert (last > 0).all()


def test_merged_foreign_and_used_models_are_refused() -> None:
    model = adapted()
    optimizer = optimizer_for(model)
    codes = []
    model.merge_adapter()
    with pytest.raises(InputError) as caught:
        AdapterSelection(model, optimizer, 2, **SCHEDULE)
    codes.append(caught.value.code)
    model.unmerge_adapter()
    with pytest.raises(InputError) as caught:
        AdapterSelection(model, optimizer_for(adapted()), 2, **SCHEDULE)
    codes.append(caught.value.code)
    selection = AdapterSelection(model, optimizer, 2, **SCHEDULE)
    train(model, optimizer, range(3))
    with pytest.raises(InputError) as caught:
        selection.load_state_dict(selection.state_dict())
    assert [*codes, caught.value.code] == ["merged", "optimizer", "other-state"]
