"""Combining LoRA adapters beside PEFT's `add_weighted_adapter`: CPU time, memory, and how far the sum is off.

Both work on the same factors in memory and take turns in one process: ours is `loraloom.update.combine.combine` layer
by layer, PEFT's is the method of a model that holds the members, its new adapter included. Pairs that do the same:

    sum          ours "linear": exact, ranks add up       PEFT "cat": the same
    sum, rank r  ours "linear" with rank: factored SVD    PEFT "svd": of the dense sum; "linear": A and B apart
    ties         ours: of the updates, then rank r        PEFT "ties_svd": the same; "ties": A and B apart
    dare         ours: of the updates, then rank r        PEFT "dare_linear_svd": the same; "dare_linear": A and B apart
    core         ours: task singular vectors              -

Seconds are of CPU of one thread, the least of the rounds. Memory is the peak of the process above what it held before,
by the kernel's high-water mark (VmHWM, reset before each), with an allocator that gives back what is freed. `off` is
||D - sum|| / ||sum||, where the sum is asked for.

    MALLOC_MMAP_THRESHOLD_=65536 python -m benchmarks.combine --out docs/benchmarks/combine_cpu.json
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from loraloom.update.combine import combine

MEMBERS, RANK, LAYERS = 4, 16, 4
WEIGHTS = [0.7, 0.5, -0.3, 0.4]
ROWS = {
    "sum": [("ours linear", "linear", None), ("PEFT cat", "cat", None)],
    "sum, rank r": [("ours linear", "linear", RANK), ("PEFT svd", "svd", RANK), ("PEFT linear", "linear", None)],
    "ties": [("ours ties", "ties", RANK), ("PEFT ties_svd", "ties_svd", RANK), ("PEFT ties", "ties", None)],
    "dare": [
        ("ours dare", "dare", RANK),
        ("PEFT dare_linear_svd", "dare_linear_svd", RANK),
        ("PEFT dare_linear", "dare_linear", None),
    ],
    "core": [("ours core", "core", RANK)],
}


def model_of(width: int) -> peft.PeftModel:
    """Linear layers with members whose factors are random."""
    generator = torch.Generator().manual_seed(width)
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=[str(i) for i in range(LAYERS)])
    model = peft.get_peft_model(
        nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS))), config, "0"
    )
    for name in range(1, MEMBERS):
        model.add_adapter(str(name), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def layers_of(model: peft.PeftModel) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)]


@torch.no_grad()
def ours(model: peft.PeftModel, method: Any, rank: int | None) -> list[torch.Tensor]:
    """The combined factors, as deltas when asked for."""
    made = []
    for layer in layers_of(model):
        members = [(layer.lora_A[str(n)].weight, layer.lora_B[str(n)].weight) for n in range(MEMBERS)]
        A, B, _ = combine(members, WEIGHTS, method, rank=rank)
        made.append((A, B))
    return [partial(torch.mm, B, A) for A, B in made]  # type: ignore[misc]


def theirs(model: peft.PeftModel, method: str, rank: int | None) -> list[Any]:
    names = [str(n) for n in range(MEMBERS)]
    options: dict[str, Any] = {"svd_rank": rank} if rank else {}
    if method.startswith(("ties", "dare")):
        options["density"] = 0.5
    model.add_weighted_adapter(names, WEIGHTS, "made", combination_type=method, **options)
    return [partial(layer.get_delta_weight, "made") for layer in layers_of(model)]


def peak_above(work: Callable[[], Any]) -> tuple[float, int, Any]:
    """Seconds of CPU, bytes of the peak above the start, and the result."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    start = time.process_time()
    result = work()
    return time.process_time() - start, _status("VmHWM") - before, result


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


@torch.no_grad()
def measure(width: int, rounds: int) -> list[dict[str, Any]]:
    model = model_of(width)
    exact = [sum(w * layer.get_delta_weight(str(n)) for n, w in enumerate(WEIGHTS)) for layer in layers_of(model)]
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for _ in range(rounds):
        for what, contenders in ROWS.items():
            for name, method, rank in contenders:
                work = partial(ours if name.startswith("ours") else theirs, model, method, rank)
                seconds, peak, deltas = peak_above(work)
                row = rows.setdefault((what, name), {"width": width, "what": what, "who": name, "seconds": seconds})
                row["seconds"] = min(row["seconds"], seconds)
                row["peak_bytes"] = max(row.get("peak_bytes", peak), peak)
                if what.startswith("sum"):
                    pairs = [(delta(), D) for delta, D in zip(deltas, exact, strict=True)]
                    off = sum(float((a - b).square().sum()) for a, b in pairs)
                    row["off"] = (off / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5
                if "made" in model.peft_config:
                    model.delete_adapter("made")
    return list(rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--note", default="", help="what to know of the machine, for the file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("width", "what", "who", "CPU s", "peak MB", "off")
    rows = [row for width in options.widths for row in measure(width, options.rounds)]
    for row in rows:
        off = f"{row['off']:.1e}" if "off" in row else ""
        numbers = f"{row['seconds']:.3f}", f"{row['peak_bytes'] / 1e6:.0f}", off
        table.add_row(str(row["width"]), row["what"], row["who"], *numbers)
    setting = {"members": MEMBERS, "rank": RANK, "layers": LAYERS, "rounds": options.rounds, "threads": 1}
    setting |= {"torch": torch.__version__, "peft": peft.__version__, "machine": platform.machine()}
    if options.note:
        setting["note"] = options.note
    if options.out:
        options.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
