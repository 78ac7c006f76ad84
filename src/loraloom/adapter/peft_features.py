"""What each field of an adapter's configuration does to the function, in one table: PEFT's LoraConfig and LoomConfig.

A field is *understood* where the function stays ``m norm(W + sum g s B M A)`` of the base model's weights; it *changes
the base* where the file alone does not say which weights the update belongs to; it makes *another function* otherwise.
Only what is understood is read. A field that stands in no table comes from a newer PEFT: it is refused by name unless
it is off. Read in peft 0.21.2; a test walks the fields of the PEFT that is installed.
"""

import math
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

from loraloom.errors import InputError
from loraloom.text import did_you_mean


class Effect(StrEnum):
    """What a field does to the function."""

    UNDERSTOOD = "understood"
    CHANGES_BASE = "changes the base"
    OTHER_FUNCTION = "another function"


class Values(NamedTuple):
    """The values that a field may have; None is one of all of them but a rank's and a number's."""

    words: str
    allow: Callable[[Any], bool]


class Feature(NamedTuple):
    """A row of the table."""

    values: Values
    effect: Effect = Effect.UNDERSTOOD
    why: str = ""
    """Where the field is not understood: the end of the sentence "FIELD is VALUE, ...", which says what to do."""


def _is(*types: type) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, types) and (bool in types or not isinstance(value, bool)))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _indices(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _by_name(allow: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or (isinstance(value, dict) and all(map(allow, value.values())))


ANY = Values("anything", lambda value: True)
TEXT = Values("a text", _is(str))
SWITCH = Values("true or false", _is(bool))
START = Values("true, false or the name of a start", _is(bool, str))
NUMBER = Values("a finite number", _number)
RANK = Values("a positive integer", _rank)
NAMES = Values(
    "a list of names or one expression", lambda value: value is None or isinstance(value, str) or _names(value)
)
NAME_LIST = Values("a list of names", lambda value: value is None or _names(value))
RANKS = Values("names with a positive integer each", _by_name(_rank))
NUMBERS = Values("names with a finite number each", _by_name(_number))
LAYERS = Values("an index or a list of them", lambda value: value is None or _indices(value) or _indices([value]))
TOKENS = Values(
    "a list of token indices, or names with such a list each",
    lambda value: _indices(value) or _by_name(_indices)(value),
)
BIAS = Values(
    "none, all, lora_only or loom_only", lambda value: value in (None, "none", "all", "lora_only", "loom_only")
)

_NOT_THE_BASE = (
    "so the update belongs to weights that the base model does not have: save it from PEFT with "
    "save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER), which makes it a plain LoRA"
)

COMMON: dict[str, Feature] = {
    "task_type": Feature(TEXT),
    "peft_type": Feature(TEXT),
    "auto_mapping": Feature(ANY),
    "peft_version": Feature(TEXT),
    "base_model_name_or_path": Feature(TEXT),
    "revision": Feature(TEXT),
    "inference_mode": Feature(SWITCH),
    "r": Feature(RANK),
    "lora_alpha": Feature(NUMBER),
    "lora_dropout": Feature(NUMBER),
    "target_modules": Feature(NAMES),
    "exclude_modules": Feature(NAMES),
    "target_parameters": Feature(NAME_LIST),
    "layers_to_transform": Feature(LAYERS),
    "layers_pattern": Feature(NAMES),
    "rank_pattern": Feature(RANKS),
    "alpha_pattern": Feature(NUMBERS),
    "modules_to_save": Feature(NAME_LIST),
    "bias": Feature(BIAS),
    "use_rslora": Feature(SWITCH),
    "use_dora": Feature(SWITCH),
    "init_lora_weights": Feature(START),
    "fan_in_fan_out": Feature(SWITCH),
    "trainable_token_indices": Feature(TOKENS),
}
LORA: dict[str, Feature] = COMMON | {
    "lora_bias": Feature(SWITCH),
    "ensure_weight_tying": Feature(SWITCH),
    # What starts and training look at; the function does not.
    "megatron_config": Feature(ANY),
    "megatron_core": Feature(ANY),
    "loftq_config": Feature(ANY),
    "eva_config": Feature(ANY),
    "corda_config": Feature(ANY),
    "lora_ga_config": Feature(ANY),
    "velora_config": Feature(ANY),  # a cheaper backward pass
    "qalora_group_size": Feature(ANY),  # nothing without use_qalora
    "runtime_config": Feature(ANY),
    "layer_replication": Feature(ANY, Effect.CHANGES_BASE, "so its model has layers that the base model does not have"),
    "kasa_config": Feature(
        ANY,
        Effect.OTHER_FUNCTION,
        "which takes directions out of the base weight: merge it with PEFT's merge_and_unload",
    ),
    "monteclora_config": Feature(
        ANY, Effect.OTHER_FUNCTION, "which draws A at random: merge it with PEFT's merge_and_unload"
    ),
    "use_qalora": Feature(ANY, Effect.OTHER_FUNCTION, "whose update takes averages of the input"),
    "alora_invocation_tokens": Feature(ANY, Effect.OTHER_FUNCTION, "whose update is for the tokens after these only"),
    "arrow_config": Feature(ANY, Effect.OTHER_FUNCTION, "which chooses among adapters for every token"),
    "use_bdlora": Feature(ANY, Effect.OTHER_FUNCTION, "whose factors are blocks of larger ones"),
}
LOOM: dict[str, Feature] = COMMON | {
    "use_mixer": Feature(START),
    "use_gate": Feature(SWITCH),
    "allow_unmatched": Feature(SWITCH),
    "composition": Feature(ANY),  # has a reader of its own
    "loom_format_version": Feature(Values("1", lambda value: value in (None, 1) and value is not True)),
}
TABLES = {"LORA": LORA, "LOOM": LOOM}

# Values of init_lora_weights, by their beginnings: those that leave the base weight as it is, and those that do not.
STARTS: dict[str, Effect] = dict.fromkeys(("gaussian", "orthogonal", "eva", "mica", "true", "false"), Effect.UNDERSTOOD)
STARTS |= dict.fromkeys(("pissa", "olora", "corda", "loftq", "lora_ga"), Effect.CHANGES_BASE)
# Tensors that training keeps beside the factors and the function does not use: VeLoRA's.
TRAINING_ONLY = ("lora_velora_embed",)


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Checks the type of every field, and that none makes another function of the tensors.

    Args:
        config: what adapter_config.json holds.
        where: what messages call it.

    Raises:
        InputError: not an adapter of type LORA or LOOM ("peft-type"), a value of a wrong type ("config-type"), a field
            that is on and not known ("unknown-field"), or another function ("other-function").
    """
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind not in TABLES:
        raise InputError(
            f"{where} is an adapter of type {kind!r}; expected one of {', '.join(TABLES)}", code="peft-type"
        )
    table = TABLES[kind]
    for name, value in config.items():
        if name not in table:
            if value:
                raise InputError(
                    f"{where}: {name!r} is {_short(value)}, a field that is not known{did_you_mean(name, table)}: it "
                    "may change the function, and needs a newer loraloom",
                    code="unknown-field",
                )
        elif not table[name].values.allow(value):
            raise InputError(
                f"{where}: {name} is {_short(value)}; expected {table[name].values.words}", code="config-type"
            )
        elif value and table[name].effect is Effect.OTHER_FUNCTION:
            raise InputError(f"{where}: {name} is {_short(value)}, {table[name].why}", code="other-function")
    if kind == "LORA" and _start(config) is None:
        start = config["init_lora_weights"]
        raise InputError(
            f"{where}: init_lora_weights is {_short(start)}, a start that is not known: it may change the base "
            "weights, and needs a newer loraloom",
            code="unknown-field",
        )


def changed_base(config: Mapping[str, Any]) -> str | None:
    """How the adapter changed its base model, as a sentence that says what to do, or None.

    Our own adapters keep what they start from: none of them changes the base.
    """
    if config.get("peft_type") != "LORA":
        return None
    for name, feature in LORA.items():
        if feature.effect is Effect.CHANGES_BASE and config.get(name):
            return f"{name} is {_short(config[name])}, {feature.why}"
    if start_changed_base(config):
        start = config["init_lora_weights"]
        return f"init_lora_weights is {start!r}, which also changed the base weights, {_NOT_THE_BASE}"
    return None


def start_changed_base(config: Mapping[str, Any]) -> bool:
    """Whether training started by taking something away from the base weights, by an amount that goes with the rank."""
    return config.get("peft_type") == "LORA" and _start(config) is Effect.CHANGES_BASE


def _start(config: Mapping[str, Any]) -> Effect | None:
    start = config.get("init_lora_weights")
    if not isinstance(start, str):
        return Effect.UNDERSTOOD
    return next((effect for name, effect in STARTS.items() if start.lower().startswith(name)), None)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
