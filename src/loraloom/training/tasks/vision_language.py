"""vision-language: supervised fine-tuning on texts with images, with TRL's SFTTrainer and its collator for these.

A row has `image` (or `images`, a list) and a chat (`messages`), or a `prompt` with its `completion`. Images are files,
or stored in the data set. The processor puts the images of a row before the text of its first user message.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset
from transformers import AutoProcessor, ProcessorMixin, Trainer

from loraloom.errors import InputError
from loraloom.training.config import DataSection, RunConfig
from loraloom.training.tasks.base import AnswerOptions, Parts, Rows, Setup, named_column, no_column
from loraloom.training.tasks.causal_lm import CausalLM, check_chat_template
from loraloom.training.tasks.generation import generate
from loraloom.training.trainers import CausalTrainer

MESSAGES = datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")})


class VisionLanguage(CausalLM):
    """Columns `images` (lists of {bytes, path}, opened in a batch) and `messages`, or `prompt` and `completion`."""

    auto = "AutoModelForImageTextToText"
    processor = "AutoProcessor"
    usage = (
        'content = [{"type": "image", "path": "image.png"}, {"type": "text", "text": "What is this?"}]\n'
        "inputs = processor.apply_chat_template(\n"
        '    [{"role": "user", "content": content}],\n'
        '    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",\n'
        ")\n"
        "answer = model.generate(**inputs, max_new_tokens=64)[0, inputs.input_ids.shape[1] :]\n"
        "print(processor.decode(answer, skip_special_tokens=True))"
    )

    def rows(self, section: DataSection, parts: Parts) -> Rows:
        found = parts["train"].column_names
        image = named_column(section, "text_column", found, ("images", "image"))
        texts = ["messages"] if "messages" in found else ["prompt", "completion"]
        for name in texts:
            if name not in found:
                raise no_column(section, name, found, "path")
        made = {part: self._columns(rows, part, image, texts) for part, rows in parts.items()}
        return Rows(made, [image, *texts])

    def _columns(self, rows: Dataset, part: str, image: str, texts: list[str]) -> Dataset:
        columns: dict[str, list[Any]] = {"images": _images(rows, part, image)}
        for name, role in zip(texts, ("user", "assistant"), strict=False):
            columns[name] = [_messages(value, role, number, part) for number, value in enumerate(rows[name][:], 1)]
        types = {"images": datasets.List(datasets.Image(decode=False)), **dict.fromkeys(texts, MESSAGES)}
        return Dataset.from_dict(columns, features=datasets.Features(types))

    def load_processor(self, path: str) -> Any:
        processor = AutoProcessor.from_pretrained(path)
        if not isinstance(processor, ProcessorMixin):
            raise ValueError("it has no processor for images and texts together")
        if processor.tokenizer.pad_token is None:
            processor.tokenizer.pad_token = processor.tokenizer.eos_token
        return processor

    def argument_defaults(self, config: RunConfig, max_length: int) -> dict[str, Any]:
        return {"max_length": config.data.max_length}  # by default none: a cut could go through an image

    def trainer(self, setup: Setup, common: dict[str, Any]) -> Trainer:
        check_chat_template(setup, setup.data, "path")
        opened = datasets.List(datasets.Image())
        data = {name: rows.cast_column("images", opened) for name, rows in setup.data.parts.items()}
        try:
            return CausalTrainer(
                train_dataset=data["train"],
                eval_dataset=data.get("validation", data["test"]),
                test_dataset=data["test"],
                **common,
            )
        except ValueError as error:  # TRL's: packing, padding_free
            raise InputError(f"training: {' '.join(str(error).split())}", code="training") from error

    def lengths(self, setup: Setup, rows: Dataset) -> list[int]:
        return []  # known only after the images are processed

    def questions(self, section: DataSection, rows: Dataset) -> list[Any]:
        image = named_column(section, "text_column", rows.column_names, ("images", "image"))
        column = "messages" if "messages" in rows.column_names else "prompt"
        if column not in rows.column_names:
            raise no_column(section, "prompt", rows.column_names, "path")
        pictures = _images(rows, "given", image)
        asked = [_messages(value, "user", i, "given") for i, value in enumerate(rows[column][:], 1)]
        return [_question(*pair) for pair in zip(pictures, asked, strict=True)]

    def answer(self, model: Any, processor: Any, rows: Sequence[Any], options: AnswerOptions) -> Iterator[dict]:
        for row in rows:
            yield {"text": "".join(generate(model, processor, row, options))}


def _images(rows: Dataset, part: str, column: str) -> list[list[dict[str, Any]]]:
    """Each row's images as {bytes, path}."""
    feature = rows.features[column]
    if isinstance(feature, datasets.Image):
        return [[one] for one in rows.cast_column(column, datasets.Image(decode=False))[column][:]]
    if isinstance(getattr(feature, "feature", None), datasets.Image):
        return rows.cast_column(column, datasets.List(datasets.Image(decode=False)))[column][:]
    found = []
    for number, value in enumerate(rows[column][:], 1):
        paths = [value] if isinstance(value, str) else value
        if not isinstance(paths, list) or not all(isinstance(path, str) and Path(path).is_file() for path in paths):
            raise InputError(
                f"row {number} of the {part} set has {value!r} in column {column!r}; expected images, or their paths",
                code="no-image",
            )
        found.append([{"bytes": None, "path": path} for path in paths])
    return found


def _messages(value: Any, role: str, number: int, part: str) -> list[dict[str, str]]:
    """A text, or messages, as messages whose content is text."""
    turns = [{"role": role, "content": value}] if isinstance(value, str) else value
    first = True
    made = []
    for turn in turns or [{}]:
        content = turn.get("content") if isinstance(turn, dict) and isinstance(turn.get("role"), str) else None
        if isinstance(content, list):  # parts: where an image stands is what the processor decides anyway
            later_image = not first and any(piece.get("type") == "image" for piece in content)
            content = None if later_image else "".join(piece.get("text") or "" for piece in content)
        if not isinstance(content, str):
            raise InputError(
                f"row {number} of the {part} set: the turn {turn!r} is no text; expected a role and a text, with "
                "the images in the first user message",
                code="wrong-turn",
            )
        first = first and turn["role"] != "user"
        made.append({"role": turn["role"], "content": content})
    return made


def _question(images: list[dict[str, Any]], messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    """What a processor takes: the turns before the first answer, with the images in the first user message."""
    until = next((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), len(messages))
    # The bytes first: of an image that is stored in a data set the path is a name that it once had.
    opened = datasets.Image()
    pieces = [{"type": "image", "image": opened.decode_example(one)} for one in images]
    asked: list[dict[str, Any]] = []
    for turn in messages[:until]:
        own = pieces if turn["role"] == "user" else []
        asked.append({"role": turn["role"], "content": [*own, {"type": "text", "text": turn["content"]}]})
        pieces = [] if own else pieces
    return asked


TASK = VisionLanguage()
