"""Code that takes every adapter for a LoRA: it works, or one line says what to do. And LoRA goes on as before."""

import subprocess
import sys

import pytest
import torch
from peft import ArrowConfig, LoraConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_riemannian_optimizer
from peft.optimizers.lorafa import LoraFAOptimizer
from peft.utils import get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from loraloom import LoomConfig
from loraloom.errors import InputError
from tests.tuner.support import Pair, randomise

BOTH = pytest.mark.parametrize("kind", [LoraConfig, LoomConfig])
TARGETS = {"target_modules": ["first", "second"]}


def saved(kind, directory, folder):
    model = get_peft_model(llama(directory), kind(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    randomise(model)
    model.save_pretrained(folder)
    return str(folder)


def llama(directory):
    return AutoModelForCausalLM.from_pretrained(directory, use_cache=False)


@BOTH
def test_lora_fa(kind):
    model = get_peft_model(Pair(), kind(r=2, **TARGETS))
    randomise(model)
    if kind is LoomConfig:
        with pytest.raises(InputError) as raised:
            create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=1e-2)
        assert raised.value.code == "lora-fa"
        return
    optimizer = create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    assert {n for n, p in model.named_parameters() if not torch.equal(p, before[n])} == {n for n in before if "_B" in n}


@BOTH
def test_the_riemannian_optimizer(kind):
    model = get_peft_model(Pair(), kind(r=2, **TARGETS))
    if kind is LoraConfig:
        create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)
        return
    with pytest.raises(ValueError, match="did not find any trainable lora_A/lora_B"):  # PEFT's own line
        create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-2)


@BOTH
def test_arrow(kind, pico_llama_dir, tmp_path):
    adapters = [saved(kind, pico_llama_dir, tmp_path / name) for name in ("a", "b")]
    base = llama(pico_llama_dir)
    if kind is LoomConfig:
        with pytest.raises(InputError) as raised:
            create_arrow_model(base, adapters, ArrowConfig(top_k=1))
        assert raised.value.code == "arrow"
        return
    assert create_arrow_model(base, adapters, ArrowConfig(top_k=1)).active_adapter == "arrow_router"


@BOTH
def test_x_lora(kind, pico_llama_dir, tmp_path):
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=32,
        xlora_depth=1,
        adapters={name: saved(kind, pico_llama_dir, tmp_path / name) for name in ("0", "1")},
    )
    if kind is LoomConfig:
        with pytest.raises(AttributeError, match="loraloom export") as raised:
            get_peft_model(llama(pico_llama_dir), config)
        assert raised.value.name == "layer_replication"
        return
    get_peft_model(llama(pico_llama_dir), config)


def test_a_configuration_has_no_field_of_lora_alone():
    config = LoomConfig()
    assert getattr(config, "layer_replication", None) is None
    with pytest.raises(AttributeError, match="no attribute 'whatever'"):
        config.whatever  # noqa: B018


@pytest.fixture
def unet():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

    def make():
        torch.manual_seed(0)
        return diffusers.UNet2DConditionModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        ).eval()

    return make


@torch.no_grad()
def sample(unet):
    torch.manual_seed(1)
    return unet(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 3, 8)).sample


@BOTH
def test_diffusers_files(kind, unet, tmp_path):
    from diffusers import StableDiffusionPipeline

    model, fresh = unet(), unet()
    model.add_adapter(kind(r=2, target_modules=["to_q", "to_v"]))
    randomise(model)
    if kind is LoomConfig:
        for save in (
            lambda: model.save_lora_adapter(tmp_path),
            lambda: model.save_lora_adapter(tmp_path, adapter_name=None),
            lambda: StableDiffusionPipeline.save_lora_weights(
                tmp_path, unet_lora_layers=get_peft_model_state_dict(model)
            ),
        ):
            with pytest.raises(InputError) as raised:
                save()
            assert raised.value.code == "diffusers-save"
        assert not list(tmp_path.iterdir())
        return
    model.save_lora_adapter(tmp_path)
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(sample(fresh), sample(model))


def test_a_unet_of_diffusers_by_peft(unet, tmp_path):
    """What the refusal says to do."""
    model = get_peft_model(unet(), LoomConfig(r=2, target_modules=["to_q", "to_v"], use_dora=True)).eval()
    randomise(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(unet(), tmp_path).eval()
    assert torch.equal(sample(again), sample(model))
    assert not torch.equal(sample(again), sample(unet()))


def test_a_folder_says_what_it_needs(tmp_path):
    """PEFT's error is the bare name of the type, so a person looks into the folder."""
    for name, options in {"task": {"task_type": "FEATURE_EXTRACTION"}, "no task": {}}.items():
        model = get_peft_model(Pair(), LoomConfig(**TARGETS, **options))
        folder = tmp_path / name
        model.save_pretrained(folder)
        model.save_pretrained(folder)
        assert (folder / "README.md").read_text(encoding="utf-8").count("import loraloom") == 1
        assert "import loraloom" in (folder / "adapter_config.json").read_text(encoding="utf-8")
        PeftModel.from_pretrained(Pair(), folder)
    code = "import sys, peft; peft.PeftConfig.from_pretrained(sys.argv[1])"
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert "KeyError: 'LOOM'" in run.stderr


def test_groups_from_a_generator_reach_lora_fa():
    model = get_peft_model(Pair(), LoraConfig(r=2, **TARGETS))
    groups = create_lorafa_optimizer(model, r=2, lora_alpha=8, lr=1e-2).param_groups
    again = LoraFAOptimizer({key: group[key] for key in ("params", "names", "scaling_factor")} for group in groups)
    assert [len(group["params"]) for group in again.param_groups] == [len(group["params"]) for group in groups]
