"""Forgetting, measured: fine-tune MiniLM hard, look for intruder dimensions, and scale them down.

MiniLM (all-MiniLM-L6-v2) learns TREC's question types with a plain LoRA on all linear layers, at learning rates from
usual to far too high. What it should not forget is judged by a logistic regression on the features that the encoder had
before training, on docstrings of the standard library, frozen from then on. Then the intruders of each adapter are
scaled by lambda, and both are measured again:

    python benchmarks/forgetting.py --train trec/train.jsonl --test trec/test.jsonl --runs DIR --out forgetting.json

Rows are {"text", "label"}. Runs that are in --out already are not repeated; --learning-rates and --seeds without a
value train nothing. --picture FILE draws the curves of --drawn, a learning rate.
"""

import argparse
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from loraloom import RunFailedError
from loraloom.report import Lines, Series
from loraloom.report.png import picture
from loraloom.training.config import RunConfig
from loraloom.training.evaluate import sweep_saved
from loraloom.training.fit import train
from loraloom.training.load import build_config

SCALES = [0.0, 0.25, 0.5, 0.7, 0.75, 0.9, 1.0]
SHOWN = ("accuracy", "retention_accuracy")


def run_config(arguments: argparse.Namespace, learning_rate: float, seed: int, folder: Path) -> RunConfig:
    """A plain LoRA on 1500 questions, one epoch."""
    return build_config(
        {
            "model": {"name": "builtin:minilm"},
            "data": {
                "path": arguments.train,
                "test_path": arguments.test,
                "validation_fraction": 0,
                "max_train": 1500,
                "max_length": 64,
                "retention": "stdlib-docstrings",
                "max_retention": arguments.max_retention,
            },
            "method": {"name": "lora", "r": 16, "lora_alpha": 32},
            "training": {
                "num_train_epochs": arguments.epochs,
                "learning_rate": learning_rate,
                "per_device_eval_batch_size": 64,
                "eval_strategy": "no",
                "save_strategy": "no",
                "use_cpu": True,
                "seed": seed,
            },
            "output": {"dir": str(folder), "overwrite": True},
        }
    )


def one_run(arguments: argparse.Namespace, learning_rate: float, seed: int) -> dict[str, Any]:
    """Train, then sweep over the scales with both scopes; scale 1 is the adapter as it is."""
    folder = Path(arguments.runs) / f"lr{learning_rate:g}-seed{seed}"
    result: dict[str, Any] = {"learning_rate": learning_rate, "seed": seed}
    try:
        trained = train(run_config(arguments, learning_rate, seed, folder))
    except RunFailedError as error:
        return result | {"failed": str(error)}
    result |= {"after": trained.after, "retention": trained.retention, "sweeps": {}}
    for scope in arguments.scopes:
        swept = sweep_saved(folder, arguments.scales, scope=scope)
        layers = swept.intruders.layers
        result |= {
            "intruders": swept.intruders.count,
            "layers": len(layers),
            "layers_with_intruders": sum(bool(layer.intruders) for layer in layers),
            "relative_norm": statistics.mean(layer.relative_norm or 0.0 for layer in layers),
        }
        result["sweeps"][scope] = [dataclasses.asdict(point) for point in swept.points]
    return result


def table(results: list[dict[str, Any]]) -> str:
    """A row per learning rate, scope and scale: means over seeds, with their range."""
    lines = ["| learning rate | scope | scale | task accuracy | retention accuracy |", "|---|---|---|---|---|"]
    for rate in dict.fromkeys(row["learning_rate"] for row in results):
        rows = [row for row in results if row["learning_rate"] == rate and "sweeps" in row]
        for scope in rows[0]["sweeps"] if rows else []:
            for points in zip(*(row["sweeps"][scope] for row in rows), strict=True):
                cells = [spread([point["metrics"][name] for point in points]) for name in SHOWN]
                lines.append(f"| {rate:g} | {scope} | {points[0]['scale']:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(results: list[dict[str, Any]], rate: float) -> Lines:
    """Both accuracies over the scale, means over the seeds of one learning rate."""
    rows = [row for row in results if row["learning_rate"] == rate]
    points = [*zip(*(row["sweeps"]["top"] for row in rows), strict=True)]
    scales = [seeds[0]["scale"] for seeds in points]
    curves = [
        Series(label, scales, [statistics.mean(point["metrics"][name] for point in seeds) for seeds in points])
        for name, label in zip(SHOWN, ("task", "retention"), strict=True)
    ]
    before = statistics.mean(row["retention"]["before"]["accuracy"] for row in rows)
    return Lines("scale of the intruders", "accuracy", curves, references={"before training": before})


def spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="the questions, coarse labels 0 to 5")
    parser.add_argument("--test", required=True)
    parser.add_argument("--runs", required=True, help="folder for the adapters")
    parser.add_argument("--out", default="forgetting.json", help="results; runs in it are not repeated")
    parser.add_argument("--learning-rates", type=float, nargs="*", default=[1e-3, 2e-3, 3e-3, 5e-3])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--scopes", nargs="+", default=["top"])
    parser.add_argument("--scales", type=float, nargs="+", default=SCALES)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--max-retention", type=int, default=400)
    parser.add_argument("--picture", help="PNG to draw")
    parser.add_argument("--drawn", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out = Path(arguments.out)
    results = json.loads(out.read_text()) if out.exists() else []
    for seed in arguments.seeds:
        for rate in arguments.learning_rates:
            if not any((row["learning_rate"], row["seed"]) == (rate, seed) for row in results):
                results.append(one_run(arguments, rate, seed))
                out.write_text(json.dumps(results, indent=1) + "\n")
                print({key: value for key, value in results[-1].items() if key != "sweeps"}, flush=True)
    print(table(results))
    if arguments.picture:
        drawn = picture(figure(results, arguments.drawn), f"Intruders scaled down, learning rate {arguments.drawn:g}")
        Path(arguments.picture).write_bytes(drawn)


if __name__ == "__main__":
    main()
