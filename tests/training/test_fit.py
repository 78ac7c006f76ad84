"""A run: it learns, saves what reloads to the same numbers, and resumes bit for bit."""

import dataclasses
import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraloom.errors import InputError, RunInterruptedError
from loraloom.training import fit
from loraloom.training.evaluate import evaluate_saved
from loraloom.training.load import load_config
from tests.refusals import coded

from .support import assert_equal_weights, assert_error, elsewhere, weights, with_method, with_training

METHODS = ["lora", "moslora", "dora", "full", "probe"]


@pytest.mark.parametrize("name", METHODS)
def test_classification_learns_and_reloads_to_the_same_numbers(classification, name):
    config = with_method(classification, name)
    result = fit.train(config)
    assert result.after["loss"] < result.before["loss"]
    assert set(result.after) == {"loss", "accuracy", "macro_f1"}
    assert result.label_names == ["blue", "green", "red"]
    assert (result.trainable_parameters == result.total_parameters) == (name == "full")
    assert result.tokens_per_second > 0
    assert result.peak_memory_bytes > 2**20
    folder = Path(config.output.dir)
    assert json.loads((folder / fit.RESULT).read_text()) == dataclasses.asdict(result)
    assert load_config(folder / fit.RESOLVED) == config
    assert not list(folder.glob("*.bin"))
    assert evaluate_saved(folder) == result.after


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_causal_learns_and_reloads_to_the_same_numbers(causal, name):
    config = with_method(causal, name, use_mixer="orthogonal")
    result = fit.train(config)
    assert result.after["loss"] < result.before["loss"]
    assert result.after["perplexity"] == math.exp(result.after["loss"])
    names = weights(config.output.dir)
    assert any(".loom_mixer." in key for key in names)
    assert any("magnitude" in key for key in names) == (name == "dora")
    assert evaluate_saved(Path(config.output.dir)) == result.after


def test_causal_loss_is_the_mean_over_tokens(causal):
    """Against the definition, text by text, and whatever the evaluation's batch size is."""
    config = with_training(causal, max_steps=2)
    small = fit.train(with_training(elsewhere(config, config.output.dir + "-small"), per_device_eval_batch_size=3))
    result = fit.train(config)
    folder = config.output.dir
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.name), folder).eval()
    losses = []
    for text in fit.load_data(config.data, "causal-lm").test["text"]:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses.append(-log_probs.gather(1, ids[0, 1:, None])[:, 0])
    expected = torch.cat(losses).mean().item()
    assert result.after["loss"] == pytest.approx(expected, rel=1e-5)
    assert small.after["loss"] == pytest.approx(expected, rel=1e-5)
    assert abs(torch.stack([loss.mean() for loss in losses]).mean().item() - expected) > 1e-4  # not the mean of means


@pytest.mark.parametrize("columns", [("prompt", "completion"), ("messages",)])
def test_other_causal_columns(causal, columns, tmp_path):
    rows = tmp_path / "rows.jsonl"
    values = {
        "prompt": "what runs ?",
        "completion": " the red dog",
        "messages": [{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "the red dog"}],
    }
    lines = [json.dumps({column: values[column] for column in columns} | {"number": i}) for i in range(20)]
    rows.write_text("\n".join(lines))
    data = dataclasses.replace(causal.data, path=str(rows), test_path=str(rows))
    result = fit.train(with_training(dataclasses.replace(causal, data=data), max_steps=4))
    assert result.after["loss"] < result.before["loss"]


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantised_base_learns_and_reloads(causal, quantization):
    model = dataclasses.replace(causal.model, quantization=quantization)
    config = with_method(dataclasses.replace(causal, model=model), "dora", use_mixer="orthogonal", use_gate=True)
    result = fit.train(config)
    assert result.after["loss"] < result.before["loss"]
    saved = weights(config.output.dir)
    assert {saved[name].dtype for name in saved if "magnitude" in name} == {torch.float32}
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}  # TRL would train them in bfloat16
    assert evaluate_saved(Path(config.output.dir)) == pytest.approx(result.after, rel=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_weight(classification, tmp_path, reentrant):
    config = with_training(classification, max_steps=4)
    plain = weights(fit.train(elsewhere(config, tmp_path / "plain")).output_dir)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    checkpointed = weights(fit.train(with_training(config, **options)).output_dir)
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor)


@pytest.mark.parametrize(
    ("kind", "name", "stop"),
    [
        ("classification", "lora", 5),  # inside the first epoch
        ("classification", "dora", 17),  # inside the second
        ("classification", "moslora", 12),  # at the end of the first
        ("classification", "full", 17),
        ("classification", "probe", 17),
        ("causal", "moslora", 17),
        ("causal", "dora", 5),
    ],
)
def test_resume_is_bit_for_bit_the_uninterrupted_run(request, ctrl_c, tmp_path, kind, name, stop):
    config = with_method(request.getfixturevalue(kind), name)
    whole = fit.train(elsewhere(config, tmp_path / "whole"))
    ctrl_c(stop)
    with pytest.raises(RunInterruptedError, match=rf"stopped after step {stop} of 24; saved .*checkpoint-{stop}"):
        fit.train(config)
    assert not (Path(config.output.dir) / fit.RESULT).exists()
    resumed = fit.train(config, resume=True)
    assert_equal_weights(weights(config.output.dir), weights(whole.output_dir))
    assert resumed.after == whole.after
    assert resumed.before == whole.before
    assert resumed.steps == whole.steps == 24


