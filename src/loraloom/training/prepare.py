"""Everything of a run that can be wrong, before anything of it is written: folder, data, model, trainer."""

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from loraloom.errors import InputError
from loraloom.selection import FILE_NAME
from loraloom.training.checkpoints import last_checkpoint
from loraloom.training.config import TRAINING_KEYS, RunConfig
from loraloom.training.load import load_config, unknown_key
from loraloom.training.metrics import LOWER_IS_BETTER, check_packages, main_metric, metric_names
from loraloom.training.optimizer import average_in_optimizer, run_optimizer
from loraloom.training.result import CHECKPOINTS, LOCK, PORTABLE, RESOLVED, RESULT, STATE
from loraloom.training.tasks import get_task
from loraloom.training.tasks.base import RunData, Setup


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold a run's folder for the whole run; of several processes of one run the first one does.

    Raises:
        InputError: another run works in the folder.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    new = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    try:
        lock = filelock.FileLock(output / LOCK, timeout=0)
        lock.acquire()
    except filelock.Timeout:
        raise InputError(
            f"output.dir {str(output)!r}: another run works there now: wait for it, or give another --output.dir",
            code="folder-in-use",
        ) from None
    try:
        yield
    finally:
        lock.release()
        if new and [path.name for path in output.iterdir()] in ([LOCK], []):  # a mistake leaves no folder behind
            (output / LOCK).unlink(missing_ok=True)
            output.rmdir()


def check_folder(config: RunConfig, resume: bool, console: Console) -> Path | None:
    """The checkpoint to resume from, if that is asked for.

    Raises:
        InputError: the folder holds a run and neither `resume` nor `output.overwrite` is set; or there is nothing to
            resume, or another model, method or data set was trained here.
    """
    output = Path(config.output.dir)
    if not resume:
        if (output / RESOLVED).exists() and not config.output.overwrite:
            raise InputError(
                f"output.dir {str(output)!r} holds a run: give another --output.dir, --resume to go on with it, or "
                "--output.overwrite true to replace it",
                code="folder-holds-a-run",
            )
        return None
    checkpoint = last_checkpoint(output / CHECKPOINTS, lambda text: console.print(text, highlight=False))
    if checkpoint is None:
        raise InputError(
            f"--resume: no complete checkpoint in {output / CHECKPOINTS}; run without --resume to start",
            code="nothing-to-resume",
        )
    earlier, now = dataclasses.asdict(load_config(output / RESOLVED)), dataclasses.asdict(config)
    for section in ("model", "data", "method", "composition", "optimizer"):
        for key, value in now[section].items():
            if earlier[section][key] != value:
                raise InputError(
                    f"--resume: {section}.{key} was {earlier[section][key]!r} and is {value!r} now; a checkpoint "
                    "resumes only the same model, data, method and optimizer",
                    code="resume-differs",
                )
    changed = [key for key in now["training"] if earlier["training"].get(key) != now["training"][key]]
    if changed:
        console.print(f"Resuming with other training.{', training.'.join(changed)} than before.")
    return checkpoint


def clear(output: Path) -> None:
    """Remove what an earlier run left of itself in the folder: a stale adapter would be loaded with a model."""
    for folder in (CHECKPOINTS, PORTABLE):
        shutil.rmtree(output / folder, ignore_errors=True)
    weights = [*output.glob("adapter_*"), *output.glob("model*.safetensors*"), output / "config.json"]
    for path in (output / RESULT, output / STATE, output / FILE_NAME, *weights):
        path.unlink(missing_ok=True)


