"""loraloom's adapter layer beside PEFT's: time of forward + backward, and bytes saved for backward.

Both run in one process on the same input tensors, one step of each in turn, in an order that is drawn anew for every
round; a number is the median over the rounds. Before each timed step every adapter weight is changed in place, as an
optimizer would (not timed), so that nothing cached from the step before can help, except in the rows named "second
micro-batch", which time a second step on unchanged weights. Before anything is timed, the outputs of the two libraries
are compared with the same adapter weights. The first row times PEFT against a copy of itself: how far it is from 1.00
is how far any other row can be trusted.

    python benchmarks/adapter_layer.py --out adapter_layer.json
"""

import argparse
import contextlib
import gc
import json
import platform
import random
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from weakref import WeakSet

import peft
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn

import loraloom
from loraloom import LoomConfig

RANK, MANY_RANK, ALPHA = 16, 8, 32
MANY = (8, 32)
# Precision -> (dtype of base and input, whether the step runs under autocast). Adapters are float32 throughout.
PRECISIONS = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "autocast": (torch.bfloat16, True)}


class Linears(nn.Module):
    """Linear layers that read the same input, as q, k and v do."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.layers]


@dataclass(frozen=True)
class Setting:
    """Where and on what one comparison runs: a device, a precision, a width in features, a batch in tokens."""

    device: str
    precision: str
    width: int
    tokens: int

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16, enabled=PRECISIONS[self.precision][1])

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision][0]

    def tensor(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(1, self.tokens, self.width, generator=generator).to(self.device, self.dtype)

    def linears(self, count: int) -> list[nn.Linear]:
        """Base layers, made once and shared by all contenders, so that none has the luckier place in memory."""
        torch.manual_seed(0)
        return [nn.Linear(self.width, self.width).to(self.device, self.dtype) for _ in range(count)]


@dataclass
class Contender:
    """A model with its adapters active, and the times of its steps in ms."""

    model: nn.Module
    setting: Setting
    second: bool = False  # time the second micro-batch of an optimizer step instead of the first
    times: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = [p for p in self.model.parameters() if p.requires_grad]

    def step(self, x: torch.Tensor, grads: list[torch.Tensor]) -> None:
        with self.setting.autocast():
            outputs = self.model(x)
        torch.autograd.backward(outputs, grads)

    def clear(self, x: torch.Tensor) -> None:
        x.grad = None
        self.model.zero_grad(set_to_none=True)

    def measure(self, x: torch.Tensor, grads: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for weight in self.weights:
                weight.add_(1e-6)
        if self.second:
            self.step(x, grads)
        self.clear(x)
        wait(self.setting.device)
        start = time.perf_counter()
        self.step(x, grads)
        wait(self.setting.device)
        self.times.append(1e3 * (time.perf_counter() - start))
        self.clear(x)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def build(base: list[nn.Linear], config: PeftConfig, adapters: int = 1) -> nn.Module:
    """The base layers with `adapters` copies of `config`, all active; weights depend on nothing but their names."""
    torch.manual_seed(0)
    model = get_peft_model(Linears(base), config, "a0")
    names = [f"a{i}" for i in range(adapters)]
    for name in names[1:]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(names)
    for name, weight in model.named_parameters():
        part = next((p for p in ("lora_A", "lora_B") if p in name), None)
        if part is not None:
            key = (part, name.split("layers.")[1].split(".")[0], name.split(".")[-2])
            generator = torch.Generator().manual_seed(sum(map(ord, "/".join(key))))
            weight.data = torch.randn(weight.shape, generator=generator).mul_(0.02).to(weight.device)
    return model.get_base_model().train()


def models(base: list[nn.Linear]) -> dict[str, nn.Module]:
    """Every model by its name in the tables."""
    one = {"r": RANK, "lora_alpha": ALPHA, "target_modules": r"layers\.\d+"}
    many = one | {"r": MANY_RANK}
    made = {
        "PEFT LoRA": build(base, LoraConfig(**one)),
        "PEFT LoRA, copy": build(base, LoraConfig(**one)),
        "PEFT DoRA": build(base, LoraConfig(use_dora=True, **one)),
        "LoRA": build(base, LoomConfig.lora(**one)),
        "MoSLoRA": build(base, LoomConfig.moslora(**one)),
        "DoRA": build(base, LoomConfig.dora(**one)),
    }
    for n in MANY:
        made[f"PEFT LoRA, {n} active"] = build(base, LoraConfig(**many), n)
        made[f"LoRA, {n} active"] = build(base, LoomConfig.lora(**many), n)
    return made


def contenders(setting: Setting) -> dict[str, Contender]:
    made = models(setting.linears(1))
    result = {name: Contender(model, setting) for name, model in made.items()}
    for name in ("PEFT DoRA", "DoRA"):
        result[f"{name}, second micro-batch"] = Contender(made[name], setting, second=True)
    return result


def comparisons(setting: Setting) -> Iterator[tuple[str, str, float | None]]:
    """(what, peer, goal as a ratio of times, or None where no goal was set)."""
    narrow = setting.precision == "fp32" and setting.width == 1024
    yield "PEFT LoRA, copy", "PEFT LoRA", None
    yield "LoRA", "PEFT LoRA", 0.95 if narrow else None
    yield "MoSLoRA", "PEFT LoRA", 1.0 if narrow else None
    yield "DoRA", "PEFT DoRA", {64: 0.30, 512: 0.65}.get(setting.tokens) if narrow else None
    yield "DoRA", "PEFT LoRA", {512: 1.10}.get(setting.tokens) if narrow else None
    yield "DoRA, second micro-batch", "PEFT DoRA, second micro-batch", None
    yield "DoRA, second micro-batch", "DoRA", None
    for n in MANY:
        yield f"LoRA, {n} active", f"PEFT LoRA, {n} active", 0.25 if n == 32 and setting.precision == "fp32" else None


def check_same_output(runners: dict[str, Contender], x: torch.Tensor) -> None:
    """Raises if loraloom and PEFT differ on the same weights: a fast wrong answer is no result."""
    tolerance = 1e-4 if x.dtype == torch.float32 else 5e-2
    for name in ("LoRA", "DoRA", *(f"LoRA, {n} active" for n in MANY)):
        with torch.no_grad(), runners[name].setting.autocast():
            (ours,), (theirs,) = runners[name].model(x), runners[f"PEFT {name}"].model(x)
        error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
        if error > tolerance:
            raise AssertionError(
                f"{name} differs from PEFT by {error:.1e} of the largest output, at most {tolerance:.0e}"
            )


def row(place: dict, what: str, peer: str, value: float, peer_value: float, goal: float | None) -> dict:
    ratio = value / peer_value
    reached = None if goal is None else ratio <= goal
    measured = {"value": value, "peer_value": peer_value, "ratio": ratio, "goal": goal, "reached": reached}
    return place | {"what": what, "peer": peer} | measured


def time_setting(setting: Setting, rounds: int, warmup: int) -> list[dict]:
    """Rows of medians in ms: all contenders step by step in turn, the order shuffled every round."""
    runners = contenders(setting)
    x, grad = setting.tensor(1).requires_grad_(), setting.tensor(2)
    check_same_output(runners, x)
    order = list(runners.values())
    shuffle = random.Random(0).shuffle
    for _ in range(warmup + rounds):
        shuffle(order)
        for runner in order:
            runner.measure(x, [grad])
    median = {name: statistics.median(runner.times[warmup:]) for name, runner in runners.items()}
    place = asdict(setting)
    return [row(place, what, peer, median[what], median[peer], goal) for what, peer, goal in comparisons(setting)]


def graph_tensors(outputs: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Tensors that custom autograd functions keep as plain attributes, which saved_tensors_hooks does not see."""
    stack, seen = [y.grad_fn for y in outputs], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield from (v for v in getattr(node, "__dict__", {}).values() if isinstance(v, torch.Tensor))
        stack.extend(parent for parent, _ in node.next_functions)


