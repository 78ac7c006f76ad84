"""causal-lm: supervised fine-tuning with TRL's SFTTrainer; loss over the predicted tokens, perplexity.

A row is a chat (`messages`), a `prompt` with its `completion` (only the completion is learned), or a bare `text`.
ShareGPT's `conversations` and Alpaca's `instruction`, `input`, `output` are read as these.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from transformers import Trainer
from trl import SFTConfig

from loraloom.card import ANSWERS
from loraloom.errors import InputError
from loraloom.training.config import DataSection, Format, RunConfig
from loraloom.training.tasks.base import (
    AnswerOptions,
    Parts,
    Rows,
    RunData,
    Setup,
    Task,
    check_texts,
    named_column,
    no_column,
)
from loraloom.training.tasks.generation import generate
from loraloom.training.trainers import CausalTrainer

# In TRL's order of preference: a chat carries most, a bare text least.
FORMATS: dict[Format, tuple[str, ...]] = {
    "chat": ("messages",),
    "prompt-completion": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
}
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
# The template of Stanford Alpaca (Taori et al. 2023), without and with an input.
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n",
)


class CausalLM(Task):
    """Columns that SFTTrainer reads, and no others: a stray one would change how it understands the rows."""

    auto = "AutoModelForCausalLM"
    peft_type = "CAUSAL_LM"
    arguments = SFTConfig
    usage = ANSWERS["AutoModelForCausalLM"]

    def rows(self, section: DataSection, parts: Parts) -> Rows:
        found = parts["train"].column_names
        used = [section.text_column] if section.text_column else [*FORMATS[_format(section, found)], "input"]
        return Rows({part: _columns(section, rows) for part, rows in parts.items()}, used)

    def argument_defaults(self, config: RunConfig, max_length: int) -> dict[str, Any]:
        return {"max_length": max_length}

    def trainer(self, setup: Setup, common: dict[str, Any]) -> Trainer:
        for data, key in ((setup.data, "path"), (setup.retained, "retention")):
            if data is not None:
                check_chat_template(setup, data, key)
        data = setup.data
        return CausalTrainer(
            train_dataset=data.train,
            eval_dataset=data.validation or data.test,
            test_dataset=data.test,
            retained=None if setup.retained is None else setup.retained.test,
            **common,
        )

    def lengths(self, setup: Setup, rows: Dataset) -> list[int]:
        tokenizer = setup.processor
        check_chat_template(setup, setup.data, "path")
        if "messages" in rows.column_names:
            return [
                len(tokenizer.apply_chat_template(row, tokenize=True, return_dict=False)) for row in rows["messages"]
            ]
        columns = [rows[name][:] for name in rows.column_names]
        texts = ["".join(parts) if isinstance(parts[0], str) else str(parts) for parts in zip(*columns, strict=True)]
        return [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]

    def questions(self, section: DataSection, rows: Dataset) -> list[Any]:
        if section.text_column is None and "messages" in rows.column_names:
            return [_asked(messages) for messages in rows["messages"]]
        usual = ("prompt", "text")
        return check_texts(rows, "given", named_column(section, "text_column", rows.column_names, usual))

    def answer(self, model: Any, processor: Any, rows: Sequence[Any], options: AnswerOptions) -> Iterator[dict]:
        for row in rows:
            yield {"text": "".join(generate(model, processor, row, options))}


def check_chat_template(setup: Setup, data: RunData, key: str) -> None:
    """Raises InputError where the rows are chats, and the tokenizer has no template for them."""
    if "messages" in data.test.column_names and setup.processor.chat_template is None:
        name = getattr(setup.config.data, key)
        raise InputError(
            f"data.{key} {name!r} holds chats, and the tokenizer has no chat template", code="no-chat-template"
        )


def _columns(section: DataSection, rows: Dataset) -> Dataset:
    found = rows.column_names
    if section.text_column:
        if section.text_column not in found:
            raise no_column(section, section.text_column, found, "text_column")
        rows = rows.select_columns([section.text_column])
        return rows if section.text_column == "text" else rows.rename_column(section.text_column, "text")
    chosen = _format(section, found)
    if chosen == "sharegpt":
        return Dataset.from_dict({"messages": [_chat(row, i) for i, row in enumerate(rows["conversations"], 1)]})
    if chosen == "alpaca":
        return Dataset.from_list([_alpaca(row) for row in rows])
    return rows.select_columns(list(FORMATS[chosen]))


def _format(section: DataSection, found: Sequence[str]) -> Format:
    """How the rows are read: `data.format`, or the first one whose columns are there.

    Raises:
        InputError: they are not.
    """
    fits = [name for name, columns in FORMATS.items() if set(columns) <= set(found)]
    if section.format == "auto" and not fits:
        raise InputError(
            f"data.path {section.path!r}: has columns {', '.join(found)}; expected messages, or prompt and completion, "
            "or conversations, or instruction and output, or text; set data.text_column",
            code="no-column",
        )
    chosen = fits[0] if section.format == "auto" else section.format
    if chosen not in fits:
        raise InputError(
            f"data.path {section.path!r}: data.format {chosen!r} needs columns {' and '.join(FORMATS[chosen])}; found "
            f"{', '.join(found)}",
            code="no-column",
        )
    return chosen


def _chat(turns: Any, number: int) -> list[dict[str, str]]:
    """ShareGPT's turns, {from, value}, as messages, {role, content}."""
    messages = []
    for turn in turns or [{}]:
        speaker, content = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if speaker not in ROLES or not isinstance(content, str):
            raise InputError(
                f"row {number}: the turn {turn!r} is no {{from: {'|'.join(ROLES)}, value: text}}", code="wrong-turn"
            )
        messages.append({"role": ROLES[speaker], "content": content})
    return messages


def _asked(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """A chat without the answer that it may end with."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def _alpaca(row: dict[str, Any]) -> dict[str, str]:
    template = ALPACA[bool(row.get("input"))]
    return {"prompt": template.format(**{"input": "", **row}), "completion": row["output"]}


TASK = CausalLM()
