"""What a run saves loads where loraloom is not: type LORA where the method is one, else in portable/."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraloom.training import fit
from loraloom.training.load import load_config

from .support import with_method, with_training

IDS = torch.arange(10, 22).reshape(2, 6)

# Importing loraloom raises there, as it does where it is not installed.
WITHOUT = """
import sys
sys.modules["loraloom"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
try:
    import loraloom
except ImportError:
    pass
else:
    raise SystemExit("loraloom is there")
base = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
model = PeftModel.from_pretrained(base, sys.argv[2]).eval()
assert model.peft_config["default"].peft_type == "LORA"
torch.save(model(torch.arange(10, 22).reshape(2, 6)).logits.detach(), sys.argv[3])
"""


def logits_without_loraloom(base, folder, tmp_path):
    arguments = [sys.executable, "-c", WITHOUT, str(base), str(folder), str(tmp_path / "logits.pt")]
    result = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return torch.load(tmp_path / "logits.pt")


def logits(config, folder):
    base = AutoModelForCausalLM.from_pretrained(config.model.name, dtype=torch.float32)
    with torch.no_grad():
        before = base.eval()(IDS).logits
        return PeftModel.from_pretrained(base, folder).eval()(IDS).logits, before


def run(causal, name, **keys):
    config = with_training(with_method(causal, name, **keys), max_steps=12, learning_rate=1e-2)
    return config, fit.train(config)


@pytest.mark.parametrize(
    ("name", "keys"),
    [("lora", {}), ("lora", {"use_rslora": True}), ("dora", {}), ("lora", {"rank_pattern": {"q_proj": 2}})],
    ids=["lora", "rslora", "dora", "ranks"],
)
def test_a_lora_run_loads_in_peft_without_loraloom(causal, tmp_path, name, keys):
    config, result = run(causal, name, **keys)
    folder = Path(config.output.dir)
    saved = json.loads((folder / "adapter_config.json").read_text())
    assert saved["peft_type"] == "LORA"
    assert saved["use_dora"] == (name == "dora")
    assert result.not_portable is None
    assert not (folder / "portable").exists()
    assert "import loraloom" not in (folder / "README.md").read_text()
    expected, _ = logits(config, folder)
    # Another process may take other instructions for the same float32 sums.
    torch.testing.assert_close(logits_without_loraloom(config.model.name, folder, tmp_path), expected)


@pytest.mark.parametrize(
    ("name", "keys"),
    [("moslora", {}), ("weightlora", {}), ("lora", {"init_lora_weights": "pissa"})],
    ids=["moslora", "weightlora", "pissa"],
)
def test_another_run_has_a_portable_copy(causal, tmp_path, name, keys):
    config, result = run(causal, name, **keys)
    folder = Path(config.output.dir)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LOOM"
    assert result.not_portable is None
    assert "import loraloom" in (folder / "README.md").read_text()
    expected, base = logits(config, folder)
    actual = logits_without_loraloom(config.model.name, folder / "portable", tmp_path)
    # Factors and their scale are multiplied in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(actual, base, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_is_no_lora_says_why(causal):
    config, result = run(causal, "dora", use_gate=True)
    assert "DoRA" in result.not_portable
    assert result.not_portable in (Path(config.output.dir) / "README.md").read_text()
    assert not (Path(config.output.dir) / "portable").exists()


def test_a_classifiers_portable_copy_has_its_head(classification):
    config = with_training(with_method(classification, "moslora"), max_steps=3)
    assert fit.train(config).not_portable is None
    copied = json.loads((Path(config.output.dir) / "portable" / "adapter_config.json").read_text())
    assert copied["modules_to_save"]
    assert copied["peft_type"] == "LORA"
    assert load_config(Path(config.output.dir) / "resolved.yaml").method.name == "moslora"
