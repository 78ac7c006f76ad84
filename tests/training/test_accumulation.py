"""A step is a step: with 16 rows at once, or 4 times 4, gradients and loss are the same; test_processes.py goes on."""

import json

import pytest
import torch
from transformers import TrainerCallback

from loraloom.training import fit

from .support import elsewhere, with_method, with_training

WAYS = {"4x4": (4, 4), "8x2": (8, 2)}


class Gradients(TrainerCallback):
    """Keeps the first step's gradients."""

    def __init__(self):
        self.first = None

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.first is None:
            named = model.named_parameters()
            self.first = {name: p.grad.clone() for name, p in named if p.grad is not None}


def in_steps_of_16(config, rows, times, **keys):
    """24 rows and 3 steps: the last step of an epoch has 8 rows."""
    return with_training(
        config,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=times,
        max_steps=3,
        logging_steps=1,
        max_grad_norm=0.0,
        save_strategy="no",
        **keys,
    )


def without_dropout(config):
    return with_method(config, "lora", lora_dropout=0.0)


def run(config, monkeypatch, folder):
    build, gradients = fit.build_trainer, Gradients()

    def watched(setup, arguments, model, callbacks):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return build(setup, arguments, model, [*callbacks, gradients])

    monkeypatch.setattr(fit, "build_trainer", watched)
    result = fit.train(elsewhere(config, folder))
    monkeypatch.setattr(fit, "build_trainer", build)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return result, gradients.first, [entry["loss"] for entry in history if "loss" in entry]


@pytest.mark.parametrize("kind", ["classification", "causal"])
@pytest.mark.parametrize("way", WAYS)
def test_accumulation_changes_nothing(request, monkeypatch, tmp_path, kind, way):
    """Sums in another order: relative differences of a few float32 roundings, 1e-5 leaves room for 100 of them."""
    config = without_dropout(request.getfixturevalue(kind))
    config.data.max_train = 24
    whole, gradients, losses = run(in_steps_of_16(config, 16, 1), monkeypatch, tmp_path / "whole")
    parts, same_gradients, same_losses = run(in_steps_of_16(config, *WAYS[way]), monkeypatch, tmp_path / way)
    assert gradients.keys() == same_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item())
    assert same_losses == pytest.approx(losses, rel=1e-5)
    assert parts.after == pytest.approx(whole.after, rel=1e-3)


def test_processes_that_would_train_alone_are_an_error(classification, monkeypatch):
    """One process of two by the environment, whose trainer finds no other."""
    from loraloom.errors import InputError
    from loraloom.training.prepare import check_processes

    arguments = fit.training_arguments(classification, 32)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError) as caught:
        check_processes(arguments)
    assert caught.value.code == "processes-alone"


def test_the_weights_of_classes_are_factors_of_the_loss(classification, monkeypatch, tmp_path):
    """A weight for every class is a factor of the whole gradient; balanced weights of equal classes are 1."""
    config = in_steps_of_16(without_dropout(classification), 16, 1)
    _, plain, losses = run(config, monkeypatch, tmp_path / "plain")
    names = ("red", "green", "blue")
    doubled = with_training(config, class_weights=dict.fromkeys(names, 2.0))
    _, twice, twice_losses = run(doubled, monkeypatch, tmp_path / "twice")
    _, same, _ = run(with_training(config, class_weights="balanced"), monkeypatch, tmp_path / "balanced")
    for name, gradient in plain.items():
        torch.testing.assert_close(twice[name], 2 * gradient)
        torch.testing.assert_close(same[name], gradient)
    assert twice_losses[0] == pytest.approx(2 * losses[0], rel=1e-6)
