"""A run of a model that writes keeps what it wrote before and after training."""

import dataclasses
import json

import pytest

from loraloom.training import fit
from loraloom.training.measure import SAMPLES

from .support import with_training

ROWS = {
    "text": [{"text": f"red blue green {i} dog cat"} for i in range(8)],
    "prompt-completion": [{"prompt": f"red {i}", "completion": "blue cat"} for i in range(8)],
}


@pytest.mark.parametrize("kind", ROWS)
def test_the_same_prompts_before_and_after(causal, kind, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    data = dataclasses.replace(causal.data, path=str(path), test_path=str(path))
    config = with_training(dataclasses.replace(causal, data=data), max_steps=8, learning_rate=1e-1)
    result = fit.train(config)
    assert len(result.examples) == SAMPLES
    for example, row in zip(result.examples, ROWS[kind], strict=False):
        assert list(example) == ["prompt", "expected", "before", "after"]
        whole = row.get("text") or f"{row['prompt']} {row['completion']}"
        assert f"{example['prompt']} {example['expected']}" == whole
    assert any(example["before"] != example["after"] for example in result.examples)


def test_a_classifier_has_its_mistakes_there(classification):
    result = fit.train(with_training(classification, max_steps=3))
    assert all("answer" in example and "after" not in example for example in result.examples)
