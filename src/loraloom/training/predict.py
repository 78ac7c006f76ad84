"""A finished run, asked something new: labels with their probabilities, numbers, tags, or text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset

from loraloom.annotations import matches
from loraloom.errors import InputError
from loraloom.io.checkpoint import read_json
from loraloom.training.config import RunConfig
from loraloom.training.evaluate import finished_run, load_model
from loraloom.training.model import load_processor, resolve_max_length
from loraloom.training.result import RESULT
from loraloom.training.sources import read_file
from loraloom.training.tasks import get_task
from loraloom.training.tasks.base import AnswerOptions, RunData, Task
from loraloom.training.tasks.generation import generate


class Predictor:
    """The model of a run's folder, which needs neither the run's data nor a trainer.

    Args:
        folder: output.dir of the run.
        max_new_tokens: how long a text may get.
        temperature: 0 is greedy; else samples.

    Raises:
        InputError: the folder holds no finished run, or its base model cannot be found.
    """

    def __init__(self, folder: Path, max_new_tokens: int = 128, temperature: float = 0.0) -> None:
        self.config: RunConfig = finished_run(folder)
        self.task: Task = get_task(self.config.model.task)
        self.processor = load_processor(self.config.model)
        names: Any = read_json(folder / RESULT).get("label_names")
        if not matches(names, list[str]):
            raise InputError(f"{folder / RESULT}: label_names is {names!r:.80}; expected a list of names", code="json")
        nothing = Dataset.from_dict({})
        self.model = load_model(folder, self.config, RunData(nothing, nothing, names), self.processor)
        length = resolve_max_length(self.config, self.processor)
        self.options = AnswerOptions(length, max_new_tokens, temperature=temperature)

    @property
    def writes(self) -> bool:
        """Whether answers are texts, which `stream` gives piece by piece."""
        return self.task.peft_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM")

    def questions(self, path: Path) -> list[Any]:
        """What to ask of each row of a file, in the columns that the run was trained on; answers are not needed.

        Raises:
            InputError: the file cannot be read, or a column is missing.
        """
        return self.task.questions(self.config.data, read_file(path, "FILE"))

    def answers(self, questions: list[Any]) -> Iterator[dict[str, Any]]:
        """An answer to each question, in order."""
        return self.task.answer(self.model, self.processor, questions, self.options)

    def stream(self, question: Any) -> Iterator[str]:
        """The text that answers, in pieces; a text is put as a user's message where the run was trained on chats."""
        return generate(self.model, self.processor, question, self.options)
