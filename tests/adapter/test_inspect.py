"""What inspect says is true of the adapter, and every way of being broken is found."""

import copy
import json
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loraloom import LoomConfig, compose
from loraloom.adapter.inspect import inspect_adapter
from loraloom.errors import InputError
from tests.refusals import coded

TARGETS = ["q_proj", "down_proj"]


def train(model, std=0.1):
    """Random values on top of every tensor of the adapter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "loom_" in name:
                parameter.add_(torch.randn_like(parameter) * std)
    return model


def saved(pico_llama_dir, folder, config, std=0.1):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(pico_llama_dir), config)
    train(model, std).save_pretrained(folder, save_embedding_layers=False)
    return model


def edit(folder, tensors=None, **config):
    """Changes the tensors (a function from dict to dict) and the configuration of a saved adapter."""
    file = folder / "adapter_model.safetensors"
    if tensors is not None:
        save_file(tensors(load_file(file)), file)
    values = json.loads((folder / "adapter_config.json").read_text()) | config
    (folder / "adapter_config.json").write_text(json.dumps(values))


def codes(inspection, level="error"):
    return {finding.code for finding in inspection.findings if finding.level == level}


@pytest.fixture
def lora(pico_llama_dir, tmp_path):
    saved(pico_llama_dir, tmp_path / "lora", peft.LoraConfig(r=4, target_modules=TARGETS))
    return tmp_path / "lora"


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=TARGETS, rank_pattern={"q_proj": 2}),
        LoomConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_mixer="kaiming", use_gate=True, use_dora=True),
        LoomConfig(r=4, target_modules=[*TARGETS, "embed_tokens"], init_lora_weights="gaussian"),
        LoomConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"),
    ],
    ids=["rslora", "all parts", "embedding", "anchored"],
)
def test_the_numbers_are_those_of_the_merged_model(pico_llama_dir, tmp_path, config):
    model = saved(pico_llama_dir, tmp_path, config)
    inspection = inspect_adapter(tmp_path, pico_llama_dir)
    assert not inspection.findings
    before = copy.deepcopy(model).unload().state_dict()
    after = copy.deepcopy(model).merge_and_unload().state_dict()
    for layer in inspection.layers:
        W, merged = before[f"{layer.module}.weight"], after[f"{layer.module}.weight"]
        assert layer.relative_norm == pytest.approx(float((merged - W).norm() / W.norm()), rel=1e-4)
        assert layer.shape in (tuple(W.shape), tuple(W.T.shape))
        assert layer.zero is None
        if not getattr(config, "use_dora", False):
            S = torch.linalg.svdvals(merged - W)
            assert layer.norm == pytest.approx(float(S.norm()), rel=1e-4)
            assert layer.stable_rank == pytest.approx(float((S / S[0]).square().sum()), rel=1e-4)
            assert 1 <= layer.effective_rank <= 2 * layer.rank
    parameters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n or "loom_" in n)
    assert inspection.parameters == parameters == sum(layer.parameters for layer in inspection.layers)
    assert inspection.nbytes == 4 * parameters
    assert sum(inspection.ranks.values()) == len(inspection.layers)
    assert json.loads(json.dumps(inspection.to_dict()))["layers"][0]["module"] == inspection.layers[0].module


def test_the_method_is_named_after_its_parts(pico_llama_dir, tmp_path, lora):
    assert inspect_adapter(lora).method == "LoRA"
    config = LoomConfig(r=4, target_modules=TARGETS, use_mixer="orthogonal", use_gate=True, use_rslora=True)
    saved(pico_llama_dir, tmp_path / "all", config)
    assert inspect_adapter(tmp_path / "all").method == "MoSLoRA + WeightLoRA + rsLoRA's scale"


def test_a_composition(pico_llama_dir, tmp_path):
    for seed, name in enumerate(("squad", "fever")):
        torch.manual_seed(seed)
        saved(pico_llama_dir, tmp_path / name, peft.LoraConfig(r=seed + 2, target_modules=TARGETS))
    base = AutoModelForCausalLM.from_pretrained(pico_llama_dir)
    model = compose(base, {name: tmp_path / name for name in ("squad", "fever")}, weights={"squad": 2.0, "fever": -1.0})
    model.save_pretrained(tmp_path / "both")
    with pytest.raises(InputError, check=coded("no-config", "adapter_config.json")):
        inspect_adapter(tmp_path / "both")
    inspection = inspect_adapter(tmp_path / "both" / "composition", pico_llama_dir)
    assert inspection.method == "WLoRA"
    assert not inspection.findings
    alone = {name: inspect_adapter(tmp_path / name).layers for name in ("squad", "fever")}
    layers = zip(inspection.layers, alone["squad"], alone["fever"], strict=True)
    for both, squad, fever in layers:
        assert both.module == squad.module == fever.module
        assert abs(2 * squad.norm - fever.norm) <= both.norm <= 2 * squad.norm + fever.norm
        assert both.rank == 5


def test_an_untrained_adapter_does_nothing(pico_llama_dir, tmp_path):
    saved(pico_llama_dir, tmp_path, peft.LoraConfig(r=4, target_modules=TARGETS), std=0)
    inspection = inspect_adapter(tmp_path)
    assert codes(inspection) == {"does-nothing"}
    assert {layer.zero for layer in inspection.layers} == {"B is zero"}
    assert {layer.norm for layer in inspection.layers} == {0.0}


def test_an_adapter_with_closed_gates_does_nothing_and_one_gate_is_a_warning(pico_llama_dir, tmp_path):
    saved(pico_llama_dir, tmp_path, LoomConfig(r=4, target_modules=TARGETS, use_gate=True))

    def close(tensors, only=""):
        return {k: v * 0 if "gate" in k and only in k else v for k, v in tensors.items()}

    edit(tmp_path, lambda tensors: close(tensors, "layers.1.self_attn"))
    inspection = inspect_adapter(tmp_path)
    assert not inspection.errors
    assert [f.names for f in inspection.findings] == [["model.layers.1.self_attn.q_proj"]]
    edit(tmp_path, close)
    assert codes(inspect_adapter(tmp_path)) == {"does-nothing"}


def test_dora_with_zero_b_needs_the_base_to_tell(pico_llama_dir, tmp_path):
    saved(pico_llama_dir, tmp_path, peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True), std=0)
    assert codes(inspect_adapter(tmp_path)) == set()
    assert codes(inspect_adapter(tmp_path), "warning") == {"zero"}
    assert codes(inspect_adapter(tmp_path, pico_llama_dir)) == {"does-nothing"}
    edit(tmp_path, lambda ts: {k: v * 1.1 if "magnitude" in k else v for k, v in ts.items()})
    assert codes(inspect_adapter(tmp_path, pico_llama_dir)) == set()


def rename(old, new):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def with_nan(tensors):
    next(v for k, v in tensors.items() if "q_proj.lora_B" in k)[0, 0] = float("nan")
    return tensors


@pytest.mark.parametrize(
    ("change", "code", "names"),
    [
        (rename("lora_A.weight", "lora_A.default.weight"), None, None),  # then B stands alone
        (rename("base_model.model.", ""), "unknown-tensor", 8),
        (rename("model.layers", "_orig_mod.model.layers"), "unresolved", 4),
        (rename("base_model.model.", "base_model.model.base_model.model."), "unresolved", 4),
        (lambda ts: ts | {"base_model.model.x.lora_A.0.weight": torch.zeros(1)}, "unknown-tensor", 1),
        (lambda ts: ts | {"base_model.model.model.layers.0.mlp.down_proj.lora_A": torch.zeros(4, 64)}, "duplicate", 1),
        (lambda ts: {k: v[:2] if "1.mlp.down_proj.lora_A" in k else v for k, v in ts.items()}, "shape", 1),
        (lambda ts: {k: v.flatten() if "lora_A" in k else v for k, v in ts.items()}, "shape", 4),
        (with_nan, "not-finite", 1),
    ],
    ids=["name in key", "no prefix", "compiled", "twice saved", "factor", "twice", "cut", "unsharded", "nan"],
)
def test_broken_tensors_are_errors(lora, change, code, names):
    edit(lora, change)
    if code is None:
        with pytest.raises(InputError, check=coded("missing-tensor")):
            inspect_adapter(lora)
        return
    inspection = inspect_adapter(lora)
    assert code in codes(inspection)
    assert len(next(f for f in inspection.findings if f.code == code).names) == names


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"r": 8}, "rank"),
        ({"rank_pattern": {"q_proj": 2}}, "rank"),
        ({"target_modules": ["q_proj"]}, "target"),
        ({"target_modules": r"model\.layers\.0\..*"}, "target"),
        ({"exclude_modules": ["model.layers.0.mlp.down_proj"]}, "target"),
        ({"layers_to_transform": [0]}, "target"),
        ({"use_dora": True}, "parts"),
        ({"init_lora_weights": "pissa_niter_4"}, "altered-base"),
    ],
)
def test_a_configuration_that_contradicts_the_tensors_is_an_error(lora, config, code):
    edit(lora, **config)
    assert code in codes(inspect_adapter(lora))


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"target_modules": [*TARGETS, "v_porj"]}, "target"),
        ({"alpha_pattern": {"o_proj": 3}}, "pattern"),
        ({"modules_to_save": ["score"]}, "modules-to-save"),
    ],
)
def test_what_may_be_a_mistake_is_a_warning(lora, config, code):
    edit(lora, **config)
    inspection = inspect_adapter(lora)
    assert codes(inspection, "warning") == {code}
    assert not inspection.errors


def test_peft_adapts_what_is_taken_for_a_target(pico_llama_dir, tmp_path):
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[1], layers_pattern="layers"
    )
    saved(pico_llama_dir, tmp_path, config)
    assert not inspect_adapter(tmp_path).findings


def test_a_foreign_base_is_an_error(pico_llama_dir, pico_bert_dir, lora):
    assert not inspect_adapter(lora, pico_llama_dir).findings
    inspection = inspect_adapter(lora, pico_bert_dir)
    assert codes(inspection) == {"unresolved"}
    assert {layer.relative_norm for layer in inspection.layers} == {None}
    edit(lora, lambda ts: {k: torch.cat([v, v], 1) if "q_proj.lora_A" in k else v for k, v in ts.items()})
    assert codes(inspect_adapter(lora, pico_llama_dir)) == {"shape"}


def test_two_modules_that_are_one(pico_llama_dir, lora):
    again = rename("base_model.model.model.", "base_model.model.")
    edit(lora, lambda ts: ts | {k: v.clone() for k, v in again(ts).items()})
    assert codes(inspect_adapter(lora, pico_llama_dir)) == {"duplicate"}


def test_heads_biases_and_tokens_are_known(pico_llama_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(pico_llama_dir)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices={"embed_tokens": [1, 2]}
    )
    train(peft.get_peft_model(model, config)).save_pretrained(tmp_path)
    inspection = inspect_adapter(tmp_path)
    assert not inspection.findings
    assert inspection.other_parameters == 32 * (model.config.vocab_size + 2)
    by_server = {verdict.server: verdict for verdict in inspection.serving}
    assert by_server["PEFT"].effect == "ok"
    assert by_server["vLLM"].effect == "rejected"
    assert "lm_head.weight" in " ".join(by_server["vLLM"].reasons)
    assert by_server["vLLM"].run.startswith("loraloom merge")


def test_inspecting_imports_neither_peft_nor_transformers(lora):
    code = (
        "import sys; from loraloom.adapter.inspect import inspect_adapter; inspect_adapter(sys.argv[1]); "
        "print([m for m in ('peft', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code, lora], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n"
