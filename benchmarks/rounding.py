"""What bfloat16 weights lose to rounding: all of MiniLM trained on the standard library's docstrings, four ways each.

    float32       the reference: weights that start at the same bfloat16 values
    nearest       the usual rounding
    kahan, stochastic     see `loraloom.optim.rounding`

"moved" is the share of all weights that are not what they were; "progress" is <D, D32> / <D32, D32> of the way D
against the reference's way D32: 1 is all the way. Every run has the same batches.

    python benchmarks/rounding.py --out docs/benchmarks/rounding.json
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loraloom.optim import build_optimizer, state_bytes
from loraloom.training.model import model_path
from loraloom.training.stdlib_docstrings import stdlib_docstrings

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"name": "weight_adam", "lr": 2e-5},
    "GaLore": {"name": "galore", "lr": 2e-4, "rank": 96, "update_gap": 10},
}
WAYS = ("float32", "nearest", "kahan", "stochastic")


def batches(steps: int, rows: int) -> tuple[int, list[tuple[Any, Tensor]]]:
    """The number of labels, and (inputs, labels) of each step."""
    texts, labels, _ = stdlib_docstrings()
    names = sorted(set(labels))
    data = list(zip(texts, map(names.index, labels), strict=True))
    random.Random(0).shuffle(data)
    tokenizer = AutoTokenizer.from_pretrained(model_path("builtin:minilm"))

    def encoded() -> Iterator[tuple[Any, Tensor]]:
        for step in range(steps):
            part = data[rows * step : rows * (step + 1)]
            inputs = tokenizer([t for t, _ in part], padding=True, truncation=True, max_length=48, return_tensors="pt")
            yield inputs, torch.tensor([label for _, label in part])

    return len(names), list(encoded())


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().float().flatten() for p in model.parameters() if p.requires_grad])


def train(options: dict[str, Any], way: str, labels: int, data: list[tuple[Any, Tensor]]) -> tuple[Tensor, int]:
    """The way that all weights have gone, and the bytes of the optimizer's state."""
    torch.manual_seed(0)
    path = model_path("builtin:minilm")
    model = AutoModelForSequenceClassification.from_pretrained(path, num_labels=labels).to(torch.bfloat16)
    model = model.float() if way == "float32" else model
    before = weights(model)
    rounding = {} if way in ("float32", "nearest") else {"rounding": way}
    optimizer = build_optimizer(model, **options, **rounding)
    model.eval()  # dropout would be drawn otherwise for each dtype
    for inputs, targets in data:
        optimizer.zero_grad()
        model(**inputs, labels=targets).loss.backward()
        optimizer.step()
    return weights(model) - before, state_bytes(optimizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--out", type=Path, help="json file for the numbers")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    labels, data = batches(arguments.steps, arguments.rows)
    results = []
    for name, options in OPTIMIZERS.items():
        reference = torch.empty(0)
        for way in WAYS:
            change, state = train(options, way, labels, data)
            reference = change if way == "float32" else reference
            moved, progress = float((change != 0).float().mean()), float(change @ reference / (reference @ reference))
            results.append(
                {"optimizer": name, "rounding": way, "moved": moved, "progress": progress, "state_bytes": state}
            )
    table = Table(*results[0])
    for row in results:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
