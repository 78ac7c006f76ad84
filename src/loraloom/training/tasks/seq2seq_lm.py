"""seq2seq-lm: a text from a text, with an encoder and a decoder; evaluations generate, and ROUGE judges that."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import DataCollatorForSeq2Seq, EvalPrediction, Seq2SeqTrainingArguments, Trainer

from loraloom.training.config import DataSection, RunConfig
from loraloom.training.metrics import compute_metrics
from loraloom.training.tasks.base import AnswerOptions, Parts, Rows, Setup, Task, check_texts, named_column
from loraloom.training.tasks.causal_lm import CausalLM
from loraloom.training.tasks.generation import generate
from loraloom.training.trainers import WritingTrainer

SOURCES = ("source", "text", "document", "article", "prompt", "input", "dialogue")
TARGETS = ("target", "summary", "completion", "highlights", "output")


class Seq2SeqLM(Task):
    """Columns `source` and `target`."""

    auto = "AutoModelForSeq2SeqLM"
    peft_type = "SEQ_2_SEQ_LM"
    arguments = Seq2SeqTrainingArguments
    usage = CausalLM.usage

    def rows(self, section: DataSection, parts: Parts) -> Rows:
        found = parts["train"].column_names
        source = named_column(section, "text_column", found, SOURCES)
        target = named_column(section, "target_column", found, TARGETS)
        made = {
            part: Dataset.from_dict(
                {"source": check_texts(rows, part, source), "target": check_texts(rows, part, target)}
            )
            for part, rows in parts.items()
        }
        return Rows(made, [source, target])

    def argument_defaults(self, config: RunConfig, max_length: int) -> dict[str, Any]:
        return {"predict_with_generate": True, "generation_max_length": config.data.max_target_length}

    def trainer(self, setup: Setup, common: dict[str, Any]) -> Trainer:
        tokenizer, smoothing = setup.processor, common["args"].label_smoothing_factor

        def encode(rows: Dataset) -> Dataset:
            sources = tokenizer(rows["source"][:], truncation=True, max_length=setup.max_length)
            length = setup.config.data.max_target_length
            targets = tokenizer(text_target=rows["target"][:], truncation=True, max_length=length)
            return Dataset.from_dict({**sources, "labels": targets["input_ids"]})

        def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            logits = (outputs["logits"] if isinstance(outputs, dict) else outputs[0]).float()
            items = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
            flat = logits.reshape(-1, logits.shape[-1])
            return F.cross_entropy(flat, labels.reshape(-1), reduction="sum", label_smoothing=smoothing) / items

        def metrics(outcome: EvalPrediction) -> dict[str, float]:
            predicted: Any = outcome.predictions
            predictions, references = (
                tokenizer.batch_decode(np.where(ids < 0, tokenizer.pad_token_id, ids), skip_special_tokens=True)
                for ids in (predicted, np.asarray(outcome.label_ids))
            )
            return compute_metrics(setup.metrics, predictions, references)

        data = {name: encode(rows) for name, rows in setup.data.parts.items()}
        return WritingTrainer(
            train_dataset=data["train"],
            eval_dataset=data.get("validation", data["test"]),
            test_dataset=data["test"],
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=common["model"]),
            compute_loss_func=loss,
            compute_metrics=metrics,
            **common,
        )

    def lengths(self, setup: Setup, rows: Dataset) -> list[int]:
        return [len(ids) for ids in setup.processor(rows["source"][:], truncation=False, verbose=False)["input_ids"]]

    def questions(self, section: DataSection, rows: Dataset) -> list[Any]:
        return check_texts(rows, "given", named_column(section, "text_column", rows.column_names, SOURCES))

    def answer(self, model: Any, processor: Any, rows: Sequence[Any], options: AnswerOptions) -> Iterator[dict]:
        for row in rows:
            yield {"text": "".join(generate(model, processor, row, options))}


TASK = Seq2SeqLM()
