"""The options of every optimizer: each stands here once, with its default; the text under it is its help.

A dataclass holds the options of one optimizer. Its class takes them as keyword arguments, RUN.yaml as keys of the
section `optimizer`. Importing this file imports no torch, so RUN.yaml is checked before torch is loaded.
"""

from dataclasses import dataclass, field, fields
from typing import Literal

from loraloom.errors import InputError

Side = Literal["std", "reverse_std", "left", "right", "full"]
Inner = Literal["adamw", "sgd", "adafactor", "adamw_8bit"]
Refresh = Literal["subspace", "svd"]
Rounding = Literal["nearest", "kahan", "stochastic"]


@dataclass(frozen=True, kw_only=True)
class GroupOptions:
    """Rates and decay of the parameter groups, which every optimizer takes; see `build_param_groups`."""

    weight_decay: float = 0.01
    """Decoupled decay of matrices; biases, norms, magnitudes and gates never decay."""
    lora_plus_ratio: float = 1.0
    """Learning rate of B over that of A (LoRA+); 16 is the paper's, with a smaller learning rate."""
    gate_lr: float | None = None
    """Learning rate of the gates. Default: the optimizer's own; weight_adam has 5.0 with `sgd`, 0.05 with `adam`."""
    mixer_lr: float | None = None
    """Learning rate of mixers (MoSLoRA). Default: the learning rate."""
    magnitude_lr: float | None = None
    """Learning rate of magnitudes (DoRA). Default: the learning rate."""
    head_lr: float | None = None
    """Learning rate of a new head and of modules_to_save. Default: the learning rate."""
    logit_lr: float = 0.05
    """Learning rate of a composition's logits; at a LoRA's rate Adam would barely move them."""


@dataclass(frozen=True, kw_only=True)
class AdamWOptions:
    """AdamW."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's two averaging rates."""
    eps: float = 1e-8
    """Added to Adam's denominator, so that a small gradient makes a small step."""


@dataclass(frozen=True, kw_only=True)
class RoundingOptions:
    """What optimizers that add their steps to bfloat16 weights themselves have in common."""

    rounding: Rounding = "nearest"
    """How a step is added to a bfloat16 weight: `kahan` keeps what rounding cut off, in two bytes a weight;
    `stochastic` rounds up or down at random, right on average. `nearest` loses steps below 1/256 of the weight. Moments
    are float32 with either."""
    seed: int = 0
    """Seed of what is drawn at random."""


@dataclass(frozen=True, kw_only=True)
class WeightAdamOptions(AdamWOptions, RoundingOptions):
    """WeightAdam: AdamW, and projected gradient descent for gates."""

    gate_method: Literal["sgd", "adam"] = "sgd"
    """How gates move; `adam` where the layers' gradients differ by orders of magnitude."""
    gate_momentum: float = 0.0
    """Momentum of `sgd` for the gates."""

    def __post_init__(self) -> None:
        check_choices(self)


@dataclass(frozen=True, kw_only=True)
class SGDOptions:
    """torch's SGD."""

    momentum: float = 0.0
    """Momentum of SGD's gradients, or of Muon's."""


@dataclass(frozen=True, kw_only=True)
class MuonOptions(AdamWOptions, SGDOptions):
    """Muon, with AdamW for what is no matrix of a hidden layer."""

    momentum: float = field(default=0.95)


@dataclass(frozen=True, kw_only=True)
class LionOptions:
    """bitsandbytes' Lion: the sign of a momentum; a third to a tenth of AdamW's rate."""

    betas: tuple[float, float] = field(default=(0.9, 0.99))


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """An optimizer whose options are all decided in the parameter groups."""


@dataclass(frozen=True, kw_only=True)
class ProjectionOptions(RoundingOptions):
    """What GaLore, Fira and APOLLO have in common."""

    rank: int = 128
    """Columns of the basis that a gradient is projected to; a quarter of the model's width is usual. The state of an
    (m, n) weight is that of max(m, n) x rank numbers. Raise it first if the method trails AdamW."""
    update_gap: int = 200
    """Steps from one renewal of a weight's basis to the next; in a short run a tenth of the steps or less."""
    scale: float = 0.25
    """Multiplies the step of projected weights, and of no others."""
    side: Side = "std"
    """Which axis is projected: `std` the shorter one, `full` both."""
    inner: Inner = "adamw"
    """The optimizer in the compact space. `GaLore(...)` and its kin also take the class of any torch optimizer."""
    target_modules: list[str] | None = None
    """Patterns of the modules whose weights are projected, such as `*.mlp.*`. Default: all linear layers, except the
    output embedding and weights tied to an embedding."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from `rank`: pattern of module names to rank; the last that matches counts."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name, value in [("rank", self.rank), ("update_gap", self.update_gap), *self.rank_pattern.items()]:
            if value < 1:
                raise InputError(f"{name}={value} is out of range; pass 1 or more", code="out-of-range")


@dataclass(frozen=True, kw_only=True)
class BasisOptions(ProjectionOptions):
    """What GaLore and Fira, which keep their bases, have in common."""

    refresh: Refresh = "subspace"
    """How a basis is found: by warm-started subspace iteration, or by a full SVD (`svd`, as published)."""
    stagger: bool = True
    """Spread the renewals over the gap; false renews all bases in one step, as published."""
    rotate_moments: bool = False
    """Carry the moments into the new basis (LDAdam) instead of keeping them; worth it where update_gap is small."""
    basis_bits: Literal[8, 32] = 32
    """Bits of a stored basis; 8 keep a quarter of its memory, with a scale for each column."""


@dataclass(frozen=True, kw_only=True)
class GaLoreOptions(BasisOptions):
    """GaLore."""

    layerwise: bool = False
    """Project and free each gradient during backward, so that the gradients of one layer exist at a time. Clipping is
    then by the norm of the projected gradients."""


@dataclass(frozen=True, kw_only=True)
class FiraOptions(BasisOptions):
    """Fira."""


@dataclass(frozen=True, kw_only=True)
class APOLLOOptions(ProjectionOptions):
    """APOLLO."""

    scale: float = field(default=1.0)


def names(options: type) -> list[str]:
    """The names of an optimizer's options."""
    return [f.name for f in fields(options)]


def check_choices(options: object) -> None:
    """Refuse a value that its field's Literal does not list.

    Raises:
        InputError: "unknown-choice".
    """
    from typing import get_args, get_origin, get_type_hints

    for name, hint in get_type_hints(type(options)).items():
        value = getattr(options, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            allowed = ", ".join(repr(choice) for choice in get_args(hint))
            raise InputError(f"{name}={value!r} is unknown; use one of {allowed}", code="unknown-choice")
