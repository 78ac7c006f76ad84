"""Every recipe runs for two steps, on a tiny stand-in for its model and a few rows with its columns."""

import dataclasses
import json

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    DebertaV2Config,
    DebertaV2Model,
)

from loraloom.cli.recipes import recipes
from loraloom.training import fit
from loraloom.training.load import build_config

COLOURS = ("red", "green", "blue")
WORDS = ("dog", "cat", "bird", "apple", "file", "line", "word", "name")


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory, pico_bert_dir, pico_llama_dir, pico_vit_dir):
    """Part of a model's name -> folder of its stand-in."""
    tiny = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    tokenizer = AutoTokenizer.from_pretrained(pico_bert_dir)
    deberta, bart = tmp_path_factory.mktemp("deberta"), tmp_path_factory.mktemp("bart")
    DebertaV2Model(DebertaV2Config(vocab_size=len(tokenizer), **tiny)).save_pretrained(deberta)
    tokenizer.save_pretrained(deberta)
    words = AutoTokenizer.from_pretrained(pico_llama_dir)
    config = BartConfig(
        vocab_size=len(words),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=64,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        decoder_start_token_id=words.bos_token_id,
        forced_eos_token_id=words.eos_token_id,
    )
    BartForConditionalGeneration(config).save_pretrained(bart)
    words.save_pretrained(bart)
    return {
        **{"deberta": deberta, "bart": bart, "roberta": pico_bert_dir, "vit": pico_vit_dir},
        **dict.fromkeys(("llama", "Llama"), pico_llama_dir),
    }


def rows_for(config, tmp_path):
    """A file with the columns that the recipe reads."""
    data, task = config.data, config.model.task
    label = (lambda i: float(i % 5)) if task == "text-regression" else (lambda i: COLOURS[i % 2])
    rows = []
    for i in range(48):
        text = f"{COLOURS[i % 2]} {WORDS[i % 8]} {WORDS[i // 8]}"
        row = {"text": text, "label": label(i), "instruction": text, "input": "", "output": "yes"}
        names = (data.text_column, data.text_pair_column, data.target_column)
        rows.append(row | {name: text for name in names if name})
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def members_for(config, base, tmp_path):
    found = {}
    for name in config.composition.members:
        auto = AutoModelForImageClassification if "image" in config.model.task else AutoModelForSequenceClassification
        model = auto.from_pretrained(base)
        targets = [n for n, _ in model.named_modules() if n.endswith(("query", "q_proj"))]
        member = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        member.save_pretrained(tmp_path / name)
        found[name] = str(tmp_path / name)
    return found


@pytest.mark.parametrize("name", recipes())
def test_each_says_where_its_numbers_are_from(name):
    head = " ".join(line.removeprefix("# ") for line in recipes()[name].splitlines() if line.startswith("#"))
    assert "arXiv" in head
    assert "Ours: " in head
    assert "github.com/" in head or "could not be verified" in head


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", recipes())
def test_two_steps(name, stand_ins, tmp_path):
    config = build_config(yaml.safe_load(recipes()[name]))
    base = next(folder for part, folder in stand_ins.items() if part in config.model.name)
    if config.model.task == "image-classification":
        from PIL import Image

        path = tmp_path / "images"
        for split in ("train", "test"):
            for colour in COLOURS:
                (path / split / colour).mkdir(parents=True)
                for i in range(6):
                    image = Image.new("RGB", (8, 8), colour).point(lambda v, i=i: max(0, v - i))
                    image.save(path / split / colour / f"{i}.png")
        path = str(path)
    else:
        path = rows_for(config, tmp_path)
    lengths = {"max_length": 32} | ({"max_target_length": 8} if config.model.task == "seq2seq-lm" else {})
    fractions = {"test_fraction": 0.25, "validation_fraction": 0.25 if config.data.validation_fraction else 0}
    data = dataclasses.replace(config.data, path=path, subset=None, **fractions, **lengths)
    keys = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "use_cpu": True}
    if "generation_max_length" in config.training:
        keys["generation_max_length"] = 16  # BART's stand-in has 64 positions
    keys |= {"warmup_steps": 0, "eval_strategy": "no", "save_strategy": "no"}
    small = {"rank": 4, "update_gap": 1} if config.optimizer.rank else {}
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, name=str(base)),
        data=data,
        optimizer=dataclasses.replace(config.optimizer, **small),
        training={**config.training, **keys},
        output=dataclasses.replace(config.output, dir=str(tmp_path / "run")),
    )
    if config.method.keep is not None and config.method.keep > 1:
        config = dataclasses.replace(
            config, method=dataclasses.replace(config.method, keep=2, warmup_steps=1, select_until=2)
        )
    elif config.method.keep is not None:
        config = dataclasses.replace(config, method=dataclasses.replace(config.method, warmup_steps=1, select_until=2))
    if config.composition.members:
        members = members_for(config, base, tmp_path)
        config = dataclasses.replace(config, composition=dataclasses.replace(config.composition, members=members))
    assert fit.train(config).steps == 2
