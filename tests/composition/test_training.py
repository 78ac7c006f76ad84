"""A plain transformers Trainer trains a composition of real files and resumes bit for bit."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from loraloom import compose
from loraloom.composition import learned_weights
from tests.composition.support import LOGITS
from tests.tuner.trainer import ARGUMENTS, HALF, STEPS, tokens

QUANTIZED = {
    "device_map": "cpu",
    "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def llama(directory, nf4=False):
    return AutoModelForCausalLM.from_pretrained(directory, **(QUANTIZED if nf4 else {}))


@pytest.fixture(scope="module")
def members(pico_llama_dir, tmp_path_factory):
    """Three LoRAs of a pico Llama on different modules."""
    folder = tmp_path_factory.mktemp("members")
    targets = {"a": ["q_proj", "v_proj"], "b": ["q_proj", "up_proj"], "c": "all-linear"}
    for seed, (name, modules) in enumerate(targets.items()):
        torch.manual_seed(seed)
        config = LoraConfig(r=2 + seed, target_modules=modules, init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(llama(pico_llama_dir), config).save_pretrained(folder / name)
    return {name: folder / name for name in targets}


def train(model, directory, resume=None):
    trainer = Trainer(model, TrainingArguments(output_dir=str(directory), **ARGUMENTS), train_dataset=tokens())
    trainer.train(resume_from_checkpoint=resume)
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


@pytest.mark.parametrize(
    ("options", "nf4"),
    [({}, False), ({"scope": "model"}, False), ({"constraint": "simplex"}, False), ({}, True)],
    ids=["per layer", "one v", "simplex", "nf4"],
)
def test_training_learns_weights_only_and_resumes_bit_for_bit(pico_llama_dir, members, tmp_path, options, nf4):
    model = compose(llama(pico_llama_dir, nf4), members, **options)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(model, tmp_path / "whole")
    layers = learned_weights(model).layers
    for name, parameter in model.named_parameters():
        module = name.removeprefix("base_model.model.").partition(".loom")[0]
        # The weight of a member that is alone in its layer is 1: a softmax gives it no gradient.
        if LOGITS not in name or options or len(layers[module]) > 1:
            assert torch.equal(parameter, before[name]) == (LOGITS not in name), name
    assert len(losses) == STEPS

    checkpoint = tmp_path / "whole" / f"checkpoint-{HALF}"
    resumed = compose(llama(pico_llama_dir, nf4), members, **options)
    resumed_losses = train(resumed, tmp_path / "resumed", resume=str(checkpoint))
    assert all(resumed_losses[step] == losses[step] for step in range(HALF + 1, STEPS + 1))
    assert learned_weights(resumed) == learned_weights(model)

    last = tmp_path / "whole" / f"checkpoint-{STEPS}" / "composition"
    loaded = PeftModel.from_pretrained(llama(pico_llama_dir, nf4), last, "composition").eval()
    assert learned_weights(loaded) == learned_weights(model)
    ids = torch.arange(10, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
        assert loaded.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape == (1, 12)
