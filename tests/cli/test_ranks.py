"""`loraloom ranks` as a user types it: what it prints is what PEFT and `loraloom train` take."""

import json

import peft
import pytest
import yaml

from loraloom.cli.main import main
from loraloom.training.load import load_config
from tests.models import llama

COLORS, ANIMALS = ("red", "green", "blue", "yellow"), ("dog", "cat", "bird", "fish")


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    texts = [f"the {color} {animal} {verb}" for color in COLORS for animal in ANIMALS for verb in ("runs", "sleeps")]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def ranks(pico_llama_dir, rows, *options):
    words = ["ranks", str(pico_llama_dir), str(rows), "--model.task", "causal-lm", "--batches", "2", *options]
    return main(words)


def test_the_file_is_the_method_of_a_run_and_a_config_of_peft(pico_llama_dir, rows, tmp_path, capsys):
    for name, read in (("ranks.yaml", yaml.safe_load), ("ranks.json", json.loads)):
        out = tmp_path / name
        assert ranks(pico_llama_dir, rows, "--rank", "2", "--out", str(out), "--json") == 0
        config = read(out.read_text())
        assert json.loads(capsys.readouterr().out)["config"] == config
        peft.get_peft_model(llama(intermediate_size=64), peft.LoraConfig(**config))
        run = tmp_path / "RUN.yaml"
        run.write_text(yaml.safe_dump({"method": config}))
        assert load_config(run).method.target_modules == config["target_modules"]
        assert ranks(pico_llama_dir, rows, "--out", str(out)) == 2  # it is there
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_without_a_file_it_is_printed(pico_llama_dir, rows, capsys):
    assert ranks(pico_llama_dir, rows, "--rank", "2") == 0
    assert "rank_pattern:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--out", "x.txt"], ["--rank", "0"], ["--batches", "0"], ["--model.task", "nonsense"]]
)
def test_a_mistake_is_one_line(pico_llama_dir, rows, capsys, options):
    assert ranks(pico_llama_dir, rows, *options) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
