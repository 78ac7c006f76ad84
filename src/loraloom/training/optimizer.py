"""The section `optimizer` of RUN.yaml as what the trainers take."""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer

from loraloom.optim import trainer_optimizer
from loraloom.training.config import METHODS_WITH_SELECTION, RunConfig


def run_optimizer(
    config: RunConfig, max_grad_norm: float | None
) -> tuple[Callable[[], Callable[..., Optimizer]], dict[str, Any]]:
    """The run's optimizer as ``optimizer_cls_and_kwargs`` of a trainer, with every key that was set.

    Args:
        config: the run.
        max_grad_norm: the trainer's. With ``optimizer.layerwise`` the gradients are gone when the trainer would clip
            them, and the optimizer clips what is left of them.

    Raises:
        ValueError: the optimizer does not honour one of the options.
    """
    options = {key: value for key, value in dataclasses.asdict(config.optimizer).items() if value is not None}
    name = options.pop("name", "weight_adam" if config.method.name in METHODS_WITH_SELECTION else "adamw")
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    if options.get("layerwise"):
        options["max_grad_norm"] = max_grad_norm or None  # 0 is transformers' word for not at all
    if name == "adamw":
        options["fused"] = True  # as transformers' default; one call instead of one for each of many small tensors
    return trainer_optimizer(name, lr=config.training["learning_rate"], **options)
