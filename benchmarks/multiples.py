"""Adapter layers as multiples of the bare layer: loraloom, PEFT, and the floor, on the CPU in float32.

One linear layer, forward and backward to the input and the adapter. All contenders run in one process on the same layer
and input, one step of each in turn, in an order that is drawn anew for every round; a number is the median over the
rounds divided by the bare layer's (frozen weight, gradient of the input). Before each step the adapter's weights are
changed in place, as an optimizer does, not timed. "Floor" is the bare sequence of torch operations, with neither module
nor autograd. "PEFT LoRA, copy" beside "PEFT LoRA" says how far a number can be trusted.

The rows of adapter_names are forward passes of 32 samples with 1, 8 and 32 adapters, of 16 tokens each.

    python -m benchmarks.multiples --out layer_multiples_cpu.json
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import loraloom
from benchmarks.adapter_layer import Linears, Setting, build
from benchmarks.composition import save
from loraloom import LoomConfig, compose

RANK, MANY, MANY_RANK, ALPHA, SAMPLES = 16, 32, 8, 32, 32
ROUNDS = {64: 100, 256: 40, 512: 25, 1024: 15}

Step = Callable[[], object]


class Layer:
    """A model whose step is timed: forward and backward."""

    def __init__(self, model: nn.Module, x: Tensor, grad: Tensor) -> None:
        self.model, self.x, self.grad = model, x, grad
        self.weights = [p for p in model.parameters() if p.requires_grad]

    def prepare(self) -> None:
        with torch.no_grad():
            for weight in self.weights:
                weight.add_(1e-6)
        self.x.grad = None
        self.model.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        (y,) = self.model(self.x)
        y.backward(self.grad)


def floors(base: nn.Linear, x: Tensor, g: Tensor) -> dict[str, Step]:
    """The operations of each layer on matrices, forward and backward."""
    W, bias = base.weight.detach(), base.bias.detach()
    x, g = x.detach().flatten(0, 1), g.flatten(0, 1)
    rank = MANY * MANY_RANK
    A, B, m, squared = torch.randn(RANK, len(W)), torch.randn(len(W), RANK), torch.ones(len(W)), W.square().sum(1)
    As, Bs = torch.randn(MANY, MANY_RANK, len(W)), torch.randn(MANY, len(W), MANY_RANK)
    stacked, gate = (As.flatten(0, 1), torch.cat([*Bs], 1)), torch.ones(rank)

    def backward(g: Tensor, h: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, ...]:
        dx, t = g @ W, g @ B
        return dx.addmm_(t, A, alpha=2.0), t.t() @ x, g.t() @ h

    def lora() -> object:
        z, h = torch.addmm(bias, x, W.t()), x @ A.t()
        return z.addmm_(h, B.t(), alpha=2.0), backward(g, h, A, B)

    def dora() -> object:
        both, h = torch.cat([x, A]) @ W.t(), x @ A.t()
        z, products = both[: len(x)].addmm_(h, B.t(), alpha=2.0), both[len(x) :].t()
        norm = (squared + products.addmm_(B, A @ A.t(), alpha=2.0, beta=2).mul_(B).sum(1)).sqrt_()
        c = m / norm
        y = torch.addcmul(bias, z, c)
        return y, backward(g * c, h, A, B), (g * z).sum(0) / norm

    def summed() -> object:
        A, B = torch.cat([*As]), torch.cat([*Bs], 1)
        z, h = torch.addmm(bias, x, W.t()), x @ A.t()
        return z.addmm_(h, B.t(), alpha=2.0), backward(g, h, A, B)

    def composition() -> object:
        A, B = stacked
        z, h = torch.addmm(bias, x, W.t()), x @ A.t()
        z.addmm_(h * gate, B.t())
        dx, t = g @ W, g @ B
        return z, (t * h).sum(0), dx.addmm_(t.mul_(gate), A)

    made = {"LoRA": lora, "DoRA": dora, f"{MANY} summed": summed, f"composition of {MANY}": composition}
    return {f"{name}, floor": torch.no_grad()(step) for name, step in made.items()}


def contenders(base: list[nn.Linear], x: Tensor, grad: Tensor) -> dict[str, Step]:
    one = {"r": RANK, "lora_alpha": ALPHA, "target_modules": r"layers\.\d+"}
    many = one | {"r": MANY_RANK}
    models = {
        "bare": Linears(base).requires_grad_(False),
        "PEFT LoRA": build(base, LoraConfig(**one)),
        "PEFT LoRA, copy": build(base, LoraConfig(**one)),
        "LoRA": build(base, LoomConfig.lora(**one)),
        "MoSLoRA": build(base, LoomConfig.moslora(**one)),
        "PEFT DoRA": build(base, LoraConfig(use_dora=True, **one)),
        "DoRA": build(base, LoomConfig.dora(**one)),
        f"PEFT {MANY} summed": build(base, LoraConfig(**many), MANY),
        f"{MANY} summed": build(base, LoomConfig.lora(**many), MANY),
    }
    with tempfile.TemporaryDirectory() as folder:
        composed = compose(Linears(base), save(base, MANY, Path(folder)))
        models[f"composition of {MANY}"] = composed.get_base_model().train()
    return {name: Layer(model, x, grad) for name, model in models.items()} | floors(base[0], x, grad)


def adapter_names(base: list[nn.Linear], tokens: int) -> dict[str, Step]:
    """Forward passes with one adapter for each sample."""
    x = torch.randn(SAMPLES, tokens, base[0].in_features)
    steps: dict[str, Step] = {}
    for by, config in (("PEFT ", LoraConfig), ("", LoomConfig)):
        model = build(base, config(r=RANK, lora_alpha=ALPHA, target_modules=r"layers\.\d+"), MANY).eval()
        for count in (1, 8, MANY):
            names = [f"a{i % count}" for i in range(SAMPLES)]
            steps[f"{by}adapter_names, {count}"] = torch.no_grad()(
                lambda layer=model.layers[0], names=names: layer(x, adapter_names=names)
            )
    with torch.no_grad():
        for count in (1, 8, MANY):
            ours, theirs = (steps[f"{by}adapter_names, {count}"]() for by in ("", "PEFT "))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    steps["bare"] = torch.no_grad()(lambda: base[0](x))
    return steps


def timed(steps: dict[str, Step], rounds: int, warmup: int = 3) -> dict[str, float]:
    """Median milliseconds of each, the contenders taking turns."""
    shuffle, order = random.Random(0), [*steps]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(warmup + rounds):
        for name in shuffle.sample(order, len(order)):
            step = steps[name]
            if isinstance(step, Layer):
                step.prepare()
            start = time.perf_counter()
            step()
            if i >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="of every setting, in place of what is the default for its tokens")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    rows = []
    base = Setting("cpu", "fp32", args.width, 1).linears(1)
    for tokens, rounds in [*ROUNDS.items(), (16 * SAMPLES, 25)]:
        mixed = len(rows) and tokens == 16 * SAMPLES and any(row["tokens"] == tokens for row in rows)
        setting = Setting("cpu", "fp32", args.width, tokens)
        x, grad = setting.tensor(1).requires_grad_(), setting.tensor(2)
        steps = adapter_names(base, 16) if mixed else contenders(base, x, grad)
        medians = timed(steps, args.rounds or rounds)
        rows += [
            {"tokens": tokens, "what": name, "ms": round(ms, 4), "multiple": round(ms / medians["bare"], 3)}
            for name, ms in medians.items()
        ]
    table = Table("tokens", "what", "ms", "multiple of the bare layer")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=100).print(table)
    if args.out:
        machine = {"processor": platform.machine(), "threads": args.threads, "load_before": load}
        versions = {module.__name__: module.__version__ for module in (torch, peft, loraloom)}
        args.out.write_text(json.dumps({"machine": machine, "versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
