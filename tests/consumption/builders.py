"""How the adapters of the matrix are made, and how saved ones are broken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.consumption import ours
from tests.consumption.references import IDS, load_base

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEARS = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CONV1D = ["c_attn", "c_proj", "c_fc"]
Build = Callable[[Any, Path], PeftModel]
Edit = Callable[[Path], None]


def trained(base: Any, config: Any, name: str = "default") -> PeftModel:
    """A PeftModel whose trained tensors have all moved, some of the gates through zero."""
    model = get_peft_model(base, config, name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (1.0 if "gate" in key else 0.3))
    return model


def lora(**options: Any) -> Build:
    values = {"r": 4, "lora_alpha": 6, "target_modules": LINEARS} | options
    return lambda base, _: trained(base, LoraConfig(**values))


def loom(**options: Any) -> Build:
    values = {"r": 4, "lora_alpha": 6, "target_modules": LINEARS} | options
    return lambda base, _: trained(base, ours.LoomConfig(**values))


def pissa_converted(base: Any, scratch: Path) -> PeftModel:
    """PiSSA, saved as the plain LoRA of twice the rank."""
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=LINEARS, init_lora_weights="pissa"))
    start, folder = scratch / "start", scratch / "converted"
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(start)
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, path_initial_model_for_weight_conversion=str(start))
    return PeftModel.from_pretrained(load_base(Path(base.name_or_path)), folder)


def composition(biased: bool = False, **options: Any) -> Build:
    """Three members of ranks 2, 4 and 3, on different modules, with weights that differ."""

    def build(base: Any, scratch: Path) -> PeftModel:
        members = {}
        rows = [{"r": 2, "target_modules": ATTENTION}, {"r": 4, "use_rslora": True}, {"r": 3, "lora_alpha": 3}]
        for i, row in enumerate(rows):
            row = {"target_modules": ATTENTION, "lora_bias": True} | row if biased else row
            lora(**row)(load_base(Path(base.name_or_path)), scratch).save_pretrained(scratch / str(i))
            members[f"member{i}"] = str(scratch / str(i))
        model = ours.compose(base, members, adapter_name="default", **options)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        return model.eval()  # which projects the weights of a simplex

    return build


def selected(expand: Any = None, **options: Any) -> Build:
    """WeightLoRA that kept 6 of 14 adapters, or with `expand` 3 of twice the rank."""

    def build(base: Any, _: Path) -> PeftModel:
        config = ours.LoomConfig.weightlora(r=4, lora_alpha=6, target_modules=LINEARS, **options)
        model = get_peft_model(base, config)
        optimizer = ours.build_optimizer(model, "weight_adam", lr=0.1, gate_lr=1.0)
        ours.AdapterSelection(model, optimizer, 6, warmup_steps=1, select_until=2, expand=expand)
        for _ in range(5):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
        return model

    return build


def edit_config(**changes: Any) -> Edit:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_tensors(change: Callable[[dict[str, torch.Tensor], str], None]) -> Edit:
    """`change` gets the tensors and the name of the B of the first q_proj."""

    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors, next(key for key in tensors if "0.self_attn.q_proj" in key and "lora_B" in key))
        save_file(tensors, path, {"format": "pt"})

    return edit


def nan(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key][1, 1] = float("nan")


def integers(tensors: dict[str, torch.Tensor], key: str) -> None:
    for name in (key, key.replace("lora_B", "lora_A")):
        tensors[name] = tensors[name].mul(4).round().to(torch.int8)


def missing(tensors: dict[str, torch.Tensor], key: str) -> None:
    del tensors[key]


def unknown(tensors: dict[str, torch.Tensor], key: str) -> None:
    tensors[key.replace("lora_B", "lora_C")] = tensors[key].clone()


def elsewhere(tensors: dict[str, torch.Tensor], key: str) -> None:
    for name in (key, key.replace("lora_B", "lora_A")):
        tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()


def pruned(build: Build) -> Build:
    def with_zero_rows(base: Any, scratch: Path) -> PeftModel:
        model = build(base, scratch)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter[3].zero_()
        return model

    return with_zero_rows
