"""A finished run, loaded from its folder and evaluated again."""

from pathlib import Path
from typing import Any

from peft import PeftModel

from loraloom.errors import InputError
from loraloom.training.config import METHODS_WITHOUT_ADAPTER
from loraloom.training.data import load_data
from loraloom.training.loading import load_config
from loraloom.training.model import load_base, load_tokenizer
from loraloom.training.run import RESOLVED, RESULT, build_trainer, evaluate


def evaluate_saved(folder: Path) -> dict[str, float]:
    """The metrics on the test set of the run that `folder` holds, as a program that reloads it would get them.

    Raises:
        InputError: the folder holds no run, or the data or base model of the run cannot be found.
    """
    if not (folder / RESULT).is_file():
        raise InputError(f"{folder} holds no finished run: there is no {RESULT}")
    config = load_config(folder / RESOLVED)
    data = load_data(config.data, config.model.task)
    tokenizer = load_tokenizer(config.model)
    if config.method.name in METHODS_WITHOUT_ADAPTER:
        model: Any = load_base(config.model, data.label_names, tokenizer, path=str(folder))[0]
    else:
        base, _ = load_base(config.model, data.label_names, tokenizer)
        model = PeftModel.from_pretrained(base, str(folder))
    return evaluate(build_trainer(config, model, tokenizer, data, []), config)
