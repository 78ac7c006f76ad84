"""The contract with PEFT: when a new version moves the ground, these tests say what moved."""

import copy
import pickle
import subprocess
import sys

import pytest

CHECK = """
from peft import PeftType, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
member = PeftType("LOOM")
assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "loom_"
assert PEFT_TYPE_TO_CONFIG_MAPPING[member].__name__ == "LoomConfig"
assert PEFT_TYPE_TO_TUNER_MAPPING[member].__name__ == "LoomModel"
import torch, peft
from loraloom import LoomConfig
class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.target = torch.nn.Linear(4, 4)
    def forward(self, x):
        return self.target(x)
model = peft.get_peft_model(Toy(), LoomConfig(target_modules=["target"], r=2))
assert type(model.base_model).__name__ == "LoomModel"
print("REGISTERED")
"""
IMPORTS = {
    "loraloom first": "import loraloom\nimport peft\n",
    "peft first": "import peft\nimport loraloom\n",
    "peft's submodule": "import loraloom\nfrom peft.tuners import lora\n",
    "transformers between": "import loraloom\nimport transformers\nimport peft\n",
    "config only": "from loraloom import LoomConfig\n",
    "twice": "import peft, importlib, loraloom\nimportlib.reload(loraloom)\nimportlib.import_module('loraloom.tuner')\n",
}


def python(code):
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:loraloom", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("order", list(IMPORTS))
def test_registers_whichever_is_imported_first(order):
    assert "REGISTERED" in python(IMPORTS[order] + CHECK)


def test_importing_loraloom_imports_neither_torch_nor_peft():
    code = "import loraloom, sys; dir(loraloom); print({m.partition('.')[0] for m in sys.modules} & {'torch', 'peft'})"
    assert python(code).strip() == "set()"


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
    from loraloom.tuner.registration import register
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    from loraloom import LoomConfig, LoomModel

    before = dict(PEFT_TYPE_TO_TUNER_MAPPING), list(PeftType)
    register(LoomConfig, LoomModel)
    assert (dict(PEFT_TYPE_TO_TUNER_MAPPING), list(PeftType)) == before


def test_a_stranger_with_the_prefix_is_refused(monkeypatch):
    from loraloom.tuner.registration import register
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    from loraloom import LoomConfig, LoomModel

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
