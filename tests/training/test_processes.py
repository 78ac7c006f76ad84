"""Two processes through the command line give what one process gives with twice the accumulation, bit for bit.

Rank 0 has the rows of the first micro-batch and rank 1 those of the second, in batches that are padded alike, so both
ways add the same two float32 gradients once: a + b is b + a, and factors of two are exact. No tolerance is needed, but
for DoRA. That accumulation is the same as one larger batch is test_accumulation.py's.
"""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch

from loraloom.training import fit
from loraloom.training.load import dump_config
from tests.processes import WORLD, command_on_ranks

from .support import elsewhere, weights, with_method, with_training

ROWS = 4
PHASES = {"warmup_steps": 2, "select_until": 4}
METHODS = {
    "lora": {},
    "moslora": {},
    "dora": {},
    "weightlora": PHASES | {"keep": 4},
    "weightlora+": PHASES | {"keep": 4, "expand_times": 1, "expand_every": 1},
}
LAYERS = {"classification": "BertLayer", "causal": "LlamaDecoderLayer"}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def without_dropout(config, tmp_path):
    """The run on a copy of its model without dropout: two processes would draw other masks than one."""
    folder = tmp_path / "model"
    if not folder.exists():
        shutil.copytree(config.model.name, folder)
        path = folder / "config.json"
        keys = {key: 0.0 for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout")}
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    config = with_method(config, config.method.name, lora_dropout=0.0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name=str(folder)))


def short(config, tmp_path, name="run", **keys):
    """Eight steps of 8 rows, shuffled; a batch of the last step of an epoch is as long as any other."""
    keys = {"max_steps": 8, "logging_steps": 1, "save_strategy": "no", "train_sampling_strategy": "random"} | keys
    config = with_training(without_dropout(config, tmp_path), per_device_train_batch_size=ROWS, **keys)
    return elsewhere(config, tmp_path / name)


def on_one(config, **keys):
    """One process that accumulates what the processes share out."""
    fit.train(with_training(config, gradient_accumulation_steps=WORLD), **keys)


def on_two(config, *words, fsdp=False):
    path = Path(f"{config.output.dir}.yaml")
    path.write_text(dump_config(config))
    command_on_ranks("train", path, "--quiet", *words, fsdp=fsdp)


def outcome(config):
    """(losses of the steps, metrics before and after)."""
    folder = Path(config.output.dir)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    result = json.loads((folder / "metrics.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry], {when: result[when] for when in ("before", "after")}


def assert_same(one, two, steps_apart=0):
    """Equal weights, metrics and losses; or with weights that may have been rounded another way in so many steps."""
    (losses, metrics), (other_losses, other_metrics) = outcome(one), outcome(two)
    assert len(losses) == 8
    assert other_losses == pytest.approx(losses, rel=1e-6)  # logged in float32, by way of a mean
    for when, values in metrics.items():
        assert other_metrics[when] == pytest.approx(values, rel=1e-6), when
    saved, other = weights(one.output.dir), weights(two.output.dir)
    assert saved.keys() == other.keys()
    for name, tensor in saved.items():
        limit = steps_apart * torch.finfo(torch.float32).eps * tensor.abs().max()
        assert (other[name] - tensor).abs().max() <= limit, name


def method(config, name):
    return with_method(config, name, **METHODS[name])


def cases(*quick, kinds, names):
    """All pairs of kind and method, of which only the quick ones are for `make test`."""
    marks = {pair: () if pair in quick else (pytest.mark.slow,) for pair in itertools.product(kinds, names)}
    return [pytest.param(*pair, marks=own) for pair, own in marks.items()]


def steps_apart(name):
    """DoRA's A and B have two terms in their gradient, which autograd adds up in another order: an ulp a step."""
    return 8 if name == "dora" else 0


@pytest.mark.parametrize(
    ("kind", "name"), cases(("classification", "weightlora+"), ("causal", "moslora"), kinds=LAYERS, names=METHODS)
)
def test_ddp_is_accumulation(request, tmp_path, kind, name):
    config = method(request.getfixturevalue(kind), name)
    one, two = (short(config, tmp_path, place) for place in ("one", "two"))
    on_one(one)
    on_two(two)
    assert_same(one, two, steps_apart(name))
    if name == "weightlora+":
        kept = json.loads((tmp_path / "two" / "selection.json").read_text())["kept"]
        assert set(kept.values()) == {2 * config.method.r}  # it did expand


@pytest.mark.parametrize(
    ("kind", "name"), cases(("classification", "dora"), kinds=LAYERS, names=("lora", "moslora", "dora"))
)
def test_fsdp2_is_accumulation(request, tmp_path, kind, name):
    """Without clipping, as the norm of shards is added up in another order."""
    config = method(request.getfixturevalue(kind), name)
    one, two = (short(config, tmp_path, place, max_grad_norm=0.0) for place in ("one", "two"))
    on_one(one)
    on_two(sharded(two, kind), fsdp=True)
    assert_same(one, two, steps_apart(name))


def sharded(config, kind):
    own = {"version": 2, "reshard_after_forward": True, "transformer_layer_cls_to_wrap": [LAYERS[kind]]}
    return with_training(config, fsdp=True, fsdp_config=own)


def left_at_step_4(whole, tmp_path):
    """The run as a kill after step 4 leaves it."""
    resumed = elsewhere(whole, tmp_path / "resumed")
    last = Path("checkpoints", "checkpoint-4")
    shutil.copytree(tmp_path / "whole" / last, tmp_path / "resumed" / last)
    shutil.copy(tmp_path / "whole" / "resolved.yaml", tmp_path / "resumed")
    return resumed


@pytest.mark.parametrize("first", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_checkpoint_resumes_on_another_number_of_processes(classification, tmp_path, first):
    """With the same rows in a step, to the weights of the uninterrupted run."""
    whole = short(method(classification, "moslora"), tmp_path, "whole", save_strategy="steps", save_steps=4)
    (on_one if first == 1 else on_two)(whole)
    resumed = left_at_step_4(whole, tmp_path)
    if first == 1:
        on_two(resumed, "--resume")
    else:
        on_one(resumed, resume=True)
    assert_same(whole, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYERS)
def test_a_sharded_run_resumes(request, tmp_path, kind):
    config = short(method(request.getfixturevalue(kind), "moslora"), tmp_path, "whole", max_grad_norm=0.0)
    whole = sharded(with_training(config, save_strategy="steps", save_steps=4), kind)
    on_two(whole, fsdp=True)
    resumed = left_at_step_4(whole, tmp_path)
    on_two(resumed, "--resume", fsdp=True)
    assert_same(whole, resumed)
