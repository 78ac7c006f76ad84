"""preference: a better and a worse answer (DPO, arXiv 2305.18290) with TRL's DPOTrainer.

The reference is the model without its adapter, so it costs no memory; with method.name `full` TRL loads a copy.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from transformers import Trainer
from trl import DPOConfig

from loraloom.errors import InputError
from loraloom.training.config import DataSection, RunConfig
from loraloom.training.tasks.base import AnswerOptions, Parts, Rows, Setup, Task, named_column
from loraloom.training.tasks.causal_lm import CausalLM
from loraloom.training.tasks.generation import generate
from loraloom.training.trainers import PreferenceTrainer

COLUMNS = ("chosen", "rejected")


class Preference(Task):
    """Columns `chosen` and `rejected`, texts or chats, and `prompt` where the prompt is apart."""

    auto = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    arguments = DPOConfig
    usage = CausalLM.usage

    def rows(self, section: DataSection, parts: Parts) -> Rows:
        found = parts["train"].column_names
        if missing := [name for name in COLUMNS if name not in found]:
            raise InputError(
                f"data.path {section.path!r}: no column {missing[0]!r} among {', '.join(found)}; expected chosen and "
                "rejected, and prompt where it is apart",
                code="no-column",
            )
        columns = [name for name in ("prompt", *COLUMNS) if name in found]
        return Rows({part: rows.select_columns(columns) for part, rows in parts.items()}, columns)

    def argument_defaults(self, config: RunConfig, max_length: int) -> dict[str, Any]:
        return {"max_length": max_length}

    def trainer(self, setup: Setup, common: dict[str, Any]) -> Trainer:
        data = setup.data
        if not isinstance(data.train[0]["chosen"], str) and setup.processor.chat_template is None:
            raise InputError(
                f"data.path {setup.config.data.path!r} holds chats, and the tokenizer has no chat template",
                code="no-chat-template",
            )
        return PreferenceTrainer(
            train_dataset=data.train,
            eval_dataset=data.validation or data.test,
            test_dataset=data.test,
            **common,
        )

    def questions(self, section: DataSection, rows: Dataset) -> list[Any]:
        return rows[named_column(section, "text_column", rows.column_names, ("prompt", "text"))][:]

    def answer(self, model: Any, processor: Any, rows: Sequence[Any], options: AnswerOptions) -> Iterator[dict]:
        for row in rows:
            yield {"text": "".join(generate(model, processor, row, options))}


TASK = Preference()
