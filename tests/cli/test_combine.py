"""`loraloom combine`, `shrink` and `extract` as a user types them."""

import json

import peft
import pytest
import torch

from loraloom.cli.main import main
from tests.models import llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    made = tmp_path_factory.mktemp("models")
    model = llama()
    model.save_pretrained(made / "base")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(made / "adapter")
    model.merge_and_unload().save_pretrained(made / "tuned")
    return made


VERBS = {
    "combine": lambda f: ["combine", f / "adapter", f / "adapter", "--weights", "0.5,0.5"],
    "shrink": lambda f: ["shrink", f / "adapter", "--rank", "2"],
    "extract": lambda f: ["extract", f / "base", f / "tuned", "--rank", "4"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_writes_an_adapter_that_stock_peft_loads_and_says_so(folders, tmp_path, capsys, verb):
    arguments = [*map(str, VERBS[verb](folders)), "--out", str(tmp_path / "out"), "--json"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert str(tmp_path / "out") in err
    peft.PeftModel.from_pretrained(llama(), report["path"])
    assert main(arguments) == 2  # the folder is there
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["combine"], ["shrink"], ["extract", "a"], ["combine", "a", "--out", "b"]])
def test_what_is_missing_is_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
