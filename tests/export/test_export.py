"""Exports: stock PEFT, in a process that cannot import loraloom, gives the logits of the original."""

import json
import shutil
import subprocess
import sys

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from loraloom import LoomConfig, compose
from loraloom.adapter.inspect import inspect_adapter
from loraloom.adapter.open import open_adapter
from loraloom.adapter.serving import serving_data
from loraloom.errors import InputError, RunFailedError
from loraloom.export import plan
from loraloom.export.export import export_adapter
from loraloom.export.plan import best_approximation
from tests.refusals import coded

TARGETS = ["q_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS}
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.1\.mlp\.down_proj": 9}}
COMPOSITION = "a composition of the first two, with learned weights"
# Kind -> its configuration; all of these are a product B A and are exported exactly, to every target.
EXACT = {
    "lora": peft.LoraConfig(**LORA),
    "lora with patterns": peft.LoraConfig(**LORA, **PATTERNS),
    "rslora with patterns": peft.LoraConfig(**LORA, **PATTERNS, use_rslora=True),
    "moslora": LoomConfig.moslora(**LORA),
    "weightlora with dead layers": LoomConfig.weightlora(**LORA, **PATTERNS),
    "gates and mixers, rslora": LoomConfig.moslora(
        **LORA, **PATTERNS, use_gate=True, use_mixer="kaiming", use_rslora=True
    ),
    "pissa": LoomConfig(**LORA, init_lora_weights="pissa"),
    "olora with gates": LoomConfig(**LORA, init_lora_weights="olora", use_gate=True),
    "composition": COMPOSITION,
}
# Kept by PEFT alone.
PEFT_ONLY = {
    "dora": LoomConfig.dora(**LORA, **PATTERNS, use_mixer="orthogonal", use_gate=True),
    "peft's dora": peft.LoraConfig(**LORA, use_dora=True, use_rslora=True),
    "head": LoomConfig.moslora(**LORA, modules_to_save=["lm_head"]),
    "embedding": LoomConfig.moslora(r=4, target_modules=["q_proj", "embed_tokens"]),
    "peft's embedding": peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
    "tokens": LoomConfig.moslora(**LORA, trainable_token_indices={"embed_tokens": [1, 5]}),
}
IDS = torch.arange(24).reshape(2, 12) % 60

# Run without loraloom: loads every adapter with stock PEFT and writes the logits.
STOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "loraloom":
            raise ImportError("loraloom is blocked here")
sys.meta_path.insert(0, Blocked())
try:
    import loraloom
except ImportError:
    pass
else:
    raise SystemExit("loraloom was not blocked")
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
base, out, *adapters = sys.argv[1:]
ids, logits = torch.arange(24).reshape(2, 12) % 60, {}
for adapter in adapters:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    assert type(model.base_model).__name__ == "LoraModel"
    with torch.no_grad():
        logits[adapter] = model(ids).logits
assert not [name for name in sys.modules if name.partition(".")[0] == "loraloom"]
save_file(logits, out)
"""


def trained(pico_llama_dir, config):
    """A model with random values on top of every tensor that trains, and two closed gates where there are gates."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(pico_llama_dir), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            if "loom_gate" in name and "layers.0" in name and "mlp" in name:
                parameter.zero_()
    return model.eval()


def composed(pico_llama_dir, folder):
    """A composition of "lora" and "lora with patterns", its weights unequal and different in every layer."""
    base = AutoModelForCausalLM.from_pretrained(pico_llama_dir)
    model = compose(base, {"squad": folder / "0", "fever": folder / "1"}, weights="learned", adapter_name="default")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "loom_logits" in name:
                parameter.add_(torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def exports(pico_llama_dir, tmp_path_factory):
    """Kind -> (logits of the original, {target: folder of the export}, logits by folder from stock PEFT)."""
    folder = tmp_path_factory.mktemp("exports")
    wanted, folders = {}, {}
    for number, (kind, config) in enumerate((EXACT | PEFT_ONLY).items()):
        torch.manual_seed(number)
        model = composed(pico_llama_dir, folder) if config is COMPOSITION else trained(pico_llama_dir, config)
        model.save_pretrained(folder / str(number), save_embedding_layers=False)
        with torch.no_grad():
            wanted[kind] = model(IDS).logits
        for target in ("portable", "peft", "vllm") if kind in EXACT else ("peft",):
            out = folder / f"{number}-{target}"
            report = export_adapter(folder / str(number), target, out)
            assert not report.lossy
            assert report.error < 1e-6
            folders[kind, target] = out
    command = [sys.executable, "-c", STOCK, pico_llama_dir, folder / "logits", *folders.values()]
    outcome = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    return wanted, folders, load_file(folder / "logits")


@pytest.mark.parametrize(
    ("kind", "target"),
    [(kind, t) for kind in EXACT for t in ("portable", "peft", "vllm")] + [(kind, "peft") for kind in PEFT_ONLY],
)
def test_stock_peft_gives_the_same_logits(exports, pico_llama_dir, kind, target):
    wanted, folders, got = exports
    base = AutoModelForCausalLM.from_pretrained(pico_llama_dir)
    with torch.no_grad():
        assert (wanted[kind] - base(IDS).logits).abs().max() > 1e-2
    torch.testing.assert_close(got[str(folders[kind, target])], wanted[kind], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", EXACT)
def test_a_portable_adapter_keeps_the_contract(exports, kind):
    folder = exports[1][kind, "portable"]
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] == config["r"]
    assert not config["use_rslora"]
    assert not config["use_dora"]
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert config["bias"] == "none"
    assert not config["modules_to_save"]
    for module in config["target_modules"]:
        A = tensors.pop(f"base_model.model.{module}.lora_A.weight")
        B = tensors.pop(f"base_model.model.{module}.lora_B.weight")
        assert A.shape[0] == B.shape[1] == config["r"]
        assert A.dtype == B.dtype == torch.float32
    assert not tensors
    inspection = inspect_adapter(folder)
    assert not inspection.findings
    promised = {serving_data()["servers"][name]["name"] for name in ("peft", *plan.TARGETS["portable"])}
    assert {verdict.effect for verdict in inspection.serving if verdict.server in promised} == {"ok"}


def test_dead_layers_are_left_out(exports):
    config = json.loads((exports[1]["weightlora with dead layers", "portable"] / "adapter_config.json").read_text())
    assert len(config["target_modules"]) == 3 + 2  # SGLang needs a v_proj beside each q_proj
    assert "model.layers.0.mlp.down_proj" not in config["target_modules"]


def test_vllm_gets_a_rank_that_it_is_configured_for(exports):
    folders = exports[1]
    ranks = {kind: open_adapter(folders[kind, "vllm"]).config["r"] for kind in ("lora", "pissa", "composition")}
    assert ranks == {"lora": 8, "pissa": 8, "composition": 8}  # 4, 4 + 4 of the anchor, 4 + 4 and 4 + 2 of two members
    assert open_adapter(folders["pissa", "portable"]).config["r"] == 8
    assert open_adapter(folders["lora with patterns", "portable"]).config["r"] == 4


def save(pico_llama_dir, folder, config):
    model = trained(pico_llama_dir, config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model


def test_truncation_is_the_best_and_its_error_is_reported(pico_llama_dir, tmp_path):
    save(pico_llama_dir, tmp_path / "a", LoomConfig.moslora(**LORA))
    with pytest.raises(InputError, check=coded("lossy", "--allow-lossy", "loraloom merge")):
        export_adapter(tmp_path / "a", "portable", tmp_path / "b", rank=2)
    assert not (tmp_path / "b").exists()
    report = export_adapter(tmp_path / "a", "portable", tmp_path / "b", rank=2, allow_lossy=True)
    assert report.lossy
    old, new = open_adapter(tmp_path / "a"), open_adapter(tmp_path / "b")
    squares = [0.0, 0.0]
    for layer in report.modules:
        D, E = (opened.modules[layer.module].update().delta() for opened in (old, new))
        S = torch.linalg.svdvals(D)
        assert layer.exported_rank == 2
        assert layer.error == pytest.approx(float((D - E).norm() / D.norm()), rel=1e-4)
        assert layer.error == pytest.approx(float(S[2:].norm() / S.norm()), rel=1e-4)
        squares = [squares[0] + float((D - E).norm() ** 2), squares[1] + float(D.norm() ** 2)]
    assert report.error == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-4)


def test_padding_changes_nothing(pico_llama_dir, tmp_path):
    save(pico_llama_dir, tmp_path / "a", peft.LoraConfig(**LORA))
    report = export_adapter(tmp_path / "a", "sglang", tmp_path / "b", rank=7)
    assert not report.lossy
    assert report.error < 1e-6
    assert open_adapter(tmp_path / "b").config["r"] == 7


def test_dora_needs_the_base_and_is_refused_above_one_percent(pico_llama_dir, tmp_path):
    model = save(pico_llama_dir, tmp_path / "a", LoomConfig.dora(**LORA, use_mixer="orthogonal"))
    with pytest.raises(InputError, check=coded("not-served")):
        export_adapter(tmp_path / "a", "vllm", tmp_path / "b")
    with pytest.raises(InputError, check=coded("lossy", "--rank")):
        export_adapter(tmp_path / "a", "vllm", tmp_path / "b", base=pico_llama_dir)
    before = model.unload().state_dict()
    after = trained_merge(pico_llama_dir, tmp_path / "a")
    # With the full rank nothing is lost, so the base and the magnitudes were read rightly.
    report = export_adapter(tmp_path / "a", "portable", tmp_path / "b", base=pico_llama_dir, rank=32)
    assert report.error < 1e-5
    new = open_adapter(tmp_path / "b")
    for module in new.modules:
        update = after[f"{module}.weight"] - before[f"{module}.weight"]
        torch.testing.assert_close(new.modules[module].update().delta(), update, rtol=1e-4, atol=1e-5)


def trained_merge(base, adapter):
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    return model.merge_and_unload().state_dict()


def test_large_matrices_are_approximated_almost_as_well_as_by_an_exact_svd():
    U, V = (torch.linalg.qr(torch.randn(1100, 1100)).Q for _ in range(2))
    S = 1 / torch.arange(1, 1101)
    state = torch.random.get_rng_state()
    A, B = best_approximation(U * S @ V, 20)
    assert torch.equal(torch.random.get_rng_state(), state)
    error = (U * S @ V - B @ A).norm()
    assert 1 - 1e-4 < error / S[20:].norm() < 1.01


@pytest.mark.parametrize(
    ("config", "target", "message"),
    [
        (PEFT_ONLY["head"], "vllm", "holds lm_head.weight, and vLLM: .* lm_head is rejected; use loraloom merge"),
        (PEFT_ONLY["tokens"], "gguf-ready", "llama.cpp: exits on full head or embedding weights; use loraloom merge"),
        (PEFT_ONLY["embedding"], "portable", "embed_tokens is an embedding, and vLLM"),
        (peft.LoraConfig(**(LORA | {"r": 600})), "vllm", "rank 600 is above 512.*give --rank"),
    ],
    ids=["head", "tokens", "embedding", "rank"],
)
def test_what_a_target_cannot_hold_is_refused_with_the_way_out(pico_llama_dir, tmp_path, config, target, message):
    save(pico_llama_dir, tmp_path / "a", config)
    with pytest.raises(InputError, match=message):
        export_adapter(tmp_path / "a", target, tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.filterwarnings("ignore:.*have invalid shape")
def test_convolutions_and_biases_go_to_peft_alone(tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 5, 2), nn.Flatten(), nn.Linear(5, 4))

    configs = {
        "conv": LoomConfig.moslora(r=2, lora_alpha=3, target_modules=["0", "2"], bias="loom_only"),
        "conv dora": LoomConfig.dora(r=2, lora_alpha=3, target_modules=["0", "2"]),
        "lora bias": peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"], lora_bias=True),
    }
    x = torch.randn(2, 3, 2, 2)
    for name, config in configs.items():
        model = peft.get_peft_model(net(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / name)
        with pytest.raises(InputError, check=coded("not-served")):
            export_adapter(tmp_path / name, "portable", tmp_path / "no")
        export_adapter(tmp_path / name, "peft", tmp_path / f"{name} out")
        exported = peft.PeftModel.from_pretrained(net(), tmp_path / f"{name} out")
        assert exported.peft_config["default"].peft_type == peft.PeftType.LORA
        torch.testing.assert_close(exported(x), model(x))


def test_what_the_configuration_says_without_a_tensor_is_dropped(pico_llama_dir, tmp_path):
    save(pico_llama_dir, tmp_path / "a", peft.LoraConfig(**LORA, bias="all"))  # a Llama has no biases
    vllm = next(verdict for verdict in inspect_adapter(tmp_path / "a").serving if verdict.server == "vLLM")
    assert (vllm.effect, vllm.reasons) == ("rejected", ["bias is 'all': bias must be none"])
    assert vllm.run.startswith("loraloom export")
    export_adapter(tmp_path / "a", "portable", tmp_path / "b")
    assert open_adapter(tmp_path / "b").config["bias"] == "none"


@pytest.mark.parametrize("init", ["pissa", "orthogonal"])
def test_updates_that_nearly_cancel_are_exact_up_to_rounding(pico_llama_dir, tmp_path, init):
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(pico_llama_dir), LoomConfig(**LORA, init_lora_weights=init)
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(torch.randn_like(parameter) * 1e-5)
    model.save_pretrained(tmp_path / "a")
    assert export_adapter(tmp_path / "a", "portable", tmp_path / "b").error < 1e-2


def test_a_start_that_changed_the_base_is_refused(pico_llama_dir, tmp_path):
    save(pico_llama_dir, tmp_path / "a", peft.LoraConfig(**LORA, init_lora_weights="pissa"))
    with pytest.raises(InputError, check=coded("altered-base", "path_initial_model_for_weight_conversion")):
        export_adapter(tmp_path / "a", "peft", tmp_path / "b")


def test_sixteen_bits_are_one_rounding(pico_llama_dir, tmp_path):
    save(pico_llama_dir, tmp_path / "a", LoomConfig.moslora(**LORA))
    report = export_adapter(tmp_path / "a", "portable", tmp_path / "b", dtype="bfloat16")
    assert report.dtype == "bfloat16"
    assert 1e-4 < report.error < 2**-7
    assert open_adapter(tmp_path / "b").modules["model.layers.0.self_attn.q_proj"].terms()[0].A.dtype is torch.bfloat16


def test_broken_adapters_are_not_exported(pico_llama_dir, tmp_path):
    save(pico_llama_dir, tmp_path / "a", peft.LoraConfig(**LORA))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    save_file(tensors | {key: tensors[key] * float("nan")}, file)
    with pytest.raises(InputError, check=coded("not-finite", "q_proj")):
        export_adapter(tmp_path / "a", "portable", tmp_path / "b")
    save_file({k: v * 0 for k, v in tensors.items()}, file)
    with pytest.raises(RunFailedError, check=coded("zero")):
        export_adapter(tmp_path / "a", "portable", tmp_path / "b")
    save_file({k.replace("base_model.model.", ""): v for k, v in tensors.items()}, file)
    with pytest.raises(InputError, check=coded("unknown-tensor")):
        export_adapter(tmp_path / "a", "portable", tmp_path / "b")
    with pytest.raises(InputError, check=coded("unknown-target", "tgi")):
        export_adapter(tmp_path / "a", "tgi", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_folder_is_replaced_only_when_asked_and_only_by_a_whole_one(pico_llama_dir, tmp_path):
    save(pico_llama_dir, tmp_path / "a", peft.LoraConfig(**LORA))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(InputError, check=coded("not-empty")):
        export_adapter(tmp_path / "a", "portable", tmp_path / "b")
    with pytest.raises(InputError, check=coded("lossy")):
        export_adapter(tmp_path / "a", "portable", tmp_path / "b", rank=1, overwrite=True)
    assert open_adapter(tmp_path / "b").config["lora_alpha"] == 6
    export_adapter(tmp_path / "a", "portable", tmp_path / "b", overwrite=True)
    assert open_adapter(tmp_path / "b").config["lora_alpha"] == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


def test_what_was_written_is_read_back(pico_llama_dir, tmp_path, monkeypatch):
    save(pico_llama_dir, tmp_path / "a", peft.LoraConfig(**LORA))

    def careless(file, tensors):
        save_file({k: v * 1.001 if "q_proj.lora_B" in k else v for k, v in tensors.items()}, file, {"format": "pt"})

    monkeypatch.setattr("loraloom.export.plan.save_tensors", careless)
    with pytest.raises(RunFailedError, check=coded("not-verified", "q_proj")):
        export_adapter(tmp_path / "a", "portable", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("out", ["", ".."])
def test_what_is_read_is_never_overwritten(pico_llama_dir, tmp_path, out):
    adapter = tmp_path / "run" / "adapter"
    save(pico_llama_dir, adapter, peft.LoraConfig(**LORA))
    with pytest.raises(InputError, check=coded("folder-is-read")):
        export_adapter(adapter, "portable", adapter / out, overwrite=True)
    assert open_adapter(adapter).modules


def test_sglang_gets_zeros_of_a_size_that_the_base_says_or_is_refused(pico_llama_dir, tmp_path):
    config = peft.LoraConfig(**(LORA | {"target_modules": ["k_proj", "up_proj"]}))
    save(pico_llama_dir, tmp_path / "a", config)
    path = tmp_path / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "some/where"}))
    for target in ("sglang", "portable"):
        with pytest.raises(InputError) as error:
            export_adapter(tmp_path / "a", target, tmp_path / "b")
        assert error.value.code == "siblings"
    assert not export_adapter(tmp_path / "a", "vllm", tmp_path / "vllm").completed
    report = export_adapter(tmp_path / "a", "sglang", tmp_path / "b", base=pico_llama_dir)
    assert {name.rpartition(".")[2] for name in report.completed} == {"q_proj", "v_proj", "gate_proj"}
    ours, theirs = (
        peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pico_llama_dir), tmp_path / name)
        for name in ("b", "a")
    )
    ids = torch.arange(12)[None]
    torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
