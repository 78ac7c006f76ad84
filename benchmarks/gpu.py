"""Adapter layers and whole steps on a GPU, in nine minutes: PEFT, the same sped up, and loraloom's own adapters.

The layer table has a linear layer with bf16 weights, or in NF4, and float32 adapters, on 512 to 16384 tokens: LoRA,
DoRA, and 8 and 32 active adapters. The step is that of a Llama of 1B shape on random weights. For each: milliseconds of
forward and backward (median, contenders in turns), peak memory above what was there before, launches as
`benchmarks/counts.py` counts them, and how often the host waited for the device. Cells for which no time is left are
not run, and named.

    python -m benchmarks.gpu --out gpu.json
    python -m benchmarks.gpu --tiny             # one small size of everything, on the CPU too: that the script works
"""

import argparse
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import loraloom
from benchmarks.counts import Counter
from loraloom import LoomConfig, speed_up

MINUTES = 9.0
CONTENDERS = ("PEFT", "sped up", "loraloom")
ADAPTERS = {"LoRA": (1, False), "DoRA": (1, True), "8 LoRA": (8, False), "32 LoRA": (32, False)}
Step = Callable[[], None]


class Clock:
    """What is left of the nine minutes."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes
        self.skipped: list[str] = []

    def allows(self, cell: str) -> bool:
        if time.monotonic() < self.end:
            return True
        self.skipped.append(cell)
        return False


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def adapters(model: nn.Module, contender: str, count: int, dora: bool, targets: list[str]) -> PeftModel:
    """The model with so many active adapters by one of the contenders."""
    config_type = LoomConfig if contender == "loraloom" else LoraConfig
    config = {"r": 16, "lora_alpha": 32, "target_modules": targets, "use_dora": dora}
    result = get_peft_model(model, config_type(**config), "a0")
    for i in range(1, count):
        result.add_adapter(f"a{i}", config_type(**config))
    result.base_model.set_adapter([f"a{i}" for i in range(count)])
    if contender == "sped up":
        assert not speed_up(result).kept
    return result.train()


def linear(base: str, width: int, device: str) -> nn.Module:
    """One frozen layer with bf16 weights, or in NF4."""
    torch.manual_seed(0)
    if base == "bf16":
        return nn.Sequential(nn.Linear(width, width, bias=False, device=device, dtype=torch.bfloat16))
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(width, width, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.support_avx512bf16_for_cpu = False
    model = nn.Sequential(layer).to(device)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # what PEFT looks for
    return model


def layer_step(base: str, width: int, tokens: int, contender: str, count: int, dora: bool, device: str) -> Step:
    model = adapters(linear(base, width, device), contender, count, dora, ["0"])
    x = torch.randn(1, tokens, width, device=device, dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(1, tokens, width, device=device, dtype=torch.bfloat16)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]

    def step() -> None:
        touch(wanted[1:])
        torch.autograd.grad(model(x), wanted, grad)

    return step


def model_step(contender: str, dora: bool, tokens: int, device: str, tiny: bool) -> Step:
    """A step of a Llama of 1B shape (16 layers, 2048 wide) in bf16, with gradient checkpointing."""
    torch.manual_seed(0)
    size = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    if tiny:
        size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=1000 if tiny else 32000, num_key_value_heads=4, use_cache=False, **size)
    with torch.device(device):
        base = LlamaForCausalLM(config).to(torch.bfloat16)
    targets = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    model = adapters(base, contender, 1, dora, targets)
    model.enable_input_require_grads()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(0, config.vocab_size, (1, tokens), device=device)
    weights = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        touch(weights)
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def touch(weights: list[torch.Tensor]) -> None:
    """Changes adapter weights in place, as an optimizer does, so that no norm is cached from the step before."""
    with torch.no_grad():
        for weight in weights:
            weight.add_(1e-6)


def host_waits(step: Step, device: str) -> int | None:
    """How often the host waits for the device during a step."""
    if device != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def measure(steps: dict[str, Step], device: str, rounds: int) -> Iterator[dict[str, Any]]:
    """A row for each contender."""
    counts: dict[str, dict[str, Any]] = {}
    for name, step in steps.items():
        step()  # warms up
        with Counter() as counter:
            step()
        counts[name] = {"launches": counter.launches, "host_waits": host_waits(step, device), "peak_bytes": None}
        if device == "cuda":
            wait(device)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step()
            wait(device)
            counts[name]["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    order, times = random.Random(0), {name: [] for name in steps}  # type: ignore[var-annotated]
    for _ in range(rounds):
        for name in order.sample([*steps], len(steps)):
            wait(device)
            start = time.perf_counter()
            steps[name]()
            wait(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    for name in steps:
        yield {"by": name, "ms": round(statistics.median(times[name]), 4), **counts[name]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        parser.error("there is no GPU here: --tiny shows that the script works, and measures nothing")
    clock, rows, rounds = Clock(args.minutes), [], 2 if args.tiny else 20
    width, sizes = (64, (16,)) if args.tiny else (4096, (512, 2048, 8192, 16384))
    for tokens in sizes[-1:] if args.tiny else (2048, 8192):
        for dora in (False, True):
            place = {"what": "step, Llama of 1B shape", "tokens": tokens, "adapter": "DoRA" if dora else "LoRA"}
            if clock.allows(str(place)):
                for name in CONTENDERS:  # one at a time: three such models need not fit
                    steps = {name: model_step(name, dora, tokens, device, args.tiny)}
                    rows += [place | row for row in measure(steps, device, max(rounds // 4, 1))]
                    del steps
    for base in ("bf16", "nf4"):
        for tokens in sizes:
            for adapter, (count, dora) in ADAPTERS.items():
                place = {"what": f"layer, {base}", "tokens": tokens, "adapter": adapter}
                if clock.allows(str(place)):
                    steps = {c: layer_step(base, width, tokens, c, count, dora, device) for c in CONTENDERS}
                    rows += [place | row for row in measure(steps, device, rounds)]
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    console = Console(width=140)
    console.print(table)
    if clock.skipped:
        console.print(f"No time was left for {len(clock.skipped)} cells: {'; '.join(clock.skipped)}")
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    versions = {m.__name__: m.__version__ for m in (torch, peft, transformers, loraloom)}
    if args.out:
        document = {"device": name, "tiny": args.tiny, "versions": versions, "skipped": clock.skipped, "rows": rows}
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
