"""What cannot be a member is refused in one line that says why, and the model is left as it was."""

import json

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model, save_as_lora
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from loraloom import LoomConfig, compose
from loraloom.errors import InputError
from tests.composition.support import LINEARS, base, ids, lora
from tests.refusals import coded
from tests.tuner.support import assert_near


def refuse(message, where, net=None, **options):
    net = base() if net is None else net
    before = [type(module) for module in net.modules()]
    with pytest.raises(InputError, match=message) as error:
        compose(net, {"bad": where}, **options)
    assert "\n" not in str(error.value)
    assert [type(module) for module in net.modules()] == before


def saved(folder, config):
    get_peft_model(base(), config).save_pretrained(folder)
    return folder


def test_missing_and_broken_files(tmp_path, members):
    refuse(r"'bad'.*nothing-here.*does not exist", tmp_path / "nothing-here")
    refuse(r"'bad'.*no adapter_config\.json", tmp_path)
    folder = saved(tmp_path / "a", LoraConfig(target_modules=LINEARS))
    file = folder / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    refuse("cannot be read as safetensors", folder)
    file.unlink()
    refuse(r"has no adapter_model\.safetensors", folder)
    state = load_file(members["nli"] / "adapter_model.safetensors")
    state.pop("base_model.model.plain.lora_B.weight")
    save_file(state, file, metadata={"format": "pt"})
    refuse("plain has no B", folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (IA3Config(target_modules=["plain"], feedforward_modules=[]), "type 'IA3'; expected one of LORA, LOOM"),
        (LoraConfig(target_modules=LINEARS, use_dora=True), "DoRA.*save_as_lora"),
        (LoomConfig(target_modules=LINEARS, use_dora=True), "DoRA.*save_as_lora"),
        (LoraConfig(target_modules=LINEARS, bias="lora_only"), "bias='lora_only'"),
        (LoraConfig(target_modules=["plain"], trainable_token_indices={"embed": [1]}), "trainable_token_indices"),
        (LoraConfig(target_modules=LINEARS, init_lora_weights="pissa"), "'pissa', which also changed the base weights"),
    ],
    ids=["ia3", "dora", "loom dora", "bias", "tokens", "pissa"],
)
def test_what_is_no_sum_of_low_rank_updates(tmp_path, config, message):
    refuse(message, saved(tmp_path, config))


@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already a LoRA")
def test_the_way_out_for_dora_works(tmp_path):
    config = LoraConfig(target_modules=LINEARS[:2], use_dora=True, init_lora_weights=False)
    model = get_peft_model(base(), config).eval()
    save_as_lora(tmp_path, model, rank=18)  # full
    with torch.no_grad():
        assert_near(compose(base(), {"was dora": tmp_path}, "uniform").eval()(ids()), model(ids()), factor=10)


def test_other_base_models(members):
    net = base()
    net.plain = nn.Linear(18, 9, bias=False)
    refuse(r"'bad': its update of plain is 7 x 18, the layer 9 x 18: it belongs to another base", members["squad"], net)
    net = base()
    net.plane = net.plain
    del net.plain
    refuse(r"'bad' adapts plain, which the model does not have", members["squad"], net)


def test_a_base_model_of_another_architecture(pico_llama_dir, tmp_path):
    """Shapes fit, so only the configurations tell."""
    llama = AutoModelForCausalLM.from_pretrained(pico_llama_dir)
    get_peft_model(llama, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(pico_llama_dir, num_key_value_heads=4, ignore_mismatched_sizes=True)
    refuse(r"num_key_value_heads is 2; this model has 4", tmp_path, other)
    assert compose(AutoModelForCausalLM.from_pretrained(pico_llama_dir), {"good": tmp_path})


def test_heads_stay_out_with_a_warning(tmp_path):
    config = LoraConfig(target_modules=["plain"], modules_to_save=["mix"])
    with pytest.warns(UserWarning, match=r"'good': mix.*stays out"):
        model = compose(base(), {"good": saved(tmp_path, config)}).eval()
    with torch.no_grad():
        assert torch.equal(model(ids()), base()(ids()))  # its B is zero


def test_a_stray_tensor_is_not_passed_over(tmp_path):
    folder = saved(tmp_path, LoraConfig(target_modules=["plain"]))
    state = load_file(folder / "adapter_model.safetensors")
    state["base_model.model.mix.weight"] = torch.zeros(7, 5)
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    refuse(r"mix\.weight, which is no part of a low-rank update", folder)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("equal", "weights='equal'.*'learned', 'uniform'"),
        ({"good": 1.0}, "weights are for good, members are bad"),
        ({"bad": 1.0, "good": 1.0}, "name each once"),
        ({"bad": float("nan")}, "weight of 'bad' is nan"),
    ],
)
def test_wrong_weights(members, weights, message):
    refuse(message, members["squad"], weights=weights)


def test_no_members_wrong_options_and_taken_names(members):
    with pytest.raises(InputError, check=coded("members")):
        compose(base(), {})
    with pytest.raises(ValueError, match="scope='global'"):
        compose(base(), members, scope="global")
    model = compose(base(), members)
    with pytest.raises(InputError, check=coded("name-taken", "composition")):
        compose(model, members)


def test_a_name_of_an_adapter_that_is_almost_there(members):
    model = compose(base(), members, adapter_name="first")
    with pytest.raises(InputError, check=coded("no-folder", "first")):
        compose(model, {"bad": "frist"})


def test_a_model_with_pefts_own_adapters_says_what_to_do(members):
    with pytest.raises(InputError, check=coded("adapters")):
        compose(lora("squad"), members)


def test_an_embedding_saved_with_its_table_is_a_member(tmp_path):
    """PEFT saves the whole table beside the update of an embedding it knows by name."""
    config = LoraConfig(target_modules=["embed"], init_lora_weights=False)
    folder = saved(tmp_path, config)
    state = load_file(folder / "adapter_model.safetensors")
    state["base_model.model.embed.base_layer.weight"] = base().embed.weight.detach()
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert compose(base(), {"good": folder})


def test_the_configuration_refuses_parts_beside_members(members):
    composition = compose(base(), members).peft_config["composition"].to_dict()["composition"]
    with pytest.raises(ValueError, match="no mixer, gate or magnitude"):
        LoomConfig(composition=composition, use_gate=True)
    assert json.dumps(composition)
