"""``LoomConfig``: one configuration for LoRA, MoSLoRA, DoRA, WeightLoRA and every combination of their parts."""

import math
import os
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, get_type_hints

from peft import LoraConfig, PeftConfig

from loraloom.annotations import describe, matches
from loraloom.errors import InputError
from loraloom.text import did_you_mean
from loraloom.tuner.peft_internals import LOOM
from loraloom.tuner.stored_ranks import check_ranks
from loraloom.update.composition import Composition

FORMAT_VERSION = 1
MIXERS = (False, "orthogonal", "kaiming")
INITS = (True, False, "gaussian", "orthogonal", "pissa", "olora")
BIASES = ("none", "all", "loom_only")
# The adapter starts as an exact identity only if B M A equals what is subtracted, so the mixer starts as I.
# Fields whose values have the type of their annotation, and no check of their own.
_TYPED = (
    *("auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "lora_alpha", "lora_dropout"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "use_rslora", "use_dora", "use_gate", "fan_in_fan_out", "trainable_token_indices"),
    *("target_parameters", "allow_unmatched"),
)
INITS_WITH_IDENTITY_MIXER = ("orthogonal", "pissa", "olora")
# What a person finds in the folder after ``KeyError: 'LOOM'``, all that PEFT says.
_REQUIRES = "pip install loraloom, and import loraloom before the adapter is loaded"
_NOTE = f"This adapter is of type LOOM: {_REQUIRES}. Without it PEFT raises `KeyError: 'LOOM'`."


def _one_of(name: str, value: Any, allowed: tuple) -> None:
    if not any(value is option or (isinstance(option, str) and value == option) for option in allowed):
        raise ValueError(f"{name}={value!r} is not known: expected one of {', '.join(map(repr, allowed))}.")


@dataclass
class LoomConfig(PeftConfig):
    """Configuration of a loom adapter: ``W' = m * norm(W + g s B M A)`` with each part optional.

    With the defaults it is plain LoRA. ``use_mixer`` adds M (MoSLoRA), ``use_gate`` adds g (WeightLoRA), ``use_dora``
    adds m and the norm (DoRA); they combine freely. Keys that ``peft.LoraConfig`` also has mean the same.

    Raises:
        ValueError: a value is out of range, or the adapter was written in a newer format.
        TypeError: an unknown field; the message names the nearest one.
    """

    r: int = 8
    """Rank of every adapter. Size and cost grow linearly with it; 8 to 64 is usual."""
    lora_alpha: int | float = 8
    """The update is scaled by s = lora_alpha / r (with ``use_rslora``: lora_alpha / sqrt(r))."""
    lora_dropout: float = 0.0
    """Dropout on the adapter's input, 0 <= p < 1. It acts on the low-rank path only, in DoRA as well."""
    target_modules: list[str] | str | None = None
    """Names (or name endings) of the modules to adapt, one regular expression for the whole name, or "all-linear".
    None takes PEFT's choice for the architecture. A name that matches nothing is an error."""
    exclude_modules: list[str] | str | None = None
    """Names (or one regular expression) of modules to leave alone though ``target_modules`` matches them."""
    layers_to_transform: list[int] | int | None = None
    """Indices of the layers to adapt; None adapts all."""
    layers_pattern: list[str] | str | None = None
    """Name of the list that holds the layers ("layers", "h"), where its place in the path is not the usual one."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks for modules whose name matches a key (name ending or regular expression), instead of ``r``."""
    alpha_pattern: dict[str, int | float] = field(default_factory=dict)
    """The same for ``lora_alpha``."""
    modules_to_save: list[str] | None = None
    """Modules, such as a new classifier head, that are trained in full and saved with the adapter."""
    bias: Literal["none", "all", "loom_only"] = "none"
    """Which biases train: none, all of the model's, or those of adapted modules."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r): keeps the update's size when r is large (2312.03732)."""
    use_dora: bool = False
    """Learn the length of each row of the weight apart from its direction (DoRA, 2402.09353)."""
    use_mixer: Literal[False, "orthogonal", "kaiming"] = False
    """Put a trained r x r matrix between A and B (MoSLoRA, 2406.11909). "orthogonal" keeps the norm of A at the start;
    "kaiming" is the authors' other choice."""
    use_gate: bool = False
    """Multiply the update by one trained scalar per module (WeightLoRA, 2506.02724); train it with ``WeightAdam``."""
    init_lora_weights: Literal[True, False, "gaussian", "orthogonal", "pissa", "olora"] = True
    """True: A Kaiming-uniform, B zero. "gaussian": A normal with deviation 1/r. "orthogonal": A and B nonzero with
    B A = 0. "pissa" (2404.02948) and "olora" (2406.01775) start from the base weight; the base itself is not changed:
    what A and B start from is kept, frozen, and subtracted. False: random A and B, for tests."""
    fan_in_fan_out: bool = False
    """The weight is stored (in, out). Found out by itself for transformers' Conv1D; for custom layers only."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Rows of the embedding to train besides the adapters (PEFT's trainable tokens)."""
    target_parameters: list[str] | None = None
    """Names (or name endings) of bare parameters to adapt: ["experts.gate_up_proj", "experts.down_proj"] in most
    mixtures of experts. Without ``use_dora`` and the starts from the base weight."""
    allow_unmatched: bool = False
    """Warn, instead of raising, when a name in target_modules or a pattern matches nothing."""
    composition: Composition | None = None
    """The members of an adapter that `loraloom.compose` made of many; written by it, not set by hand."""
    loom_format_version: int | None = None
    """Version of the checkpoint format; set by loraloom when the adapter is made. With it the names are trusted: PEFT
    has expanded them by then, and they are no longer what a person typed."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Raised here because PEFT catches the TypeError of a dataclass' __init__, drops the key and goes on: an adapter
        # with a part that this version does not know would become another adapter.
        known = [f.name for f in fields(cls)]
        for name in kwargs:
            if name not in known:
                if name in (f.name for f in fields(LoraConfig)):
                    raise TypeError(
                        f"LoomConfig has no field {name!r}, a part of PEFT's LoRA that loraloom does not have: "
                        "leave it out, or use peft.LoraConfig."
                    )
                near = did_you_mean(name, known) or "."
                raise TypeError(
                    f"LoomConfig has no field {name!r}{near} If it comes from a saved adapter, that adapter needs a "
                    "newer loraloom: pip install -U loraloom."
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LOOM
        self._check_types()
        if self.auto_mapping:  # what save_pretrained adds is for a person
            self.auto_mapping = {name: v for name, v in self.auto_mapping.items() if name != "requires"} or None
        if self.loom_format_version not in (None, FORMAT_VERSION):
            raise ValueError(
                f"loom_format_version={self.loom_format_version!r}: this loraloom reads version {FORMAT_VERSION}. "
                "Upgrade it with: pip install -U loraloom."
            )
        for name, rank in {"r": self.r, **self.rank_pattern}.items():
            if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
                raise ValueError(f"The rank {name}={rank!r} must be a positive integer.")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout={self.lora_dropout!r} must lie in [0, 1).")
        _one_of("use_mixer", self.use_mixer, MIXERS)
        _one_of("init_lora_weights", self.init_lora_weights, INITS)
        _one_of("bias", self.bias, BIASES)
        alphas = (self.lora_alpha, *self.alpha_pattern.values())
        if self.init_lora_weights in ("pissa", "olora") and not all(alpha > 0 for alpha in alphas):
            raise ValueError(
                f"lora_alpha={self.lora_alpha!r}, alpha_pattern={self.alpha_pattern!r}: "
                f"init_lora_weights={self.init_lora_weights!r} divides by alpha, which must be positive."
            )
        if self.init_lora_weights == "orthogonal" and any(r % 2 for r in (self.r, *self.rank_pattern.values())):
            raise ValueError(f"init_lora_weights='orthogonal' needs even ranks, got r={self.r}, {self.rank_pattern}.")
        if isinstance(self.composition, dict):
            self.composition = Composition.from_dict(self.composition)
        if self.composition is not None and (self.use_mixer or self.use_gate or self.use_dora):
            raise ValueError(
                "A composition has no mixer, gate or magnitude of its own: leave out use_mixer, use_gate and use_dora."
            )
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # PEFT's own convention
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise ValueError(
                f"target_modules={self.target_modules!r} is a regular expression, which layers_to_transform and "
                "layers_pattern do not combine with: put the layer indices into the expression, or give a list."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform.")

    def __getattr__(self, name: str) -> Any:
        # X-LoRA and others take a configuration for LoRA's without asking for its type.
        if hasattr(LoraConfig, name) or name in (f.name for f in fields(LoraConfig)):
            message = (
                f"LoomConfig has no {name!r}: what asked for it takes adapters of type LORA alone, and this one is of "
                "type LOOM. Use peft.LoraConfig, or write the adapter as a LoRA with loraloom export."
            )
        else:
            message = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(message, name=name, obj=self)

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; README.md and ``auto_mapping`` then say that loading needs loraloom."""
        mapping = kwargs.pop("auto_mapping_dict", None) or self.auto_mapping
        if mapping or self.task_type:  # without either, PEFT's AutoPeftModel says that it has nothing to go by
            kwargs["auto_mapping_dict"] = (mapping or {}) | {"requires": _REQUIRES}
        readme = Path(save_directory, "README.md")
        text = readme.read_text(encoding="utf-8") if readme.exists() else ""
        if "import loraloom" not in text and not Path(save_directory).is_file():  # that is PEFT's to refuse
            readme.parent.mkdir(parents=True, exist_ok=True)
            readme.write_text(f"{text.rstrip()}\n\n{_NOTE}\n".lstrip(), encoding="utf-8")
        super().save_pretrained(save_directory, **kwargs)  # last: with push_to_hub it uploads the folder

    def _check_types(self) -> None:
        """Raises InputError for a value of another type than the field's; a file may hold anything."""
        hints = get_type_hints(type(self))
        for name in _TYPED:
            value = getattr(self, name)
            value = list(value) if isinstance(value, set | frozenset | tuple | range) else value  # PEFT's conventions
            if not matches(value, hints[name]):
                raise InputError(f"{name}={value!r:.80}: expected {describe(hints[name])}.", code="config-type")
        if not all(map(math.isfinite, (self.lora_alpha, *self.alpha_pattern.values()))):
            raise InputError(
                f"lora_alpha={self.lora_alpha!r}, alpha_pattern={self.alpha_pattern!r:.80}: expected finite numbers.",
                code="config-type",
            )

    @classmethod
    def lora(cls, **kwargs: Any) -> Self:
        """Plain LoRA (2106.09685): ``W + s B A``."""
        return cls(**kwargs)

    @classmethod
    def moslora(cls, **kwargs: Any) -> Self:
        """MoSLoRA (2406.11909): ``W + s B M A`` with a trained r x r mixer, orthogonal at the start."""
        return cls(**{"use_mixer": "orthogonal"} | kwargs)

    @classmethod
    def dora(cls, **kwargs: Any) -> Self:
        """DoRA (2402.09353): ``m * (W + s B A) / rownorm(W + s B A)``."""
        return cls(**{"use_dora": True} | kwargs)

    @classmethod
    def weightlora(cls, **kwargs: Any) -> Self:
        """WeightLoRA (2506.02724): ``W + g s B A`` with one trained scalar per module."""
        return cls(**{"use_gate": True} | kwargs)

    @classmethod
    def from_lora(cls, config: LoraConfig, **kwargs: Any) -> Self:
        """A loom configuration that means the same as a ``peft.LoraConfig``.

        Args:
            config: the LoRA configuration.
            **kwargs: fields to set besides, for instance ``use_mixer="orthogonal"``.

        Raises:
            ValueError: the configuration uses something that loraloom does not have, by name.
        """
        ours = {f.name for f in fields(cls)}
        values: dict[str, Any] = {}
        unsupported = []
        for f in fields(config):
            value = getattr(config, f.name)
            if f.name in ours and f.name != "peft_type":
                values[f.name] = value
            else:
                default = f.default_factory() if f.default_factory is not MISSING else f.default
                if f.name not in ("peft_type", "runtime_config", "lora_dtype") and value and value != default:
                    unsupported.append(f.name)
        if config.runtime_config.ephemeral_gpu_offload:
            unsupported.append("ephemeral_gpu_offload")
        if unsupported:
            raise ValueError(f"LoraConfig uses {', '.join(sorted(unsupported))}, which loraloom does not support.")
        if values["bias"] == "lora_only":
            values["bias"] = "loom_only"
        return cls(**values | kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """PEFT's loader, except that a local adapter stored as a pickle is refused.

        Raises:
            ValueError: the folder holds ``adapter_model.bin`` and no ``adapter_model.safetensors``.
            InputError: a rank is larger than every tensor of the file, so that it cannot be the adapter's ("rank").
        """
        folder = os.path.join(pretrained_model_name_or_path, subfolder or "")
        has = {name: os.path.exists(os.path.join(folder, f"adapter_model.{name}")) for name in ("bin", "safetensors")}
        if has["bin"] and not has["safetensors"]:
            raise ValueError(
                f"{folder} holds adapter_model.bin, a pickle, which can run code when it is loaded. "
                "Save the adapter with save_pretrained(..., safe_serialization=True)."
            )
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if has["safetensors"]:
            check_ranks(config, os.path.join(folder, "adapter_model.safetensors"))
        return config
