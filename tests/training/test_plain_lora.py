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
for line in sys.stdin:
    name, folder, out = line.split("\\t")
    base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder).eval()
    assert model.peft_config["default"].peft_type == "LORA"
    torch.save(model(torch.arange(10, 22).reshape(2, 6)).logits.detach(), out.rstrip())
    print("saved", flush=True)
"""


@pytest.fixture(scope="module")
def logits_without_loraloom(tmp_path_factory):
    """A function of a base model and an adapter's folder: the logits in a process where importing loraloom raises."""
    folder = tmp_path_factory.mktemp("stock")
    log, out = folder / "log.txt", folder / "logits.pt"
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", WITHOUT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=folder,
        ) as process,
    ):

        def logits(base, adapter):
            print(base, adapter, out, sep="\t", file=process.stdin, flush=True)
            assert process.stdout.readline() == "saved\n", log.read_text()
            return torch.load(out)

        yield logits


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
def test_a_lora_run_loads_in_peft_without_loraloom(causal, logits_without_loraloom, name, keys):
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
    torch.testing.assert_close(logits_without_loraloom(config.model.name, folder), expected)


@pytest.mark.parametrize(
    ("name", "keys"),
    [("moslora", {}), ("weightlora", {}), ("lora", {"init_lora_weights": "pissa"})],
    ids=["moslora", "weightlora", "pissa"],
)
def test_another_run_has_a_portable_copy(causal, logits_without_loraloom, name, keys):
    config, result = run(causal, name, **keys)
    folder = Path(config.output.dir)
    assert json.loads((folder / "adapter_config.json").read_text())["peft_type"] == "LOOM"
    assert result.not_portable is None
    assert "import loraloom" in (folder / "README.md").read_text()
    expected, base = logits(config, folder)
    actual = logits_without_loraloom(config.model.name, folder / "portable")
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
