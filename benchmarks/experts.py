"""Training steps of mixtures of experts on the CPU: PEFT's ``target_parameters`` and loraloom's, on equal weights.

Models of the shapes of Mixtral (8 experts, 2 a token) and GPT-OSS (32 experts, 4 a token), scaled down, with random
weights; adapters on the experts alone. For each way in which transformers multiplies: CPU seconds of the process for
forward and backward (median; the contenders take turns), peak bytes of tensors alive, bytes that autograd saves,
floating-point operations, and the largest difference of outputs and gradients relative to the largest entry.

    python -m benchmarks.experts --out docs/benchmarks/experts_cpu.json
"""

import argparse
import gc
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

from benchmarks.whole_model import Peak, saved_bytes, step, touch, write
from loraloom import LoomConfig

CONTENDERS = {"PEFT": LoraConfig, "loraloom": LoomConfig}
WAYS = ("eager", "grouped_mm")
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
COMMON = {"vocab_size": 1000, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
SHAPES: dict[str, tuple[Any, Any, dict[str, int]]] = {
    "Mixtral": (MixtralForCausalLM, MixtralConfig, {"hidden_size": 512, "intermediate_size": 1792}),
    "GPT-OSS": (
        GptOssForCausalLM,
        GptOssConfig,
        {
            "hidden_size": 384,
            "intermediate_size": 384,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "head_dim": 48,
        },
    ),
}
TINY = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 4}


def adapted(shape: str, contender: str, way: str, tiny: bool) -> nn.Module:
    """A model with adapters by one of the contenders; the base and the random adapter are the same for all."""
    kind, config, sizes = SHAPES[shape]
    torch.manual_seed(0)
    model = kind(config(**COMMON, **(sizes | TINY if tiny else sizes)))
    model.config._experts_implementation = way
    model = get_peft_model(
        model, CONTENDERS[contender](r=16, lora_alpha=32, target_modules=[], target_parameters=TARGETS)
    )
    generator = torch.Generator().manual_seed(1)
    factors = {name.replace("loom_", ""): p for name, p in model.named_parameters() if "lora_" in name}
    with torch.no_grad():
        for name in sorted(factors):
            factors[name].normal_(std=0.02, generator=generator)
    return model.train()


def batch(tiny: bool) -> dict[str, torch.Tensor]:
    """2 texts of 256 tokens."""
    ids = torch.randint(0, 1000, (2, 8 if tiny else 256), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def gradients(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The logits and every adapter's gradient."""
    output = model(**inputs)
    output.loss.backward()
    found = {n.replace("loom_", ""): p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return {"logits": output.logits.detach(), **found}


def difference(models: dict[str, nn.Module], inputs: dict[str, torch.Tensor]) -> float:
    """The largest over tensors of ``max |ours - PEFT's| / max |PEFT's|``."""
    theirs, ours = (gradients(models[name], inputs) for name in ("PEFT", "loraloom"))
    if theirs.keys() != ours.keys():
        raise RuntimeError(f"other tensors have gradients: {sorted(theirs.keys() ^ ours.keys())[:3]}")
    return max(((ours[n] - g).abs().max() / g.abs().max()).item() for n, g in theirs.items())


def counted(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
    """Peak bytes, saved bytes and floating-point operations of a step."""
    saved = saved_bytes(model, inputs)
    model.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False) as flops:
        step(model, inputs)
    model.zero_grad(set_to_none=True)
    gc.collect()
    with Peak() as peak:
        step(model, inputs)
    model.zero_grad(set_to_none=True)
    return {"peak_bytes": peak.most, "saved_bytes": saved, "flops": flops.get_total_flops()}


def timed(models: dict[str, nn.Module], inputs: dict[str, torch.Tensor], rounds: int) -> dict[str, float]:
    """Median CPU seconds of the process for a step; the contenders alternate."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for i in range(rounds + 1):
        for name in [*models] if i % 2 else [*models][::-1]:
            touch(models[name])
            start = time.process_time()
            step(models[name], inputs)
            if i:  # the first round warms up
                times[name].append(time.process_time() - start)
            models[name].zero_grad(set_to_none=True)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(shape: str, way: str, rounds: int, tiny: bool) -> list[dict[str, Any]]:
    """One row for each contender."""
    inputs = batch(tiny)
    models = {name: adapted(shape, name, way, tiny) for name in CONTENDERS}
    off = difference(models, inputs)
    times = timed(models, inputs, rounds)
    counts = {name: counted(model, inputs) for name, model in models.items()}
    place = {"shape": shape, "way": way, "difference": off}
    return [place | {"by": name, "cpu_seconds": round(times[name], 4)} | counts[name] for name in models]


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows, with multiples of PEFT's."""
    result = Table("shape", "way", "by", "CPU s", "peak MB", "saved MB", "GFLOP", "difference")
    theirs: dict[str, Any] = {}
    for row in rows:
        theirs = row if row["by"] == "PEFT" else theirs
        units = {"cpu_seconds": 1, "peak_bytes": 1e6, "saved_bytes": 1e6, "flops": 1e9}
        cells = [f"{row[key] / unit:.3g} ({row[key] / theirs[key]:.2f})" for key, unit in units.items()]
        result.add_row(row["shape"], row["way"], row["by"], *cells, f"{row['difference']:.1e}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each contender")
    parser.add_argument("--tiny", action="store_true", help="models of a second, to see that the script works")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    rows = [row for shape in SHAPES for way in WAYS for row in compare(shape, way, args.rounds, args.tiny)]
    Console(width=120).print(table(rows))
    if args.out:
        write(args.out, rows, args.rounds, load)


if __name__ == "__main__":
    main()
