"""Callbacks that watch a run: it learns nothing or has diverged, the user stops it, how fast it is."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from loraloom.errors import RunFailedError


class SanityCallback(TrainerCallback):
    """Stops a run that will learn nothing, with the reason.

    In the first `steps` optimizer steps some trained weight must get a gradient other than zero, and some must change.
    (With B = 0 only B has a gradient at step 1; that is enough.) Later on, a loss that is not finite ends the run.

    Args:
        names: substring of the parameters to look at, "loom_" for adapters; "" for every trained parameter.
        steps: how many optimizer steps a run has to show that it learns; more than a warm-up's first step of rate 0.

    Raises:
        RunFailedError: from the callbacks, so that training ends with it.
    """

    def __init__(self, names: str, steps: int = 5):
        self.names = names
        self.steps = steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self.watched = [p for name, p in model.named_parameters() if p.requires_grad and self.names in name]
        if not self.watched:
            raise RunFailedError(
                f"no parameter with {self.names!r} in its name trains: check method.target_modules",
                code="nothing-to-train",
            )
        self.first_step = state.global_step
        self.saw_gradient = False
        self.norms = self._norms()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.saw_gradient or state.global_step - self.first_step >= self.steps:
            return
        gradients = [_local(p.grad) for p in self.watched if p.grad is not None]
        self.saw_gradient = any(bool(gradient.any()) for gradient in gradients)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, lr_scheduler: Any = None, **_: Any
    ) -> None:
        steps = min(self.steps, state.max_steps - self.first_step)
        if state.global_step - self.first_step != steps:
            return
        if not len(self.norms):
            return
        if not self.saw_gradient:
            raise RunFailedError(
                f"no adapter has had a non-zero gradient in the first {steps} steps, so nothing is learned: "
                "check that the adapted modules are used in the forward pass and that the labels are not all masked",
                code="no-gradient",
            )
        if torch.equal(self.norms, self._norms()):
            raise RunFailedError(
                f"no adapter weight has changed in the first {steps} steps although there are gradients: the "
                f"learning rate is {lr_scheduler.get_last_lr()[0]:g}; raise training.learning_rate",
                code="nothing-moves",
            )
        self.watched = []  # adapters that a selection drops later on are to be freed

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        for name in ("loss", "eval_loss", "test_loss"):
            value = (logs or {}).get(name, 0.0)
            if not math.isfinite(float(value)):
                raise RunFailedError(
                    f"{name} is {value} at step {state.global_step}: the run has diverged; lower "
                    f"training.learning_rate (now {args.learning_rate:g}) or use a wider model.dtype",
                    code="diverged",
                )

    def _norms(self) -> torch.Tensor:
        """Of what this process has of each weight that is watched; (0,) where it has nothing."""
        norms = [_local(p.detach()).double().norm().cpu() for p in self.watched if _local(p).numel()]
        return torch.stack(norms) if norms else torch.empty(0)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's share of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class InterruptCallback(TrainerCallback):
    """Turns the first Ctrl-C into: finish this step, save a checkpoint, stop. A second one stops at once.

    Args:
        announce: called at the first Ctrl-C.
    """

    def __init__(self, announce: Callable[[], None]):
        self.announce = announce
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take over SIGINT for the time of the block; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def on_signal(*_: Any) -> None:
            self.requested = True
            signal.signal(signal.SIGINT, before)
            self.announce()

        before = signal.signal(signal.SIGINT, on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.requested:
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.requested:  # the checkpoint is written already, and an evaluation would make the user wait
            control.should_save = False
            control.should_evaluate = False


class SpeedCallback(TrainerCallback):
    """Tokens (without padding) per second of training, the evaluations in between left out."""

    def __init__(self) -> None:
        self.evaluation_seconds = 0.0
        self.tokens_per_second = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.tokens_before = state.num_input_tokens_seen  # a resumed run starts with those of its first part
        self.evaluation_seconds = 0.0
        self.started = time.monotonic()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        self.evaluation_seconds += (metrics or {}).get("eval_runtime", 0.0)  # none for a second set, measured outside

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        seconds = time.monotonic() - self.started - self.evaluation_seconds
        self.tokens_per_second = (state.num_input_tokens_seen - self.tokens_before) / max(seconds, 1e-9)