class Saved:
    """What autograd keeps in place of a saved tensor; it dies with the graph node that holds it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def saved_bytes(model: nn.Module, x: torch.Tensor, setting: Setting) -> dict[str, int]:
    """Bytes kept for backward, each storage once, by owner: the model's weights, the input x, or the adapters' own."""
    held: WeakSet[Saved] = WeakSet()

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        held.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor), setting.autocast():
        outputs = model(x)
    tensors = [*(saved.tensor for saved in held), *graph_tensors(outputs)]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    result = {"weights": 0, "input": 0, "own": 0}
    for pointer, size in sizes.items():
        owner = "weights" if pointer in weights else "input" if pointer == x.untyped_storage().data_ptr() else "own"
        result[owner] += size
    return result


def saved_setting(setting: Setting) -> list[dict]:
    """Rows of bytes saved beyond weights and input, for one linear and for three that share their input."""
    x, rows = setting.tensor(1).requires_grad_(), []
    for count in (1, 3):
        made = models(setting.linears(count))
        saved = {name: saved_bytes(model, x, setting) for name, model in made.items()}
        for what, peer, goal in (
            ("LoRA", "PEFT LoRA", 0.5),
            ("MoSLoRA", "PEFT LoRA", None),
            ("DoRA", "PEFT DoRA", None),
            ("DoRA", "PEFT LoRA", None),
            *((f"LoRA, {n} active", f"PEFT LoRA, {n} active", None) for n in MANY),
        ):
            place = asdict(setting) | {"linears": count, "input": saved[what]["input"]}
            rows.append(row(place, what, peer, saved[what]["own"], saved[peer]["own"], goal))
    return rows


def show(console: Console, title: str, rows: list[dict], unit: str, scale: float) -> None:
    where = ("device", "precision", "width", "tokens", *(("linears",) if "linears" in rows[0] else ()))
    table = Table(title=title)
    for heading in (*where, "loraloom", "peer", unit, f"peer, {unit}", "ratio", "goal", ""):
        table.add_column(heading, justify="left" if heading in ("device", "precision", "loraloom", "peer") else "right")
    for r in rows:
        verdict = {None: "", True: "ok", False: "short"}[r["reached"]]
        goal = "-" if r["goal"] is None else f"{r['goal']:.2f}"
        numbers = (f"{r['value'] / scale:.3f}", f"{r['peer_value'] / scale:.3f}", f"{r['ratio']:.2f}", goal, verdict)
        table.add_row(*(str(r[key]) for key in where), r["what"], r["peer"], *numbers)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--quick", action="store_true", help="width 1024, fp32, fewer rounds")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cpu, and cuda as well where there is one")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    available = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    devices = [args.device] if args.device else available
    rounds, warmup = {64: 200, 512: 60, 1024: 40}, 5
    if args.quick:
        rounds = {tokens: n // 3 for tokens, n in rounds.items()}
    precisions = {"cpu": ["fp32", "bf16"], "cuda": ["fp32", "bf16", "autocast"]}
    settings = [
        Setting(device, precision, width, tokens)
        for device in devices
        for precision in (["fp32"] if args.quick else precisions[device])
        for width in ((1024,) if args.quick else (1024, 2048))
        for tokens in (64, 512, 1024)
    ]
    times: list[dict] = []
    for setting in track(settings, "timing", transient=True):
        times += time_setting(setting, rounds[setting.tokens], warmup)
        gc.collect()
    kept = [Setting(device, precision, 1024, 512) for device in devices for precision in ("bf16", "autocast")]
    saved = [r for setting in kept for r in saved_setting(setting)]
    console = Console(width=160)
    show(console, "forward + backward, x.requires_grad, median", times, "ms", 1)
    show(console, "saved for backward beyond weights and input, bf16 base, fp32 adapters", saved, "MiB", 2**20)
    if args.out:
        machine = torch.cuda.get_device_name() if "cuda" in devices else platform.machine()
        versions = {module.__name__: module.__version__ for module in (torch, peft, loraloom)}
        environment = {"machine": machine, "threads": args.threads, "rounds": rounds, "versions": versions}
        report = {"environment": environment, "time_ms": times, "saved_bytes": saved}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
