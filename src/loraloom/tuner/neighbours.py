"""Where other code takes every adapter for a LoRA: one line that says what to do, instead of a crash or a lost file.

diffusers writes an adapter's tensors for a loader that makes a ``LoraConfig`` of them, whatever the adapter was. PEFT's
LoRA-FA and Arrow look for tensors by LoRA's names. Each module is changed when somebody imports it, not before.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import wrapt

from loraloom.errors import InputError
from loraloom.tuner.peft_internals import LOOM, PREFIX

_INSTEAD = "train with peft.LoraConfig (loraloom.speed_up makes it fast), or write a LoRA with loraloom export"


def watch() -> None:
    """Has the checks put into diffusers and PEFT, once each."""
    for module, name, check in _CHECKS:
        wrapt.register_post_import_hook(_put(name, check), module)


def _put(name: str, check: Callable) -> Callable:
    def checked(wrapped: Any, instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        call = inspect.signature(wrapped).bind(*args, **kwargs)
        call.apply_defaults()
        check(instance, **call.arguments)
        return wrapped(*args, **kwargs)

    return lambda module: wrapt.wrap_function_wrapper(module, name, checked)


def _check_diffusers_model(model: Any, adapter_name: str | None, **_: Any) -> None:
    configs = getattr(model, "peft_config", {})
    names = [adapter_name] if adapter_name else [*configs]
    if any(configs[name].peft_type is LOOM for name in names if name in configs):
        raise InputError(
            "save_lora_adapter writes a file that diffusers would load as another adapter: wrap the model by "
            f"peft.get_peft_model and call save_pretrained, {_INSTEAD}.",
            code="diffusers-save",
        )


def _check_diffusers_file(_: Any, state_dict: Iterable[str], **__: Any) -> None:
    if ours := next((key for key in state_dict if f".{PREFIX}" in key), None):
        raise InputError(
            f"save_lora_weights got {ours!r}, a tensor of a loraloom adapter, which diffusers would load as another "
            f"adapter: {_INSTEAD}.",
            code="diffusers-save",
        )


def _check_lorafa(_: Any, params: Iterable, **__: Any) -> None:
    listed = params if isinstance(params, list | tuple) else ()  # to look into a generator would empty it
    groups = [group for group in listed if isinstance(group, dict)]
    if any(f".{PREFIX}" in name for group in groups for name in group.get("names", ())):
        raise InputError(
            "create_lorafa_optimizer pairs A and B by LoRA's names, which a loraloom adapter does not have: train with "
            "peft.LoraConfig, or freeze every A and use another optimizer.",
            code="lora-fa",
        )


def _check_arrow(_: Any, model: Any, adapter_names: list[str], **__: Any) -> None:
    for name in adapter_names:
        if model.peft_config[name].peft_type is LOOM:
            raise InputError(
                f"Arrow routes among adapters of type LORA, and {name!r} is of type LOOM: write each as a LoRA with "
                "loraloom export, and give it those.",
                code="arrow",
            )


_CHECKS: tuple[tuple[str, str, Callable], ...] = (
    ("diffusers.loaders.peft", "PeftAdapterMixin.save_lora_adapter", _check_diffusers_model),
    ("diffusers.loaders.lora_base", "LoraBaseMixin.write_lora_layers", _check_diffusers_file),
    ("peft.optimizers.lorafa", "LoraFAOptimizer.__init__", _check_lorafa),
    ("peft.tuners.lora.arrow", "check_loaded_lora_compatibility_arrow", _check_arrow),
)
