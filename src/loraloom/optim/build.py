"""One entry point to every optimizer: `build_optimizer`, and `trainer_optimizer` for transformers' Trainer.

An option reaches an optimizer only if that optimizer honours it; any other is an error that says which ones would.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from torch import nn
from torch.optim import Optimizer

from loraloom.optim.galore.groups import project_groups
from loraloom.optim.param_groups import build_param_groups


@dataclass(frozen=True)
class Choice:
    """Where an optimizer's class is, and which options of its constructor it honours."""

    module: str
    class_name: str
    options: tuple[str, ...]


_TORCH = ("betas", "eps", "foreach", "fused")
_8BIT = ("betas", "eps", "min_8bit_size")
OPTIMIZERS = {
    "adamw": Choice("torch.optim", "AdamW", (*_TORCH, "amsgrad")),
    "weight_adam": Choice(
        "loraloom.optim.weight_adam", "WeightAdam", (*_TORCH, "constraint", "gate_method", "gate_momentum")
    ),
    "adamw_8bit": Choice("bitsandbytes.optim", "AdamW8bit", _8BIT),
    "paged_adamw_8bit": Choice("bitsandbytes.optim", "PagedAdamW8bit", _8BIT),
    "galore": Choice(
        "loraloom.optim.galore.engine",
        "GaLore",
        (
            *("rank", "update_gap", "scale", "side", "refresh", "stagger", "rotate_moments", "residual", "layerwise"),
            *("max_grad_norm", "process_group", "seed", "inner", "target_modules"),
            *(*_TORCH, "amsgrad", "momentum", "nesterov", "min_8bit_size"),  # of one or other inner optimizer
        ),
    ),
}
# What GaLore's `inner` may be called; a class will do as well.
INNER = {
    "adamw": OPTIMIZERS["adamw"],
    "sgd": Choice("torch.optim", "SGD", ("momentum", "nesterov", "foreach", "fused")),
    "adafactor": Choice("torch.optim", "Adafactor", ("foreach",)),
    "adamw_8bit": OPTIMIZERS["adamw_8bit"],
}
# Honoured by all: they are decided in the parameter groups.
GROUP_OPTIONS = ("lr", "weight_decay", "lora_plus_ratio", "gate_lr", "head_lr", "logit_lr")


def build_optimizer(
    model: nn.Module,
    name: str = "adamw",
    *,
    lr: float,
    weight_decay: float = 1e-2,
    lora_plus_ratio: float = 1.0,
    gate_lr: float | None = None,
    head_lr: float | None = None,
    logit_lr: float | None = None,
    **options: Any,
) -> Optimizer:
    """The named optimizer over the model's trainable parameters, grouped by `build_param_groups`.

    Args:
        model: a PEFT model, or any module.
        name: a key of `OPTIMIZERS`: "adamw", "weight_adam", "adamw_8bit", "paged_adamw_8bit" or "galore".
        lr, weight_decay, lora_plus_ratio, gate_lr, head_lr, logit_lr: as in `build_param_groups`.
        **options: further arguments of the optimizer's class, for example ``betas``, or ``constraint=KSparse(20)``.
            "galore" also takes ``target_modules`` of `project_groups`, and ``inner`` may be a key of `INNER`.

    Raises:
        ValueError: the name or an option is unknown, the optimizer does not honour an option, or the model trains no
            parameter that an option is for.
        ModuleNotFoundError: the optimizer's package is not installed.
    """
    check_optimizer_options(name, options)
    choice = OPTIMIZERS[name]
    module = _import(choice.module, name)
    groups = build_param_groups(
        model,
        lr,
        lora_plus_ratio=lora_plus_ratio,
        gate_lr=gate_lr,
        head_lr=head_lr,
        logit_lr=logit_lr,
        weight_decay=weight_decay,
    )
    if choice.module == "bitsandbytes.optim":
        # Rows of an embedding get gradients rarely and unevenly; bitsandbytes advises 32-bit state for them.
        manager = module.GlobalOptimManager.get_instance()
        for embedding in model.modules():
            if isinstance(embedding, nn.Embedding) and embedding.weight.requires_grad:
                manager.register_module_override(embedding, "weight", {"optim_bits": 32})
    if name == "galore":
        groups = project_groups(model, groups, options.pop("target_modules", None))
        if isinstance(inner := options.get("inner"), str):
            options["inner"] = getattr(_import(INNER[inner].module, inner), INNER[inner].class_name)
    return getattr(module, choice.class_name)(groups, lr=lr, **options)


def trainer_optimizer(
    name: str = "adamw", *, lr: float, **options: Any
) -> tuple[Callable[[], Callable[..., Optimizer]], dict[str, Any]]:
    """`build_optimizer` as the ``optimizer_cls_and_kwargs`` of transformers' Trainer and TRL's trainers.

    The trainer then builds the optimizer itself, once the model is where it trains: right under FSDP and on resume, as
    an optimizer passed in ``optimizers=`` is not. Its learning_rate, weight_decay and adam_* arguments are not read;
    pass them here. Its scheduler multiplies the rate of every group.

    Args:
        name, lr, **options: as in `build_optimizer`; names are checked at once.
    """
    check_optimizer_options(name, {key: value for key, value in options.items() if key not in GROUP_OPTIONS})
    # A callable that is no Optimizer class is called without arguments and gives what is called with the model.
    return (lambda: build_optimizer), {"name": name, "lr": lr, **options}


def check_optimizer_options(name: str, options: dict[str, Any]) -> None:
    """Raise ValueError if the optimizer is unknown or would not honour one of the options."""
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r} is unknown; use one of {', '.join(OPTIMIZERS)}")
    if name == "galore" and isinstance(inner := options.get("inner", "adamw"), str):
        _check_inner_options(inner, options)
    for option, value in options.items():
        if option in OPTIMIZERS[name].options:
            continue
        if takers := [other for other, choice in OPTIMIZERS.items() if option in choice.options]:
            raise ValueError(f"optimizer {name!r} can't honour {option}={value!r}; these can: {', '.join(takers)}")
        known = sorted({*GROUP_OPTIONS, *(o for choice in OPTIMIZERS.values() for o in choice.options)})
        nearest = difflib.get_close_matches(option, known, n=1) or known
        raise ValueError(f"option {option}={value!r} is unknown to every optimizer; did you mean {', '.join(nearest)}?")


def _check_inner_options(inner: str, options: dict[str, Any]) -> None:
    if inner not in INNER:
        raise ValueError(f"inner={inner!r} is unknown; use one of {', '.join(INNER)}, or an optimizer's class")
    for option, value in options.items():
        takers = [other for other, choice in INNER.items() if option in choice.options]
        if takers and inner not in takers:
            raise ValueError(
                f"optimizer 'galore' with inner={inner!r} can't honour {option}={value!r}; inner can be: "
                f"{', '.join(takers)}"
            )


def _import(module: str, optimizer: str) -> ModuleType:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ModuleNotFoundError(
            f"optimizer {optimizer!r} needs {package}; install it with: pip install 'loraloom[quant]'"
        ) from error
