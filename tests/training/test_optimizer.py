"""The section `optimizer`: every key reaches the optimizer that trains, and a key that would not is an error."""

import dataclasses

import pytest
import torch

from loraloom.errors import InputError
from loraloom.optim import WeightAdam
from loraloom.training import fit

from .support import elsewhere, weights, with_method, with_optimizer, with_training


@pytest.fixture
def trained_with(monkeypatch):
    """Train four steps, and give the optimizer that did it, without accelerate's wrapping."""

    def train(config):
        trainers = []
        build = fit.build_trainer
        monkeypatch.setattr(fit, "build_trainer", lambda *a: trainers.append(build(*a)) or trainers[0])
        fit.train(with_training(config, max_steps=4, save_strategy="no", eval_strategy="no"))
        return trainers[0].optimizer.optimizer

    return train


def groups(optimizer):
    return {group["name"]: group for group in optimizer.param_groups}


def test_every_key_reaches_the_optimizer(classification, trained_with):
    config = with_training(
        with_method(classification, "weightlora", warmup_steps=0, select_until=4), learning_rate=1e-3
    )
    keys = {"lora_plus_ratio": 4, "gate_lr": 2.0, "head_lr": 5e-3, "betas": [0.8, 0.95], "eps": 1e-6}
    config = with_optimizer(config, **keys, weight_decay=0.1, gate_momentum=0.5)
    optimizer = trained_with(config)
    assert type(optimizer) is WeightAdam
    by_name = groups(optimizer)
    rates = {name: group["initial_lr"] for name, group in by_name.items()}
    assert rates == {"lora_A": 1e-3, "lora_B": 4e-3, "gates": 2.0, "heads": 5e-3, "heads_no_decay": 5e-3}
    assert {name for name, group in by_name.items() if group["weight_decay"] == 0.1} == {"lora_A", "lora_B", "heads"}
    for group in by_name.values():
        assert (tuple(group["betas"]), group["eps"], group["gate_momentum"]) == ((0.8, 0.95), 1e-6, 0.5)


def test_the_default_is_adamw_at_the_rate_of_training(classification, trained_with):
    optimizer = trained_with(with_training(classification, learning_rate=3e-3))
    assert type(optimizer) is torch.optim.AdamW
    assert {group["initial_lr"] for group in optimizer.param_groups} == {3e-3}
    assert {name: group["weight_decay"] for name, group in groups(optimizer).items()} == {
        "lora_A": 0.01,
        "lora_B": 0.01,
        "heads": 0.01,
        "heads_no_decay": 0.0,
    }


def test_training_optim_is_transformers_own_with_its_keys(classification, trained_with):
    keys = {"optim": "adamw_torch", "weight_decay": 0.3, "adam_beta1": 0.7, "adam_epsilon": 1e-5}
    optimizer = trained_with(with_training(classification, **keys))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.3, 0.0}
    assert {(group["betas"], group["eps"]) for group in optimizer.param_groups} == {((0.7, 0.999), 1e-5)}


def test_8bit_trains(classification, trained_with):
    config = with_optimizer(with_method(classification, "lora", r=64), name="adamw_8bit", lora_plus_ratio=2)
    assert type(trained_with(config)).__name__ == "AdamW8bit"


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(
    ("name", "keys", "kind"),
    [
        ("lion", {"betas": [0.8, 0.9]}, "Lion"),
        ("lion_8bit", {}, "Lion8bit"),
        ("paged_adamw", {"eps": 1e-6}, "PagedAdamW"),
        ("muon", {"momentum": 0.9, "betas": [0.8, 0.9]}, "Muon"),
    ],
)
def test_other_optimizers_by_name(classification, trained_with, name, keys, kind):
    optimizer = trained_with(with_optimizer(with_method(classification, "moslora"), name=name, mixer_lr=5e-3, **keys))
    assert type(optimizer).__name__ == kind
    assert groups(optimizer)["mixers"]["initial_lr"] == 5e-3
    for key, value in keys.items():
        taken = [group for group in optimizer.param_groups if key in group and not group.get("use_muon")]
        taken += [group for group in optimizer.param_groups if key == "momentum" and group.get("use_muon")]
        assert taken
        assert all(group[key] == (tuple(value) if isinstance(value, list) else value) for group in taken)


@pytest.mark.parametrize("rounding", ["kahan", "stochastic"])
def test_bfloat16_weights_train_in_full_with_another_rounding(classification, trained_with, rounding):
    config = with_optimizer(with_method(classification, "full"), name="weight_adam", rounding=rounding)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="bfloat16"))
    optimizer = trained_with(config)
    states = [state for p, state in optimizer.state.items() if p.dtype == torch.bfloat16]
    assert states
    assert all(state["exp_avg"].dtype == torch.float32 for state in states)
    assert all(("error" in state) == (rounding == "kahan") for state in states)


def test_weight_adam_without_gates_is_adamw_bit_for_bit(classification, tmp_path):
    config = with_training(classification, max_steps=3, save_strategy="no")
    one = fit.train(elsewhere(with_optimizer(config, name="weight_adam"), tmp_path / "one"))
    two = fit.train(elsewhere(with_training(config, optim="adamw_torch", weight_decay=0.01), tmp_path / "two"))
    first, second = weights(one.output_dir), weights(two.output_dir)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gate_lr": 2.0}, r"optimizer: gate_lr=2\.0 was given, but the model trains no gate; leave it out"),
        (
            {"gate_momentum": 0.5},
            r"optimizer: optimizer 'adamw' can't honor gate_momentum=0\.5; these can: weight_adam",
        ),
        ({"name": "weight_adam", "eps": -1}, r"optimizer: eps=-1 is negative"),
        ({"betas": [0.9, 1.5]}, r"optimizer: "),
    ],
)
def test_mistakes_are_one_line(classification, keys, message):
    with pytest.raises(InputError, match=message) as caught:
        fit.train(with_optimizer(classification, **keys))
    assert "\n" not in str(caught.value)
