"""What users of LoRA call besides training: scales, hot swaps, weighted adapters, options that are only LoRA's."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import LoraRuntimeConfig
from peft.utils.hotswap import hotswap_adapter

from loraloom import LoomConfig
from loraloom.errors import InputError
from tests.refusals import coded
from tests.tuner.support import ALL_PARTS, Pair, assert_near, randomise

PARTS = {"lora": {}, "rslora": {"use_rslora": True}, "mixer and gate": {"use_mixer": "orthogonal", "use_gate": True}}


def adapted(parts, seed=2, **kwargs):
    torch.manual_seed(0)
    model = get_peft_model(Pair(), LoomConfig(r=4, lora_alpha=6, target_modules=["first", "second"], **parts, **kwargs))
    randomise(model, seed)
    return model.eval()


@pytest.fixture(params=PARTS)
def parts(request):
    return PARTS[request.param]


@torch.no_grad()
def test_scales_multiply_the_update(parts):
    model, x = adapted(parts), torch.randn(3, 8)
    layer = model.get_base_model().first
    base, whole = layer.base_layer(x), layer(x)
    layer.set_scale("default", 0.5)
    assert_near(layer(x) - base, 0.5 * (whole - base), torch.float32, factor=10)
    layer.scale_layer(3)
    assert_near(layer(x) - base, 1.5 * (whole - base), torch.float32, factor=10)
    layer.unscale_layer(3)
    assert_near(layer(x) - base, 0.5 * (whole - base), torch.float32, factor=10)
    layer.unscale_layer()
    assert torch.equal(layer(x), whole)
    layer.set_scale("absent", 0.5)
    assert torch.equal(layer(x), whole)


@torch.no_grad()
def test_a_hot_swap_is_the_other_adapter(parts, tmp_path):
    other, x = adapted(parts, seed=5), torch.randn(3, 8)
    other.save_pretrained(tmp_path)
    model = adapted(parts)
    assert (model(x) - other(x)).abs().max() > 1e-2
    hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(model(x), other(x))


def test_a_hot_swap_of_another_method_is_refused(tmp_path):
    adapted(ALL_PARTS).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"use_mixer|use_dora|use_rslora"):
        hotswap_adapter(adapted({}), str(tmp_path), "default")


@pytest.mark.parametrize("of", [lambda m: m, lambda m: m.base_model], ids=["PeftModel", "LoomModel"])
def test_weighted_adapters_are_answered_by_compose(of):
    with pytest.raises(InputError, check=coded("add-weighted-adapter")) as raised:
        of(adapted({})).add_weighted_adapter(["default"], [1.0], "mixed")
    assert raised.value.code == "add-weighted-adapter"


@pytest.mark.parametrize("option", ["lora_bias", "megatron_config", "layer_replication", "eva_config"])
def test_an_option_of_lora_only_is_named_as_such(option):
    with pytest.raises(TypeError, match=rf"{option}.*peft.LoraConfig"):
        LoomConfig(**{option: True})
    with pytest.raises(TypeError, match="newer loraloom"):
        LoomConfig(a_field_of_the_future=True)


@pytest.mark.parametrize(
    "options", [{"runtime_config": LoraRuntimeConfig(ephemeral_gpu_offload=True)}, {"megatron_config": {"a": 1}}]
)
def test_an_option_of_lora_only_is_not_dropped(options):
    with pytest.raises(ValueError, match="does not support"):
        LoomConfig.from_lora(LoraConfig(**options))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_divides_by_alpha(start):
    with pytest.raises(ValueError, match="alpha"):
        LoomConfig(init_lora_weights=start, lora_alpha=0)
    with pytest.raises(ValueError, match="alpha"):
        LoomConfig(init_lora_weights=start, alpha_pattern={"q": -1})


@torch.no_grad()
def test_diffusers_weights_of_adapters():
    utils = pytest.importorskip("diffusers.utils.peft_utils", reason="diffusers is not installed")
    model, x = adapted({}), torch.randn(3, 8)
    layer = model.get_base_model().first
    base, whole = layer.base_layer(x), layer(x)
    utils.set_weights_and_activate_adapters(model.get_base_model(), ["default"], [0.25])
    assert_near(layer(x) - base, 0.25 * (whole - base), torch.float32, factor=10)
