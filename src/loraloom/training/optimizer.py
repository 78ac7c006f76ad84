"""The section `optimizer` of RUN.yaml as what the trainers take."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments

from loraloom.errors import InputError
from loraloom.optim import trainer_optimizer
from loraloom.training.config import METHODS_WITH_SELECTION, RunConfig


def run_optimizer(
    config: RunConfig, arguments: TrainingArguments
) -> tuple[Callable[[], Callable[..., Optimizer]], dict[str, Any]]:
    """The run's optimizer as ``optimizer_cls_and_kwargs`` of a trainer, with every key that was set.

    Args:
        config: the run.
        arguments: the trainer's. With ``optimizer.layerwise`` the gradients are gone when the trainer would clip
            them or DDP average them, and the optimizer does both with what is left of them.

    Raises:
        InputError: the optimizer does not honor one of the options.
    """
    options = {key: value for key, value in dataclasses.asdict(config.optimizer).items() if value is not None}
    name = options.pop("name", "weight_adam" if config.method.name in METHODS_WITH_SELECTION else "adamw")
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    if options.get("layerwise"):
        options["max_grad_norm"] = arguments.max_grad_norm or None  # 0 is transformers' word for not at all
        if arguments.world_size > 1:
            options["process_group"] = dist.group.WORLD
    if name == "adamw":
        options["fused"] = True  # as transformers' default; one call instead of one for each of many small tensors
    return trainer_optimizer(name, lr=config.training["learning_rate"], **options)


def average_in_optimizer(trainer: Trainer) -> None:
    """Leave the model of a trainer without DDP, for an optimizer that averages the gradients of all processes itself.

    Raises:
        InputError: the model is to be sharded.
    """
    if trainer.is_fsdp_enabled:
        raise InputError(
            "optimizer.layerwise can't be used with FSDP, which shards gradients: use DDP, or leave it out",
            code="layerwise-sharded",
        )
    # What evaluations do: everything but the wrapping.
    accelerator: Any = trainer.accelerator
    accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)
