"""Texts with images, through TRL's collator: the answer depends on the image, runs reload and answer."""

import dataclasses
import io
import json
import types
from pathlib import Path
from unittest.mock import MagicMock, create_autospec

import datasets
import pytest
import torch
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from loraloom.training import fit
from loraloom.training.config import DataSection, MethodSection, ModelSection, OutputSection, RunConfig
from loraloom.training.evaluate import evaluate_saved
from loraloom.training.predict import Predictor
from loraloom.training.tasks.base import AnswerOptions
from loraloom.training.tasks.generation import generate
from loraloom.training.tasks.vision_language import TASK

from .support import assert_error, with_training

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image> {% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %} </s> {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def pico_llava_dir(tmp_path_factory, pico_llama_dir):
    """A LLaVA of two layers of width 32 on each side, for images of 8 x 8 in four patches."""
    folder = tmp_path_factory.mktemp("pico_llava")
    tokenizer = AutoTokenizer.from_pretrained(pico_llama_dir)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    size = {"height": 8, "width": 8}
    pixels = CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=8, patch_size=4, projection_dim=32),
        text_config=LlamaConfig(**shape, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def chat(colour):
    asked, said = [{"type": "image"}, {"type": "text", "text": "what ?"}], [{"type": "text", "text": colour}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


ROWS = {
    "prompt and completion": lambda path, colour: {"image": path, "prompt": "what ?", "completion": colour},
    "messages": lambda path, colour: {"images": [path], **chat(colour)},
}


@pytest.fixture
def config_of(pico_llava_dir, tmp_path):
    def build(row, **training):
        for name, colour in COLOURS.items():
            Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
        for part, count in (("train", 48), ("test", 12)):
            names = [list(COLOURS)[i % 3] for i in range(count)]
            lines = [json.dumps(row(str(tmp_path / f"{name}.png"), name)) for name in names]
            (tmp_path / f"{part}.jsonl").write_text("\n".join(lines))
        data = {"path": str(tmp_path / "train.jsonl"), "test_path": str(tmp_path / "test.jsonl")}
        config = RunConfig(
            model=ModelSection(name=str(pico_llava_dir), task="vision-language"),
            data=DataSection(**data, validation_fraction=0),
            method=MethodSection(name="moslora", r=4, lora_alpha=8),
            output=OutputSection(dir=str(tmp_path / "run")),
        )
        keys = {"learning_rate": 2e-2, "per_device_train_batch_size": 8, "num_train_epochs": 8, "use_cpu": True}
        return with_training(config, **keys, save_strategy="no", **training)

    return build


@pytest.mark.parametrize("form", ROWS)
def test_it_learns_what_the_image_shows(config_of, tmp_path, form):
    """The texts are the same in every row, so without the image the answer's loss is not below that of a guess."""
    result = fit.train(config_of(ROWS[form], **({"assistant_only_loss": False} if form == "messages" else {})))
    assert result.after["loss"] < result.before["loss"]
    assert evaluate_saved(tmp_path / "run") == pytest.approx(result.after, rel=1e-5)
    predictor = Predictor(tmp_path / "run", max_new_tokens=2)
    questions = predictor.questions(Path(tmp_path / "test.jsonl"))[:3]
    said = [answer["text"].split()[:1] for answer in predictor.answers(questions)]
    assert said == [[name] for name in COLOURS]


def test_what_does_not_go_is_one_line(config_of, tmp_path):
    config = config_of(lambda path, colour: {"image": path + "x", "prompt": "what ?", "completion": colour})
    assert_error("no-image", "red.pngx", lambda: fit.train(config))
    config = config_of(ROWS["prompt and completion"], packing=True)
    assert_error("training", "acking", lambda: fit.train(config))
    late = [{"role": "user", "content": "what ?"}, {"role": "user", "content": [{"type": "image"}]}]
    config = config_of(lambda path, colour: {"image": path, "messages": late})
    assert_error("wrong-turn", "first user message", lambda: fit.train(config))


def test_stored_images_are_asked_about_by_their_bytes():
    """In a data set of the hub the path is no file here."""
    stored = io.BytesIO()
    Image.new("RGB", (8, 8), COLOURS["blue"]).save(stored, "png")
    columns = {"image": datasets.Image(), "prompt": datasets.Value("string")}
    given = {"image": [{"bytes": stored.getvalue(), "path": "once/there.png"}], "prompt": ["what ?"]}
    rows = datasets.Dataset.from_dict(given, features=datasets.Features(columns))
    ((turn,),) = TASK.questions(DataSection(), rows)
    assert turn["content"][0]["image"].getpixel((0, 0)) == COLOURS["blue"]


@pytest.mark.parametrize("turns", [[{"content": "what ?"}], ["what ?"], []])
def test_a_turn_without_a_role_is_named(turns):
    rows = datasets.Dataset.from_dict({"images": [[__file__]], "messages": [turns]})
    assert_error("wrong-turn", "row 1", lambda: TASK.questions(DataSection(), rows))


@pytest.mark.parametrize(("model", "kept"), [(Gemma3ForConditionalGeneration, True), (LlamaForCausalLM, False)])
def test_token_types_reach_the_models_that_see_by_them(model, kept):
    """Gemma 3 attends in both directions within an image, which they mark."""
    given = {}
    stub = create_autospec(model, instance=True)
    stub.device, stub.config = "cpu", types.SimpleNamespace(is_encoder_decoder=False)
    stub.generate.side_effect = lambda streamer, **inputs: [given.update(inputs), streamer.end()]
    processor = MagicMock(**{"tokenizer.pad_token_id": 0})
    ids = torch.ones(1, 2, dtype=torch.long)
    processor.apply_chat_template.return_value = {"input_ids": ids, "token_type_ids": ids}
    assert not "".join(generate(stub, processor, [{}], AnswerOptions(8)))
    assert ("token_type_ids" in given) == kept


def test_a_model_without_images_is_refused(config_of, pico_llama_dir):
    config = config_of(ROWS["messages"])
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, name=str(pico_llama_dir)))
    assert_error("no-model", "images", lambda: fit.train(config))
