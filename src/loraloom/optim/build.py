"""One entry point to every optimizer: `build_optimizer`, and `trainer_optimizer` for transformers' Trainer.

An option reaches an optimizer only if that optimizer honors it; any other is an error that says which ones would.
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from loraloom.optim.galore.groups import project_groups
from loraloom.optim.muon import muon_groups
from loraloom.optim.options import ProjectionOptions
from loraloom.optim.param_groups import build_param_groups
from loraloom.optim.registry import GROUP_OPTIONS, OPTIMIZERS, check_optimizer_options, import_optimizer
from loraloom.optim.rounding import check_rounding


def build_optimizer(model: nn.Module, name: str = "adamw", *, lr: float, **options: Any) -> Optimizer:
    """The named optimizer over the model's trainable parameters, grouped by `build_param_groups`.

    Args:
        model: a PEFT model, or any module.
        name: a key of `OPTIMIZERS`, such as "adamw", "weight_adam", "adamw_8bit" or "galore".
        lr: the learning rate.
        **options: of `GroupOptions`, such as ``weight_decay`` and ``lora_plus_ratio``; of the optimizer; and further
            arguments of its class, for example ``fused=True`` or ``constraint=KSparse(20)``.

    Raises:
        InputError: the name or an option is unknown, the optimizer does not honor an option, its package is not
            installed, or the model trains no parameter that an option is for.
    """
    rates = {key: options.pop(key) for key in GROUP_OPTIONS if key in options}
    check_optimizer_options(name, options)
    optimizer, choice = import_optimizer(name, OPTIMIZERS), OPTIMIZERS[name]
    groups = build_param_groups(model, lr, **rates)
    if choice.module == "bitsandbytes.optim":
        _keep_embeddings_in_32_bits(model)
    if issubclass(choice.options, ProjectionOptions):
        patterns = (options.pop(key, None) for key in ("target_modules", "rank_pattern"))
        groups = project_groups(model, groups, *patterns)
    if name == "muon":
        groups = muon_groups(model, groups)
    if "rounding" not in choice.honors:
        check_rounding("nearest", [p for group in groups for p in group["params"]])
    return optimizer(groups, lr=lr, **options)


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Rows of an embedding get gradients rarely and unevenly; bitsandbytes advises 32-bit state for them."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    for embedding in model.modules():
        if isinstance(embedding, nn.Embedding) and embedding.weight.requires_grad:
            manager.register_module_override(embedding, "weight", {"optim_bits": 32})


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
