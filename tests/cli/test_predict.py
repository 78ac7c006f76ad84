"""`loraloom predict`, `init` and `recipes`: what is typed, what is printed, what is written."""

import json
from typing import get_args

import pytest
import yaml

from loraloom.cli.main import main
from loraloom.cli.recipes import recipes, title
from loraloom.training.config import Task
from loraloom.training.load import build_config, load_config


@pytest.fixture
def in_process(monkeypatch):
    """Warnings stay as pytest sets them."""
    for verb in ("train", "predict"):
        monkeypatch.setattr(f"loraloom.cli.{verb}.quiet_libraries", lambda: None)


@pytest.fixture
def colours(tmp_path):
    rows = [{"text": f"{c} {w}", "label": c} for c in ("red", "blue") for w in ("dog", "cat", "apple", "file") * 8]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train(model, data, folder, *options):
    words = ["train", "--quiet", "--model.name", str(model), "--data.path", str(data), "--data.test_path", str(data)]
    words += ["--output.dir", str(folder), "--training.use_cpu", "true", "--training.save_strategy", "no"]
    assert main([*words, *options]) == 0


def test_labels_with_probabilities(pico_bert_dir, colours, tmp_path, capsys, in_process):
    train(pico_bert_dir, colours, tmp_path / "run", "--training.learning_rate", "2e-2")
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), "--text", "red bird", "--quiet", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["input"] == "red bird"
    assert answer["label"] == "red"
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-3)
    lines = tmp_path / "lines.txt"
    lines.write_text("blue bird\nred bird\n")
    assert main(["predict", str(tmp_path / "run"), str(lines)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == ["blue", "red"]
    assert said[0].endswith("blue bird")


def test_text_is_written(pico_llama_dir, colours, tmp_path, capsys, in_process):
    options = ["--model.task", "causal-lm", "--training.max_steps", "2", "--training.eval_strategy", "no"]
    train(pico_llama_dir, colours, tmp_path / "run", *options)
    capsys.readouterr()
    for words in (["--text", "the red"], ["--text", "what ?", "--chat"]):
        arguments = ["predict", str(tmp_path / "run"), *words, "--max_new_tokens", "4"]
        assert main(arguments) == 0
        said = capsys.readouterr().out.strip()
        assert main([*arguments, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["text"].strip() == said


@pytest.mark.parametrize("words", [[], ["folder"], ["folder", "file.jsonl", "--text", "x"]])
def test_what_to_answer_must_be_said(words, capsys):
    assert main(["predict", *words]) == 2
    assert "FILE or --text" in capsys.readouterr().err


@pytest.mark.parametrize("task", get_args(Task))
def test_a_starter_is_a_run_of_its_task(task, tmp_path, capsys):
    out = tmp_path / "RUN.yaml"
    assert main(["init", task, "--out", str(out)]) == 0
    config = load_config(out)
    assert config.model.task == task
    assert max(map(len, out.read_text().splitlines())) < 120
    assert main(["init", task, "--out", str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_task_with_a_typo(capsys):
    assert main(["init", "text-clasification"]) == 2
    assert "did you mean 'text-classification'" in capsys.readouterr().err


def test_recipes_are_listed_and_copied(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{name} " in listed for name in recipes())
    assert main(["recipes", "qlora-guanaco"]) == 0
    assert load_config(tmp_path / "qlora-guanaco.yaml").model.quantization == "nf4"
    assert main(["recipes", "qlora-guanco"]) == 2
    assert "did you mean 'qlora-guanaco'" in capsys.readouterr().err


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_names_its_source_and_is_a_run(name):
    text = recipes()[name]
    assert title(text)
    assert "# Experiment: arXiv" in text
    assert "Ours:" in text
    build_config(yaml.safe_load(text))
