"""WeightLoRA in a run: the kept adapters alone are trained on, saved, reloaded, resumed, shown and written down."""

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerCallback

from loraloom.errors import InputError, RunInterruptedError
from loraloom.training import fit
from loraloom.training.display import adapters_table
from loraloom.training.evaluate import evaluate_saved
from tests.refusals import coded

from .support import (
    assert_equal_weights,
    elsewhere,
    weights,
    with_method,
    with_optimizer,
    with_training,
)

# Of 24 steps: 2 warm up, until 6 adapters are selected, at 9 weightlora+ halves and doubles.
PHASES = {"warmup_steps": 2, "select_until": 0.25}
PLUS = {**PHASES, "keep": 4, "expand_times": 1, "expand_every": 3}


def kept(result):
    return {name: adapter for name, adapter in result.adapters.items() if adapter is not None}


@pytest.fixture(scope="module")
def of_all_phases(tmp_path_factory):
    return tmp_path_factory.mktemp("whole")


def test_only_the_kept_adapters_are_left_and_reload(classification):
    config = with_method(classification, "weightlora", keep=4, **PHASES)
    result = fit.train(config)
    assert result.after["loss"] < result.before["loss"]
    folder = Path(config.output.dir)
    assert json.loads((folder / fit.RESULT).read_text())["adapters"] == result.adapters
    assert len(result.adapters) == 13  # two layers of six linear ones, and the pooler
    assert len(kept(result)) == 4
    assert {adapter["r"] for adapter in kept(result).values()} == {4}
    selection = json.loads((folder / "selection.json").read_text())
    assert selection["kept"] == {name: adapter["r"] for name, adapter in kept(result).items()}
    last = dict(zip(selection["modules"], selection["history"][-1]["gates"], strict=True))
    assert {name: gate for name, gate in last.items() if gate} == {n: a["gate"] for n, a in kept(result).items()}
    saved = {name.split(".loom_")[0].removeprefix("base_model.model.") for name in weights(folder) if "loom_" in name}
    assert saved == set(kept(result))
    assert evaluate_saved(folder) == result.after


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        ({"constraint": "sparse_simplex", "keep": 4, "radius": 4.0}, 4),
        ({"constraint": "simplex", "radius": 0.5}, None),
        ({"by": "magnitude", "keep": 3}, 3),
    ],
    ids=str,
)
def test_every_set_selects(classification, keys, count):
    config = with_training(with_method(classification, "weightlora", **keys, **PHASES), max_steps=8)
    result = fit.train(with_optimizer(config, gate_lr=0.5))
    gates = [adapter["gate"] for adapter in kept(result).values()]
    assert 1 <= len(gates) <= (count or 13)
    if "radius" in keys:
        assert sum(gates) == pytest.approx(keys["radius"], rel=1e-5)


def test_gates_go_to_the_tracker_while_there_are_any(classification, monkeypatch):
    logged = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append((state.global_step, logs))

    build = fit.build_trainer
    monkeypatch.setattr(fit, "build_trainer", lambda *a: build(*a[:3], [*a[3], Tracker()]))
    config = with_method(classification, "weightlora", keep=0.5, warmup_steps=2, select_until=6)
    result = fit.train(with_training(config, logging_steps=3, max_steps=9, save_strategy="no"))
    gates = {step: logs for step, logs in logged if any(key.startswith("gates/") for key in logs)}
    assert gates.keys() == {3}  # at 6 and 9 they are part of B
    assert {key for key in gates[3] if "/" in key} == {f"gates/{name}" for name in result.adapters}


@pytest.mark.parametrize("stop", [1, 4, 7, 9, 17], ids=["warm-up", "selecting", "expanding", "expanded", "fixed"])
def test_resume_in_every_phase_is_bit_for_bit_the_uninterrupted_run(classification, ctrl_c, of_all_phases, stop):
    config = with_method(classification, "weightlora+", **PLUS)
    config = with_optimizer(config, gate_lr=3.0, lora_plus_ratio=4)
    whole = elsewhere(config, of_all_phases / "whole")
    if stop == 1:
        fit.train(whole)
    expected = json.loads((of_all_phases / "whole" / fit.RESULT).read_text())
    ctrl_c(stop)
    with pytest.raises(RunInterruptedError, match=f"stopped after step {stop} of 24"):
        fit.train(config)
    resumed = fit.train(config, resume=True)
    assert {adapter["r"] for adapter in kept(resumed).values()} == {8}
    assert_equal_weights(weights(config.output.dir), weights(whole.output.dir))
    for key in ("before", "after", "adapters", "trainable_parameters"):
        assert getattr(resumed, key) == expected[key], key
    both = [Path(folder) / "selection.json" for folder in (config.output.dir, whole.output.dir)]
    assert both[0].read_text() == both[1].read_text()
    assert evaluate_saved(Path(config.output.dir)) == resumed.after


