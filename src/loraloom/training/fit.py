"""One training run, from a RunConfig to an adapter on disk with the numbers that it reached."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from rich.console import Console
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from loraloom.card import write_card
from loraloom.errors import InputError, RunInterruptedError
from loraloom.io.files import write_text_atomically
from loraloom.optim import adamw_memory, expected_memory, format_galore, format_param_groups
from loraloom.optim.galore.engine import ProjectedOptimizer
from loraloom.training.callbacks import InterruptCallback, SanityCallback, SpeedCallback
from loraloom.training.card import run_card
from loraloom.training.checkpoints import CheckpointCallback, Clock
from loraloom.training.composition import finish_composition, write_portable
from loraloom.training.config import COMPOSITION, METHODS_WITH_SELECTION, TASKS_WITH_HEAD, RunConfig
from loraloom.training.data import data_sha256, load_data
from loraloom.training.data_report import MEASURED, outcome_warnings, report_on
from loraloom.training.display import TrainingDisplay, memory_table
from loraloom.training.load import dump_config
from loraloom.training.measure import evaluate_test, sample_answers, validation_metrics
from loraloom.training.metrics import peak_memory_bytes
from loraloom.training.model import apply_method, load_base, load_processor, resolve_max_length
from loraloom.training.prepare import (
    build_trainer,
    check_folder,
    clear,
    locked,
    measured,
    prepare_setup,
    training_arguments,
)
from loraloom.training.result import CHECKPOINTS, RESOLVED, RESULT, STATE, RunResult
from loraloom.training.retention import Retention, load_retention
from loraloom.training.selection import select_in
from loraloom.training.tasks import get_task
from loraloom.training.trainers import ExactTrainer


def train(config: RunConfig, *, resume: bool = False, console: Console | None = None, command: str = "") -> RunResult:
    """Train as `config` says, save into `config.output.dir`, and measure before and after.

    The folder gets the adapter and tokenizer, a model card, resolved.yaml, trainer_state.json with everything that was
    logged, metrics.json (last, so it marks a finished run), checkpoints/ and, from weightlora, selection.json with the
    gates over time. The first Ctrl-C ends the current step and saves a checkpoint. A resumed run gives bit for bit what
    the uninterrupted one gives. The folder is locked meanwhile, and changes only after all checks.

    Args:
        config: the run, from `load_config` or built in Python.
        resume: go on from the last complete checkpoint in the folder.
        console: where to show progress; default is none.
        command: what was typed, for the model card.

    Raises:
        InputError: something in the configuration, the data or the folder is wrong.
        RunFailedError: the run will learn nothing (see `SanityCallback`).
        RunInterruptedError: stopped by the user; a checkpoint is saved.
    """
    with locked(Path(config.output.dir)):
        return _train(config, resume, console or Console(quiet=True), command)


def _train(config: RunConfig, resume: bool, console: Console, command: str) -> RunResult:
    output, task = Path(config.output.dir), get_task(config.model.task)
    checkpoint = check_folder(config, resume, console)
    clock = Clock(checkpoint)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    set_seed(config.training["seed"])
    with console.status("Reading data"):
        processor = load_processor(config.model)
        max_length = resolve_max_length(config, processor)
        data = load_data(config.data, config.model.task)
        retained = load_retention(config.data, config.model.task)
        arguments = training_arguments(config, max_length, validates=data.validation is not None)
        setup = prepare_setup(config, processor, data, retained, max_length)
        lengths = task.lengths(setup, measured(data.train, MEASURED))
        report = report_on(data, config.model.task, lengths, max_length)
    for line in report.lines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    with console.status("Loading the model"):
        base, new_modules = load_base(config.model, data, processor)
        model = apply_method(base, config, new_modules)
    display = TrainingDisplay(console, setup.metrics, clock)
    speed = SpeedCallback()
    interrupt = InterruptCallback(
        lambda: console.print("Finishing this step and saving a checkpoint; Ctrl-C again stops at once.")
    )
    trains = count_parameters(model)[0] > 0  # else it is a composition with given weights, and only evaluated
    if not trains and config.method.name != COMPOSITION:
        raise InputError(
            f"method.name {config.method.name!r} trains nothing of {config.model.name!r}, which has a trained head "
            "already: use an adapter, or 'full'",
            code="trains-nothing",
        )
    adapter_trains = isinstance(model, PeftModel) and config.composition.weights == "learned"
    watched = str(model.base_model.prefix) if adapter_trains else ""
    callbacks = [SanityCallback(watched), speed, interrupt, display]
    trainer = build_trainer(setup, arguments, model, callbacks)
    _check_sharding(trainer, config)
    if trains:
        optimizer = trainer.create_optimizer()  # now, so that a mistake costs no evaluation
        show_optimizer(model, optimizer, console)
        cast(ExactTrainer, trainer).shard()
    selection = select_in(trainer, config) if config.method.name in METHODS_WITH_SELECTION else None

    def start() -> None:
        """The first thing that changes the folder, after the last check: a mistake before loses nothing."""
        if trainer.is_world_process_zero():
            if checkpoint is None and (output / RESOLVED).exists():
                clear(output)
            write_text_atomically(output / RESOLVED, dump_config(config))
        trainer.accelerator.wait_for_everyone()

    trainer.add_callback(CheckpointCallback(trainer, clock.seconds))
    trainer.add_callback(StartCallback(start))
    with display.showing(), interrupt.listening():
        before, _ = evaluate_test(trainer, setup)
        written = sample_answers(trainer, setup)
        retention = None if retained is None else Retention(trainer, config, processor, retained)
        if selection is not None and checkpoint is not None:
            selection.resume(checkpoint)  # not earlier: `before` is of the model with all adapters
        if trains:
            cast(ExactTrainer, trainer).forget_preparation()
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        else:
            start()
        state = trainer.state
        if interrupt.requested and state.global_step < state.max_steps:
            saved = output / CHECKPOINTS / f"checkpoint-{state.global_step}"
            raise RunInterruptedError(
                f"stopped after step {state.global_step} of {state.max_steps}; saved {saved}", code="interrupted"
            )
        validation = validation_metrics(trainer, setup)
        after, evidence = evaluate_test(trainer, setup)
        written = _both(written, sample_answers(trainer, setup))
        retention_metrics = None if retention is None else {"before": retention.before, "after": retention.measure()}
    trainer.save_model(str(output))
    composed = not_portable = None
    if trainer.is_world_process_zero():
        if config.method.name == COMPOSITION:
            composed = finish_composition(model, output)
        else:
            not_portable = write_portable(output)
    trainable, total = count_parameters(model)
    result = RunResult(
        task=config.model.task,
        method=config.method.name,
        before=before,
        after=after,
        label_names=data.label_names,
        train_rows=len(data.train),
        test_rows=len(data.test),
        steps=state.global_step,
        trainable_parameters=trainable,
        total_parameters=total,
        tokens_per_second=round(speed.tokens_per_second, 1),
        peak_memory_bytes=peak_memory_bytes(),
        wall_time_seconds=round(clock.seconds(), 2),
        output_dir=str(output),
        retention=retention_metrics,
        composition=composed,
        not_portable=not_portable,
        adapters=None if selection is None else selection.adapters(),
        validation_rows=0 if data.validation is None else len(data.validation),
        validation=validation,
        data=report.to_dict(),
        warnings=[*report.warnings, *outcome_warnings(report, after, evidence.predicted)],
        confusion=evidence.confusion,
        examples=written or evidence.examples,
    )
    if trainer.is_world_process_zero():
        # Trainer leaves its arguments as a pickle beside the weights; resolved.yaml says the same and is safe to read.
        (output / "training_args.bin").unlink(missing_ok=True)
        if config.model.task in TASKS_WITH_HEAD:  # an adapter has no place for the labels' names
            base.config.save_pretrained(output)
        if selection is not None:
            selection.selection.save(output)
        state.save_to_json(str(output / STATE))
        write_card(run_card(config, result, data_sha256(data), command), output)
        write_text_atomically(output / RESULT, json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return result


def _both(before: list[dict[str, str]], after: list[dict[str, str]]) -> list[dict[str, str]]:
    """Answers to the same prompts before and after training."""
    return [
        {"prompt": one["prompt"], "expected": one["expected"], "before": one["answer"], "after": other["answer"]}
        for one, other in zip(before, after, strict=True)
    ]


class StartCallback(TrainerCallback):
    """Calls `start` when training begins; to be added last, as the other callbacks check things then."""

    def __init__(self, start: Callable[[], None]) -> None:
        self.start = start

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start()


def _check_sharding(trainer: Trainer, config: RunConfig) -> None:
    if not trainer.is_fsdp_enabled:
        return
    if getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
        raise InputError("FSDP of version 1 shards no adapters of ours: set the version to 2", code="fsdp")
    if config.method.name == COMPOSITION:
        raise InputError(
            f"method.name {COMPOSITION!r} makes one LoRA of whole layers, FSDP shards them: use DDP", code="fsdp"
        )
    if config.data.retention is not None:
        raise InputError(
            "data.retention does not work with FSDP: measure it on the saved adapter, on one device", code="fsdp"
        )


def show_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, console: Console) -> None:
    """The parameter groups, what GaLore projects, and the memory of it all."""
    console.print(format_param_groups(optimizer.param_groups), highlight=False)
    if isinstance(optimizer, ProjectedOptimizer):
        console.print("\n" + format_galore(optimizer), highlight=False)
    console.print(memory_table(expected_memory(model, optimizer), adamw_memory(model)), highlight=False)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable and all parameters; a 4-bit base counts its weights, not its bytes."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)
