"""`loraloom intruders`: what it prints and writes, and with which exit code it ends."""

import json
import subprocess
import sys

import peft
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from loraloom.cli.main import main
from loraloom.training import fit
from loraloom.training.fit import RESULT
from loraloom.training.load import build_config

FIND = ["--epsilon", "0.8", "--top-k", "4"]


@pytest.fixture
def adapter(pico_llama_dir, tmp_path):
    """A LoRA as large as its base; its configuration names the base."""
    model = AutoModelForCausalLM.from_pretrained(pico_llama_dir)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_table_and_json(adapter, pico_llama_dir, capsys):
    assert main(["intruders", str(adapter), *FIND]) == 0
    out = capsys.readouterr().out
    assert out.count("proj") == 4
    assert "intruder dimensions in 4 of 4 modules" in out
    assert main(["intruders", str(adapter), "--base", str(pico_llama_dir), *FIND, "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert err == ""
    assert result["count"] == sum(len(layer["intruders"]) for layer in result["layers"]) > 0


def test_an_adapter_is_written_and_loads(adapter, pico_llama_dir, tmp_path, capsys):
    arguments = ["intruders", str(adapter), *FIND, "--out", str(tmp_path / "new"), "--scale", "0", "--rank", "keep"]
    assert main(arguments) == 0
    assert "error" in (out := capsys.readouterr().out)
    assert f"Written to {tmp_path / 'new'}" in out
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico_llama_dir), str(tmp_path / "new"))
    assert model.peft_config["default"].r == 4
    card = (tmp_path / "new" / "README.md").read_text()
    assert "--scale 0 --rank keep" in card
    assert "in 4 of 4 modules" in card
    assert main(arguments) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main([*arguments, "--overwrite", "--quiet"]) == 0


def test_a_sweep_without_a_run_says_what_it_cannot_know(adapter, tmp_path, capsys):
    arguments = ["intruders", str(adapter), *FIND, "--sweep", "1,0.5", "--report", str(tmp_path / "report")]
    assert main([*arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    whole, half = json.loads(out)["points"]
    assert whole["metrics"]["relative_change"] == 0 < half["metrics"]["relative_change"]
    assert "takes the model and its data" in err
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["sections"][0]["title"] == "Mitigation trade-off"


def test_rewinding_beside_the_intruders(adapter, tmp_path, capsys):
    arguments = ["intruders", str(adapter), *FIND, "--sweep", "0.5,0", "--rewind", "--report", str(tmp_path / "report")]
    assert main([*arguments, "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [(point["scale"], point["rewound"]) for point in points] == [
        (1.0, False),
        (0.5, False),
        (0.0, False),
        (0.5, True),
        (0.0, True),
    ]
    assert [point["metrics"]["relative_change"] for point in points if point["rewound"]] == [0.5, 1.0]
    assert points[-1]["metrics"]["remaining_intruders"] == 0
    section = json.loads((tmp_path / "report" / "report.json").read_text())["sections"][0]
    groups = [point["group"] for point in section["figure"]["points"]]
    assert [groups.count(group) for group in dict.fromkeys(groups)] == [3, 3]  # the adapter is on both curves
    assert [row[1] for row in section["table"]["rows"]] == [1.0, 0.5, 0.0, 0.5, 0.0]  # and in the table once


def test_a_sweep_of_a_run_evaluates_it(pico_bert_dir, tmp_path, capsys):
    rows = [{"text": f"{c} {w}", "label": c} for c in ("red", "blue") for w in ("dog", "cat", "apple", "file")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("the", "of", "to", "in", "is", "it", "for", "on")
    animals = [{"text": f"{animal} {word}", "label": animal} for animal in ("dog", "cat") for word in words]
    (tmp_path / "animals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in animals))
    folder = tmp_path / "run"
    sections = {
        "model": {"name": str(pico_bert_dir)},
        "data": {"path": str(tmp_path / "rows.jsonl"), "test_path": str(tmp_path / "rows.jsonl")},
        "method": {"r": 4},
        "training": {"num_train_epochs": 6, "learning_rate": 0.05, "use_cpu": True},
        "output": {"dir": str(folder)},
    }
    sections["data"] |= {"retention": str(tmp_path / "animals.jsonl")}
    fit.train(build_config(sections))
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    assert main(["intruders", str(folder), *FIND, "--sweep", "1,0", "--scope", "all", "--rewind", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["intruders"]["count"] > 0
    first, last, rewound = (point["metrics"] for point in result["points"])
    assert [*first][:2] == ["accuracy", "retention_accuracy"]
    assert first["remaining_intruders"] == result["intruders"]["count"]
    measured = json.loads((folder / RESULT).read_text())
    for name, value in measured["after"].items():
        assert first[name] == pytest.approx(value, abs=1e-5)
    for name, value in measured["retention"]["after"].items():
        assert first[f"retention_{name}"] == pytest.approx(value, abs=1e-5)
    assert last["loss"] != pytest.approx(first["loss"], abs=1e-3)
    for name, value in measured["retention"]["before"].items():  # the retention's head is its own: this is the base
        assert rewound[f"retention_{name}"] == pytest.approx(value, abs=1e-5)
    assert "takes the model" not in err
    assert before == {file: file.read_bytes() for file in before}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs the folder of an adapter"),
        (["missing"], "missing"),
        (["ADAPTER", "--base", "BASE", "--sweep", "0.5;0.7"], "--sweep 0.5;0.7: expected numbers"),
        (["ADAPTER", "--base", "BASE", "--sweep", "0.5", "--out", "x"], "choose one"),
        (["ADAPTER", "--rewind"], "--rewind goes with --sweep"),
        (["ADAPTER", "--base", "BASE", "--sweep", "2", "--rewind"], "scale 2 cannot be rewound to"),
        (["ADAPTER", "--push", "me/it"], "--push uploads what --out writes"),
        (["ADAPTER", "--base", "BASE", "--epsilon", "2"], "epsilon=2.0 must lie in (0, 1)"),
        (["ADAPTER", "--base", "ADAPTER"], "not in the base model"),
        (["ADAPTER", "--scal", "1"], "unknown option '--scal'; did you mean '--scale'?"),
    ],
)
def test_mistakes_are_one_line(arguments, message, adapter, pico_llama_dir, capsys):
    places = {"ADAPTER": str(adapter), "BASE": str(pico_llama_dir)}
    assert main(["intruders", *(places.get(word, word) for word in arguments)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.strip().count("\n") == 0


def test_no_model_is_built(adapter, tmp_path):
    """Neither PEFT nor transformers is imported, whatever is asked of the files."""
    program = f"""
import sys
from loraloom.cli.main import main
assert main(["intruders", {str(adapter)!r}, "--out", {str(tmp_path / "new")!r}, "--quiet"]) == 0
assert main(["intruders", {str(adapter)!r}, "--sweep", "0.5", "--quiet"]) == 0
print(sorted(name for name in ("peft", "transformers", "datasets") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
