"""One training run, from a RunConfig to an adapter on disk with the numbers that it reached."""

import dataclasses
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig

from loraloom.card import write_card
from loraloom.errors import InputError, RunInterruptedError
from loraloom.io.files import write_text_atomically
from loraloom.optim import adamw_memory, expected_memory, format_galore, format_param_groups
from loraloom.optim.galore.engine import ProjectedOptimizer
from loraloom.selection import FILE_NAME
from loraloom.training.callbacks import InterruptCallback, SanityCallback, SpeedCallback
from loraloom.training.card import run_card
from loraloom.training.composition import PORTABLE, Composed, finish_composition
from loraloom.training.config import COMPOSITION, METHODS_WITH_SELECTION, METRICS, RunConfig
from loraloom.training.data import RunData, data_sha256, load_data
from loraloom.training.display import TrainingDisplay, memory_table
from loraloom.training.loading import dump_config, load_config, unknown_key
from loraloom.training.metrics import classification_metrics, peak_memory_bytes
from loraloom.training.model import apply_method, load_base, load_tokenizer
from loraloom.training.optimizer import run_optimizer
from loraloom.training.retention import Retention, load_retention
from loraloom.training.selection import Adapters, select_in
from loraloom.training.trainers import CausalTrainer, ExactResumeTrainer

RESOLVED, RESULT, CHECKPOINTS = "resolved.yaml", "metrics.json", "checkpoints"
STATE = "trainer_state.json"  # transformers' name of it; holds everything that was logged


@dataclass(frozen=True)
class RunResult:
    """What metrics.json holds."""

    task: str
    method: str
    before: dict[str, float]
    """Metrics on the test set before training (a new head is random then)."""
    after: dict[str, float]
    label_names: list[str]
    train_rows: int
    test_rows: int
    steps: int
    trainable_parameters: int
    total_parameters: int
    tokens_per_second: float
    """Tokens without padding, over the time of training without its evaluations."""
    peak_memory_bytes: int | None
    """Allocated on the GPU where there is one, else resident memory of the process."""
    wall_time_seconds: float
    output_dir: str
    retention: dict[str, dict[str, float]] | None = None
    """With data.retention: its metrics "before" and "after"."""
    composition: Composed | None = None
    """composition: what it learned of the members."""
    adapters: Adapters | None = None
    """weightlora: rank and last gate of every adapter that was kept, null for one that was dropped, by module."""


