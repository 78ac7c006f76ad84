"""Disconnecting, folding and expanding leave the function, the optimizer and the checkpoint as they should be."""

import math

import peft
import pytest
import torch
from torch import nn

from loraloom import LoomConfig
from loraloom.errors import InputError
from loraloom.selection.rewire import adapted_layers, disconnect, expand_ranks, factors, fold_gates, gate, largest_rank
from loraloom.tuner.layer import LoomLayer

from .support import Net, adapted, assert_identical, optimizer_for, outputs, randomize, tensors, train

EVERYWHERE = ["embed", "conv", "up", "down"]
PARTS = [
    {},
    {"use_mixer": "orthogonal"},
    {"use_rslora": True},
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "orthogonal", "use_mixer": "orthogonal", "rank_pattern": {"layers.1.up": 4}},
]


def ready(parts: dict, steps: int = 3) -> tuple[peft.PeftModel, torch.optim.Optimizer]:
    model = adapted(target_modules=EVERYWHERE, **parts)
    optimizer = optimizer_for(model)
    randomize(model)
    train(model, optimizer, range(steps))
    return model, optimizer


def close_gates(model: nn.Module, names: list[str]) -> None:
    with torch.no_grad():
        for name in names:
            gate(adapted_layers(model, "default")[name], "default").zero_()


def assert_reloads(model: peft.PeftModel, folder) -> None:
    """A stranger with the base model and the saved adapter gets the same tensors, scales and outputs."""
    model.save_pretrained(str(folder))
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Net(), str(folder))
    assert_identical(tensors(loaded), tensors(model))
    torch.testing.assert_close(outputs(loaded), outputs(model), rtol=1e-6, atol=1e-6)  # other memory, other kernels
    ours, theirs = adapted_layers(model, "default"), adapted_layers(loaded, "default")
    assert ours.keys() == theirs.keys()
    for name, layer in ours.items():
        assert theirs[name].r == layer.r
        assert theirs[name].scaling == layer.scaling


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_disconnecting_closed_adapters_changes_no_output(parts: dict, tmp_path) -> None:
    model, optimizer = ready(parts)
    dead = ["embed", "layers.0.up", "layers.1.up", "layers.2.down"]
    close_gates(model, dead)
    layers = adapted_layers(model, "default")
    bases = {name: layers[name].base_layer for name in dead}
    before = outputs(model)
    disconnect(model, "default", dead, optimizer)
    assert torch.equal(outputs(model), before)
    for name, base in bases.items():
        assert model.get_base_model().get_submodule(name) is base
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == {p for p in model.parameters() if p.requires_grad}
    assert set(optimizer.state) <= held
    assert_reloads(model, tmp_path)
    train(model, optimizer, range(3, 5))


