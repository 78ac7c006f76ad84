"""Pre-training with AdamW, GaLore, Fira, APOLLO and LoRA: loss after a fixed number of tokens, state, step time.

A byte-level Llama of 1.1M parameters is trained from scratch on the sources of the standard library's modules; the loss
is that of other modules. The methods differ in how the matrices of the linear layers are trained; embeddings, output
and norms are trained in full, by AdamW at one rate, in every run. Every method gets the same effort: with one seed and
half of the steps its rate is searched on a ladder of factors of two, three rungs around a first guess and one more
wherever the best is at an end; then it is trained with each seed at the best rate. Every run is written as soon as it
is over, and not repeated.

    python benchmarks/galore_pretrain.py search train times --out docs/benchmarks/galore_pretrain.json
"""

import argparse
import json
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from loraloom import LoomConfig
from loraloom.io.files import write_text_atomically
from loraloom.optim import APOLLO, Fira, GaLore, build_param_groups, project_groups, state_bytes

RANK, UPDATE_GAP, ROWS, LENGTH = 32, 50, 8, 128
REST_RATE = 1e-2  # of embeddings, output and norms
# The first guess of the matrices' rate, the optimizer of a projected method, and its options.
METHODS: dict[str, tuple[float, Any, dict[str, Any]]] = {
    "AdamW": (4e-3, None, {}),
    "GaLore svd": (1.6e-2, GaLore, {"refresh": "svd", "stagger": False}),
    "GaLore subspace": (1.6e-2, GaLore, {"refresh": "subspace"}),
    "Fira": (1.6e-2, Fira, {}),
    "APOLLO": (8e-3, APOLLO, {}),
    "LoRA": (8e-3, None, {}),
}


def sources() -> tuple[Tensor, Tensor]:
    """Bytes of the standard library's modules, for training and (every tenth file) for the loss that is reported."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for i, path in enumerate(sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))):
        parts[i % 10 == 0].append(path.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8).long() for part in parts)
    return train, held_out


def batches(text: Tensor, seed: int, rows: int) -> Iterator[Tensor]:
    """Rows of `LENGTH` bytes from random places."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - LENGTH, (rows,), generator=generator)
        yield torch.stack([text[i : i + LENGTH] for i in starts.tolist()])


def setup(method: str, rate: float, seed: int) -> tuple[nn.Module, Optimizer]:
    """A new model, and the method's optimizer over it."""
    torch.manual_seed(seed)
    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=128, intermediate_size=352, num_hidden_layers=5, num_attention_heads=4,
            max_position_embeddings=LENGTH, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    if method == "LoRA":
        model = get_peft_model(model, LoomConfig.lora(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad or "proj" not in name)
    groups = [
        {**group, "lr": rate if group["name"] in ("projected", "lora_A", "lora_B") else REST_RATE}
        for group in project_groups(model, build_param_groups(model, rate, weight_decay=0.0))
    ]
    if method in ("AdamW", "LoRA"):
        return model, torch.optim.AdamW(groups)
    _, kind, options = METHODS[method]
    return model, kind(groups, rank=RANK, update_gap=UPDATE_GAP, **options)


def train_step(model: nn.Module, optimizer: Optimizer, tokens: Tensor) -> None:
    optimizer.zero_grad()
    model(input_ids=tokens, labels=tokens).loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def run(method: str, rate: float, seed: int, steps: int, text: tuple[Tensor, Tensor]) -> dict[str, Any]:
    model, optimizer = setup(method, rate, seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min(1.0, (t + 1) / (0.1 * steps)) * (1 - 0.9 * t / steps)
    )
    data = batches(text[0], seed, ROWS)
    for _ in range(steps):
        train_step(model, optimizer, next(data))
        schedule.step()
    held_out = next(batches(text[1], 0, 128))
    with torch.no_grad():
        losses = [model.eval()(input_ids=part, labels=part).loss.item() for part in held_out.split(32)]
    return {"method": method, "lr": rate, "seed": seed, "steps": steps, "loss": statistics.mean(losses)}


class Runs:
    """The finished runs, on disk; one that is there is not repeated."""

    def __init__(self, path: Path):
        self.path = path
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"runs": []}
        self.text = sources()

    def loss(self, method: str, rate: float, seed: int, steps: int) -> float:
        key = {"method": method, "lr": rate, "seed": seed, "steps": steps}
        for row in self.content["runs"]:
            if key.items() <= row.items():
                return row["loss"]
        self.content["runs"].append(run(method, rate, seed, steps, self.text))
        self.save()
        print(self.content["runs"][-1], flush=True)
        return self.content["runs"][-1]["loss"]

    def save(self) -> None:
        write_text_atomically(self.path, json.dumps(self.content, indent=2) + "\n")


