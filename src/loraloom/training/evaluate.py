"""A finished run, loaded from its folder and evaluated again: as it is, or with its intruder dimensions scaled down."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from transformers import Trainer

from loraloom.adapter.open import open_stored
from loraloom.adapter.stored import CONFIG
from loraloom.errors import InputError
from loraloom.io.checkpoint import read_json
from loraloom.training.config import METHODS_WITHOUT_ADAPTER, RunConfig
from loraloom.training.data import load_data
from loraloom.training.load import load_config
from loraloom.training.measure import evaluate_test
from loraloom.training.metrics import main_metric
from loraloom.training.model import load_base, load_processor, resolve_max_length
from loraloom.training.prepare import build_trainer, prepare_setup, training_arguments
from loraloom.training.result import RESOLVED, RESULT
from loraloom.training.retention import Retention, load_retention
from loraloom.training.tasks.base import RunData, Setup
from loraloom.tuner.model import LoomModel
from loraloom.tuner.speed_up import speed_up

if TYPE_CHECKING:
    from loraloom.intruders.report import SweepReport


@dataclass(frozen=True)
class Loaded:
    """A finished run as it was at its end."""

    trainer: Trainer
    setup: Setup
    retention: Retention | None = None
    """With data.retention: what measures it, fitted without the adapter."""


def evaluate_saved(folder: Path) -> dict[str, float]:
    """The metrics on the test set of the run that `folder` holds, as a program that reloads it would get them.

    Raises:
        InputError: the folder holds no run, or the data or base model of the run cannot be found.
    """
    config = finished_run(folder)
    loaded = _load(folder, config)
    return evaluate_test(loaded.trainer, loaded.setup)[0]


def sweep_saved(folder: Path, scales: Sequence[float], **options: Any) -> "SweepReport":
    """What scaling the intruder dimensions of a finished run does to its task and to what its base could do.

    The points' metrics are those of the test set and, if the run has `data.retention`, the same ones of that set, as
    ``retention_...``. What is judged first comes first: the task's accuracy (causal-lm: loss), then that of retention.

    Args:
        folder: output.dir of the run.
        scales: see :func:`loraloom.intruders.live.sweep_intruders`.
        **options: of :func:`loraloom.intruders.live.sweep_intruders`: scope, rank, rewind, top_k, epsilon.

    Raises:
        InputError: as :func:`evaluate_saved`; or the run trained no adapter.
    """
    from loraloom.intruders.live import sweep_intruders

    config = finished_run(folder)
    if config.method.name in METHODS_WITHOUT_ADAPTER:
        raise InputError(
            f"{folder} holds a run of method.name {config.method.name!r}, which trains no adapter", code="no-adapter"
        )
    loaded = _load(folder, config)
    first = main_metric(config.model.task, config.training.get("metrics"))

    def measure(_: PeftModel) -> dict[str, float]:
        metrics = evaluate_test(loaded.trainer, loaded.setup)[0]
        if loaded.retention is not None:
            metrics |= {f"retention_{name}": value for name, value in loaded.retention.measure().items()}
        return dict(sorted(metrics.items(), key=lambda item: not item[0].endswith(first)))

    model: Any = loaded.trainer.model
    return sweep_intruders(model, "default", scales, measure, **options)


def finished_run(folder: Path) -> RunConfig:
    """The configuration of the run that a folder holds.

    Raises:
        InputError: the folder holds no finished run.
    """
    if not (folder / RESULT).is_file():
        raise InputError(f"{folder} holds no finished run: there is no {RESULT}", code="no-run")
    return load_config(folder / RESOLVED)


def load_model(folder: Path, config: RunConfig, data: RunData, processor: Any) -> Any:
    """The model of a run as its folder has it: the base with its adapter, or the trained weights.

    Raises:
        InputError: the base model of the run cannot be found.
    """
    if config.method.name in METHODS_WITHOUT_ADAPTER:
        return load_base(config.model, data, processor, path=str(folder))[0]
    adapter_config = read_json(folder / CONFIG)
    if not adapter_config.get("target_parameters"):
        open_stored(folder)
    base, _ = load_base(config.model, data, processor)
    try:
        model = PeftModel.from_pretrained(base, str(folder))
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # of a configuration that PEFT cannot read
        raise InputError(f"{folder}: PEFT cannot load the adapter: {error}", code="adapter") from error
    if not isinstance(model.base_model, LoomModel):
        speed_up(model)  # as in training: the same numbers to the last bit
    return model


def _load(folder: Path, config: RunConfig) -> Loaded:
    """The trainer with the run's model and, with data.retention, what measures that."""
    data = load_data(config.data, config.model.task)
    processor = load_processor(config.model)
    max_length = resolve_max_length(config, processor)
    adapter = config.method.name not in METHODS_WITHOUT_ADAPTER
    retained = load_retention(config.data, config.model.task) if adapter else None
    setup = prepare_setup(config, processor, data, retained, max_length)
    model = load_model(folder, config, data, processor)
    arguments = training_arguments(config, max_length, validates=data.validation is not None)
    trainer = build_trainer(setup, arguments, model, [])
    if retained is None:
        return Loaded(trainer, setup)
    with model.disable_adapter():
        return Loaded(trainer, setup, Retention(trainer, config, processor, retained))
