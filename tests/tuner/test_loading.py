"""Saving and loading through PEFT's own calls: safetensors only, exact, and loud when a file does not fit."""

import json
import subprocess
import sys

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftConfig, PeftModel, convert_to_lora, get_peft_model, set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from loraloom import LoomConfig
from tests.refusals import coded
from tests.tuner.support import ALL_PARTS, PART_IDS, PARTS, adapted, assert_near, make_base, make_input, randomise

A_KEY = "base_model.model.target.loom_lora_A.weight"


@pytest.fixture
def saved(tmp_path):
    """A directory with an adapter that has every part."""
    adapted(ALL_PARTS, "linear").save_pretrained(tmp_path)
    return tmp_path


def edit_tensors(directory, edit):
    path = directory / "adapter_model.safetensors"
    state = load_file(path)
    edit(state)
    save_file(state, path, metadata={"format": "pt"})


def edit_config(directory, **values):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("parts", PARTS, ids=PART_IDS)
def test_the_file_holds_exactly_the_adapters_tensors_under_fixed_names(parts, tmp_path):
    adapted(parts, "linear").save_pretrained(tmp_path)
    expected = {"loom_lora_A": (4, 6), "loom_lora_B": (10, 4)}
    if parts["use_mixer"]:
        expected["loom_mixer"] = (4, 4)
    if parts["use_gate"]:
        expected["loom_gate_lora_magnitude_vector"] = (1,)
    if parts["use_dora"]:
        expected["loom_lora_magnitude_vector"] = (10,)
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        f"base_model.model.target.{name}.weight": shape for name, shape in expected.items()
    }
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "conv2d", "nf4"])
def test_loading_restores_every_bit_and_dtype(kind, dtype, low_cpu_mem_usage, tmp_path):
    model = adapted(ALL_PARTS, kind, dtype)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(kind, dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    expected = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        if ".loom_" in name:
            assert parameter.device.type == "cpu"
            assert parameter.dtype == expected[name].dtype
            assert torch.equal(parameter, expected[name])
    x = make_input(kind, dtype)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_several_adapters_load_beside_each_other(low_cpu_mem_usage, tmp_path):
    models = {}
    for i, parts in enumerate((ALL_PARTS, {}, {"use_dora": True, "r": 2})):
        models[str(i)] = adapted(parts, "linear")
        randomise(models[str(i)], 10 + i)
        models[str(i)].save_pretrained(tmp_path / str(i))
    loaded = PeftModel.from_pretrained(make_base("linear"), tmp_path / "0", adapter_name="0")
    for name in ("1", "2"):
        loaded.load_adapter(str(tmp_path / name), adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage)
    x = make_input("linear")
    for name, model in models.items():
        loaded.set_adapter(name)
        with torch.no_grad():
            assert torch.equal(loaded.eval()(x), model(x))


def test_a_loaded_adapter_can_be_trained_further(saved):
    model = PeftModel.from_pretrained(make_base("linear"), saved, is_trainable=True)
    model(make_input("linear")).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".loom_" in n)


def load(directory):
    return PeftModel.from_pretrained(make_base("linear"), directory)


def test_a_missing_tensor_is_an_error_that_names_it(saved):
    edit_tensors(saved, lambda state: state.pop(A_KEY))
    with pytest.raises((ValueError, RuntimeError), check=coded("missing-tensor", "target.loom_lora_A")):
        load(saved)


@pytest.mark.parametrize("part", ["mixer", "gate_lora_magnitude_vector", "lora_magnitude_vector"])
def test_a_missing_part_is_an_error_that_names_it(part, saved):
    edit_tensors(saved, lambda state: state.pop(f"base_model.model.target.loom_{part}.weight"))
    with pytest.raises((ValueError, RuntimeError), match=f"target.loom_{part}"):
        load(saved)


@pytest.mark.parametrize(
    "name",
    ["base_model.model.elsewhere.loom_lora_A.weight", "base_model.model.target.loom_lora_C.weight"],
)
def test_an_extra_tensor_is_an_error_that_names_it(name, saved):
    edit_tensors(saved, lambda state: state.update({name: torch.zeros(4, 6)}))
    with pytest.raises((ValueError, RuntimeError), match=name.split(".", 2)[2].replace(".weight", "")):
        load(saved)


def test_a_part_that_the_config_lacks_is_an_error(saved):
    edit_config(saved, use_mixer=False)
    with pytest.raises((ValueError, RuntimeError), check=coded("unknown-tensor", "loom_mixer")):
        load(saved)


