"""What a selection works on: the adapter with gates, and the set that the gates are projected onto."""

from typing import Literal

from peft import PeftModel

from loraloom.errors import InputError
from loraloom.optim.weight_adam import WeightAdam
from loraloom.selection.phases import is_fraction
from loraloom.selection.rewire import adapted_layers, gate
from loraloom.update.simplex import Constraint, KSparse, Simplex, SimplexKSparse

DEFAULT_KEEP = 0.5


def gated_adapter(model: PeftModel, optimizer: WeightAdam) -> str:
    """Name of the active adapter. Raises if selection cannot work on it (DoRA, biases, merged, foreign optimizer)."""
    if not isinstance(optimizer, WeightAdam):
        raise InputError(
            f"the optimizer is a {type(optimizer).__name__}; selection needs loraloom.optim.WeightAdam",
            code="optimizer",
        )
    if len(model.active_adapters) != 1:
        raise InputError(
            f"the active adapters are {model.active_adapters}; selection works on exactly one", code="adapters"
        )
    adapter = model.active_adapters[0]
    layers = adapted_layers(model, adapter)
    gates = [gate(layer, adapter) for layer in layers.values()]
    if not gates or any(g is None for g in gates):
        raise InputError(f"adapter {adapter!r} has no gates; make it with LoomConfig.weightlora(...)", code="no-gates")
    if any(layer.magnitude(adapter) is not None for layer in layers.values()):
        raise InputError(
            f"adapter {adapter!r} uses DoRA, whose magnitude still rescales the weight when the gate is zero, so that "
            "disconnecting would change the model: set use_dora=False",
            code="dora",
        )
    if getattr(model.peft_config[adapter], "bias", "none") == "loom_only":
        raise InputError(
            f"adapter {adapter!r} trains the biases of its layers, which a checkpoint would not hold once a layer is "
            "disconnected: set bias='none' or 'all'",
            code="bias",
        )
    if any(layer.merged for layer in layers.values()):
        raise InputError(f"adapter {adapter!r} is merged: call unmerge_adapter() first", code="merged")
    held = {id(p) for group in optimizer.param_groups if group["is_gate"] for p in group["params"]}
    if held != {id(g) for g in gates}:
        raise InputError(
            f"the optimizer holds {len(held)} gates, adapter {adapter!r} has {len(gates)}, and they must be the same: "
            "build the optimizer from this model with only this adapter trainable",
            code="optimizer",
        )
    return adapter


def gate_set(
    keep: int | float | Constraint | None,
    count: int,
    constraint: str,
    by: Literal["signed", "magnitude"],
    radius: float,
) -> Constraint:
    """The set that the gates are projected onto; see `AdapterSelection`.

    Raises:
        InputError: an argument is out of range, or the set has no use for it.
    """
    if constraint not in ("k_sparse", "simplex", "sparse_simplex"):
        raise InputError(
            f"constraint={constraint!r} is unknown; use 'k_sparse', 'simplex' or 'sparse_simplex'",
            code="unknown-choice",
        )
    if constraint != "k_sparse" and by != "signed":
        raise InputError(
            f"by={by!r} is for constraint='k_sparse': gates on a simplex are not negative", code="exclusive"
        )
    if constraint == "k_sparse" and radius != 1.0:
        raise InputError(f"radius={radius} is for a simplex; pass constraint='sparse_simplex'", code="exclusive")
    if keep is not None and not isinstance(keep, int | float):
        return keep
    if constraint == "simplex":
        if keep is not None:
            raise InputError(
                f"keep={keep} is not for constraint='simplex', which decides it; use 'sparse_simplex'", code="exclusive"
            )
        return Simplex(radius)
    keep = DEFAULT_KEEP if keep is None else keep
    k = max(1, round(keep * count)) if is_fraction(keep) else keep
    if not (isinstance(k, int) and 1 <= k <= count):
        raise InputError(
            f"keep={keep} is out of range: pass 1 to {count} adapters, or a fraction of them below 1",
            code="out-of-range",
        )
    return KSparse(k, by) if constraint == "k_sparse" else SimplexKSparse(k, radius)
