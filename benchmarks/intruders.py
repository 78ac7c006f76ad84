"""Intruder mitigation beside PEFT's `reduce_intruder_dimension`, on one square linear layer with a LoRA of rank 16.

Contenders take turns in one process, on copies of one model, and do the same: find the intruders among the first 10
directions (epsilon 0.5), scale all of them by 0.75, and store the result as an adapter of the same rank.

    peft      peft.tuners.lora.intruders.reduce_intruder_dimension
    cold      reduce_intruders(..., scope="all", rank="keep")
    cached    the same with the decomposition of the base weight at hand, as for every adapter after the first
    basis     what that decomposition costs, once per base weight
    scale     one more scale of a sweep

Times are seconds of CPU of one thread (--threads for more, and then wall-clock time), so that other processes disturb
them least; a number is the least of its rounds. Each size is written as soon as it is measured.

    python benchmarks/intruders.py --sizes 768 2048 4096 --out intruders.json
"""

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from rich.console import Console
from rich.table import Table
from torch import nn

from loraloom import BasisCache, find_intruders, reduce_intruders, sweep_intruders

RANK, SCALE = 16, 0.75
COLUMNS = ("peft", "cold", "cached", "basis", "scale", "cold / peft", "cached / peft")


class One(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.target = nn.Linear(width, width, bias=False)


def model_of(width: int) -> PeftModel:
    """A weight whose singular values fall over two to three decades, as those of trained square layers do, and an
    update whose own run from 1.5 times its norm down to 0.3: some directions are intruders, some are not."""
    generator = torch.Generator().manual_seed(width)
    base = One(width)
    with torch.no_grad():
        W = torch.randn(width, width, generator=generator) * torch.linspace(1, 0.2, width)
        base.target.weight.copy_(W / torch.linalg.vector_norm(W[0]))
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["target"]))
    layer: Any = model.base_model.model.target
    with torch.no_grad():
        strength = torch.linspace(3.0, 0.6, RANK).sqrt()
        for parameter in (layer.lora_A.default.weight, layer.lora_B.default.weight.T):
            Q = torch.linalg.qr(torch.randn(width, RANK, generator=generator)).Q
            parameter.copy_(Q.T * strength[:, None])
    return model


def delta(model: PeftModel) -> torch.Tensor:
    layer: Any = model.base_model.model.target
    return layer.get_delta_weight("new").detach()


def measure(width: int, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    source, bases = model_of(width), BasisCache()
    times: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = clock()
        result = work()
        times[name] = min(times.get(name, float("inf")), clock() - start)
        return result

    def scales(model: PeftModel) -> list[float]:
        stamps = [clock()]
        sweep_intruders(
            model, "default", [0.9, 0.8, 0.7], lambda _: stamps.append(clock()) or {}, scope="all", rank="keep"
        )
        return stamps

    lines: list[str] = []
    reduce = partial(reduce_intruders, new_adapter="new", scale=SCALE, scope="all", rank="keep")
    peer = partial(
        reduce_intruder_dimension, new_adapter_name="new", mitigation_lambda=SCALE, logging_sink=lines.append
    )
    timed("basis", partial(bases, source.base_model.model.target.weight))
    for i in range(rounds):
        ours, cached, theirs = (copy.deepcopy(source) for _ in range(3))
        report = timed("cold", partial(reduce, ours))
        known = timed("cached", partial(reduce, cached, bases=bases))
        stamps = scales(source)
        times["scale"] = min(times.get("scale", float("inf")), stamps[3] - stamps[2])
        if i < (1 if width >= 2048 else 3):
            timed("peft", partial(peer, theirs))
            reference = delta(theirs)
    # PEFT tells how many; which ones, the exact cosines do.
    count = int(lines[0].split("Intruders: ")[1])
    exact = find_intruders(source, bases=bases).layers[0]
    return {
        "width": width,
        **times,
        "cold / peft": times["cold"] / times["peft"],
        "cached / peft": times["cached"] / times["peft"],
        "intruders": len(report.layers[0].intruders),
        "same intruders": report.layers[0].intruders == exact.intruders == known.layers[0].intruders
        and count == len(exact.intruders),
        "delta, relative difference": float((delta(ours) - reference).norm() / reference.norm()),
        "decomposed": report.layers[0].exact,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[768, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="json file; rows of other sizes in it are kept")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    setting = {
        "threads": options.threads,
        "clock": "cpu seconds" if options.threads == 1 else "wall seconds",
        "torch": torch.__version__,
        "peft": peft.__version__,
        "machine": platform.machine(),
    }
    rows = json.loads(options.out.read_text())["rows"] if options.out and options.out.exists() else []
    table = Table("width", *COLUMNS, "same intruders")
    for width in options.sizes:
        row = measure(width, options.rounds, clock)
        times = (
            f"{row[name]:.4f}" for name in ("peft", "cold", "cached", "basis", "scale", "cold / peft", "cached / peft")
        )
        table.add_row(str(width), *times, str(row["same intruders"]))
        rows = sorted([r for r in rows if r["width"] != width] + [row], key=lambda r: r["width"])
        if options.out:
            options.out.write_text(json.dumps({"setting": setting, "rows": rows}, indent=1) + "\n")
    Console().print(table)


if __name__ == "__main__":
    main()
