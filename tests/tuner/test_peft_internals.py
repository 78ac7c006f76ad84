"""The contract with PEFT: when a new version moves the ground, these tests say what moved."""

import copy
import pickle
import subprocess
import sys

import pytest

ORDERS = {
    "loraloom first": "import loraloom\nimport peft",
    "peft first": "import peft\nimport loraloom",
    "a submodule of peft": "import loraloom\nfrom peft.tuners import lora",
    "the config only": "from loraloom import LoomConfig",
    "twice": "import peft, importlib, loraloom\nimportlib.reload(loraloom)\nimportlib.import_module('loraloom.tuner')",
}
# Forks a process for each order from one that has imported what is slow, torch, but neither of the two.
IN_EVERY_ORDER = """
import os, sys
import torch, transformers.modeling_utils, accelerate
assert not {"peft", "loraloom"} & sys.modules.keys()

def check(order):
    exec(order, {})
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    member = PeftType("LOOM")
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "loom_"
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member].__name__ == "LoomConfig"
    assert PEFT_TYPE_TO_TUNER_MAPPING[member].__name__ == "LoomModel"
    assert "loraloom.tuner.model" in sys.modules

for order in sys.argv[1:]:
    pid = os.fork()
    if pid == 0:
        check(order)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def python(code, *arguments):
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


def test_registers_whichever_is_imported_first():
    codes, errors = python(IN_EVERY_ORDER, *ORDERS.values())
    assert dict(zip(ORDERS, codes.split(), strict=True)) == dict.fromkeys(ORDERS, "0"), errors


def test_importing_loraloom_imports_neither_torch_nor_peft():
    code = "import loraloom, sys; dir(loraloom); print({m.partition('.')[0] for m in sys.modules} & {'torch', 'peft'})"
    assert python(code)[0].strip() == "set()"


def test_the_package_names_its_public_surface():
    import loraloom

    assert {"LoomConfig", "LoomModel"} <= set(loraloom.__all__) <= set(dir(loraloom))
    assert all(getattr(loraloom, name) is not None for name in loraloom.__all__)
    with pytest.raises(AttributeError, match="LoomConfg"):
        _ = loraloom.LoomConfg


def test_the_type_behaves_as_a_member_of_the_enum():
    from peft import PeftType

    from loraloom import LoomConfig

    member = PeftType.LOOM
    assert isinstance(member, PeftType)
    assert member is PeftType("LOOM") is PeftType["LOOM"] is LoomConfig().peft_type
    assert (member.name, member.value) == ("LOOM", "LOOM")
    assert member == "LOOM"
    assert member in PeftType
    assert [m for m in PeftType if m is member] == [member]
    assert {member: 1}[PeftType("LOOM")] == 1
    assert copy.deepcopy(member) is member
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert list(PeftType).count(PeftType.LORA) == 1


def test_registering_again_does_nothing():
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    from loraloom import LoomConfig, LoomModel
    from loraloom.tuner.peft_internals import register

    before = dict(PEFT_TYPE_TO_TUNER_MAPPING), list(PeftType)
    register(LoomConfig, LoomModel)
    assert (dict(PEFT_TYPE_TO_TUNER_MAPPING), list(PeftType)) == before


def test_a_stranger_with_the_prefix_is_refused(monkeypatch):
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from loraloom import LoomConfig, LoomModel
    from loraloom.tuner.peft_internals import register

    monkeypatch.delitem(PEFT_TYPE_TO_TUNER_MAPPING, PeftType.LOOM)
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.LOOM)
    monkeypatch.delitem(PEFT_TYPE_TO_PREFIX_MAPPING, PeftType.LOOM)
    monkeypatch.setitem(PEFT_TYPE_TO_PREFIX_MAPPING, PeftType.LORA, "loom_")
    with pytest.raises(ImportError, match="loom_"):
        register(LoomConfig, LoomModel)


def test_peft_still_derives_the_prefix_from_the_type():
    """transformers' add_adapter filters the state dict by the lower-case type, so the prefix may not be another."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    from loraloom import LoomModel

    assert PEFT_TYPE_TO_PREFIX_MAPPING["LOOM"] == LoomModel.prefix == "loom_"


def test_a_config_has_every_field_that_peft_and_trl_read():
    from loraloom import LoomConfig

    config = LoomConfig()
    for name in (
        *("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "trainable_token_indices"),
        *("layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "bias", "inference_mode"),
        "task_type",
    ):
        assert hasattr(config, name), name
