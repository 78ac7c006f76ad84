"""PEFT's LoRA in a plain trainer of transformers or TRL, on the rows and with the settings of a run of ours.

It shares no code with loraloom: rows are tokenized, batched, trained and judged by the libraries' own means.
"""

import math
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


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
