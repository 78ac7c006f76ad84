"""N pre-trained adapters on one linear layer, forward + backward: a composition, and N that simply add up, beside PEFT.

The contenders run in one process on the same layer and input, one step of each in turn, in an order that is drawn anew
for every round; a number is the median over the rounds (the way of adapter_layer.py, from which the parts are). PEFT
and "N summed" train A and B of every adapter; a composition trains its N weights. "PEFT, N frozen" is PEFT's loop
without gradients of A and B, which is less than a composition computes. Before anything is timed, all are compared on
the same adapters. The first row times PEFT against a copy of itself: how far it is from 1.00 is how far to trust.

    python -m benchmarks.composition --out composition.json
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import peft
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from torch import nn

import loraloom
from benchmarks.adapter_layer import Contender, Linears, Setting, build, row, show
from loraloom import LoomConfig, compose

COUNTS, RANK = (1, 4, 8, 16, 32), 8
CONFIG = {"r": RANK, "lora_alpha": 32, "target_modules": r"layers\.\d+"}
ROUNDS = {64: 60, 256: 40, 1024: 15}


def models(base: list[nn.Linear]) -> dict[str, nn.Module]:
    """Every model by its name in the tables."""
    made: dict[str, nn.Module] = {"bare layer": Linears(base)}
    for n in COUNTS:
        made[f"PEFT, {n} active"] = build(base, LoraConfig(**CONFIG), n)
        made[f"{n} summed"] = build(base, LoomConfig(**CONFIG), n)
        made[f"PEFT, {n} frozen"] = build(base, LoraConfig(**CONFIG), n).requires_grad_(False)
        with tempfile.TemporaryDirectory() as folder:
            members = save(base, n, Path(folder))
            made[f"composition of {n}"] = compose(Linears(base), members, constraint="softmax").get_base_model().train()
            made[f"check {n}"] = compose(Linears(base), members, dict.fromkeys(members, 1.0)).get_base_model()
    made["PEFT, 32 active, copy"] = build(base, LoraConfig(**CONFIG), 32)
    return made


def save(base: list[nn.Linear], count: int, folder: Path) -> dict[str, Path]:
    """The adapters of PEFT's model, each in a folder of its own."""
    stacked = build(base, LoraConfig(**CONFIG), count)
    for i in range(count):
        single = get_peft_model(Linears([nn.Linear(b.in_features, b.out_features) for b in base]), LoraConfig(**CONFIG))
        for layer, source in zip(single.get_base_model().layers, stacked.layers, strict=True):
            for part in ("lora_A", "lora_B"):
                getattr(layer, part)["default"].weight.data = getattr(source, part)[f"a{i}"].weight.data.clone()
        single.save_pretrained(folder / f"a{i}")
    return {f"a{i}": folder / f"a{i}" for i in range(count)}


def comparisons() -> Iterator[tuple[str, str, float | None]]:
    """(what, peer, goal as a ratio of times, or None where no goal was set)."""
    yield "PEFT, 32 active, copy", "PEFT, 32 active", None
    for n in COUNTS:
        last = n == COUNTS[-1]
        yield f"composition of {n}", f"PEFT, {n} active", 0.15 if last else None
        yield f"composition of {n}", f"PEFT, {n} frozen", None
        yield f"composition of {n}", "bare layer", 2.0 if last else None
        yield f"{n} summed", f"PEFT, {n} active", 0.25 if last else None


def check_same_output(made: dict[str, nn.Module], x: torch.Tensor) -> None:
    """Raises if loraloom and PEFT differ on the same weights: a fast wrong answer is no result."""
    tolerance = 1e-4 if x.dtype == torch.float32 else 5e-2
    for n in COUNTS:
        with torch.no_grad():
            (theirs,) = made[f"PEFT, {n} active"](x)
            for name in (f"{n} summed", f"check {n}"):
                (ours,) = made[name](x)
                error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
                if error > tolerance:
                    raise AssertionError(f"{name} differs from PEFT by {error:.1e} of the largest output")
        del made[f"check {n}"]


def time_setting(setting: Setting) -> list[dict]:
    """Rows of medians in ms: all contenders step by step in turn, the order shuffled every round."""
    base = setting.linears(1)
    made = models(base)
    made["bare layer"].requires_grad_(False)
    x, grad = setting.tensor(1).requires_grad_(), setting.tensor(2)
    check_same_output(made, x)
    runners = {name: Contender(model, setting) for name, model in made.items()}
    order, shuffle, warmup = list(runners.values()), random.Random(0).shuffle, 3
    for _ in range(warmup + ROUNDS[setting.tokens]):
        shuffle(order)
        for runner in order:
            runner.measure(x, [grad])
    median = {name: statistics.median(runner.times[warmup:]) for name, runner in runners.items()}
    place = asdict(setting)
    return [row(place, what, peer, median[what], median[peer], goal) for what, peer, goal in comparisons()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", choices=ROUNDS, default=list(ROUNDS))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    settings = [Setting(args.device, "fp32", 1024, tokens) for tokens in args.tokens]
    rows = [r for setting in track(settings, "timing", transient=True) for r in time_setting(setting)]
    show(Console(width=160), "forward + backward of one linear layer, x.requires_grad, rank 8, median", rows, "ms", 1)
    if args.out:
        machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
        versions = {module.__name__: module.__version__ for module in (torch, peft, loraloom)}
        environment = {"machine": machine, "threads": args.threads, "rounds": ROUNDS, "versions": versions}
        args.out.write_text(json.dumps({"environment": environment, "time_ms": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
