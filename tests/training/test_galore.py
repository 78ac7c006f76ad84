"""GaLore in a run: its keys of RUN.yaml, exact resume over a refresh, what reloads, and the tables at the start."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from loraloom.cli.main import main
from loraloom.errors import InputError, RunInterruptedError
from loraloom.optim import GaLore, state_bytes
from loraloom.training import fit
from loraloom.training.evaluate import evaluate_saved
from loraloom.training.load import dump_config
from tests.processes import command_on_ranks
from tests.refusals import coded

from .support import assert_equal_weights, elsewhere, weights, with_method, with_optimizer, with_training

VARIANTS = {
    "subspace": {},
    "svd": {"refresh": "svd", "stagger": False},
    "rotated, decay": {"rotate_moments": True, "weight_decay": 0.1},
    "Fira": {"name": "fira"},
    "APOLLO": {"name": "apollo"},
    "layerwise": {"layerwise": True},
    "sgd": {"inner": "sgd", "momentum": 0.9},
}


def galore(config, **keys):
    return with_optimizer(with_method(config, "full"), **{"name": "galore", "rank": 4, "update_gap": 6, **keys})


@pytest.fixture
def trained(monkeypatch):
    """Run, and give the trainer."""

    def train(config, console=None):
        trainers = []
        build = fit.build_trainer
        monkeypatch.setattr(fit, "build_trainer", lambda *a: trainers.append(build(*a)) or trainers[0])
        fit.train(with_training(config, max_steps=3, save_strategy="no", eval_strategy="no"), console=console)
        return trainers[0]

    return train


@pytest.mark.parametrize(
    ("kind", "variant"),
    [*(("causal", variant) for variant in VARIANTS), ("classification", "subspace"), ("classification", "layerwise")],
)
def test_it_learns_resumes_bit_for_bit_and_reloads(request, ctrl_c, tmp_path, kind, variant):
    """24 steps with a refresh of every weight in each six, interrupted after 15."""
    config = galore(request.getfixturevalue(kind), **VARIANTS[variant])
    whole = fit.train(elsewhere(config, tmp_path / "whole"))
    assert whole.after["loss"] < whole.before["loss"]
    assert whole.trainable_parameters == whole.total_parameters
    ctrl_c(15)
    with pytest.raises(RunInterruptedError):
        fit.train(config)
    resumed = fit.train(config, resume=True)
    assert_equal_weights(weights(config.output.dir), weights(whole.output_dir))
    assert resumed.after == whole.after == evaluate_saved(Path(config.output.dir))


def test_the_command_line_resumes_and_its_folder_is_a_plain_model(causal, ctrl_c, tmp_path, monkeypatch):
    monkeypatch.setattr("loraloom.cli.train.quiet_libraries", lambda: None)
    path = tmp_path / "RUN.yaml"
    path.write_text(dump_config(galore(causal, name="fira")))
    whole = str(tmp_path / "whole")
    assert main(["train", str(path), "--output.dir", whole, "--quiet"]) == 0
    ctrl_c(15)
    assert main(["train", str(path), "--quiet"]) == 130
    assert main(["train", str(path), "--resume", "--quiet"]) == 0
    assert_equal_weights(weights(causal.output.dir), weights(whole))
    model = AutoModelForCausalLM.from_pretrained(whole)
    saved = weights(whole)
    assert all(torch.equal(p, saved[name]) for name, p in model.named_parameters() if name in saved)


def test_every_key_reaches_the_optimizer(causal, trained):
    keys = {"rank": 5, "update_gap": 9, "scale": 0.5, "side": "left", "refresh": "svd", "betas": [0.8, 0.9]}
    keys |= {
        "stagger": False,
        "rotate_moments": True,
        "basis_bits": 8,
        "rank_pattern": {"*.gate_proj": 3},
        "target_modules": ["*.mlp.*"],
        "eps": 1e-6,
    }
    config = with_training(galore(causal, **keys, weight_decay=0.2), learning_rate=3e-3)
    optimizer = trained(config).optimizer.optimizer
    assert type(optimizer) is GaLore
    assert type(optimizer.inner) is torch.optim.AdamW
    o = optimizer.options
    assert (o.refresh, o.stagger, o.rotate_moments, o.basis_bits) == ("svd", False, True, 8)
    assert sorted(slot.rank for slot in optimizer.projected.values()) == [3, 3, 5, 5, 5, 5]
    assert len(optimizer.projected) == 6  # gate, up and down of two layers
    group = next(group for group in optimizer.param_groups if group["name"] == "projected")
    assert group["initial_lr"] == 3e-3
    assert {key: group[key] for key in ("rank", "update_gap", "scale", "side", "weight_decay", "eps")} == {
        "rank": 5, "update_gap": 9, "scale": 0.5, "side": "left", "weight_decay": 0.2, "eps": 1e-6,
    }  # fmt: skip
    assert tuple(group["betas"]) == (0.8, 0.9)


@pytest.mark.parametrize(("norm", "expected"), [({}, 1.0), ({"max_grad_norm": 0.3}, 0.3), ({"max_grad_norm": 0}, None)])
def test_the_layerwise_optimizer_clips_in_the_trainers_place(causal, trained, norm, expected):
    trainer = trained(with_training(galore(causal, layerwise=True), **norm))
    assert trainer.optimizer.optimizer.max_grad_norm == expected
    assert trainer.args.max_grad_norm == 0


def test_the_tables_at_the_start_are_true(causal, trained):
    console = Console(record=True, width=120, file=io.StringIO())
    trainer = trained(galore(causal), console)
    text = console.export_text()
    assert any(line.split()[:6] == ["32", "x", "32", "right,", "rank", "4"] for line in text.splitlines())
    state = f"{state_bytes(trainer.optimizer.optimizer):,}"
    row = next(line for line in text.splitlines() if "optimizer state" in line)
    assert state in row
    assert "with AdamW" in text


def test_the_default_optimizer_shows_its_memory_without_a_comparison(classification, trained):
    console = Console(record=True, width=120, file=io.StringIO())
    trainer = trained(classification, console)
    text = console.export_text()
    row = next(line for line in text.splitlines() if "optimizer state" in line)
    assert f"{state_bytes(trainer.optimizer.optimizer):,}" in row
    assert "with AdamW" not in text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gate_momentum": 0.5}, "optimizer 'galore' can't honor gate_momentum=0.5; these can: weight_adam"),
        ({"momentum": 0.9}, "can't honor momentum=0.9; these can: inner='sgd'"),
        ({"rank": 64}, "GaLore found no matrix whose sides exceed rank=64; lower rank"),
        ({"rank": 0}, "rank=0 is out of range; pass 1 or more"),
        ({"name": "fira", "layerwise": True}, "optimizer 'fira' can't honor layerwise=True; these can: galore"),
        ({"name": "apollo", "refresh": "svd"}, "optimizer 'apollo' can't honor refresh='svd'; these can: galore, fira"),
        ({"name": "fira", "inner": "sgd", "side": "full"}, "Fira scales channels, and side='full' leaves none"),
        ({"target_modules": ["*.mpl.*"]}, r"target_modules pattern '\*.mpl.\*' matches no module"),
        ({"rounding": "kahan"}, "rounding='kahan' is for bfloat16 weights, and these are torch.float32"),
        ({"lora_plus_ratio": 4}, "lora_plus_ratio=4 was given, but the model trains no B matrix"),
    ],
)
def test_what_it_cannot_honor_is_one_line(causal, keys, message):
    with pytest.raises(InputError, match=f"^optimizer: .*{message}") as caught:
        fit.train(galore(causal, **keys))
    assert "\n" not in str(caught.value)


def test_a_rank_of_galore_for_another_optimizer_is_an_error(causal):
    with pytest.raises(InputError, check=coded("optimizer", "adamw")):
        fit.train(with_optimizer(with_method(causal, "full"), rank=4))


@pytest.mark.slow
def test_layerwise_on_two_processes_is_layerwise_on_one(causal, tmp_path):
    """Through the command line: two gloo processes with 8 rows each, and one with 16; clipping is by the same norm.

    Adam divides gradients that differ by float32 roundings, so a weight may differ by a share of its step.
    """
    config = with_training(
        galore(causal, layerwise=True, refresh="svd", stagger=False),
        max_steps=6, save_strategy="no", eval_strategy="no", logging_steps=1, gradient_accumulation_steps=2,
    )  # fmt: skip
    losses, saved = {}, {}
    for name, rows in {"one": 8, "two": 4}.items():
        own = with_training(elsewhere(config, tmp_path / name), per_device_train_batch_size=rows)
        if name == "one":
            fit.train(own)
        else:
            file = tmp_path / f"{name}.yaml"
            file.write_text(dump_config(own))
            command_on_ranks("train", file, "--quiet")
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = [entry["loss"] for entry in history if "loss" in entry]
        saved[name] = weights(tmp_path / name)
    assert losses["two"] == pytest.approx(losses["one"], rel=1e-4)
    for name, tensor in saved["one"].items():
        torch.testing.assert_close(saved["two"][name], tensor, rtol=1e-2, atol=1e-3)
