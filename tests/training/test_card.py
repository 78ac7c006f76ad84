"""The card of a run says what the run was, and its code loads what the run saved."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from loraloom.training import fit
from loraloom.training.data import data_sha256, load_data
from loraloom.training.load import build_config

from .support import with_method, with_training


@pytest.mark.parametrize("method", ["moslora", "full"])
def test_the_card_of_a_classifier(classification, method, monkeypatch, capsys):
    config = with_method(with_training(classification, max_steps=2), method)
    result = fit.train(config, command="loraloom train RUN.yaml")
    folder = Path(config.output.dir)
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == ("peft" if method == "moslora" else "transformers")
    assert f"{result.after['accuracy']:.4f}" in card.text
    assert data_sha256(load_data(config.data, "text-classification")) in card.text
    assert "loraloom train RUN.yaml" in card.text
    assert "vLLM" not in card.text  # language model servers take no classifier
    assert "null" not in card.text
    (text,) = re.findall(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    assert build_config(yaml.safe_load(text)) == config
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert str(folder) not in code
    monkeypatch.chdir(folder)
    base = Path(config.model.name)
    (folder / base.name).symlink_to(base)
    scope: dict = {}
    exec(code, scope)
    assert scope["model"].config.num_labels == 3
    assert capsys.readouterr().out.strip() in result.label_names


def test_the_hash_is_of_the_rows(classification, tmp_path):
    data = load_data(classification.data, "text-classification")
    assert data_sha256(data) == data_sha256(load_data(classification.data, "text-classification"))
    lines = Path(classification.data.path).read_text().splitlines()
    row = json.loads(lines[0])
    lines[0] = json.dumps({**row, "text": row["text"] + " ."})
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    changed = type(classification.data)(path=str(tmp_path / "train.jsonl"), test_path=classification.data.test_path)
    assert data_sha256(load_data(changed, "text-classification")) != data_sha256(data)
