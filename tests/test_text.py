"""Words for people: tables line up, places are the layer's number, the nearest name is offered."""

import pytest

from loraloom.text import did_you_mean, place, readable_bytes, short_names, text_table


def test_the_columns_of_a_table_line_up():
    lines = text_table([["name", "n", "much"], ["a", "10", "1"], ["longer name", "2", "12,345"]]).splitlines()
    assert lines == ["name          n    much", "a            10       1", "longer name   2  12,345"]
    assert text_table([["a", ""], ["b", "x"]], left=2).splitlines() == ["a", "b  x"]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("model.layers.3.mlp.experts.7.up_proj", ("3", "mlp.experts.7.up_proj")),
        ("0.query", ("0", "query")),
        ("lm_head", ("-", "lm_head")),
    ],
)
def test_the_first_number_counts_layers(module, expected):
    assert place(module) == expected


def test_a_short_name_is_no_other_modules_ending():
    modules = ["attention.output.dense", "output.dense", "query"]
    assert short_names(modules) == {modules[0]: "attention.output.dense", modules[1]: "output.dense", "query": "query"}


@pytest.mark.parametrize(
    ("count", "expected"), [(None, "unknown"), (512, "512 B"), (2**21, "2.0 MiB"), (1.5 * 2**30, "1.50 GiB")]
)
def test_sizes(count, expected):
    assert readable_bytes(count) == expected


def test_the_nearest_name_or_nothing():
    assert did_you_mean("lora_alfa", ["r", "lora_alpha"]) == "; did you mean 'lora_alpha'?"
    assert did_you_mean("zebra", ["r", "lora_alpha"]) == ""
