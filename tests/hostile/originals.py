"""The sound files that hostile ones are made of: a base, a tuned copy of it, three adapters, a finished run."""

import json
import shutil
from pathlib import Path

import peft
import torch

from tests.models import save_pico_llama

TARGETS = ["q_proj", "v_proj", "down_proj"]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def make_originals(folder: Path) -> None:
    """Writes the folders `base`, `sharded`, `tuned`, `lora`, `loom` and `composition`; sizes are under 200 kB each."""
    from loraloom import LoomConfig, compose

    torch.manual_seed(0)
    base, lora, loom = (folder / name for name in ("base", "lora", "loom"))
    save_pico_llama(base)
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    plain = peft.LoraConfig(**options, rank_pattern={"down_proj": 2}, alpha_pattern={"v_proj": 3})
    for where, config in (
        (lora, plain),
        (loom, LoomConfig(**options, use_mixer="orthogonal", use_gate=True)),
    ):
        model = peft.get_peft_model(_model(base), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "loom_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.peft_config["default"].base_model_name_or_path = str(base)
        model.save_pretrained(where, save_embedding_layers=False)
    tuned = model.merge_and_unload()
    tuned.save_pretrained(folder / "tuned")
    _model(base).save_pretrained(folder / "sharded", max_shard_size="20KB")
    both = compose(_model(base), {"one": lora, "two": loom}, weights="uniform")
    both.save_pretrained(folder / "both")
    inside = folder / "both" / "composition"
    (inside if inside.is_dir() else folder / "both").rename(folder / "composition")
    shutil.rmtree(folder / "both", ignore_errors=True)


def make_run(folder: Path) -> None:
    """Writes the finished run of two steps into `folder`/run, for `predict`."""
    from loraloom.cli.main import main

    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"the {c} dog", "label": c}) + "\n" for c in ("red", "blue") * 8))
    out = folder / "run"
    words = f"--model.name {folder / 'base'} --data.path {rows} --data.test_path {rows} --data.validation_fraction 0 "
    words += f"--method.name lora --method.r 2 --output.dir {out} --training.max_steps 2 --training.use_cpu true"
    (folder / "RUN.yaml").write_text("{}\n")
    if code := main(["train", str(folder / "RUN.yaml"), *words.split(), "--quiet"]):
        raise RuntimeError(f"loraloom train ended with {code}")


def _model(base: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)