def test_resume_of_a_causal_run(causal, ctrl_c, tmp_path):
    config = with_method(causal, "weightlora", keep=0.25, **PHASES)
    whole = fit.train(elsewhere(config, tmp_path / "whole"))
    ctrl_c(8)
    with pytest.raises(RunInterruptedError):
        fit.train(config)
    resumed = fit.train(config, resume=True)
    assert_equal_weights(weights(config.output.dir), weights(whole.output_dir))
    assert resumed.after == whole.after == evaluate_saved(Path(config.output.dir))


def test_a_budget_of_parameters(classification):
    config = with_method(classification, "weightlora+", keep=2, expand_parameters=2000, **PHASES)
    result = fit.train(with_training(config, max_steps=8, save_strategy="no"))
    adapters = sum(t.numel() for name, t in weights(config.output.dir).items() if "loom_" in name)
    assert 1000 < adapters <= 2000
    assert {adapter["r"] > 4 for adapter in kept(result).values()} == {True}


def test_resume_refuses_what_it_cannot_continue(classification):
    config = with_method(classification, "weightlora", **PHASES)
    config = with_training(config, max_steps=8, save_strategy="steps", save_steps=1, save_total_limit=8)
    fit.train(config)
    with pytest.raises(InputError, check=coded("resume-differs", "--resume", "optimizer.gate_lr", "2.0")):
        fit.train(with_optimizer(config, gate_lr=2.0), resume=True)
    with pytest.raises(InputError, check=coded("resume-differs", "--resume", "20")):
        fit.train(with_training(config, max_steps=20), resume=True)


def test_another_method_in_the_folder_leaves_no_selection_behind(classification):
    config = with_training(with_method(classification, "weightlora", **PHASES), max_steps=8, save_strategy="no")
    fit.train(config)
    plain = with_training(classification, max_steps=2)
    plain = dataclasses.replace(plain, output=dataclasses.replace(plain.output, overwrite=True))
    assert fit.train(plain).adapters is None
    assert not (Path(config.output.dir) / "selection.json").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"keep": 14}, r"method: keep=14 is out of range: pass 1 to 13 adapters"),
        ({"keep": 1.0}, r"method: keep=1\.0 is out of range"),
        ({"constraint": "simplex", "keep": 4}, r"method: keep=4 is not for constraint='simplex'"),
        ({"constraint": "simplex", "by": "magnitude"}, r"method: by='magnitude' is for constraint='k_sparse'"),
        ({"use_gate": False}, r"method: .*no gates"),
        ({"use_dora": True}, r"method: .*set use_dora=False"),
        ({"warmup_steps": 9, "select_until": 5}, r"method: select_until=5 leaves no step to select"),
        ({"warmup_steps": 2, "select_until": 99}, r"method: selecting and expanding take 99 steps, the run has 24"),
    ],
)
def test_mistakes_are_one_line(classification, keys, message):
    with pytest.raises(InputError, match=message) as caught:
        fit.train(with_method(classification, "weightlora", **keys))
    assert "\n" not in str(caught.value)


def test_the_table_names_modules_by_their_shortest_ending():
    names = [f"bert.encoder.layer.{i}.{m}" for i in (0, 1) for m in ("attention.self.query", "attention.output.dense")]
    names += ["bert.encoder.layer.1.output.dense", "bert.pooler"]
    adapters = dict.fromkeys(names) | {names[0]: {"r": 4, "gate": 1.234}, names[4]: {"r": 8, "gate": -0.5}}
    console = Console(width=100)
    with console.capture() as captured:
        console.print(adapters_table(adapters))
    text = captured.get()
    assert "2 of 6 adapters kept" in text
    rows = {
        line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:-1]]
        for line in text.splitlines()
        if "│" in line
    }
    assert rows == {"0": ["4 1.23", ".", "", ""], "1": [".", ".", "8 -0.50", ""], "-": ["", "", "", "."]}
    assert "attention.self.query" not in text
