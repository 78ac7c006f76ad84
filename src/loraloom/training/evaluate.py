"""A finished run, loaded from its folder and evaluated again: as it is, or with its intruder dimensions scaled down."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import Trainer

from loraloom.errors import InputError
from loraloom.training.config import METHODS_WITHOUT_ADAPTER, RunConfig
from loraloom.training.data import load_data
from loraloom.training.loading import load_config
from loraloom.training.model import load_base, load_tokenizer
from loraloom.training.retention import Retention, load_retention
from loraloom.training.run import RESOLVED, RESULT, build_trainer, evaluate

if TYPE_CHECKING:
    from loraloom.intruders.report import SweepReport


def evaluate_saved(folder: Path) -> dict[str, float]:
    """The metrics on the test set of the run that `folder` holds, as a program that reloads it would get them.

    Raises:
        InputError: the folder holds no run, or the data or base model of the run cannot be found.
    """
    config = _finished_run(folder)
    return evaluate(_load(folder, config)[0], config)


def sweep_saved(folder: Path, scales: Sequence[float], **options: Any) -> "SweepReport":
    """What scaling the intruder dimensions of a finished run does to its task and to what its base could do.

    The points' metrics are those of the test set and, if the run has `data.retention`, the same ones of that set, as
    ``retention_...``. What is judged first comes first: the task's accuracy (causal-lm: loss), then that of retention.

    Args:
        folder: output.dir of the run.
        scales: see :func:`loraloom.intruders.live.sweep`.
        **options: of :func:`loraloom.intruders.live.sweep`: scope, rank, top_k, epsilon.

    Raises:
        InputError: as :func:`evaluate_saved`; or the run trained no adapter.
    """
    from loraloom.intruders.live import sweep

    config = _finished_run(folder)
    if config.method.name in METHODS_WITHOUT_ADAPTER:
        raise InputError(f"{folder} holds a run of method.name {config.method.name!r}, which trains no adapter")
    trainer, retention = _load(folder, config)
    first = "loss" if config.model.task == "causal-lm" else "accuracy"

    def measure(_: PeftModel) -> dict[str, float]:
        metrics = evaluate(trainer, config)
        if retention is not None:
            metrics |= {f"retention_{name}": value for name, value in retention.measure().items()}
        return dict(sorted(metrics.items(), key=lambda item: not item[0].endswith(first)))

    model: Any = trainer.model
    return sweep(model, "default", scales, measure, **options)


def _finished_run(folder: Path) -> RunConfig:
    if not (folder / RESULT).is_file():
        raise InputError(f"{folder} holds no finished run: there is no {RESULT}")
    return load_config(folder / RESOLVED)


def _load(folder: Path, config: RunConfig) -> tuple[Trainer, Retention | None]:
    """The trainer with the run's model and, with data.retention, what measures that: fitted without the adapter."""
    data = load_data(config.data, config.model.task)
    tokenizer = load_tokenizer(config.model)
    if config.method.name in METHODS_WITHOUT_ADAPTER:
        model: Any = load_base(config.model, data.label_names, tokenizer, path=str(folder))[0]
        return build_trainer(config, model, tokenizer, data, []), None
    base, _ = load_base(config.model, data.label_names, tokenizer)
    model = PeftModel.from_pretrained(base, str(folder))
    retained = load_retention(config.data, config.model.task)
    trainer = build_trainer(config, model, tokenizer, data, [], retained)
    if retained is None:
        return trainer, None
    with model.disable_adapter():
        return trainer, Retention(trainer, config, tokenizer, retained)