def train(config: RunConfig, *, resume: bool = False, console: Console | None = None, command: str = "") -> RunResult:
    """Train as `config` says, save into `config.output.dir`, and measure before and after.

    The folder gets the adapter and tokenizer, a model card, resolved.yaml, trainer_state.json with everything that was
    logged, metrics.json (last, so it marks a finished run), checkpoints/ and, from weightlora, selection.json with the
    gates over time. The first Ctrl-C ends the current step and saves a checkpoint. A resumed run gives bit for bit what
    the uninterrupted one gives.

    Args:
        config: the run, from `load_config` or built in Python.
        resume: go on from the last checkpoint in the folder.
        console: where to show progress; default is none.
        command: what was typed, for the model card.

    Raises:
        InputError: something in the configuration, the data or the folder is wrong.
        RunFailedError: the run cannot come to anything (see `SanityCallback`).
        RunInterruptedError: stopped by the user; a checkpoint is saved.
    """
    started = time.monotonic()
    console = console or Console(quiet=True)
    output = Path(config.output.dir)
    checkpoint = _prepare_output(config, output, resume, console)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    set_seed(config.training["seed"])
    with console.status("Reading data"):
        data = load_data(config.data, config.model.task)
        retained = load_retention(config.data, config.model.task)
    with console.status("Loading the model"):
        tokenizer = load_tokenizer(config.model)
        base, new_modules = load_base(config.model, data.label_names, tokenizer)
        model = apply_method(base, config, new_modules)
    display = TrainingDisplay(console, METRICS[config.model.task])
    speed = SpeedCallback()
    interrupt = InterruptCallback(
        lambda: console.print("Finishing this step and saving a checkpoint; Ctrl-C again stops at once.")
    )
    trains = count_parameters(model)[0] > 0  # else it is a composition with given weights, and only evaluated
    if not trains and config.method.name != COMPOSITION:
        raise InputError(
            f"method.name {config.method.name!r} trains nothing of {config.model.name!r}, which has a trained head "
            "already: use an adapter, or 'full'"
        )
    adapter_trains = isinstance(model, PeftModel) and config.composition.weights == "learned"
    watched = str(model.base_model.prefix) if adapter_trains else ""
    callbacks = [SanityCallback(watched), speed, interrupt, display]
    trainer = build_trainer(config, model, tokenizer, data, callbacks, retained)
    if trainer.is_fsdp_enabled and config.method.name == COMPOSITION:
        raise InputError(f"method.name {COMPOSITION!r} makes one LoRA of whole layers, FSDP shards them: use DDP")
    if trainer.is_fsdp_enabled and retained is not None:
        raise InputError("data.retention does not work with FSDP: measure it on the saved adapter, on one device")
    if trains and not trainer.is_fsdp_enabled:  # there it can be made only from the sharded model
        optimizer = trainer.create_optimizer()  # now, so that a mistake costs no evaluation
        show_optimizer(model, optimizer, console)
    selection = select_in(trainer, config) if config.method.name in METHODS_WITH_SELECTION else None
    if checkpoint is None and (output / RESOLVED).exists() and trainer.is_world_process_zero():
        _clear(output)  # not earlier: up to here a mistake loses nothing
    trainer.accelerator.wait_for_everyone()
    write_text_atomically(output / RESOLVED, dump_config(config))
    with display.showing(), interrupt.listening():
        before = evaluate(trainer, config)
        retention = None if retained is None else Retention(trainer, config, tokenizer, retained)
        if selection is not None and checkpoint is not None:
            selection.resume(Path(checkpoint))  # not earlier: `before` is of the model with all adapters
        if trains:
            trainer.train(resume_from_checkpoint=checkpoint)
        state = trainer.state
        if interrupt.requested and state.global_step < state.max_steps:
            saved = output / CHECKPOINTS / f"checkpoint-{state.global_step}"
            raise RunInterruptedError(f"stopped after step {state.global_step} of {state.max_steps}; saved {saved}")
        after = _last_evaluation(trainer, config) or evaluate(trainer, config)
        retention_metrics = None if retention is None else {"before": retention.before, "after": retention.measure()}
    trainer.save_model(str(output))
    composed = None
    if config.method.name == COMPOSITION and trainer.is_world_process_zero():
        composed = finish_composition(model, output)
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
        wall_time_seconds=round(time.monotonic() - started, 2),
        output_dir=str(output),
        retention=retention_metrics,
        composition=composed,
        adapters=None if selection is None else selection.adapters(),
    )
    if trainer.is_world_process_zero():
        # Trainer leaves its arguments as a pickle beside the weights; resolved.yaml says the same and is safe to read.
        (output / "training_args.bin").unlink(missing_ok=True)
        if selection is not None:
            selection.selection.save(output)
        state.save_to_json(str(output / STATE))
        write_card(run_card(config, result, data_sha256(data), command), output)
        write_text_atomically(output / RESULT, json.dumps(dataclasses.asdict(result), indent=2) + "\n")
    return result


def show_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer, console: Console) -> None:
    """The parameter groups, what GaLore projects, and the memory of it all."""
    console.print(format_param_groups(optimizer.param_groups), highlight=False)
    if isinstance(optimizer, ProjectedOptimizer):
        console.print("\n" + format_galore(optimizer), highlight=False)
    console.print(memory_table(expected_memory(model, optimizer), adamw_memory(model)), highlight=False)


