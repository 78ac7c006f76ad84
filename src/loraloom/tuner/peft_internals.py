"""The one place that touches private parts of PEFT: a new PEFT type, and the internals the tuner needs.

PEFT keeps its adapter types in a closed enum and looks tuners up by member. A bare string would pass most of PEFT but
break where transformers reads ``peft_type.value``, so a real member is added at run time and checked at once.
``tests/tuner/test_registration.py`` is the contract: it fails with a clear message when a new PEFT moves the ground.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant, MiCALinearVariant
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.tuners.tuners_utils import _ExcludedModule as ExcludedModule
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, PeftType, hotswap, register_peft_method
from peft.utils.integrations import gather_params_ctx, init_empty_weights
from peft.utils.other import AuxiliaryTrainingWrapper
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

__all__ = [
    "HEADS_SAVED_LATER",
    "LOOM",
    "PREFIX",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "DoraLinearVariant",
    "ExcludedModule",
    "LoraLayer",
    "MiCALinearVariant",
    "after_injection",
    "base_weight",
    "check_adapters_to_merge",
    "expand_all_linear",
    "features_of",
    "gather_params_ctx",
    "get_quantization_kwargs",
    "has_base_weight",
    "init_empty_weights",
    "lora_forwards",
    "register",
    "resolve_quantization_backend",
]

# Modules that PEFT adds to modules_to_save only after the injection, by task.
HEADS_SAVED_LATER = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}

NAME = "LOOM"
PREFIX = NAME.lower() + "_"  # transformers and PEFT derive it from the type; every adapter attribute starts with it


def _add_peft_type(name: str) -> PeftType:
    """Returns ``PeftType.<name>``, creating the member when PEFT does not have it."""
    existing = PeftType.__members__.get(name)
    if existing is not None:
        return existing
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    if not (PeftType(name) is PeftType[name] is getattr(PeftType, name) is member and member in list(PeftType)):
        raise ImportError(
            f"loraloom could not add its type to peft {peft.__version__}: PeftType is no longer the enum it was. "
            "Install a PEFT version that loraloom supports: pip install 'peft>=0.20,<0.22'."
        )
    return member


LOOM = _add_peft_type(NAME)


def register(config_cls: type, model_cls: type) -> None:
    """Registers the tuner with PEFT; calling it again does nothing.

    Raises:
        ImportError: another method already owns the prefix ``loom_``.
    """
    if PEFT_TYPE_TO_TUNER_MAPPING.get(LOOM) is model_cls and PEFT_TYPE_TO_CONFIG_MAPPING.get(LOOM) is config_cls:
        return
    # register_peft_method looks the prefix up among the mapping's keys (types), so its own check never fires.
    owner = next((kind for kind, prefix in PEFT_TYPE_TO_PREFIX_MAPPING.items() if prefix == PREFIX), None)
    if owner is not None:
        raise ImportError(f"The PEFT prefix {PREFIX!r} already belongs to {owner}: loraloom cannot register beside it.")
    hotswap.CONFIG_KEYS_TO_CHECK[LOOM] = [*hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA], "use_mixer", "use_gate"]
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)


def features_of(layer: Any) -> tuple[int, int]:
    """In and out features of any linear layer that PEFT knows, sharded and quantised ones too.

    Raises:
        ValueError: the layer does not say.
    """
    from peft.tuners.tuners_utils import _get_in_out_features

    in_features, out_features = _get_in_out_features(layer)
    if in_features is None or out_features is None:
        raise ValueError(f"A {type(layer).__name__} has no in_features and out_features, so its sizes are not known.")
    return in_features, out_features


def expand_all_linear(config: Any, model: Any) -> None:
    """Replaces ``target_modules="all-linear"`` in the config by the module names, by PEFT's own rules."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    _maybe_include_all_linear_layers(config, model)


# PEFT's LoRA layers whose forward pass is the base layer's output plus that of each active adapter, in order. The
# modules of the second column define the class only where the backend is installed.
_LORA_CLASSES = {
    "layer": ("Linear",),
    "bnb": ("Linear8bitLt", "Linear4bit"),
    "gptq": ("GPTQLoraLinear",),
    "awq": ("AwqLoraLinear",),
    "aqlm": ("AqlmLoraLinear",),
    "hqq": ("HqqLoraLinear",),
    "eetq": ("EetqLoraLinear",),
}


@functools.cache
def lora_forwards() -> frozenset[Callable]:
    """The forward functions of these layers; a subclass that has the function too is such a layer."""
    found = []
    for module_name, names in _LORA_CLASSES.items():
        try:
            module = importlib.import_module(f"peft.tuners.lora.{module_name}")
        except ImportError:  # the backend is not installed
            continue
        found += [getattr(module, name).forward for name in names if hasattr(module, name)]
    return frozenset(found)


_injection_callbacks: list[Callable[[Any], None]] = []


def after_injection(callback: Callable[[Any], None]) -> None:
    """Calls ``callback(model)`` whenever PEFT has put an adapter into a model, by whatever route."""
    if callback in _injection_callbacks:
        return
    _injection_callbacks.append(callback)
    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def inject_adapter(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        inject(self, model, *args, **kwargs)
        callback(model)

    BaseTuner.inject_adapter = inject_adapter  # type: ignore[method-assign]


def has_base_weight(base_layer: Any) -> bool:
    """Whether :func:`base_weight` can give the weight."""
    weight = getattr(base_layer, "weight", None)
    return _is_plain(weight) or resolve_quantization_backend(base_layer) is not None


def base_weight(base_layer: Any) -> Tensor:
    """The weight of a base layer as floating-point numbers, in the shape in which the layer stores it."""
    if _is_plain(base_layer.weight):
        return base_layer.weight
    backend: Any = resolve_quantization_backend(base_layer)
    return backend.get_base_weight(base_layer)


def _is_plain(weight: Any) -> bool:
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()
