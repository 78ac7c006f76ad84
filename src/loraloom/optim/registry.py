"""The optimizers by name: where the class is, and which options it honors. Imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from loraloom.errors import InputError
from loraloom.optim import options as o
from loraloom.text import did_you_mean


@dataclass(frozen=True)
class Choice:
    """An optimizer.

    Attributes:
        module, class_name: where its class is.
        options: the dataclass of its options.
        arguments: further arguments of its class, which RUN.yaml does not have.
    """

    module: str
    class_name: str
    options: type
    arguments: tuple[str, ...] = ()

    @property
    def honors(self) -> list[str]:
        """The names of all that it honors besides `GroupOptions`."""
        return [*o.names(self.options), *self.arguments]


_TORCH = ("foreach", "fused")
_GALORE = "loraloom.optim.galore.methods"
OPTIMIZERS = {
    "adamw": Choice("torch.optim", "AdamW", o.AdamWOptions, (*_TORCH, "amsgrad")),
    "weight_adam": Choice("loraloom.optim.weight_adam", "WeightAdam", o.WeightAdamOptions, (*_TORCH, "constraint")),
    "adamw_8bit": Choice("bitsandbytes.optim", "AdamW8bit", o.AdamWOptions, ("min_8bit_size",)),
    "paged_adamw_8bit": Choice("bitsandbytes.optim", "PagedAdamW8bit", o.AdamWOptions, ("min_8bit_size",)),
    "paged_adamw": Choice("bitsandbytes.optim", "PagedAdamW", o.AdamWOptions),
    "lion": Choice("bitsandbytes.optim", "Lion", o.LionOptions),
    "lion_8bit": Choice("bitsandbytes.optim", "Lion8bit", o.LionOptions, ("min_8bit_size",)),
    "muon": Choice("loraloom.optim.muon", "Muon", o.MuonOptions),
    "galore": Choice(_GALORE, "GaLore", o.GaLoreOptions, ("max_grad_norm", "process_group")),
    "fira": Choice(_GALORE, "Fira", o.FiraOptions),
    "apollo": Choice(_GALORE, "APOLLO", o.APOLLOOptions),
}
# What `inner` of GaLore, Fira and APOLLO may be called.
INNER = {
    "adamw": OPTIMIZERS["adamw"],
    "sgd": Choice("torch.optim", "SGD", o.SGDOptions, (*_TORCH, "nesterov")),
    "adafactor": Choice("torch.optim", "Adafactor", o.NoOptions, ("foreach",)),
    "adamw_8bit": OPTIMIZERS["adamw_8bit"],
}
GROUP_OPTIONS = ("lr", *o.names(o.GroupOptions))


def import_optimizer(name: str, choices: Mapping[str, Choice]) -> Callable[..., Any]:
    """The class of a named optimizer.

    Raises:
        InputError: "unknown-optimizer", or "missing-package".
    """
    choice = choices[check_name(name, choices)]
    try:
        return getattr(import_module(choice.module), choice.class_name)
    except ModuleNotFoundError as error:
        package = choice.module.partition(".")[0]
        raise InputError(
            f"optimizer {name!r} needs {package}; install it with: pip install 'loraloom[quant]'",
            code="missing-package",
        ) from error


def check_name(name: str, choices: Mapping[str, Choice] = OPTIMIZERS) -> str:
    """The name of an optimizer, if it is one.

    Raises:
        InputError: "unknown-optimizer".
    """
    if name not in choices:
        raise InputError(
            f"optimizer {name!r} is unknown; use one of {', '.join(choices)}{did_you_mean(name, choices)}",
            code="unknown-optimizer",
        )
    return name


def check_optimizer_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuse an option that the optimizer would not honor.

    Args:
        name: of the optimizer.
        options: all but those of `GroupOptions`.

    Raises:
        InputError: "unknown-optimizer", "not-honored" or "unknown-option".
    """
    choice = OPTIMIZERS[check_name(name)]
    honored, inner_choices = list(choice.honors), {}
    if "inner" in honored:
        inner = options.get("inner", "adamw")
        if not isinstance(inner, str):
            return  # a class raises by itself
        honored += INNER[check_name(inner, INNER)].honors
        inner_choices = INNER
    for option, value in options.items():
        if option in honored:
            continue
        takers = [f"inner={other!r}" for other, one in inner_choices.items() if option in one.honors]
        takers = takers or [other for other, one in OPTIMIZERS.items() if option in one.honors]
        if takers:
            raise InputError(
                f"optimizer {name!r} can't honor {option}={value!r}; these can: {', '.join(takers)}", code="not-honored"
            )
        known = {*GROUP_OPTIONS, *(o for one in [*OPTIMIZERS.values(), *INNER.values()] for o in one.honors)}
        raise InputError(
            f"option {option}={value!r} is unknown to every optimizer{did_you_mean(option, sorted(known))}",
            code="unknown-option",
        )