def training_arguments(config: RunConfig, max_length: int, validates: bool = True) -> TrainingArguments:
    """The arguments of the task's trainer.

    Args:
        config: the run.
        max_length: tokens after which a text is cut.
        validates: whether there is a validation set; without one nothing is evaluated while training.

    Raises:
        InputError: `training` has a key that the task's arguments do not have, or a value that they refuse; a metric's
            package is missing; or several processes were started and do not work together.
    """
    task = get_task(config.model.task)
    given = {key: value for key, value in config.training.items() if key not in TRAINING_KEYS}
    known = [f.name for f in dataclasses.fields(task.arguments)]
    for key in given:
        if key not in known:
            raise unknown_key("training", key, [*known, *TRAINING_KEYS])
    chosen = config.training.get("metrics")
    names = metric_names(config.model.task, chosen)
    check_packages(names)
    best = main_metric(config.model.task, chosen)
    defaults: dict[str, Any] = {
        "include_num_input_tokens_seen": "non_padding",
        "logging_nan_inf_filter": False,  # it would hide a loss that is not finite from `SanityCallback`
        "dataloader_pin_memory": torch.cuda.is_available(),  # else torch warns at every loader
        "use_cpu": not torch.accelerator.is_available(),  # else several processes would not find each other
        **task.argument_defaults(config, max_length),
    }
    chooses_best = given.get("load_best_model_at_end") or given.get("save_strategy") == "best"
    if chooses_best:
        defaults |= {"metric_for_best_model": best, "greater_is_better": best not in LOWER_IS_BETTER}
    fixed: dict[str, Any] = {"output_dir": str(Path(config.output.dir) / CHECKPOINTS), "disable_tqdm": True}
    if not validates:
        if chooses_best:
            raise InputError(
                "training.load_best_model_at_end and save_strategy 'best' choose by the validation set, and there is "
                "none: set data.validation_fraction or data.validation_path",
                code="no-validation",
            )
        fixed["eval_strategy"] = "no"
    try:
        arguments = task.arguments(**{**defaults, **given, **fixed})
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"training: {' '.join(str(error).split())}", code="training") from error
    check_processes(arguments)
    return arguments


def check_processes(arguments: TrainingArguments) -> None:
    """Raises InputError where several processes were started and each would train on its own."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > 1 and arguments.world_size == 1:
        raise InputError(
            f"WORLD_SIZE is {started}, and this process trains alone on {arguments.device}: all {started} would write "
            "the same folder; set training.use_cpu true for processes on the CPU, or start one process",
            code="processes-alone",
        )


def prepare_setup(config: RunConfig, processor: Any, data: RunData, retained: RunData | None, max_length: int) -> Setup:
    """What the task makes its trainer from."""
    names = metric_names(config.model.task, config.training.get("metrics"))
    return Setup(config, data, processor, max_length, names, retained)


def build_trainer(
    setup: Setup,
    arguments: TrainingArguments,
    model: PreTrainedModel | PeftModel,
    callbacks: list[TrainerCallback],
) -> Trainer:
    """The trainer of the run's task.

    Raises:
        InputError: the optimizer does not honour an option; or the rows are chats and the tokenizer has no template.
    """
    config = setup.config
    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "processing_class": setup.processor,
        "callbacks": callbacks,
    }
    if "optim" not in config.training:
        try:
            common["optimizer_cls_and_kwargs"] = run_optimizer(config, arguments)
        except ValueError as error:
            raise InputError(f"optimizer: {error}", code="optimizer") from error
    if config.optimizer.layerwise:
        arguments.max_grad_norm = 0.0  # the optimizer does it
    trainer = get_task(config.model.task).trainer(setup, common)
    if config.optimizer.layerwise:
        average_in_optimizer(trainer)
    trainer.remove_callback(PrinterCallback)
    if arguments.dataloader_drop_last and not len(trainer.get_train_dataloader()):
        raise InputError(
            f"training.dataloader_drop_last drops the only batch: {len(setup.data.train)} rows are fewer than a batch "
            f"of {arguments.train_batch_size}",
            code="no-batch",
        )
    return trainer


def measured(rows: Dataset, limit: int) -> Dataset:
    """At most `limit` rows, spread evenly."""
    step = max(1, len(rows) // limit)
    return rows if step == 1 else rows.select(range(0, len(rows), step))
