"""WeightLoRA's selection in a run: the keys of `method` as an `AdapterSelection`, its resume, and its outcome."""

from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from loraloom.errors import InputError
from loraloom.optim import WeightAdam
from loraloom.selection import AdapterSelection, FillBudget, HalveAndDouble, SelectionCallback
from loraloom.selection.phases import Phases
from loraloom.training.config import EXPANSION_KEYS, SELECTION_KEYS, MethodSection, RunConfig

# Rank ("r") and last gate ("gate") of the adapter of each module, None where it was disconnected.
Adapters = dict[str, dict[str, float] | None]


class RunSelection(SelectionCallback):
    """The callback of a run of the command line, whose mistakes are the user's: they are `InputError`."""

    phases_before: Phases | None = None

    def resume(self, checkpoint: Path) -> None:
        """Give the model the shape that it had at the checkpoint; call it before ``trainer.train``."""
        self.selection.start(TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).max_steps)
        self.phases_before = self.selection.phases
        self.selection.restore(checkpoint)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        try:
            super().on_train_begin(args, state, control, **kwargs)
        except ValueError as error:
            raise InputError(f"method: {' '.join(str(error).split())}", code="method") from error
        before, now = self.phases_before, cast(Phases, self.selection.phases)
        if before is not None and before != now:
            raise InputError(
                f"--resume: the run has {state.max_steps} steps now, which moves the selection from steps "
                f"{_span(before)} to {_span(now)}: resume with the length that it had, or start anew with whole steps "
                "in method.warmup_steps and method.select_until",
                code="resume-differs",
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Nothing: the run itself saves the selection, into output.dir; without checkpoints their folder is missing."""

    def adapters(self) -> Adapters:
        """What became of each adapter."""
        kept = self.selection.kept
        gates: dict[str, float] = {}
        for record in self.selection.history:
            pairs = zip(self.selection.modules, record["gates"], strict=True)
            gates |= {name: gate for name, gate in pairs if gate is not None}
        return {
            name: {"r": kept[name], "gate": gates[name]} if name in kept else None for name in self.selection.modules
        }


def select_in(trainer: Trainer, config: RunConfig) -> RunSelection:
    """Add the selection that `config.method` describes to a trainer that has its optimizer.

    Raises:
        InputError: a key is out of range, or the model cannot be selected from; or it is sharded.
    """
    if trainer.is_fsdp_enabled:
        raise InputError(
            f"method.name {config.method.name!r} disconnects whole adapters, FSDP shards them: use DDP", code="fsdp"
        )
    method = config.method
    options = {key: getattr(method, key) for key in SELECTION_KEYS if getattr(method, key) is not None}
    model, optimizer = cast(PeftModel, trainer.model), cast(WeightAdam, trainer.optimizer)
    try:
        selection = AdapterSelection(
            model, optimizer, expand=_expansion(method), seed=config.training["seed"], **options
        )
    except ValueError as error:
        raise InputError(f"method: {' '.join(str(error).split())}", code="method") from error
    callback = RunSelection(selection, trainer.log)
    trainer.add_callback(callback)
    return callback


def _span(phases: Phases) -> str:
    return f"{phases.warmup_steps}..{phases.fixed_from}"


def _expansion(method: MethodSection) -> HalveAndDouble | FillBudget | None:
    if method.name != "weightlora+":
        return None
    if method.expand_parameters is not None:
        return FillBudget(method.expand_parameters)
    given = {key.removeprefix("expand_"): getattr(method, key) for key in EXPANSION_KEYS}
    return HalveAndDouble(**{key: value for key, value in given.items() if value is not None})
