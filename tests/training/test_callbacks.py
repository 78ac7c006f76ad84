"""A run that cannot come to anything ends early and says why; the display shows what happened."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from loraloom.errors import RunFailedError, RunInterruptedError
from loraloom.training import fit
from tests.refusals import coded


def with_training(config, **keys):
    return dataclasses.replace(config, training={**config.training, **keys})


@pytest.fixture
def spoil(monkeypatch):
    """Apply a change to the model right after the method's adapters are on it."""

    def with_change(change):
        apply = fit.apply_method

        def spoiled(*args):
            model = apply(*args)
            change(model)
            return model

        monkeypatch.setattr(fit, "apply_method", spoiled)

    return with_change


def test_no_gradient_ends_the_run(classification, spoil):
    def disconnect(model):  # the adapters are there and trainable, and the forward pass goes around them
        model.base_model.disable_adapter_layers()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or "classifier" in name)

    spoil(disconnect)
    with pytest.raises(RunFailedError, check=coded("no-gradient")):
        fit.train(classification)


def test_no_trained_adapter_ends_the_run(classification, spoil):
    spoil(lambda model: [p.requires_grad_(False) for name, p in model.named_parameters() if "lora_" in name])
    with pytest.raises(RunFailedError, check=coded("nothing-to-train", "lora_")):
        fit.train(classification)


def test_a_rate_of_zero_ends_the_run(causal):
    with pytest.raises(RunFailedError, check=coded("nothing-moves", "training.learning_rate")):
        fit.train(with_training(causal, learning_rate=0.0))


@pytest.mark.parametrize("kind", ["classification", "causal"])
def test_nan_loss_ends_the_run(request, spoil, kind):
    def poison(model):
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_A" in name)[0, 0] = torch.nan

    spoil(poison)
    with pytest.raises(RunFailedError, check=coded("diverged", "training.learning")):
        fit.train(with_training(request.getfixturevalue(kind), logging_steps=1))


def test_a_healthy_short_run_raises_nothing(classification):
    assert fit.train(with_training(classification, max_steps=2)).steps == 2


def test_display_has_a_row_per_epoch(classification):
    console = Console(record=True, width=120, force_terminal=False)
    result = fit.train(validated(classification), console=console)
    assert [row[0] for row in rows_of(console)] == ["1.00", "2.00"]
    assert f"{result.validation['accuracy']:.4f}" in rows_of(console)[-1]


def test_the_table_and_the_clock_go_on_after_a_resumption(classification, ctrl_c):
    config = validated(classification)
    ctrl_c(17)
    with pytest.raises(RunInterruptedError):
        fit.train(config)
    marks = Path(config.output.dir, fit.CHECKPOINTS).glob("checkpoint-17/complete.json")
    (mark,) = marks
    mark.write_text(json.dumps({"seconds": 1000.0}))
    console = Console(record=True, width=120, force_terminal=False)
    result = fit.train(config, resume=True, console=console)
    assert [row[0] for row in rows_of(console)] == ["1.00", "2.00"]
    assert 1000 < result.wall_time_seconds < 1100


def validated(config):
    test = config.data.test_path
    return dataclasses.replace(config, data=dataclasses.replace(config.data, validation_path=test))


def rows_of(console):
    """The cells of the table of epochs."""
    lines = console.export_text(clear=False).splitlines()
    table = lines[next(i for i, line in enumerate(lines) if "macro f1" in line) :]
    return [line.strip("│ ").split() for line in table if line.startswith("│")][:2]


def test_display_on_a_terminal_leaves_the_same_table(classification):
    console = Console(record=True, width=120, force_terminal=True)
    fit.train(with_training(validated(classification), max_steps=3, eval_strategy="steps"), console=console)
    assert "macro f1" in console.export_text()
