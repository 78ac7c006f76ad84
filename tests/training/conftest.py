"""Small runs on the pico models: rows on disk, and a configuration that trains on them in seconds."""

import json
import random

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from loraloom.training import fit
from loraloom.training.config import (
    TRAINING_DEFAULTS,
    DataSection,
    MethodSection,
    ModelSection,
    OutputSection,
    RunConfig,
)

from .support import StopAt

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="session")
def colour_rows(tmp_path_factory):
    """Folder with train.jsonl (96 rows) and test.jsonl (24): short texts of very different length, labelled by the one
    colour that each names."""
    generator = random.Random(0)
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", 96), ("test", 24)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(count):
                colour = COLOURS[i % 3]
                others = generator.choices(["apple", "dog", "runs", "the", "file"], k=generator.randint(1, 12))
                words = [*others, colour]
                generator.shuffle(words)
                file.write(json.dumps({"text": " ".join(words), "label": colour}) + "\n")
    return folder


@pytest.fixture
def classification(pico_bert_dir, colour_rows, tmp_path):
    """A run of 24 steps with dropout in the model and in the adapters; texts are grouped by length."""
    return RunConfig(
        model=ModelSection(name=str(pico_bert_dir)),
        data=DataSection(
            path=str(colour_rows / "train.jsonl"), test_path=str(colour_rows / "test.jsonl"), validation_fraction=0
        ),
        method=MethodSection(name="lora", r=4, lora_alpha=8, lora_dropout=0.1),
        training={
            **TRAINING_DEFAULTS,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-3,
            "train_sampling_strategy": "group_by_length",
            "use_cpu": True,
        },
        output=OutputSection(dir=str(tmp_path / "run")),
    )


@pytest.fixture
def causal(pico_llama_dir, colour_rows, tmp_path):
    """The same rows as language modelling, with TRL's SFTTrainer."""
    return RunConfig(
        model=ModelSection(name=str(pico_llama_dir), task="causal-lm"),
        data=DataSection(
            path=str(colour_rows / "train.jsonl"),
            test_path=str(colour_rows / "test.jsonl"),
            validation_fraction=0,
            max_length=32,
        ),
        method=MethodSection(name="lora", r=4, lora_alpha=8, lora_dropout=0.1),
        training={
            **TRAINING_DEFAULTS,
            "num_train_epochs": 2,
            "per_device_train_batch_size": 8,
            "learning_rate": 5e-3,
            "use_cpu": True,
        },
        output=OutputSection(dir=str(tmp_path / "run")),
    )


@pytest.fixture
def ctrl_c(monkeypatch):
    """Make the next run receive Ctrl-C in the given step."""

    def at(step):
        build = fit.build_trainer

        def with_interrupt(setup, arguments, model, callbacks):
            monkeypatch.setattr(fit, "build_trainer", build)
            return build(setup, arguments, model, [*callbacks, StopAt(step)])

        monkeypatch.setattr(fit, "build_trainer", with_interrupt)

    return at


@pytest.fixture(scope="session")
def pico_t5_dir(tmp_path_factory, pico_llama_dir):
    """A two-layer T5 of width 32 with the words of the other pico models."""
    folder = tmp_path_factory.mktemp("pico_t5")
    tokenizer = AutoTokenizer.from_pretrained(pico_llama_dir)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[end])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=tokenizer.pad_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pico_vit_dir(tmp_path_factory):
    """A two-layer ViT for images of 8 x 8."""
    folder = tmp_path_factory.mktemp("pico_vit")
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=8, patch_size=4
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder
