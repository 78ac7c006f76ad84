"""Whole training steps on the CPU: PEFT's LoRA and DoRA, the same sped up, and loraloom's own adapters.

A BERT of MiniLM's size and a small Llama on random weights and tokens, every linear layer adapted. For each: seconds of
forward and backward (median over rounds in which the contenders take turns in an order drawn anew), bytes that autograd
saves beyond those of the bare model, peak bytes of tensors alive, and launches as `benchmarks/counts.py` counts them.
Counts are the same on any machine. Times are meant for a machine with nothing else to do: the load is recorded.

    python -m benchmarks.whole_model --out whole_model_cpu.json
"""

import argparse
import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakSet, finalize

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import loraloom
from benchmarks.counts import Counter
from loraloom import LoomConfig, speed_up

MODELS = ("bert", "llama")
METHODS = ("lora", "dora")
CONTENDERS = ("PEFT", "sped up", "loraloom")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def base(kind: str, tiny: bool) -> nn.Module:
    """A model with random weights, the same every time."""
    torch.manual_seed(0)
    if kind == "bert":
        size = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
        if tiny:
            size |= {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
        return BertForSequenceClassification(BertConfig(vocab_size=1000, **size))
    size = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
    if tiny:
        size |= {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_key_value_heads=4, **size))


def adapted(kind: str, method: str, contender: str, precision: str, checkpointing: bool, tiny: bool) -> nn.Module:
    """A model with adapters by one of the contenders; with ``method`` "bare" it has none."""
    model: Any = base(kind, tiny).to(PRECISIONS[precision])
    names = ["query", "key", "value", "dense"]
    if kind == "llama":
        names = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    options = {"r": 16, "lora_alpha": 32, "target_modules": names, "use_dora": method == "dora"}
    options["exclude_modules"] = ".*pooler.*" if kind == "bert" else None
    if method == "bare":
        model.requires_grad_(False)
    else:
        config = LoomConfig(**options) if contender == "loraloom" else LoraConfig(**options)
        model = get_peft_model(model, config)
    if contender == "sped up":
        assert not speed_up(model).kept
    model.enable_input_require_grads()
    if checkpointing:
        inner = model if method == "bare" else model.get_base_model()
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def batch(kind: str, tiny: bool) -> dict[str, torch.Tensor]:
    """8 texts of 128 tokens (BERT), or 2 of 256 (Llama)."""
    rows, length = (2, 8) if tiny else (8, 128) if kind == "bert" else (2, 256)
    ids = torch.randint(0, 1000, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids[:, 0] % 2 if kind == "bert" else ids}


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    model(**inputs).loss.backward()


def saved_bytes(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes that autograd saves, each storage once, parameters left out."""
    seen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = 0
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            alive.append(tensor)  # else another tensor could get its address
            total += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs).loss.backward()
    return total


class Peak(TorchDispatchMode):
    """The most bytes of storages alive at once among those made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: WeakSet[Any] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage not in self.known:
                    self.known.add(storage)
                    self.now += storage.nbytes()
                    finalize(storage, self._freed, storage.nbytes())
                    self.most = max(self.most, self.now)
        return result

    def _freed(self, size: int) -> None:
        self.now -= size


def counted(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, int]:
    """Launches, saved bytes and peak bytes of a step on changed weights; a norm that is cached would not show."""
    touch(model)
    with Counter() as counter:
        step(model, inputs)
    model.zero_grad(set_to_none=True)
    touch(model)
    saved = saved_bytes(model, inputs)
    model.zero_grad(set_to_none=True)
    touch(model)
    gc.collect()
    with Peak() as peak:
        step(model, inputs)
    model.zero_grad(set_to_none=True)
    return {"launches": counter.launches, "saved_bytes": saved, "peak_bytes": peak.most}


def touch(model: nn.Module) -> None:
    """Changes every adapter weight in place, as an optimizer does."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-6)


def timed(models: dict[str, nn.Module], inputs: dict[str, torch.Tensor], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, the contenders taking turns."""
    order = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in models}
    for i in range(rounds + 1):
        for name in order.sample([*models], len(models)):
            model = models[name]
            touch(model)
            start = time.perf_counter()
            step(model, inputs)
            if i:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
            model.zero_grad(set_to_none=True)
    return {name: statistics.median(values) for name, values in times.items()}


def compare(
    kind: str, method: str, precision: str, checkpointing: bool, rounds: int, tiny: bool
) -> list[dict[str, Any]]:
    """One row for each contender."""
    place = {"model": kind, "method": method, "precision": precision, "checkpointing": checkpointing}
    make: Callable[[str, str], nn.Module] = lambda m, c: adapted(kind, m, c, precision, checkpointing, tiny)  # noqa: E731
    inputs = batch(kind, tiny)
    bare = counted(make("bare", "PEFT"), inputs)
    models = {name: make(method, name) for name in CONTENDERS}
    counts = {name: counted(model, inputs) for name, model in models.items()}
    times = timed(models, inputs, rounds) if rounds else {}
    return [
        place
        | {"by": name, "ms": round(times[name], 2) if rounds else None}
        | {key: value - (bare[key] if key != "peak_bytes" else 0) for key, value in counts[name].items()}
        for name in models
    ]


def table(rows: list[dict[str, Any]], timing: bool) -> Table:
    """The rows as multiples of PEFT's."""
    result = Table("model", "precision", "checkpointing", "method", "by", "time", "launches", "saved", "peak")
    theirs: dict[str, Any] = {}
    for row in rows:
        theirs = row if row["by"] == "PEFT" else theirs
        keys = (["ms"] if timing else []) + ["launches", "saved_bytes", "peak_bytes"]
        ratios = [f"{row[key] / theirs[key]:.2f}" if theirs[key] else "-" for key in keys]
        place = [row["model"], row["precision"], "yes" if row["checkpointing"] else "no", row["method"], row["by"]]
        result.add_row(*place, *([] if timing else ["-"]), *ratios)
    return result


def write(out: Path, rows: list[dict[str, Any]], rounds: int, load: float) -> None:
    """The rows as JSON, with the machine, its load before the first of them, and the versions."""
    threads = torch.get_num_threads()
    machine = {"processor": platform.processor() or platform.machine(), "threads": threads, "load_before": load}
    versions = {m.__name__: m.__version__ for m in (torch, peft, transformers, loraloom)}
    document = {"machine": machine, "versions": versions, "rounds": rounds, "rows": rows}
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of each contender; 0 only counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="models of a second, to see that the script works")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    rows = [
        row
        for kind in MODELS
        for precision in (["bf16"] if args.tiny else PRECISIONS)
        for checkpointing in ([True] if args.tiny else [False, True])
        for method in METHODS
        for row in compare(kind, method, precision, checkpointing, args.rounds, args.tiny)
    ]
    Console(width=120).print(table(rows, args.rounds > 0))
    if args.out:
        write(args.out, rows, args.rounds, load)


if __name__ == "__main__":
    main()
