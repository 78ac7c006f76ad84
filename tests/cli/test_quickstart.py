"""`loraloom quickstart`, with pico models and few rows in place of its own; the real one takes minutes."""

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import TrainingArguments

from loraloom.cli import quickstart, quickstart_llm
from loraloom.cli.main import main
from loraloom.training import builtin
from loraloom.training.config import DataSection, ModelSection, OutputSection
from loraloom.training.evaluate import evaluate_saved
from loraloom.training.load import dump_config, load_config
from loraloom.training.predict import Predictor


@pytest.fixture
def small(pico_bert_dir, tmp_path, monkeypatch):
    """The quickstart's own configuration on a pico model and 40 rows, its reload in this process."""
    rows = [{"text": f"{c} {w} {i}", "label": c} for i, c in enumerate(("red", "blue") * 10) for w in ("dog", "cat")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = quickstart.quickstart_config(str(tmp_path / "run"))
    config = dataclasses.replace(
        own,
        model=ModelSection(name=str(pico_bert_dir)),
        data=DataSection(path=str(path), test_path=str(path)),
        method=dataclasses.replace(own.method, r=4),
        training={**own.training, "num_train_epochs": 4, "use_cpu": True},
        output=OutputSection(dir=str(tmp_path / "run")),
    )
    monkeypatch.setattr(quickstart, "quickstart_config", lambda folder: config)
    monkeypatch.setattr(quickstart, "quiet_libraries", lambda: None)
    monkeypatch.setattr(quickstart, "evaluate_in_fresh_process", lambda folder: evaluate_saved(Path(folder)))
    return tmp_path / "run"


def test_numbers_and_next_steps(small, capsys):
    assert main(["quickstart", "--json", "--folder", str(small)]) == 0
    out, err = capsys.readouterr()
    numbers = json.loads(out)
    assert numbers["majority"] == 0.5
    assert 0 <= numbers["probe"] <= 1
    assert numbers["reloaded"] == numbers["fine_tuned"] == evaluate_saved(small)["accuracy"]
    for part in (
        "adapters kept: rank and gate",
        "linear probe, frozen encoder",
        "adapter_model.safetensors",
        f"loraloom evaluate {small}",
    ):
        assert part in err
    assert (small / "adapter_model.safetensors").is_file()
    page = small / "report" / "report.html"
    assert err.rstrip().endswith(f"Report: {page}")
    assert page.is_file()
    report = json.loads((small / "report" / "report.json").read_text())
    bars = next(section["figure"] for section in report["sections"] if section["title"] == "What it gains")
    assert bars["values"] == [numbers["majority"], numbers["probe"], numbers["fine_tuned"]]


def test_a_reload_with_another_result_fails(small, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "evaluate_in_fresh_process", lambda folder: {"accuracy": -1.0})
    assert main(["quickstart", "--quiet", "--folder", str(small)]) == 1
    assert "the reloaded adapter has accuracy -1.0000" in capsys.readouterr().err


def test_its_configuration_is_one_that_train_takes(tmp_path):
    config = quickstart.quickstart_config("quickstart-run")
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert config.training.keys() <= {f.name for f in dataclasses.fields(TrainingArguments)}


def test_only_its_own_folder_is_replaced():
    assert quickstart.quickstart_config(quickstart.FOLDER).output.overwrite
    assert not quickstart.quickstart_config("elsewhere").output.overwrite


@pytest.fixture
def small_llm(pico_llama_dir, tmp_path, monkeypatch):
    """The language model's quickstart on a pico model and 40 rows, its reload in this process."""
    rows = [{"prompt": f"dog {i} is", "completion": " red" if i % 2 else " blue"} for i in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = quickstart_llm.quickstart_config(str(tmp_path / "run"), "float32")
    config = dataclasses.replace(
        own,
        model=dataclasses.replace(own.model, name=str(pico_llama_dir)),
        data=DataSection(path=str(path), test_path=str(path), max_length=32, validation_fraction=0),
        training={**own.training, "use_cpu": True},
    )
    monkeypatch.setattr(quickstart_llm, "quickstart_config", lambda folder, dtype: config)
    monkeypatch.setattr(builtin, "builtin_path", lambda name: str(pico_llama_dir))
    monkeypatch.setattr(quickstart, "quiet_libraries", lambda: None)

    def reloaded(folder, prompts):
        predictor = Predictor(folder, quickstart_llm.TOKENS)
        return [answer["text"] for answer in predictor.answers(prompts)]

    monkeypatch.setattr(quickstart_llm, "answers_in_fresh_process", reloaded)
    return tmp_path / "run"


def test_a_language_model_writes_before_and_after(small_llm, capsys):
    assert main(["quickstart", "--llm", "--json", "--folder", str(small_llm)]) == 0
    out, err = capsys.readouterr()
    numbers = json.loads(out)
    assert 0 <= numbers["right_before"] <= 1
    assert 0 <= numbers["right_after"] <= 1
    for part in ("before", "after", "loss", f"loraloom predict {small_llm}"):
        assert part in err
    assert json.loads((small_llm / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert (small_llm / "report" / "report.html").is_file()


def test_the_language_models_configuration_is_one_that_train_takes(tmp_path):
    config = quickstart_llm.quickstart_config("quickstart-llm-run", "bfloat16")
    path = tmp_path / "resolved.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config


def test_the_faster_precision_is_one_that_a_model_can_have():
    assert quickstart_llm.faster_dtype() in ("bfloat16", "float32")


def test_an_answer_with_anything_else_is_wrong():
    assert quickstart_llm.share_right([" ast", "ast, I think"], [" ast", " ast"]) == 0.5
