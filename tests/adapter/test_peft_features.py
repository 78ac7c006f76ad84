"""The table of what an adapter's configuration may say: complete, typed, and slow expressions do not hang."""

import json
import time
from dataclasses import fields

import peft
import pytest
from safetensors.torch import load_file, save_file
from torch import nn

from loraloom import LoomConfig
from loraloom.adapter.inspect import inspect_adapter
from loraloom.adapter.open import open_adapter
from loraloom.adapter.peft_features import LOOM, LORA, STARTS, TABLES, Effect, changed_base
from loraloom.cli.main import main
from loraloom.errors import InputError
from tests.refusals import coded

CONFIG = "adapter_config.json"
WRONG = {
    "a rank": [None, "x", 0, -1, 2.5, True, [2], {}],
    "a number": [None, "x", True, [1], {}, float("nan"), float("inf")],
    "a switch": ["false", "x", 1.5, [True], {}],
    "names": [5, {"a": 1}, [1], [["a"]], True],
    "ranks by name": [[1], "x", 5, {"a": None}, {"a": 0}, {"a": "x"}],
    "numbers by name": [[1], "x", 5, {"a": None}, {"a": "x"}, {"a": float("nan")}],
    "a list of names": [5, True, [1], {"a": 1}],
    "a type": [None, 5, ["LORA"], {}, "IA3"],
    "a text": [5, ["a"], {}, True],
}
KINDS = {
    "r": "a rank",
    "lora_alpha": "a number",
    "lora_dropout": "a number",
    "use_rslora": "a switch",
    "use_dora": "a switch",
    "fan_in_fan_out": "a switch",
    "target_modules": "names",
    "exclude_modules": "names",
    "rank_pattern": "ranks by name",
    "alpha_pattern": "numbers by name",
    "modules_to_save": "a list of names",
    "peft_type": "a type",
    "base_model_name_or_path": "a text",
    "bias": "a text",
}


@pytest.fixture
def lora(tmp_path):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 5)), peft.LoraConfig(r=2, target_modules=["0"]))
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(("table", "config"), [(LORA, peft.LoraConfig), (LOOM, LoomConfig)])
def test_every_field_of_the_installed_configuration_has_a_row(table, config):
    assert {field.name for field in fields(config)} <= table.keys()


def test_what_is_not_understood_says_why():
    for table in TABLES.values():
        for name, feature in table.items():
            assert (feature.effect is Effect.UNDERSTOOD) == (not feature.why), name


@pytest.mark.parametrize("start", STARTS)
def test_starts_that_change_the_base_are_named(start):
    config = {"peft_type": "LORA", "init_lora_weights": start}
    assert (changed_base(config) is not None) == (STARTS[start] is Effect.CHANGES_BASE)
    assert changed_base(config | {"peft_type": "LOOM"}) is None


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in KINDS for value in WRONG[KINDS[field]]])
def test_a_value_of_a_wrong_type_is_refused_by_opening_and_by_inspecting(lora, field, value):
    edit(lora, **{field: value})
    for verb in (open_adapter, inspect_adapter):
        with pytest.raises(InputError) as error:
            verb(lora)
        assert error.value.code == ("peft-type" if field == "peft_type" else "config-type")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [True, 1, "x", [0], {"a": 1}])
def test_a_field_of_a_newer_peft_is_refused_by_name_when_it_is_on(lora, value):
    edit(lora, use_new_thing=None)
    assert open_adapter(lora).modules
    edit(lora, use_new_thing=value)
    with pytest.raises(InputError, check=coded("unknown-field", "use_new_thing")) as error:
        open_adapter(lora)
    assert error.value.code == "unknown-field"
    edit(lora, use_new_thing=None, init_lora_weights="newstart")
    with pytest.raises(InputError, check=coded("unknown-field")):
        open_adapter(lora)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", "(a|a)+[bc]"),
        ("exclude_modules", "((a|a)+)+[b-d]$"),
        ("rank_pattern", {"(a|aa)+(?=[bc])": 2}),
        ("alpha_pattern", {"(a|a)+[bc]": 2}),
    ],
)
def test_an_expression_that_takes_for_ever_is_refused(lora, field, value):
    name = "base_model.model." + "a" * 60
    tensors = load_file(lora / "adapter_model.safetensors")
    save_file(
        {k.replace("base_model.model.0", name): v for k, v in tensors.items()}, lora / "adapter_model.safetensors"
    )
    edit(lora, target_modules=["a" * 60])
    edit(lora, **{field: value})
    started = time.monotonic()
    with pytest.raises(InputError) as error:
        open_adapter(lora)
    assert error.value.code == "slow-pattern"
    assert time.monotonic() - started < 10


def test_the_expression_of_the_audit_is_decided(lora):
    edit(lora, target_modules="(([a-z._0-9])+)+!$")
    with pytest.raises(InputError) as error:
        open_adapter(lora)
    assert error.value.code == "target"


def test_what_is_no_expression_is_refused(lora):
    edit(lora, target_modules="(")
    with pytest.raises(InputError) as error:
        open_adapter(lora)
    assert error.value.code == "bad-pattern"


@pytest.mark.parametrize("name", ["layers.1.[/x]down", "a\x1b[2Jb", "a\nb", "[red]x", "\x9b31m"])
def test_names_from_files_are_not_obeyed_by_the_terminal(lora, capsys, name):
    tensors = load_file(lora / "adapter_model.safetensors")
    renamed = {k.replace("model.0", f"model.{name}"): v for k, v in tensors.items()}
    save_file(renamed, lora / "adapter_model.safetensors")
    edit(lora, target_modules=[name], base_model_name_or_path=name)
    assert main(["inspect", str(lora)]) == 1  # B is zero
    said = "".join(capsys.readouterr())
    assert not [c for c in said if not c.isprintable() and c != "\n"]
    assert "unexpected" not in said
    assert "Error" not in said