def test_a_kept_name_that_ends_like_a_dropped_one_is_still_the_only_one_loaded(tmp_path) -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 4)
            self.block = nn.ModuleDict({"proj": nn.Linear(4, 4)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block["proj"](torch.tanh(self.proj(x)))

    base = Nested()
    model = peft.get_peft_model(base, LoomConfig.weightlora(r=2, target_modules=["proj"]))
    optimizer = optimizer_for(model)
    close_gates(model, ["block.proj"])
    disconnect(model, "default", ["block.proj"], optimizer)
    assert list(adapted_layers(model, "default")) == ["proj"]
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(Nested(), str(tmp_path))
    assert list(adapted_layers(loaded, "default")) == ["proj"]


def test_disconnecting_leaves_other_adapters_alone() -> None:
    model = adapted()
    model.add_adapter("other", LoomConfig(r=3, target_modules=["up"], init_lora_weights=False))
    optimizer = optimizer_for(model)
    model.base_model.set_adapter(["default", "other"])
    before = outputs(model)
    close_gates(model, ["layers.0.up", "layers.0.down"])
    model.base_model.set_adapter("default")
    optimizer = optimizer_for(model)
    disconnect(model, "default", ["layers.0.up", "layers.0.down"], optimizer)
    layer = model.get_base_model().get_submodule("layers.0.up")
    assert isinstance(layer, LoomLayer)
    assert list(layer.loom_lora_A) == ["other"]
    assert isinstance(model.get_base_model().get_submodule("layers.0.down"), nn.Linear)
    assert layer.active_adapters == ["default"]  # as everywhere: "other" has not been switched on behind our back
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(outputs(model), before)  # B of "default" is zero


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_folded_gates_change_no_output_and_leave_a_plain_adapter(parts: dict, tmp_path) -> None:
    model, optimizer = ready(parts)
    before = outputs(model)
    fold_gates(model, "default", optimizer)
    torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-5)
    assert not any("gate" in name for name, _ in model.named_parameters())
    assert model.peft_config["default"].use_gate is False
    assert_reloads(model, tmp_path)
    train(model, optimizer, range(3, 5))


def test_folding_divides_the_moments_as_it_divides_the_gradient() -> None:
    model, optimizer = ready({})

    def gradients() -> dict[str, torch.Tensor]:
        optimizer.zero_grad()
        outputs_of = model(torch.arange(10).view(2, 5))
        outputs_of.square().mean().backward()
        return {n: layer.factor("B", "default").grad for n, layer in adapted_layers(model, "default").items()}

    gates = {n: float(gate(layer, "default").detach()) for n, layer in adapted_layers(model, "default").items()}
    assert any(g < 0 for g in gates.values())
    old = gradients()
    states = {
        n: {k: v.clone() for k, v in optimizer.state[layer.factor("B", "default")].items()}
        for n, layer in adapted_layers(model, "default").items()
    }
    fold_gates(model, "default", optimizer)
    new = gradients()
    for name, layer in adapted_layers(model, "default").items():
        torch.testing.assert_close(new[name] * gates[name], old[name], rtol=1e-4, atol=1e-6)
        state = optimizer.state[layer.factor("B", "default")]
        torch.testing.assert_close(state["exp_avg"] * gates[name], states[name]["exp_avg"])
        torch.testing.assert_close(state["exp_avg_sq"] * gates[name] ** 2, states[name]["exp_avg_sq"])
        assert state["step"] == states[name]["step"]


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_expansion_preserves_the_function_and_reloads_every_time(parts: dict, tmp_path) -> None:
    model, optimizer = ready(parts)
    for round_ in range(2):
        before = outputs(model)
        layers = adapted_layers(model, "default")
        ranks = {name: min(2 * layer.r["default"], largest_rank(layer, "default")) for name, layer in layers.items()}
        chosen = {name: r for name, r in ranks.items() if name != "layers.2.down"}
        scaling = {name: layer.scaling["default"] for name, layer in layers.items()}
        expand_ranks(model, "default", chosen, optimizer, seed=round_)
        torch.testing.assert_close(outputs(model), before, rtol=1e-5, atol=1e-5)
        for name, layer in layers.items():
            assert layer.scaling["default"] == pytest.approx(scaling[name], rel=1e-12)
            assert layer.r["default"] == chosen.get(name, 2)
        assert_reloads(model, tmp_path / str(round_))
        train(model, optimizer, range(3 + round_, 4 + round_))
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == {p for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("seed", range(4))
def test_expanded_factors_are_well_conditioned_and_orthogonal_to_the_old(seed: int) -> None:
    model, optimizer = ready({})
    before = {}
    for name, layer in adapted_layers(model, "default").items():
        part = "B" if name == "embed" else "A"
        factor = layer.factor(part, "default").detach().flatten(1)
        before[name] = factor.T.clone() if name == "embed" else factor.clone()
    ranks = {name: 5 for name in before}
    conditions = expand_ranks(model, "default", ranks, optimizer, seed)
    for name, layer in adapted_layers(model, "default").items():
        part = "B" if name == "embed" else "A"
        factor = layer.factor(part, "default").detach().flatten(1)
        factor = factor.T if name == "embed" else factor
        assert torch.equal(factor[:2], before[name])
        new, size = factor[2:].double(), torch.linalg.vector_norm(before[name].double()) / math.sqrt(2)
        torch.testing.assert_close(new @ new.T / size**2, torch.eye(3).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(
            new @ before[name].double().T / size**2, torch.zeros(3, 2).double(), rtol=0, atol=1e-6
        )
        # No worse than it was: the new singular values lie between the old ones.
        assert float(torch.linalg.cond(factor)) == pytest.approx(float(torch.linalg.cond(before[name])), rel=1e-4)
        assert conditions[name] == pytest.approx(float(torch.linalg.cond(factor)), rel=1e-4)
        other = layer.factor("A" if name == "embed" else "B", "default").detach().flatten(1)
        assert not (other[2:] if name == "embed" else other[:, 2:]).any()
        assert conditions[name] < 10


def test_the_optimizer_goes_on_for_the_old_directions_and_begins_for_the_new() -> None:
    model, optimizer = ready({"use_mixer": "orthogonal"})
    states = {
        name: [{k: v.clone() for k, v in optimizer.state[p].items()} for p in factors(layer, "default")]
        for name, layer in adapted_layers(model, "default").items()
    }
    order = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    expand_ranks(model, "default", {name: 4 for name in states}, optimizer, seed=0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(group) for group in order]
    for name, layer in adapted_layers(model, "default").items():
        for p, old in zip(factors(layer, "default"), states[name], strict=True):
            state = optimizer.state[p]
            assert state["step"] == old["step"] == 3
            for key in ("exp_avg", "exp_avg_sq"):
                inside = tuple(slice(n) for n in old[key].shape)
                assert torch.equal(state[key][inside], old[key])
                assert state[key].count_nonzero() == old[key].count_nonzero()


def test_an_odd_rank_loads_though_the_initialization_wanted_an_even_one(tmp_path) -> None:
    model, optimizer = ready({"init_lora_weights": "orthogonal"})
    expand_ranks(model, "default", {name: 3 for name in adapted_layers(model, "default")}, optimizer, seed=0)
    assert_reloads(model, tmp_path)


def test_the_same_seed_adds_the_same_directions() -> None:
    results = []
    for global_seed in (1, 2):
        model, optimizer = ready({})
        torch.manual_seed(global_seed)
        expand_ranks(model, "default", {"layers.0.up": 4, "conv": 3}, optimizer, seed=7)
        results.append(tensors(model))
    assert_identical(*results)


def test_ranks_that_cannot_be_are_refused_before_anything_changes() -> None:
    model, optimizer = ready({})
    before = tensors(model)
    limit = largest_rank(adapted_layers(model, "default")["layers.0.up"], "default")
    assert limit == 8
    for r in (1, limit + 1):
        with pytest.raises(InputError) as caught:
            expand_ranks(model, "default", {"conv": 4, "layers.0.up": r}, optimizer, seed=0)
        assert caught.value.code == "out-of-range"
        assert "layers.0.up" in str(caught.value)
    assert_identical(tensors(model), before)
