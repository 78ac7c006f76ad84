"""GaLore beside AdamW and galore-torch: cost of a refresh, quality of the basis, step time, and state.

Three parts, each printed as a table and written to one json file:

    refresh    CPU seconds for one new basis: galore-torch's SVD, and subspace iteration from an old basis, in turn
    overlap    MiniLM is trained on the standard library's docstrings; the basis that follows its gradients by
               subspace iteration is compared with the exact one of the same gradient
    step       CPU seconds of optimizer steps on the weights of one transformer block

Times are CPU time of one thread, so that other processes disturb them least; contenders take turns in one process, and
a number is the least of its rounds.

    python benchmarks/galore.py refresh overlap step --out docs/benchmarks/galore_cpu.json
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from galore_torch import GaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loraloom import APOLLO, Fira, GaLore, state_bytes
from loraloom.optim.galore.bases import project, sides_of, subspace_bases, svd_bases
from loraloom.training.model import model_path
from loraloom.training.stdlib_docstrings import stdlib_docstrings

RANK = 128


def seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def gradient(m: int, n: int, seed: int) -> Tensor:
    """A matrix whose singular values fall like those of a gradient, by a power law."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, n + 1) ** -0.7
    return torch.randn(m, n, generator=generator) * scale @ torch.randn(n, n, generator=generator) / n**0.5


def refresh() -> list[dict[str, Any]]:
    rows, peer = [], GaLoreProjector(RANK)
    for width in (768, 2048, 4096):
        G, sides = gradient(width, width, 0), (False, True)
        old = subspace_bases(gradient(width, width, 1), RANK, sides, (None, None), torch.Generator().manual_seed(0))
        right = old[1]
        times: dict[str, list[float]] = {"svd": [], "subspace": [], "floor": []}
        for r in range(5):
            if r < (3 if width < 2048 else 1):
                times["svd"].append(seconds(lambda G=G: peer.get_orthogonal_matrix(G, RANK, type="right")))
            generator = torch.Generator().manual_seed(r)
            times["subspace"].append(
                seconds(lambda G=G, o=old, g=generator: subspace_bases(G, RANK, (False, True), o, g))
            )
            times["floor"].append(seconds(lambda G=G, P=right: torch.linalg.qr(G.mT @ (G @ P))))
        best = {key: min(values) for key, values in times.items()}
        rows.append({"width": width, **best, "subspace / svd": best["subspace"] / best["svd"]})
    return rows


def overlap(steps: int = 41, every: int = 10) -> list[dict[str, Any]]:
    path = model_path("builtin:minilm")
    texts, labels, _ = stdlib_docstrings()
    names = sorted(set(labels))
    rows_of = list(zip(texts, (names.index(label) for label in labels), strict=True))
    random.Random(0).shuffle(rows_of)
    tokenizer = AutoTokenizer.from_pretrained(path)
    transformers.logging.set_verbosity_error()
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=len(names))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    weights = {
        n: p for n, p in model.named_parameters() if n.endswith(("query.weight", "dense.weight")) and "layer" in n
    }
    weights = {n: p for n, p in weights.items() if ".0." in n or ".5." in n}
    ranks, bases, rows = (8, 16, 32), {}, []
    for step in range(steps):
        batch = rows_of[32 * step : 32 * step + 32]
        inputs = tokenizer([t for t, _ in batch], padding=True, truncation=True, max_length=48, return_tensors="pt")
        optimizer.zero_grad()
        model(**inputs, labels=torch.tensor([label for _, label in batch])).loss.backward()
        if step % every == 0:
            for rank in ranks:
                shares, overlaps, stale = [], [], []
                for name, p in weights.items():
                    sides = sides_of("std", tuple(p.shape))
                    old = bases.get((name, rank), (None, None))
                    new = subspace_bases(p.grad, rank, sides, old, torch.Generator().manual_seed(step))
                    bases[name, rank], exact = new, svd_bases(p.grad, rank, sides)
                    best = project(p.grad, exact).square().sum()
                    shares.append(float(project(p.grad, new).square().sum() / best))
                    stale.append(float(project(p.grad, old if step else new).square().sum() / best))
                    a, b = (x[0] if sides[0] else x[1] for x in (new, exact))
                    overlaps.append(float((a.T @ b).square().sum() / rank))
                row = {"step": step, "rank": rank, "energy": statistics.mean(shares), "least": min(shares)}
                rows.append({**row, "energy, old basis": statistics.mean(stale), "overlap": statistics.mean(overlaps)})
        optimizer.step()
    return rows


def step(width: int = 768, gap: int = 200) -> list[dict[str, Any]]:
    shapes = [(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]
    gradients = [gradient(m, n, i) if m >= n else gradient(n, m, i).T.contiguous() for i, (m, n) in enumerate(shapes)]
    make = {
        "AdamW": lambda w: torch.optim.AdamW(w, lr=1e-3),
        "galore-torch": lambda w: GaLoreAdamW(
            [{"params": w, "rank": RANK, "update_proj_gap": gap, "scale": 0.25, "proj_type": "std"}],
            lr=1e-3, no_deprecation_warning=True,
        ),
        "GaLore": lambda w: GaLore(w, lr=1e-3, rank=RANK, update_gap=gap),
        "Fira": lambda w: Fira(w, lr=1e-3, rank=RANK, update_gap=gap),
        "APOLLO": lambda w: APOLLO(w, lr=1e-3, rank=RANK, update_gap=gap),
    }  # fmt: skip
    optimizers = {}
    for name, build in make.items():
        weights = [nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
        for p, g in zip(weights, gradients, strict=True):
            p.grad = g
        optimizers[name] = build(weights)
        optimizers[name].step()  # the first step makes the state
    times: dict[str, list[float]] = {name: [] for name in make}
    for _ in range(8):
        for name, optimizer in optimizers.items():
            times[name].append(seconds(optimizer.step))
    rows = []
    for name, optimizer in optimizers.items():
        plain, renewal = min(times[name]), 0.0
        if name == "galore-torch":
            for state in optimizer.state.values():
                state["step"] = gap
            renewal = seconds(optimizer.step) - plain
        elif name in ("GaLore", "Fira"):
            # Move every weight to its step of refresh in turn; they fall on different steps.
            for slot in optimizer.projected.values():
                due = gap - slot.index * gap // len(optimizer.projected)
                for state in optimizer.state.values():
                    state["step"] = due
                renewal += seconds(optimizer.step) - plain
        state = state_bytes(optimizer)
        if name == "galore-torch":
            state += sum(4 * s["projector"].ortho_matrix.numel() for s in optimizer.state.values())
        row = {"optimizer": name, "step": plain, "all refreshes": renewal, "mean step": plain + renewal / gap}
        rows.append({**row, "state MiB": state / 2**20})
    return rows


def show(name: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=name)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["refresh", "overlap", "step"])
    parser.add_argument("--out", type=Path, help="json file for the numbers; other parts in it stay")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for part in arguments.parts:
        results[part] = {"refresh": refresh, "overlap": overlap, "step": step}[part]()
        show(part, results[part])
    if arguments.out:
        earlier = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
        arguments.out.write_text(json.dumps({**earlier, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
