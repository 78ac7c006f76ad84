"""Experts' adapters on disk: what PEFT's own forward computes, through every verb that takes files."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from loraloom import LoomConfig
from loraloom.adapter.experts import wrapped_parameters
from loraloom.adapter.inspect import inspect_adapter
from loraloom.adapter.open import open_stored
from loraloom.composition.compose import compose
from loraloom.errors import InputError
from loraloom.export.export import export_adapter
from loraloom.intruders.stored import find_stored_intruders, reduce_stored_intruders
from loraloom.merge.merge import merge_checkpoint
from tests.adapter.support import logits, same_logits, trained
from tests.models import mixtral
from tests.refusals import coded

# PEFT honours a pattern for a parameter, and warns all the same: it looks among the modules alone.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def qwen():
    """Stores each expert's projections apart."""
    sizes = {"moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES | sizes))


def gpt_oss(intermediate_size=24):
    """Stores its parameters as they are, as (E, in, out)."""
    sizes = {"num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 8, "intermediate_size": intermediate_size}
    return GptOssForCausalLM(GptOssConfig(**SIZES | sizes))


def square_gpt_oss():
    """down_proj is square: nothing but the model's type says which way it lies."""
    return gpt_oss(16)


MODELS = {"mixtral": mixtral, "qwen": qwen, "gpt_oss": gpt_oss, "square": square_gpt_oss}
CONFIGS = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=EXPERTS),
    "rslora": LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=EXPERTS[::-1], use_rslora=True),
    "one": LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS[1:]),
    "patterns": LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=EXPERTS, rank_pattern={"experts.gate_up_proj": 4}
    ),
    "loom": LoomConfig(
        r=2, target_modules=["q_proj"], target_parameters=EXPERTS, use_mixer="orthogonal", use_gate=True
    ),
}


@pytest.fixture(params=MODELS)
def base(request, tmp_path):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with torch.no_grad():
        for parameter in model.parameters():  # the initial weights are too small for an expert to matter
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(params=CONFIGS)
def adapter(request, base, tmp_path):
    """An adapter's folder and PEFT's model with it."""
    model = trained(AutoModelForCausalLM.from_pretrained(base), CONFIGS[request.param], tmp_path / "adapter")
    plain = logits(AutoModelForCausalLM.from_pretrained(base))
    assert (logits(model) - plain).abs().max() > 1e-2
    return tmp_path / "adapter", model


