"""A run that cannot come to anything ends early and says why; the display shows what happened."""

import dataclasses

import pytest
import torch
from rich.console import Console

from loraloom.errors import RunFailedError
from loraloom.training import run


def with_training(config, **keys):
    return dataclasses.replace(config, training={**config.training, **keys})


@pytest.fixture
def spoil(monkeypatch):
    """Apply a change to the model right after the method's adapters are on it."""

    def with_change(change):
        apply = run.apply_method

        def spoiled(*args):
            model = apply(*args)
            change(model)
            return model

        monkeypatch.setattr(run, "apply_method", spoiled)

    return with_change


def test_no_gradient_ends_the_run(classification, spoil):
    def disconnect(model):  # the adapters are there and trainable, and the forward pass goes around them
        model.base_model.disable_adapter_layers()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("loom_" in name or "classifier" in name)

    spoil(disconnect)
    with pytest.raises(RunFailedError, match="no adapter has had a non-zero gradient in the first 5 steps"):
        run.train(classification)


def test_no_trained_adapter_ends_the_run(classification, spoil):
    spoil(lambda model: [p.requires_grad_(False) for name, p in model.named_parameters() if "loom_" in name])
    with pytest.raises(RunFailedError, match=r"no parameter with 'loom_' in its name trains"):
        run.train(classification)


def test_a_rate_of_zero_ends_the_run(causal):
    with pytest.raises(RunFailedError, match=r"no adapter weight has changed .* raise training\.learning_rate"):
        run.train(with_training(causal, learning_rate=0.0))


@pytest.mark.parametrize("kind", ["classification", "causal"])
def test_nan_loss_ends_the_run(request, spoil, kind):
    def poison(model):
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "loom_lora_A" in name)[0, 0] = torch.nan

    spoil(poison)
    with pytest.raises(RunFailedError, match=r"loss is nan at step \d+: the run has diverged; lower training.learning"):
        run.train(with_training(request.getfixturevalue(kind), logging_steps=1))


def test_a_healthy_short_run_raises_nothing(classification):
    assert run.train(with_training(classification, max_steps=2)).steps == 2


def test_display_has_a_row_per_epoch(classification):
    console = Console(record=True, width=120, force_terminal=False)
    result = run.train(classification, console=console)
    lines = console.export_text().splitlines()
    table = [line for line in lines[next(i for i, line in enumerate(lines) if "macro f1" in line) :] if "│" in line]
    assert [line.split()[1] for line in table] == ["0.00", "1.00", "2.00"]
    assert f"{result.after['accuracy']:.4f}" in table[-1]


def test_display_on_a_terminal_leaves_the_same_table(classification):
    console = Console(record=True, width=120, force_terminal=True)
    run.train(with_training(classification, max_steps=3), console=console)
    assert "macro f1" in console.export_text()
