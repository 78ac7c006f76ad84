"""Every task learns what its rows say, from a file, with its metrics; and reloads to the same numbers."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
from PIL import Image

from loraloom.training import fit
from loraloom.training.config import DataSection, MethodSection, ModelSection, OutputSection, RunConfig
from loraloom.training.evaluate import evaluate_saved

from .support import assert_error, with_training

COLOURS, ANIMALS, FILL = ("red", "green", "blue"), ("dog", "cat", "bird"), ("the", "runs", "file", "line")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def some(generator, words, count=3):
    chosen = [*generator.choices(FILL, k=count), *words]
    generator.shuffle(chosen)
    return chosen


def rows_of(task, count, seed):
    """Rows whose answer is in plain sight."""
    generator = random.Random(seed)
    for _ in range(count):
        colour, animal, other = generator.choice(COLOURS), generator.choice(ANIMALS), generator.choice(COLOURS)
        text = " ".join(some(generator, [colour, animal]))
        if task == "text-classification":  # a pair: do the two name one colour?
            second = " ".join(some(generator, [generator.choice([colour, other])]))
            yield {"first": text, "second": second, "label": "same" if colour in second.split() else "other"}
        elif task == "multi-label":
            animals = generator.sample(ANIMALS, k=generator.randint(0, 2))
            yield {"text": " ".join(some(generator, animals)), "labels": animals}
        elif task == "text-regression":
            yield {"text": text, "score": float(COLOURS.index(colour))}
        elif task == "token-classification":
            words = some(generator, [colour, animal])
            tags = {colour: "B-COLOUR", animal: "B-ANIMAL"}
            yield {"tokens": words, "tags": [tags.get(word, "O") for word in words]}
        elif task == "seq2seq-lm":
            yield {"text": text, "summary": colour}
        elif task == "preference":
            yield {"prompt": f"{text} ?", "chosen": f" {colour}", "rejected": f" {animal}"}


def config_of(task, model, tmp_path, **data):
    path = data.pop("path", None)
    if path is None:
        path = write(tmp_path / "train.jsonl", rows_of(task, 128, 0))
        data.setdefault("test_path", write(tmp_path / "test.jsonl", rows_of(task, 24, 1)))
    config = RunConfig(
        model=ModelSection(name=str(model), task=task),
        data=DataSection(path=path, **data),
        method=MethodSection(name="lora", r=4, lora_alpha=8),
        output=OutputSection(dir=str(tmp_path / "run")),
    )
    keys = {"learning_rate": 2e-2, "per_device_train_batch_size": 8, "num_train_epochs": 4, "use_cpu": True}
    return with_training(config, **keys, save_strategy="no")


@pytest.mark.parametrize(
    ("task", "keys", "metric", "least"),
    [
        ("multi-label", {}, "micro_f1", 0.7),
        ("text-regression", {}, "pearson", 0.8),
        ("token-classification", {}, "entity_f1", 0.9),
    ],
)
def test_heads_learn_and_reload(task, keys, metric, least, pico_bert_dir, tmp_path):
    result = fit.train(config_of(task, pico_bert_dir, tmp_path, **keys))
    assert result.after[metric] > least > result.before[metric]
    assert list(result.after)[:2] == ["loss", metric]
    assert result.validation_rows > 0
    assert set(result.validation) == set(result.after)
    assert evaluate_saved(tmp_path / "run") == pytest.approx(result.after, rel=1e-5)


def test_pairs_are_read_as_pairs(pico_bert_dir, tmp_path):
    """The label depends on both texts; what the model gets has both in it."""
    keys = {"text_column": "first", "text_pair_column": "second"}
    config = with_training(config_of("text-classification", pico_bert_dir, tmp_path, **keys), max_steps=2)
    built = []
    build = fit.build_trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "build_trainer", lambda *a: built.append(build(*a)) or built[-1])
        result = fit.train(config)
    assert result.data["ignored_columns"] == []
    row = built[0].train_dataset[0]
    assert row["input_ids"].count(3) == 2  # [SEP]


def test_metrics_and_weights_are_chosen(pico_bert_dir, tmp_path):
    keys = {"text_column": "first", "text_pair_column": "second"}
    config = config_of("text-classification", pico_bert_dir, tmp_path, **keys)
    config = with_training(config, max_steps=2, metrics=["matthews_correlation", "accuracy"], class_weights="balanced")
    result = fit.train(config)
    assert list(result.after) == ["loss", "matthews_correlation", "accuracy"]
    wrong = with_training(config, class_weights={"sam": 2.0})
    wrong = dataclasses.replace(wrong, output=OutputSection(dir=str(tmp_path / "other")))
    assert_error("unknown-label", "did you mean 'same'", lambda: fit.train(wrong))


def test_writing_is_judged_by_what_is_written(pico_t5_dir, tmp_path):
    config = config_of("seq2seq-lm", pico_t5_dir, tmp_path, max_target_length=4)
    config = with_training(config, metrics=["exact_match", "rougeL"], learning_rate=5e-2, num_train_epochs=6)
    result = fit.train(config)
    assert list(result.after) == ["loss", "exact_match", "rougeL"]
    assert result.after["loss"] < 0.5 * result.before["loss"]
    assert result.after["exact_match"] > result.before["exact_match"]
    assert evaluate_saved(tmp_path / "run") == pytest.approx(result.after, rel=1e-5)


def test_preferences_are_learned(pico_llama_dir, tmp_path):
    result = fit.train(config_of("preference", pico_llama_dir, tmp_path, max_length=32))
    assert list(result.after) == ["loss", "reward_accuracy", "reward_margin"]
    assert result.before["reward_margin"] == pytest.approx(0, abs=1e-6)  # the adapter starts as the reference
    assert result.after["reward_accuracy"] > 0.9
    assert evaluate_saved(tmp_path / "run") == pytest.approx(result.after, rel=1e-4)
    assert not (tmp_path / "run" / "ref").exists()


def test_images_in_a_folder_per_label(pico_vit_dir, tmp_path):
    for split, count in (("train", 24), ("test", 6)):
        for colour in COLOURS:
            folder = tmp_path / "images" / split / colour
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), colour).point(lambda v, i=i: max(0, v - i)).save(folder / f"{i}.png")
    config = config_of("image-classification", pico_vit_dir, tmp_path, path=str(tmp_path / "images"))
    result = fit.train(config)
    assert result.label_names == sorted(COLOURS)
    assert result.after["accuracy"] > 0.9
    assert Path(tmp_path / "run" / "preprocessor_config.json").exists()
    assert evaluate_saved(tmp_path / "run") == pytest.approx(result.after, rel=1e-5)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (
            {"conversations": [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "the red dog"}]},
            ["messages"],
        ),
        ({"instruction": "what ?", "input": "", "output": "the red dog"}, ["prompt", "completion"]),
        ({"instruction": "what ?", "input": "dog", "output": "the red dog"}, ["prompt", "completion"]),
    ],
)
def test_formats_of_chats(row, columns, tmp_path):
    path = write(tmp_path / "rows.jsonl", [row] * 3)
    data = fit.load_data(DataSection(path=path, test_path=path), "causal-lm")
    assert data.train.column_names == columns
    text = json.dumps(data.train[0])
    assert "what ?" in text
    assert "the red dog" in text
    assert ("### Input" in text) == (row.get("input") == "dog")


@pytest.mark.parametrize(
    ("task", "rows", "code", "named"),
    [
        ("multi-label", [{"text": "a", "labels": "x"}], "wrong-labels", "row 1"),
        ("text-regression", [{"text": "a", "score": "high"}], "wrong-labels", "row 1"),
        ("text-regression", [{"text": f"a{i}", "score": 1} for i in range(60)], "one-label", "1.0"),
        ("token-classification", [{"tokens": ["a", "b"], "tags": ["O"]}], "wrong-labels", "row 1"),
        ("seq2seq-lm", [{"text": "a", "label": "b"}], "no-column", "target_column"),
        ("preference", [{"chosen": "a"}], "no-column", "rejected"),
        ("causal-lm", [{"conversations": [{"from": "dog", "value": "x"}]}], "wrong-turn", "dog"),
    ],
)
def test_rows_that_do_not_fit_a_task(task, rows, code, named, tmp_path):
    path = write(tmp_path / "rows.jsonl", rows)
    assert_error(code, named, lambda: fit.load_data(DataSection(path=path), task))


def test_a_typo_in_a_label_and_a_majority_are_said(pico_bert_dir, tmp_path):
    rows = [{"text": f"the {COLOURS[i % 2]} dog", "label": ("yes", "no")[i % 2]} for i in range(198)]
    rows += [{"text": "the blue dog", "label": "Yes"}]
    path = write(tmp_path / "rows.jsonl", rows)
    test = write(tmp_path / "test.jsonl", rows[:21])
    config = config_of("text-classification", pico_bert_dir, tmp_path, path=path, test_path=test, validation_fraction=0)
    result = fit.train(with_training(config, max_steps=1, learning_rate=1e-6, warmup_steps=0))
    assert result.data["classes"] == {"yes": 99, "no": 99, "Yes": 1} or result.data["classes"]["Yes"] == 1
    assert any("'Yes'" in text and "typo of 'yes'" in text for text in result.warnings)
    assert any("to every test row" in text or "is not above" in text for text in result.warnings)
    assert sum(map(sum, result.confusion)) == 21
    assert result.examples[0].keys() >= {"text", "label", "answer", "probability"}