def parameters(model):
    """Name -> the parameter and what PEFT adds to it, (E, out, in), of all that are adapted."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if type(module).__name__ == "ParamWrapper":
            base = module.get_base_layer()
            both = getattr(base, module.parameter_name).detach(), module.get_delta_weight("default").detach()
            transposed = getattr(base, "is_transposed", False)
            found[f"{name.replace('.base_layer', '')}.{module.parameter_name}"] = tuple(
                tensor.mT if transposed else tensor for tensor in both
            )
    return found


def test_every_expert_is_a_module_with_its_weight(adapter, base):
    folder, model = adapter
    opened = open_stored(folder, base)
    adapted = parameters(model)
    experts = [module for module in opened.modules.values() if module.expert is not None]
    assert {module.expert.parameter for module in experts} == set(adapted)
    assert len(experts) == sum(len(delta) for _, delta in adapted.values())
    for module in experts:
        W, delta = (tensor[module.expert.index] for tensor in adapted[module.expert.parameter])
        torch.testing.assert_close(module.update().delta(), delta, atol=1e-6, rtol=1e-5)
        assert torch.equal(module.weight(), W)


def test_inspect_merge_and_export(adapter, base, tmp_path):
    folder, model = adapter
    report = inspect_adapter(folder, base)
    assert not report.findings
    norms = {layer.module: layer.norm for layer in report.layers}
    for name, (_, delta) in parameters(model).items():
        place, _, last = name.rpartition(".")
        for index, matrix in enumerate(delta):
            assert norms[f"{place}.{index}.{last}"] == pytest.approx(float(matrix.norm()), rel=1e-5)
    merge_checkpoint([folder], base, tmp_path / "merged")
    same_logits(tmp_path / "merged", model)
    result = export_adapter(folder, "peft", tmp_path / "exported")
    assert result.error < 1e-6
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "exported")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)


def test_a_layers_weight_is_exported_as_that_layer(tmp_path):
    """PEFT refuses a layer that is named both among the modules and among the parameters."""
    torch.manual_seed(0)
    mixtral().save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=[], target_parameters=[EXPERTS[0], "q_proj.weight"])
    model = trained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config, tmp_path / "adapter")
    export_adapter(tmp_path / "adapter", "peft", tmp_path / "exported")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "exported")
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=0)


def test_intruders_of_experts_are_those_of_their_matrices(adapter, base, tmp_path):
    folder, _ = adapter
    report = find_stored_intruders(folder, base, top_k=4)
    found = {layer.name: layer for layer in report.layers}
    opened = open_stored(folder, base)
    for module in (module for module in opened.modules.values() if module.expert is not None):
        changed = torch.linalg.svdvals(module.weight() + module.update().delta())[:4]
        torch.testing.assert_close(
            torch.tensor(found[module.name].singular_values), changed.detach(), atol=1e-4, rtol=1e-4
        )
    with pytest.raises(InputError) as caught:
        reduce_stored_intruders(folder, tmp_path / "reduced", base)
    assert caught.value.code == "experts"


def test_other_verbs_and_servers_refuse(adapter, base, tmp_path):
    folder, _ = adapter
    with pytest.raises(InputError) as caught:
        export_adapter(folder, "gguf-ready", tmp_path / "out")
    assert "experts" in str(caught.value)
    with pytest.raises(InputError) as caught:
        compose(AutoModelForCausalLM.from_pretrained(base), {"one": str(folder)}, {"one": 1.0})
    assert caught.value.code == "experts"


def edited(folder, change):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_files_that_do_not_fit(tmp_path):
    model = mixtral()
    model.save_pretrained(tmp_path / "base")
    folder = tmp_path / "adapter"
    trained(model, CONFIGS["lora"], folder)
    edited(folder, lambda config: config.update(target_parameters=EXPERTS[:1]))
    with pytest.raises(InputError) as caught:
        open_stored(folder)
    assert caught.value.code == "experts"
    edited(folder, lambda config: config.update(target_parameters=EXPERTS, r=7))
    with pytest.raises(InputError) as caught:
        open_stored(folder)
    assert caught.value.code == "rank"
    edited(folder, lambda config: config.update(r=3))
    mixtral(num_local_experts=3).save_pretrained(tmp_path / "other")
    assert open_stored(folder, tmp_path / "base")
    mixtral(intermediate_size=40).save_pretrained(tmp_path / "other")
    with pytest.raises(InputError) as caught:
        open_stored(folder, tmp_path / "other")
    assert caught.value.code == "shape"


def test_parameters_whose_order_the_file_does_not_tell_are_refused():
    config = {"target_parameters": ["mlp.wide", "mlp.tall"]}
    with pytest.raises(InputError, check=coded("experts", "wide", "tall")):
        wrapped_parameters(config, ["mlp.base_layer", "mlp"], "adapter")
    assert wrapped_parameters({"target_parameters": ["mlp.wide"]}, ["mlp"], "adapter") == {"mlp": "mlp.wide"}


def test_a_base_that_quantises_its_experts(tmp_path):
    """GPT-OSS as it is published: MXFP4 blocks, merged as what they stand for."""
    model = gpt_oss(intermediate_size=32)
    model.config.hidden_size = 32
    torch.manual_seed(1)
    config = model.config
    model = GptOssForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors, stored, exact = load_file(path), {}, {}
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for key, W in tensors.items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            count, width, out = W.shape
            codes = torch.randint(16, (count, out, width), dtype=torch.uint8)
            scales = torch.randint(122, 126, (count, out, width // 32), dtype=torch.uint8)
            stored[f"{key}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).reshape(count, out, width // 32, 16)
            stored[f"{key}_scales"] = scales
            number = values[(codes & 7).long()] * torch.where(codes > 7, -1.0, 1.0)
            exact[key] = (number * (scales.float() - 127).exp2().repeat_interleave(32, -1)).mT.contiguous()
        else:
            stored[key] = exact[key] = W
    save_file(stored, path, {"format": "pt"})
    save_file(exact, tmp_path / "exact.safetensors")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}))
    model.load_state_dict(exact)
    adapted = trained(model, CONFIGS["lora"], tmp_path / "adapter")
    options = {"base_precision": "dequantised", "dtype": "float32"}
    merge_checkpoint([tmp_path / "adapter"], tmp_path / "base", tmp_path / "merged", **options)
    same_logits(tmp_path / "merged", adapted)
