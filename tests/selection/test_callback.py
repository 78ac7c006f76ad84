"""The phases under transformers' Trainer: the selection is told, saved and resumed with the run."""

import json

import peft
import pytest
import torch
from transformers import BertForSequenceClassification, Trainer, TrainerState, TrainingArguments

from loraloom import LoomConfig
from loraloom.errors import InputError
from loraloom.selection import AdapterSelection, HalveAndDouble, SelectionCallback
from tests.models import bert_classifier

from .support import assert_identical, optimizer_for, tensors

STEPS = 12
OPTIONS = {"warmup_steps": 2, "select_until": 0.5, "expand": HalveAndDouble(times=1, every=2)}


def base() -> BertForSequenceClassification:
    torch.manual_seed(0)
    return bert_classifier()


def build(folder, log: bool = False, **arguments) -> tuple[Trainer, AdapterSelection]:
    config = LoomConfig.weightlora(
        r=2, target_modules=["query", "value", "dense"], task_type="SEQ_CLS", lora_dropout=0.1
    )
    model = peft.get_peft_model(base(), config)
    optimizer = optimizer_for(model)
    selection = AdapterSelection(model, optimizer, 4, **OPTIONS)
    generator = torch.Generator().manual_seed(1)
    data = [
        {"input_ids": torch.randint(0, 40, (7,), generator=generator), "labels": int(i) % 3} for i in range(4 * STEPS)
    ]
    settings = {"max_steps": STEPS, "save_steps": 1, "logging_steps": 4, "per_device_train_batch_size": 4}
    settings |= {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    trainer = Trainer(
        model, TrainingArguments(str(folder), **settings | arguments), train_dataset=data, optimizers=(optimizer, None)
    )
    trainer.add_callback(SelectionCallback(selection, trainer.log if log else None))
    return trainer, selection


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("straight")
    trainer, selection = build(folder, log=True)
    trainer.train()
    return folder, trainer, selection


def test_the_run_ends_with_few_wide_adapters_that_a_stranger_can_load(straight, tmp_path) -> None:
    folder, trainer, selection = straight
    assert list(selection.kept.values()) == [4, 4]
    assert json.loads((folder / "selection.json").read_text()) == selection.state_dict()
    trainer.save_model(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(base(), str(tmp_path))
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        expected = trainer.model.eval()(input_ids=ids).logits
        torch.testing.assert_close(loaded.eval()(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-6)


def test_the_gates_are_logged_with_the_loss_while_there_are_any(straight) -> None:
    _, trainer, selection = straight
    logs = [log for log in trainer.state.log_history if any(key.startswith("gates/") for key in log)]
    assert [log["step"] for log in logs] == [4]  # at 8 and 12 they are folded
    assert {key.removeprefix("gates/") for key in logs[0] if "/" in key} == set(selection.modules)
    assert [log["step"] for log in trainer.state.log_history if "loss" in log] == [4, 8, 12]


@pytest.mark.parametrize("stop", [1, 4, 6, 7, 8, 10])
def test_resumed_in_any_phase_equals_uninterrupted_bit_for_bit(straight, tmp_path, stop: int) -> None:
    folder, uninterrupted, expected = straight
    trainer, selection = build(tmp_path)
    checkpoint = folder / f"checkpoint-{stop}"
    selection.restore(checkpoint)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert_identical(tensors(trainer.model), tensors(uninterrupted.model))
    assert selection.state_dict() == expected.state_dict()


def test_resuming_without_restoring_is_an_error(straight, tmp_path) -> None:
    folder, _, _ = straight
    trainer, _ = build(tmp_path)
    with pytest.raises(InputError) as caught:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert caught.value.code == "not-restored"


def test_loading_the_best_model_at_the_end_is_refused(tmp_path) -> None:
    trainer, _ = build(tmp_path)
    trainer.args.load_best_model_at_end = True
    with pytest.raises(InputError) as caught:
        trainer.train()
    assert caught.value.code == "best-model"


def test_what_was_dropped_stays_frozen_when_peft_switches_adapters_on_again(tmp_path) -> None:
    trainer, selection = build(tmp_path)
    dropped = set(selection.modules[:3])
    selection.freeze(dropped)
    trainer.model.set_adapter("default")
    names = {n for n, p in trainer.model.named_parameters() if p.requires_grad and "loom_lora_A" in n}
    assert len(names) == len(selection.modules)
    callback = SelectionCallback(selection)
    callback.on_train_begin(trainer.args, TrainerState(max_steps=STEPS), trainer.control)
    names = {n for n, p in trainer.model.named_parameters() if p.requires_grad and "loom_lora_A" in n}
    assert len(names) == len(selection.modules) - 3