def build_trainer(
    config: RunConfig,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    data: RunData,
    callbacks: list[TrainerCallback],
    retained: RunData | None = None,
) -> Trainer:
    """The trainer of the run's task.

    Raises:
        InputError: `training` has a key that the task's arguments do not have, or a value that they refuse; or the
            rows are chats and the tokenizer has no chat template.
    """
    causal = config.model.task == "causal-lm"
    arguments_class: type[TrainingArguments] = SFTConfig if causal else TrainingArguments
    known = [f.name for f in dataclasses.fields(arguments_class)]
    for key in config.training:
        if key not in known:
            raise unknown_key("training", key, known)
    defaults: dict[str, Any] = {
        "include_num_input_tokens_seen": "non_padding",
        "dataloader_pin_memory": torch.cuda.is_available(),  # else torch warns at every loader
    }
    fixed = {"output_dir": str(Path(config.output.dir) / CHECKPOINTS), "disable_tqdm": True}
    if causal:
        defaults["max_length"] = config.data.max_length
    try:
        arguments = arguments_class(**{**defaults, **config.training, **fixed})
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(f"training: {' '.join(str(error).split())}") from error
    # What both trainers take.
    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "processing_class": tokenizer,
        "callbacks": callbacks,
    }
    if "optim" not in config.training:
        try:
            common["optimizer_cls_and_kwargs"] = run_optimizer(config, arguments.max_grad_norm)
        except ValueError as error:
            raise InputError(f"optimizer: {error}") from error
    if config.optimizer.layerwise:
        if arguments.world_size > 1:
            raise InputError(
                f"optimizer.layerwise frees gradients before {arguments.world_size} processes can average them: leave "
                "it out, or start one process"
            )
        arguments.max_grad_norm = 0.0  # the optimizer does it
    if causal:
        for rows, key in ((data, "path"), (retained, "retention")):
            if rows is not None and "messages" in rows.test.column_names and tokenizer.chat_template is None:
                name = getattr(config.data, key)
                raise InputError(f"data.{key} {name!r} holds chats, and the tokenizer has no chat template")
        trainer: Trainer = CausalTrainer(
            train_dataset=data.train,
            eval_dataset=data.test,
            retained=None if retained is None else retained.test,
            **common,
        )
    else:
        trainer = ExactResumeTrainer(
            train_dataset=tokenize(data.train, tokenizer, config.data.max_length),
            eval_dataset=tokenize(data.test, tokenizer, config.data.max_length),
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=classification_metrics(len(data.label_names)),
            **common,
        )
    trainer.remove_callback(PrinterCallback)
    return trainer


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """`text` and `label` to the model's inputs and `labels`, unpadded: batches are padded to their longest."""
    encoded = tokenizer(rows["text"][:], truncation=True, max_length=max_length)
    return Dataset.from_dict({**encoded, "labels": rows["label"][:]})


def evaluate(trainer: Trainer, config: RunConfig) -> dict[str, float]:
    """The task's metrics on the test set."""
    metrics = trainer.evaluate()
    return {name: metrics[f"eval_{name}"] for name in METRICS[config.model.task]}


def _last_evaluation(trainer: Trainer, config: RunConfig) -> dict[str, float] | None:
    """The metrics of the weights as they are now, if the last epoch ended with an evaluation of just these."""
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    if not evaluations or evaluations[-1]["step"] != trainer.state.global_step or trainer.args.load_best_model_at_end:
        return None
    return {name: evaluations[-1][f"eval_{name}"] for name in METRICS[config.model.task]}


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable and all parameters; a 4-bit base counts its weights, not its bytes."""
    if isinstance(model, PeftModel):
        return model.get_nb_trainable_parameters()
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in sizes if trains), sum(n for n, _ in sizes)


def _prepare_output(config: RunConfig, output: Path, resume: bool, console: Console) -> str | None:
    """The checkpoint to resume from, if that is asked for.

    Raises:
        InputError: the folder holds a run and neither `resume` nor `output.overwrite` is set; or there is nothing to
            resume, or another model, method or data set was trained here.
    """
    if resume:
        checkpoints = output / CHECKPOINTS
        checkpoint = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
        if checkpoint is None:
            raise InputError(f"--resume: no checkpoint in {checkpoints}; run without --resume to start")
        earlier = dataclasses.asdict(load_config(output / RESOLVED))
        now = dataclasses.asdict(config)
        for section in ("model", "data", "method", "composition", "optimizer"):
            for key, value in now[section].items():
                if earlier[section][key] != value:
                    raise InputError(
                        f"--resume: {section}.{key} was {earlier[section][key]!r} and is {value!r} now; a checkpoint "
                        "resumes only the same model, data, method and optimizer"
                    )
        changed = [key for key in now["training"] if earlier["training"].get(key) != now["training"][key]]
        if changed:
            console.print(f"Resuming with other training.{', training.'.join(changed)} than before.")
        return checkpoint
    if (output / RESOLVED).exists() and not config.output.overwrite:
        raise InputError(
            f"output.dir {str(output)!r} holds a run: give another --output.dir, --resume to go on with it, or "
            "--output.overwrite true to replace it"
        )
    output.mkdir(parents=True, exist_ok=True)
    return None


def _clear(output: Path) -> None:
    """Remove what an earlier run left of itself in the folder: a stale adapter would be loaded with a model."""
    for folder in (CHECKPOINTS, PORTABLE):
        shutil.rmtree(output / folder, ignore_errors=True)
    weights = [*output.glob("adapter_*"), *output.glob("model*.safetensors*"), output / "config.json"]
    for path in (output / RESULT, output / STATE, output / FILE_NAME, *weights):
        path.unlink(missing_ok=True)
