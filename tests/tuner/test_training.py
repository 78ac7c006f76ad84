"""Real trainers on a pico Llama: transformers' Trainer and TRL's SFTTrainer, saved and resumed bit for bit."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from loraloom import LoomConfig
from tests.tuner.support import ALL_PARTS
from tests.tuner.trainer import ARGUMENTS, HALF, SENTENCES, STEPS, tokens


def config(**kwargs):
    parts = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    return LoomConfig(**parts | ALL_PARTS | kwargs)


def llama(directory, nf4=False):
    quantization = {}
    if nf4:
        quantization = {
            "device_map": "cpu",
            "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        }
    return AutoModelForCausalLM.from_pretrained(directory, **quantization)


def one_adapter(directory):
    return get_peft_model(llama(directory), config())


def one_adapter_on_nf4(directory):
    return get_peft_model(llama(directory, nf4=True), config())


def two_active_adapters(directory):
    model = get_peft_model(llama(directory), config(), "first")
    model.add_adapter("second", config(use_dora=False, use_gate=False, r=2))
    model.base_model.set_adapter(["first", "second"])
    return model


class TrainerOfAll(Trainer):
    """Resuming by transformers makes one adapter active only; this makes all of them active again."""

    def _load_from_checkpoint(self, checkpoint, model=None):
        active = list(self.model.active_adapters)
        super()._load_from_checkpoint(checkpoint, model)
        self.model.base_model.set_adapter(active)


def train(model, directory, resume=None):
    """The trainer's log of losses by step, and the trained tensors."""
    trainer = TrainerOfAll(model, TrainingArguments(output_dir=str(directory), **ARGUMENTS), train_dataset=tokens())
    trainer.train(resume_from_checkpoint=resume)
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("build", [one_adapter, one_adapter_on_nf4, two_active_adapters], ids=lambda f: f.__name__)
def test_resuming_equals_not_stopping_bit_for_bit(build, pico_llama_dir, tmp_path):
    start = {n: p.detach().clone() for n, p in build(pico_llama_dir).named_parameters() if p.requires_grad}
    torch.manual_seed(0)
    losses, expected = train(build(pico_llama_dir), tmp_path / "whole")
    torch.manual_seed(1)  # what a new process would start with must not matter
    resumed_losses, resumed = train(
        build(pico_llama_dir), tmp_path / "resumed", resume=str(tmp_path / "whole" / f"checkpoint-{HALF}")
    )
    assert len(losses) == STEPS
    assert all(resumed_losses[step] == losses[step] for step in range(HALF + 1, STEPS + 1))
    assert resumed.keys() == expected.keys() == start.keys()
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
    assert not any(torch.equal(expected[name], value) for name, value in start.items())
    assert all(value.dtype == torch.float32 for value in expected.values())


@pytest.mark.parametrize("build", [one_adapter, two_active_adapters], ids=lambda f: f.__name__)
def test_what_the_trainer_saves_loads_with_the_same_output(build, pico_llama_dir, tmp_path):
    model = build(pico_llama_dir)
    train(model, tmp_path)
    checkpoint, ids = tmp_path / f"checkpoint-{STEPS}", torch.arange(10, 20)[None]
    names = list(model.active_adapters)
    places = {name: checkpoint / name if name != "default" else checkpoint for name in names}
    loaded = PeftModel.from_pretrained(llama(pico_llama_dir), places[names[0]], adapter_name=names[0])
    for name in names[1:]:
        loaded.load_adapter(str(places[name]), name)
    loaded.base_model.set_adapter(names)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("nf4", [False, True], ids=["fp32", "nf4"])
def test_trl_sft_trains_saves_and_resumes(pico_llama_dir, tmp_path, nf4):
    tokenizer = AutoTokenizer.from_pretrained(pico_llama_dir)

    def sft(directory, resume=None):
        arguments = SFTConfig(output_dir=str(directory), max_length=16, **ARGUMENTS)
        trainer = SFTTrainer(
            llama(pico_llama_dir, nf4),
            arguments,
            train_dataset=Dataset.from_dict({"text": SENTENCES}),
            processing_class=tokenizer,
            peft_config=config(),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    model = sft(tmp_path / "whole")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    # TRL casts the factors of an adapter on a quantised base to bf16; a gate or magnitude in bf16 would hardly move.
    assert all(p.dtype == torch.float32 for name, p in trained.items() if "magnitude_vector" in name)
    assert {name.split(".")[-3] for name in trained} == {
        "loom_lora_A",
        "loom_lora_B",
        "loom_mixer",
        "loom_gate_lora_magnitude_vector",
        "loom_lora_magnitude_vector",
    }
    gates = [p.item() for name, p in trained.items() if "loom_gate" in name]
    assert all(gate != 1.0 for gate in gates)

    resumed = sft(tmp_path / "resumed", resume=str(tmp_path / "whole" / f"checkpoint-{HALF}"))
    for name, parameter in resumed.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == trained[name].dtype
            assert torch.equal(parameter, trained[name]), name
    saved = load_file(tmp_path / "whole" / f"checkpoint-{STEPS}" / "adapter_model.safetensors")
    assert len(saved) == len(trained)