def best_rate(runs: Runs, method: str, steps: int) -> tuple[float, int]:
    """The rate of least loss, and how many were tried; the first seed of the final runs is not among the search's."""
    losses = {rate: runs.loss(method, rate, 100, steps) for rate in (METHODS[method][0] * f for f in (0.5, 1, 2))}
    while True:
        best = min(losses, key=lambda rate: losses[rate])
        if best == min(losses):
            rate = best / 2
        elif best == max(losses):
            rate = best * 2
        else:
            return best, len(losses)
        losses[rate] = runs.loss(method, rate, 100, steps)


def summary(runs: Runs, methods: list[str], seeds: int, steps: int) -> list[dict[str, Any]]:
    rates = {method: best_rate(runs, method, steps // 2) for method in methods}
    for seed in range(seeds):  # outermost, so that a run that is cut short has compared all methods
        for method, (rate, _) in rates.items():
            runs.loss(method, rate, seed, steps)
    rows = []
    for method, (rate, tried) in rates.items():
        losses = [runs.loss(method, rate, seed, steps) for seed in range(seeds)]
        row = {"method": method, "rates tried": tried, "rate": rate, "loss": statistics.mean(losses)}
        rows.append({**row, "spread": statistics.stdev(losses), "least": min(losses), "most": max(losses)})
    return rows


def times(text: Tensor, rounds: int = 12) -> list[dict[str, Any]]:
    """CPU seconds of a whole training step and of the optimizer's part, least of the rounds; contenders in turn."""
    contenders = {method: setup(method, rate, 0) for method, (rate, _) in METHODS.items()}
    data = batches(text, 0, ROWS)
    least: dict[str, list[float]] = {method: [1e9, 1e9] for method in METHODS}
    for _ in range(rounds):
        tokens = next(data)
        for method, (model, optimizer) in contenders.items():
            start = time.process_time()
            train_step(model, optimizer, tokens)
            end = time.process_time()
            optimizer.step()  # the gradients are still there
            taken = end - start, time.process_time() - end
            least[method] = [min(pair) for pair in zip(least[method], taken, strict=True)]
    return [
        {"method": method, "step": least[method][0], "optimizer": least[method][1], "state bytes": state_bytes(o)}
        for method, (_, o) in contenders.items()
    ]


def show(name: str, rows: list[dict[str, Any]]) -> None:
    table = Table(*rows[0], title=name)
    for row in rows:
        table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["search", "train", "times"])
    parser.add_argument("--out", type=Path, required=True, help="json file, read and extended")
    parser.add_argument("--seeds", type=int, default=3, help="final runs of each method")
    parser.add_argument("--steps", type=int, default=200, help="steps of each final run, of 1024 bytes")
    parser.add_argument("--only", nargs="+", choices=METHODS, help="methods to search or train; all by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    runs = Runs(arguments.out)
    methods = [method for method in METHODS if method in (arguments.only or METHODS)]
    if "search" in arguments.parts:
        for method in methods:
            best_rate(runs, method, arguments.steps // 2)
    if "train" in arguments.parts:
        runs.content["train"] = summary(runs, methods, arguments.seeds, arguments.steps)
        show("train", runs.content["train"])
    if "times" in arguments.parts:
        runs.content["times"] = times(runs.text[0])
        show("times", runs.content["times"])
    runs.save()


if __name__ == "__main__":
    main()