def test_resume_is_exact_with_accumulation(classification, ctrl_c, tmp_path):
    config = with_training(classification, gradient_accumulation_steps=2, lr_scheduler_type="cosine")
    whole = fit.train(elsewhere(config, tmp_path / "whole"))
    ctrl_c(4)
    with pytest.raises(RunInterruptedError):
        fit.train(config)
    fit.train(config, resume=True)
    assert_equal_weights(weights(config.output.dir), weights(whole.output_dir))


def test_same_seed_same_weights_other_seed_other_weights(classification, tmp_path):
    config = with_training(classification, max_steps=3)
    one, two = (weights(fit.train(elsewhere(config, tmp_path / name)).output_dir) for name in "ab")
    assert_equal_weights(one, two)
    other = weights(fit.train(elsewhere(with_training(config, seed=1), tmp_path / "c")).output_dir)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_ctrl_c_in_the_last_step_finishes_the_run(classification, ctrl_c):
    ctrl_c(24)
    assert fit.train(classification).steps == 24
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_is_not_replaced_unless_asked(classification):
    config = with_training(classification, max_steps=2)
    fit.train(config)
    with pytest.raises(InputError, check=coded("folder-holds-a-run", "--output.dir", "--resume", "--output.overwrite")):
        fit.train(config)
    overwriting = dataclasses.replace(config, output=dataclasses.replace(config.output, overwrite=True))
    assert fit.train(overwriting).steps == 2


def test_overwriting_loses_nothing_to_a_mistake_and_leaves_nothing_stale(classification):
    config = with_training(classification, max_steps=2)
    fit.train(config)
    folder = Path(config.output.dir)
    config = dataclasses.replace(config, output=dataclasses.replace(config.output, overwrite=True))
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, path="none.jsonl"))
    with pytest.raises(InputError, check=coded("no-file", "none.jsonl")):
        fit.train(wrong)
    with pytest.raises(InputError, check=coded("unknown-key")):
        fit.train(with_training(config, learnig_rate=1.0))
    assert (folder / fit.RESULT).is_file()
    assert (folder / fit.CHECKPOINTS).is_dir()
    result = fit.train(with_method(config, "full"))  # whose folder would otherwise load the old adapter as well
    assert not list(folder.glob("adapter_*"))
    assert evaluate_saved(folder) == result.after


def test_a_probe_without_a_new_head_is_an_error(classification, pico_bert_dir, tmp_path):
    first = fit.train(with_method(with_training(classification, max_steps=2), "full"))
    model = dataclasses.replace(classification.model, name=first.output_dir)
    again = elsewhere(dataclasses.replace(classification, model=model), tmp_path / "probe")
    with pytest.raises(InputError, check=coded("trains-nothing", "probe")):
        fit.train(with_method(again, "probe"))


def test_resume_refuses_what_it_cannot_continue(classification, tmp_path):
    config = with_training(classification, max_steps=2, save_steps=1, save_strategy="steps")
    assert_error("nothing-to-resume", "run without --resume", lambda: fit.train(config, resume=True))
    fit.train(config)
    other = dataclasses.replace(config, method=dataclasses.replace(config.method, r=8))
    with pytest.raises(InputError, check=coded("resume-differs", "--resume", "method.r")):
        fit.train(other, resume=True)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"learnig_rate": 1}, "unknown key training.learnig_rate; did you mean 'learning_rate'?"),
        ({"max_train": 1}, "unknown key training.max_train; it belongs to section 'data'"),
        ({"lr_scheduler_type": "zigzag"}, "training: zigzag is not a valid SchedulerType"),
    ],
)
def test_mistakes_in_training_are_one_line(classification, keys, message):
    with pytest.raises(InputError) as caught:
        fit.train(with_training(classification, **keys))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sft_keys_are_for_causal_only(classification, causal, tmp_path):
    fit.train(with_training(causal, packing=False, max_steps=2))
    config = elsewhere(with_training(classification, packing=False), tmp_path / "classification")
    with pytest.raises(InputError, check=coded("unknown-key", "training.packing")):
        fit.train(config)


def test_mistakes_in_method_are_one_line(classification):
    method = dataclasses.replace(classification.method, target_modules=["query", "velue"])
    with pytest.raises(InputError, check=coded("method")) as caught:
        fit.train(dataclasses.replace(classification, method=method))
    assert "\n" not in str(caught.value)


def test_missing_model_is_one_line(classification):
    model = dataclasses.replace(classification.model, name="no/such-model")
    with pytest.raises(InputError, check=coded("no-model", "no/such-model", "model.name")) as caught:
        fit.train(dataclasses.replace(classification, model=model))
    assert "\n" not in str(caught.value)


def test_chats_need_a_chat_template(causal, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "what ?"}]}\n' * 20)
    folder = tmp_path / "model"
    shutil.copytree(causal.model.name, folder)
    (folder / "chat_template.jinja").unlink()
    config = dataclasses.replace(
        causal,
        model=dataclasses.replace(causal.model, name=str(folder)),
        data=dataclasses.replace(causal.data, path=str(rows), test_path=str(rows)),
    )
    assert_error("no-chat-template", "rows.jsonl", lambda: fit.train(config))
