"""What a run saves knows its labels' names, and the Python of its card ends in one of them."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from loraloom.training import fit

from .support import with_method, with_training


@pytest.mark.parametrize("name", ["lora", "full"])
def test_the_cards_python_answers_with_a_label(classification, name):
    config = with_training(with_method(classification, name), max_steps=2, save_strategy="no")
    folder = Path(fit.train(config).output_dir)
    assert AutoConfig.from_pretrained(folder).id2label == {0: "blue", 1: "green", 2: "red"}
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = next(block.split("```")[0] for block in card.split("```python\n")[1:] if "id2label" in block)
    base = Path(config.model.name)  # a local model goes by its folder's name: a card tells nothing of one machine
    code = code.replace(f'"{base.name}"', f'"{base}"')
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] in ("blue", "green", "red")
