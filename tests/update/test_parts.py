"""The table of parts: each name and key is one thing's, and layers have the parts that it says."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

import loraloom
from loraloom.update.parts import LOOM, LORA, NAMES, PARTS
from tests.tuner.support import ALL_PARTS, FLOAT_KINDS, make_base, with_adapter


def test_every_name_and_every_key_stands_once():
    for counts in (Counter(part.name for part in PARTS), Counter(key for part in PARTS for key in part.keys)):
        assert set(counts.values()) == {1}


def test_names_and_keys_are_inverse():
    assert {name: key for key, name in NAMES["LOOM"].items()} == LOOM
    assert {name: key for key, name in NAMES["LORA"].items() if "embedding" not in key} == LORA


@pytest.mark.parametrize("kind", FLOAT_KINDS)
@pytest.mark.parametrize("start", [True, "pissa"])
def test_a_layer_has_the_parts_that_its_configuration_says(kind, start):
    model = with_adapter(make_base(kind), ALL_PARTS, init_lora_weights=start)
    expected = {part.name for part in PARTS if part.present(model.peft_config["default"])}
    found = {name: p for name, p in model.named_parameters() if ".loom_" in name}
    assert {NAMES["LOOM"][name.split(".")[-3]] for name in found} == expected
    shapes = [found[f"base_model.model.target.{LOOM[name]}.default.weight"].shape for name in ("A", "B")]
    for name, parameter in found.items():
        part = next(part for part in PARTS if part.loom == name.split(".")[-3])
        assert parameter.shape == part.shape(*shapes)
        assert parameter.requires_grad == part.trainable


def spelled(path):
    """(line, key) of every state key in a string of a file that is no docstring."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docs)
    keys = {key for part in PARTS for key in part.keys}
    for node in strings:
        if isinstance(node.value, str):
            yield from ((node.lineno, word) for word in re.findall(r"\w+", node.value) if word in keys)


def test_no_other_file_spells_a_state_key():
    """Groups of the optimizer have names of their own, two of which are those of PEFT's keys."""
    source = Path(loraloom.__file__).parent
    found = {
        f"{path.relative_to(source)}:{line} {key}"
        for path in source.rglob("*.py")
        if path != source / "update" / "parts.py"
        for line, key in spelled(path)
        if not (path.parent == source / "optim" and key in ("lora_A", "lora_B"))
    }
    assert found == set()
