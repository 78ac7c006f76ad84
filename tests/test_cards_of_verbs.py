"""Cards of merge, export and intruders: their code runs in the folder and answers, and names no path of one machine."""

import contextlib
import io
import re

import peft
import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from loraloom.card import ANSWERS, AUTO_OF_ENDING, AUTO_OF_TASK, auto_class
from loraloom.export.export import export_adapter
from loraloom.intruders.stored import reduce_stored_intruders
from loraloom.merge.merge import merge_checkpoint
from tests.adapter.support import trained

NAMES = ["sport", "politics", "science"]


@pytest.fixture
def causal(pico_llama_dir, tmp_path):
    """(base, adapter) of a language model, with its tokenizer."""
    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trained(AutoModelForCausalLM.from_pretrained(pico_llama_dir), config, tmp_path / "adapter")
    return pico_llama_dir, tmp_path / "adapter"


@pytest.fixture
def classifier(pico_bert_dir, tmp_path):
    """(base, adapter) of a classifier with named labels, which the base does not have."""
    names = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    model = AutoModelForSequenceClassification.from_pretrained(pico_bert_dir, num_labels=3, **names)
    settings = model.config
    config = peft.LoraConfig(r=8, target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["classifier"])
    trained(model, config, tmp_path / "adapter")
    settings.save_pretrained(tmp_path / "adapter")
    return pico_bert_dir, tmp_path / "adapter"


def card_of(folder):
    """The card's text, checked for what no card may hold: paths of this machine beside the command, and nulls."""
    text = (folder / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert None not in header.values()
    assert "null" not in text
    without_command = re.sub(r"## How it was made\n\n```bash.*?```", "", text, flags=re.DOTALL)
    assert str(folder.parent) not in without_command
    return text


def answer(folder, base, monkeypatch):
    """What the card's Python prints when it is run in its folder, with the base beside it under its own name."""
    monkeypatch.chdir(folder)
    if not (folder / base.name).exists():
        (folder / base.name).symlink_to(base)
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    return printed.getvalue().strip()


def test_a_merged_language_model_writes(causal, tmp_path, monkeypatch):
    base, adapter = causal
    merge_checkpoint([adapter], base, tmp_path / "merged", command=f"loraloom merge {adapter}")
    text = card_of(tmp_path / "merged")
    assert "AutoModelForCausalLM.from_pretrained(folder)" in text
    assert "vllm serve merged" in text
    assert answer(tmp_path / "merged", base, monkeypatch)


def test_a_merged_classifier_names_its_labels(classifier, tmp_path, monkeypatch):
    base, adapter = classifier
    merge_checkpoint([adapter], base, tmp_path / "merged")
    assert "Serving" not in card_of(tmp_path / "merged")
    assert [*AutoConfig.from_pretrained(tmp_path / "merged").id2label.values()] == NAMES
    assert answer(tmp_path / "merged", base, monkeypatch) in NAMES


@pytest.mark.parametrize("target", ["vllm", "portable", "peft"])
def test_an_exported_adapter_says_how_it_is_served(causal, tmp_path, target, monkeypatch):
    base, adapter = causal
    export_adapter(adapter, target, tmp_path / "out")
    text = card_of(tmp_path / "out")
    commands = re.findall(r"vllm serve .* --enable-lora --max-lora-rank 8 --lora-modules NAME=out$", text, re.MULTILINE)
    assert len(commands) == (target != "peft")
    assert ("--lora-paths NAME=out" in text.split("| program")[0]) == (target == "portable")
    assert answer(tmp_path / "out", base, monkeypatch)


def test_an_exported_classifier_is_in_no_serving_table_and_loads_with_its_head(classifier, tmp_path, monkeypatch):
    base, adapter = classifier
    export_adapter(adapter, "peft", tmp_path / "out")
    assert "Serving" not in card_of(tmp_path / "out")
    assert "num_labels=3" in card_of(tmp_path / "out")
    assert answer(tmp_path / "out", base, monkeypatch).startswith("LABEL_")


def test_a_mitigated_adapter_answers(causal, tmp_path, monkeypatch):
    base, adapter = causal
    reduce_stored_intruders(adapter, tmp_path / "out", base, 0.5, "all", "exact")
    assert "| vLLM |" in card_of(tmp_path / "out")
    assert answer(tmp_path / "out", base, monkeypatch)


@pytest.mark.parametrize(
    ("config", "auto"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "AutoModelForCausalLM"),
        ({"architectures": ["GPT2LMHeadModel"]}, "AutoModelForCausalLM"),
        ({"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True}, "AutoModelForSeq2SeqLM"),
        ({"architectures": ["BertForTokenClassification"]}, "AutoModelForTokenClassification"),
        ({"architectures": ["BertModel"]}, "AutoModel"),
        ({}, "AutoModel"),
    ],
)
def test_the_class_that_loads_a_model(config, auto):
    assert auto_class(config) == auto


def test_every_class_has_an_answer():
    assert {*AUTO_OF_TASK.values(), *AUTO_OF_ENDING.values(), "AutoModel"} <= ANSWERS.keys()
