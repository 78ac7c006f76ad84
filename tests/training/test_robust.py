"""Runs that are killed, started twice, or wrong: nothing that was there is lost, and the next start goes on."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from loraloom.errors import InputError, RunInterruptedError
from loraloom.training import fit
from loraloom.training.checkpoints import COMPLETE
from loraloom.training.evaluate import evaluate_saved
from loraloom.training.load import load_config
from loraloom.training.result import LOCK
from tests.refusals import coded

from .support import assert_equal_weights, assert_error, elsewhere, weights, with_method, with_training

SELECTING = {"warmup_steps": 2, "select_until": 0.25}


def overwriting(config):
    return dataclasses.replace(config, output=dataclasses.replace(config.output, overwrite=True))


def content(folder):
    """Every file of a run but the lock's."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != LOCK]
    return {str(path): path.read_bytes() for path in files}


def checkpoints(config):
    return sorted(Path(config.output.dir, fit.CHECKPOINTS).glob("checkpoint-*"))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda config: with_method(config, "weightlora", select_until=99, warmup_steps=2),
        lambda config: with_method(config, "weightlora", keep=99),
        lambda config: with_training(config, learnig_rate=1.0),
        lambda config: with_training(config, load_best_model_at_end=True),
        lambda config: with_method(config, "lora", target_modules=["nothing"]),
        lambda config: dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, rank=4)),
    ],
    ids=["schedule", "keep", "key", "no validation", "targets", "option"],
)
def test_overwriting_with_a_mistake_destroys_nothing(classification, wrong):
    config = with_training(classification, max_steps=2)
    fit.train(config)
    before = content(config.output.dir)
    with pytest.raises(InputError):
        fit.train(overwriting(wrong(config)))
    assert content(config.output.dir) == before


@pytest.mark.parametrize("overwrites", [False, True])
def test_a_selection_without_checkpoints_is_saved(classification, overwrites):
    config = with_training(with_method(classification, "weightlora", **SELECTING), max_steps=8)
    if overwrites:
        fit.train(config)
        config = overwriting(config)
    result = fit.train(with_training(config, save_strategy="no"))
    assert json.loads(Path(config.output.dir, "selection.json").read_text())["kept"]
    assert evaluate_saved(Path(config.output.dir)) == result.after


def test_an_incomplete_checkpoint_is_skipped_with_a_notice(classification, ctrl_c, tmp_path):
    """As a kill leaves it: the folder of the last checkpoint is there, and its mark is not."""
    config = with_training(classification, save_strategy="steps", save_steps=4, save_total_limit=3)
    whole = fit.train(elsewhere(config, tmp_path / "whole"))
    ctrl_c(10)
    with pytest.raises(RunInterruptedError):
        fit.train(config)
    last = checkpoints(config)[0]  # checkpoint-10
    assert last.name == "checkpoint-10"
    (last / COMPLETE).unlink()
    (last / "optimizer.pt").write_bytes(b"half of a file")
    from rich.console import Console

    console = Console(record=True, width=200)
    resumed = fit.train(config, resume=True, console=console)
    assert "checkpoint-10 was not written to its end: skipped" in console.export_text()
    assert_equal_weights(weights(config.output.dir), weights(whole.output_dir))
    assert resumed.after == whole.after


def test_old_checkpoints_go_only_when_the_new_one_is_complete(classification, monkeypatch):
    """A kill between the selection's file and the mark: with a limit of one, the checkpoint before is still there."""
    from loraloom.training import checkpoints as module

    config = with_training(
        with_method(classification, "weightlora", **SELECTING), save_strategy="steps", save_steps=4, save_total_limit=1
    )
    write, killed = module.write_text_atomically, []

    def at_the_third(path, text):
        if path.parent.name == "checkpoint-12":
            killed.append((path.parent / "selection.json").is_file())
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(module, "write_text_atomically", at_the_third)
    with pytest.raises(KeyboardInterrupt):
        fit.train(config)
    monkeypatch.undo()
    assert killed == [True]
    assert [path.name for path in checkpoints(config)] == ["checkpoint-12", "checkpoint-8"]
    assert fit.train(config, resume=True).steps == 24
    assert [path.name for path in checkpoints(config)] == ["checkpoint-24"]


def test_the_best_checkpoint_is_kept(classification):
    test = classification.data.test_path
    config = dataclasses.replace(classification, data=dataclasses.replace(classification.data, validation_path=test))
    config = with_training(config, load_best_model_at_end=True, save_total_limit=1, num_train_epochs=3)
    result = fit.train(config)
    history = json.loads(Path(config.output.dir, "trainer_state.json").read_text())["log_history"]
    accuracies = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry]
    assert result.validation["accuracy"] == max(accuracies)
    assert result.after["accuracy"] == max(accuracies)  # here the two sets are the same


def test_a_folder_in_use_is_refused(classification):
    folder = Path(classification.output.dir)
    folder.mkdir()
    with FileLock(folder / LOCK):
        assert_error("folder-in-use", str(folder), lambda: fit.train(classification))
    assert fit.train(with_training(classification, max_steps=2)).steps == 2


def test_no_is_a_word_in_yaml(tmp_path):
    path = tmp_path / "RUN.yaml"
    path.write_text("training: {save_strategy: no, eval_strategy: no}\noutput: {overwrite: true}")
    config = load_config(path)
    assert config.training["save_strategy"] == config.training["eval_strategy"] == "no"
    assert config.output.overwrite is True
    path.write_text("output: {overwrite: yes}")
    with pytest.raises(InputError, check=coded("option-value")):
        load_config(path)


def test_drop_last_is_about_training(classification):
    """24 test rows in batches of 32 are evaluated all the same; a training set of less than a batch is an error."""
    config = with_training(classification, dataloader_drop_last=True, max_steps=2)
    result = fit.train(config)
    assert sum(map(sum, result.confusion)) == result.test_rows == 24
    data = dataclasses.replace(classification.data, max_train=6)
    few = overwriting(dataclasses.replace(config, data=data))
    assert_error("no-batch", "6 rows", lambda: fit.train(few))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_new_head_on_a_quantised_base_is_not_quantised(classification, quantization):
    config = dataclasses.replace(
        classification, model=dataclasses.replace(classification.model, quantization=quantization)
    )
    result = fit.train(with_training(config, max_steps=6))
    assert result.after["loss"] < result.before["loss"]
    heads = {name: tensor for name, tensor in weights(config.output.dir).items() if "classifier" in name}
    assert {tensor.dtype for tensor in heads.values()} == {torch.float32}
    assert heads["base_model.model.classifier.weight"].shape == (3, 32)
    assert evaluate_saved(Path(config.output.dir)) == pytest.approx(result.after, rel=1e-4)


def test_a_run_stops_for_a_model_folder_that_is_not_there(classification, tmp_path):
    shutil.copytree(classification.model.name, tmp_path / "encoder")
    config = dataclasses.replace(
        classification, model=dataclasses.replace(classification.model, name=str(tmp_path / "encodr"))
    )
    assert_error("no-folder", "did you mean", lambda: fit.train(config))


def test_a_length_that_the_model_has_no_positions_for(classification):
    config = dataclasses.replace(classification, data=dataclasses.replace(classification.data, max_length=128))
    assert_error("too-long", "has 64 positions", lambda: fit.train(config))
