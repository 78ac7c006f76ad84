"""The table of parts: each name and key is one thing's, and layers have the parts that it says."""

from collections import Counter

import pytest

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
