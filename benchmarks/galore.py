"""GaLore beside AdamW and galore-torch: cost of a refresh, quality of the basis, step time, state, and loss.

Four parts, each printed as a table and written to one json file:

    refresh    CPU seconds for one new basis: a full SVD, and subspace iteration from an old basis, in turn
    overlap    MiniLM is trained on the standard library's docstrings; the basis that follows its gradients by
               subspace iteration is compared with the exact one of the same gradient
    step       CPU seconds of optimizer steps on the weights of one transformer block
    pretrain   a byte-level Llama on the standard library's sources, a fixed number of tokens: loss on held-out files,
               bytes of optimizer state, CPU seconds of a whole step

Times are CPU time of one thread, so that other processes disturb them least; contenders take turns in one process, and
a number is the least of its rounds.

    python benchmarks/galore.py refresh overlap step pretrain --out galore.json
"""

import argparse
import json
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from galore_torch import GaLoreAdamW
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from loraloom import LoomConfig
from loraloom.optim import GaLore, build_optimizer, build_param_groups, project_groups, state_bytes
from loraloom.optim.galore_projection import project, sides_of, subspace_bases, svd_bases
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
    rows = []
    for width in (768, 2048, 4096):
        G, sides = gradient(width, width, 0), (False, True)
        old = subspace_bases(gradient(width, width, 1), RANK, sides, (None, None), torch.Generator().manual_seed(0))
        right = old[1]
        times: dict[str, list[float]] = {"svd": [], "subspace": [], "floor": []}
        for r in range(5):
            if r < (3 if width < 2048 else 1):
                times["svd"].append(seconds(lambda G=G, s=sides: svd_bases(G, RANK, s)))
            generator = torch.Generator().manual_seed(r)
            times["subspace"].append(
                seconds(lambda G=G, o=old, g=generator: subspace_bases(G, RANK, (False, True), o, g))
            )
            times["floor"].append(seconds(lambda G=G, P=right: torch.linalg.qr(G.mT @ (G @ P))))
        best = {key: min(values) for key, values in times.items()}
        rows.append({"width": width, **best, "subspace / svd": best["subspace"] / best["svd"]})
    return rows


def overlap(steps: int = 31, every: int = 10) -> list[dict[str, Any]]:
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
        "Fira": lambda w: GaLore(w, lr=1e-3, rank=RANK, update_gap=gap, residual=True),
        "APOLLO": lambda w: GaLore(w, lr=1e-3, rank=RANK, update_gap=gap, refresh="random", scale=1.0),
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


def sources() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's modules, for training and (every tenth file) for the loss that is reported."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        parts[i % 10 == 0].append(path.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8).long() for part in parts)
    return train, held_out


def batches(text: Tensor, seed: int, rows: int, length: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - length, (rows,), generator=generator)
        yield torch.stack([text[i : i + length] for i in starts.tolist()])


METHODS: dict[str, dict[str, Any]] = {
    "AdamW": {"lr": 3e-3},
    "GaLore svd": {"refresh": "svd", "stagger": False, "lr": 1e-2, "scale": 0.5},
    "GaLore subspace": {"lr": 1e-2, "scale": 0.5},
    "Fira": {"residual": True, "lr": 1e-2, "scale": 0.5},
    "APOLLO": {"refresh": "random", "lr": 1e-2, "scale": 1.0},
    "LoRA": {"lr": 1e-2},
}


def pretrain(seeds: int, steps: int, rank: int = 32, lr: float | None = None, only: str = "") -> list[dict[str, Any]]:
    text, held_out = sources()
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    validation = next(batches(held_out, 0, 32, 128))
    rows = []
    for name, options in METHODS.items():
        if only not in name:
            continue
        options, losses, times = {**options, **({"lr": lr} if lr else {})}, [], []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model: nn.Module = LlamaForCausalLM(config)
            if name == "LoRA":
                model = get_peft_model(model, LoomConfig.lora(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
                for key, p in model.named_parameters():
                    p.requires_grad_(p.requires_grad or "proj" not in key)
            if name in ("AdamW", "LoRA"):
                optimizer = build_optimizer(model, "adamw", weight_decay=0.0, **options)
            else:
                groups = project_groups(model, build_param_groups(model, options["lr"], weight_decay=0.0))
                for group in groups:
                    if group["name"] != "projected":
                        group["lr"] = METHODS["AdamW"]["lr"]
                optimizer = GaLore(groups, rank=rank, update_gap=50, **options)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda t: min(1.0, (t + 1) / (0.1 * steps)) * (1 - 0.9 * t / steps)
            )
            data = batches(text, seed, 8, 128)
            start = time.process_time()
            for _ in range(steps):
                tokens = next(data)
                optimizer.zero_grad()
                model(input_ids=tokens, labels=tokens).loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
            times.append((time.process_time() - start) / steps)
            with torch.no_grad():
                losses.append(model.eval()(input_ids=validation, labels=validation).loss.item())
        row = {"method": name, "lr": options["lr"], "loss": statistics.mean(losses), "least": min(losses)}
        row |= {"most": max(losses), "state MiB": state_bytes(optimizer) / 2**20, "step": min(times)}
        rows.append(row)
    return rows


def show(name: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=name)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["refresh", "overlap", "step", "pretrain"])
    parser.add_argument("--out", type=Path, help="json file for the numbers")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method in pretrain")
    parser.add_argument("--steps", type=int, default=400, help="steps of each run in pretrain, of 1024 bytes")
    parser.add_argument("--lr", type=float, help="one learning rate for all methods in pretrain")
    parser.add_argument("--only", default="", help="methods in pretrain whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for part in arguments.parts:
        if part == "pretrain":
            results[part] = pretrain(arguments.seeds, arguments.steps, lr=arguments.lr, only=arguments.only)
        else:
            results[part] = {"refresh": refresh, "overlap": overlap, "step": step}[part]()
        show(part, results[part])
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
