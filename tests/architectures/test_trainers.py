"""TRL's trainers on a LoomConfig: three steps, what they save loads again, the reference is the model at the start."""

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from loraloom import LoomConfig
from tests.tuner.support import randomise

STEPS = 3
IDS = torch.arange(10, 22).reshape(2, 6)
PROMPTS = ["the red apple is", "a small dog", "the blue bird", "one good word"] * 2
ANSWERS = ["good .", "runs fast", "sleeps", "is new"] * 2
OTHERS = ["bad !", "not all", "eats", "was old"] * 2
PREFERENCES = {"prompt": PROMPTS, "chosen": ANSWERS, "rejected": OTHERS}
TRAINERS = {
    "SFT": {"prompt": PROMPTS, "completion": ANSWERS},
    "DPO": PREFERENCES,
    "KTO": {"prompt": PROMPTS, "completion": ANSWERS, "label": [True, False] * 4},
    "Reward": PREFERENCES,
    "GRPO": {"prompt": PROMPTS},
    "RLOO": {"prompt": PROMPTS},
}
PARTS = {"use_mixer": "orthogonal", "use_dora": True, "use_gate": True}
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

pytestmark = [
    pytest.mark.architectures,
    # TRL 1.16 warns of its own defaults, bitsandbytes of its CPU path; what is tested are the results.
    pytest.mark.filterwarnings("ignore"),
]


def length(completions, **_):
    return [float(len(completion)) for completion in completions]


def load(name, directory, **kwargs):
    kind = AutoModelForSequenceClassification if name == "Reward" else AutoModelForCausalLM
    torch.manual_seed(0)  # the head of a reward model is new
    return kind.from_pretrained(directory, **({"num_labels": 1} if name == "Reward" else {}), **kwargs)


def config(name, **kwargs):
    task = "SEQ_CLS" if name == "Reward" else "CAUSAL_LM"
    return LoomConfig(r=4, target_modules="all-linear", task_type=task, **PARTS | kwargs)


def trainer(name, model, directory, output, peft_config=None):
    options = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": []}
    options |= {"use_cpu": True, "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "bf16": False}
    rewards = {}
    if name in ("GRPO", "RLOO"):
        options |= {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
        rewards = {"reward_funcs": length}
    if name != "RLOO" and name != "GRPO":
        options |= {"max_length": 16}
    arguments = getattr(trl, f"{name}Config")(output_dir=str(output), **options)
    return getattr(trl, f"{name}Trainer")(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(TRAINERS[name]),
        processing_class=AutoTokenizer.from_pretrained(directory),
        peft_config=peft_config,
        **rewards,
    )


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


def adapter(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if ".loom_" in name and ".default" in name}


def check(name, run, base_of, output):
    before = adapter(run.model)
    run.train()
    assert all(entry["loss"] == entry["loss"] for entry in run.state.log_history if "loss" in entry)
    moved = [n for n, p in adapter(run.model).items() if not torch.equal(p, before[n])]
    assert len(moved) > 0.9 * len(before)
    assert all(p.dtype is torch.float32 for n, p in run.model.named_parameters() if "magnitude_vector" in n)
    run.save_model(str(output / "saved"))
    again = PeftModel.from_pretrained(base_of(), output / "saved")
    if name != "Reward":  # its head is saved with the adapter; dropout is off in both
        torch.testing.assert_close(logits(again), logits(run.model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", TRAINERS)
def test_a_fresh_adapter(name, pico_llama_dir, tmp_path):
    run = trainer(name, load(name, pico_llama_dir), pico_llama_dir, tmp_path, config(name))
    check(name, run, lambda: load(name, pico_llama_dir), tmp_path)


@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_an_adapter_that_exists_is_its_own_reference(name, pico_llama_dir, tmp_path):
    model = get_peft_model(load(name, pico_llama_dir), config(name))
    randomise(model)
    start = logits(model)
    run = trainer(name, model, pico_llama_dir, tmp_path)
    if "ref" in run.model.peft_config:
        run.model.set_adapter("ref")
        torch.testing.assert_close(logits(run.model), start, rtol=0, atol=1e-5)
        run.model.set_adapter("default")
    else:
        assert name == "SFT"
    check(name, run, lambda: load(name, pico_llama_dir), tmp_path)
    if "ref" in run.model.peft_config:
        run.model.set_adapter("ref")
        torch.testing.assert_close(logits(run.model), start, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_on_an_nf4_base(name, pico_llama_dir, tmp_path):
    model = load(name, pico_llama_dir, quantization_config=NF4)
    run = trainer(name, model, pico_llama_dir, tmp_path, config(name))
    run.train()
    assert all(p.dtype is torch.float32 for n, p in run.model.named_parameters() if "magnitude_vector" in n)
    assert all(p.isfinite().all() for p in adapter(run.model).values())


def test_nf4_with_a_new_classification_head(pico_llama_dir):
    """O9: the head is a Linear4bit that was never quantised."""
    model = get_peft_model(load("Reward", pico_llama_dir, quantization_config=NF4), config("Reward"))
    output = model.train()(input_ids=IDS).logits
    output.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n)