def test_a_wrong_shape_is_an_error_that_names_it(saved):
    edit_tensors(saved, lambda state: state.update({A_KEY: torch.zeros(3, 6)}))
    with pytest.raises((ValueError, RuntimeError), check=coded("rank", "target.loom_lora_A")):
        load(saved)


def test_what_does_not_fit_stays_out_where_that_is_asked_for(saved):
    edit_tensors(saved, lambda state: state.update({A_KEY: torch.zeros(3, 6)}))
    with pytest.warns(UserWarning, match="loom_lora_A"):
        model = PeftModel.from_pretrained(make_base("linear"), saved, ignore_mismatched_sizes=True)
    state, kept = load_file(saved / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    assert kept[A_KEY].shape != state.pop(A_KEY).shape
    assert all(torch.equal(kept[key], value) for key, value in state.items())


def test_the_wrong_base_is_an_error(saved):
    from torch import nn

    from tests.tuner.support import Toy

    with pytest.raises((ValueError, RuntimeError), check=coded("rank", "target.loom_lora_A")):
        PeftModel.from_pretrained(Toy(nn.Linear(7, 10)), saved)


def test_a_foreign_format_version_is_an_error_that_says_so(saved):
    edit_config(saved, loom_format_version=99)
    with pytest.raises(ValueError, match=r"loom_format_version=99.*pip install"):
        load(saved)


def test_an_unknown_config_key_is_an_error_that_names_it(saved):
    """PEFT would drop the key and go on, and the adapter would be another one."""
    edit_config(saved, use_wings=True)
    with pytest.raises(TypeError, match="use_wings"):
        load(saved)
    with pytest.raises(TypeError, match="use_wings"):
        PeftConfig.from_pretrained(str(saved))


def test_errors_also_come_from_load_adapter_and_low_memory_loading(saved):
    edit_tensors(saved, lambda state: state.pop(A_KEY))
    model = get_peft_model(make_base("linear"), LoomConfig(target_modules=["target"]), "first")
    with pytest.raises((ValueError, RuntimeError), check=coded("missing-tensor", "target.loom_lora_A")):
        model.load_adapter(str(saved), "second")
    with pytest.raises((ValueError, RuntimeError), check=coded("missing-tensor", "target.loom_lora_A")):
        PeftModel.from_pretrained(make_base("linear"), saved, low_cpu_mem_usage=True)


def test_a_pickled_adapter_is_refused(tmp_path):
    model = adapted(ALL_PARTS, "linear")
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match=r"adapter_model\.bin"):
        load(tmp_path)


LOAD_WITHOUT_LORALOOM = """
import sys
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM

class Toy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.target = torch.nn.Linear(6, 10)

adapter, base = sys.argv[1:]
for route in (
    lambda: PeftConfig.from_pretrained(adapter),
    lambda: PeftModel.from_pretrained(Toy(), adapter),
    lambda: AutoModelForCausalLM.from_pretrained(base).load_adapter(adapter),
):
    try:
        route()
    except Exception as error:
        print(f"refused: {type(error).__name__}: {error}")
    else:
        print("LOADED")
assert "loraloom" not in sys.modules
"""


def test_without_loraloom_loading_fails_loudly(saved, pico_llama_dir):
    """Never a plain LoRA: the type is unknown to PEFT, and the error shows it."""
    arguments = [sys.executable, "-c", LOAD_WITHOUT_LORALOOM, str(saved), str(pico_llama_dir)]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("refused") and "LOOM" in line for line in lines), run.stdout


@pytest.mark.parametrize("init", [True, "pissa"])
def test_a_model_offloaded_by_accelerate_gives_the_same_output_and_merges(init):
    parts = {"use_mixer": "orthogonal", "use_gate": True, "use_rslora": False, "init_lora_weights": init}
    model, x = adapted(parts, "linear"), make_input("linear")
    with torch.no_grad():
        expected = model(x)
        cpu_offload(model, execution_device="cpu")
        assert all(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(model(x), expected)
        model.merge_adapter()
        assert_near(model(x), expected)
        model.unmerge_adapter()
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT's LoRA says so of every Conv1D
def test_peft_turns_an_adapter_of_full_rank_into_the_same_lora(kind):
    model, x = adapted(ALL_PARTS, kind), make_input(kind)
    config, state = convert_to_lora(model, rank=6)
    lora = get_peft_model(make_base(kind), config).eval()
    set_peft_model_state_dict(lora, state)
    with torch.no_grad():
        assert_near(lora(x), model(x))


@pytest.mark.parametrize("kind", ["embedding", "conv2d"])
def test_peft_refuses_to_convert_what_its_lora_could_not_load(kind):
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(adapted(ALL_PARTS, kind), rank=2)
