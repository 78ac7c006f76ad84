"""Whether a saved adapter's tensors fit the layers that its configuration made."""

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from loraloom.errors import InputError
from loraloom.tuner.layer import LoomLayer
from loraloom.tuner.peft_internals import PREFIX


def check_fit(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Raises where loading would leave something out, or load what cannot be computed with.

    PEFT loads with ``strict=False``: a tensor without a place, or a place without a tensor, would go unnoticed. Sizes
    are :func:`check_sizes`'s, which comes after PEFT's ``ignore_mismatched_sizes``.

    Args:
        model: with layers of the adapter.
        adapter_name: its name in the model.
        state_dict: the tensors by their names in the model; those of other parts are passed over.

    Raises:
        InputError: "missing-tensor", "unknown-tensor", "unresolved" (of a module that has no such adapter), "dtype" or
            "not-finite".
    """
    layers = _layers(model)
    expected = {name for name, _ in _parameters(model) if _adapter_of(name) == adapter_name}
    ours = {key: value for key, value in state_dict.items() if f".{PREFIX}" in key}
    extra = [key for key in ours if key not in expected]
    placed = [key for key in ours if key in expected]
    wrong_dtype = [key for key in placed if not ours[key].is_floating_point() or ours[key].itemsize == 1]
    problems: list[tuple[str, Iterable[str], str]] = [
        ("missing-tensor", expected - ours.keys(), "tensors are missing"),
        ("unresolved", [k for k in extra if k.partition(f".{PREFIX}")[0] not in layers], "have no module here"),
        ("unknown-tensor", extra, "tensors have no place in this model"),
        ("dtype", wrong_dtype, f"are {ours[wrong_dtype[0]].dtype if wrong_dtype else ''}, not floating point numbers"),
    ]
    for code, keys, what in problems:
        _refuse(code, keys, what, adapter_name)
    _refuse("not-finite", [k for k in placed if not ours[k].isfinite().all()], "hold NaN or infinity", adapter_name)


def check_sizes(model: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
    """Raises where a tensor has another size than its place, before anything is loaded.

    Args:
        model: with loom layers.
        state_dict: the tensors by their names in the model, behind ``prefix``.

    Raises:
        InputError: "rank".
    """
    wrong: dict[str, list[str]] = {}
    for name, parameter in _parameters(model):
        if f"{prefix}{name}" in state_dict and state_dict[f"{prefix}{name}"].shape != parameter.shape:
            wrong.setdefault(_adapter_of(name), []).append(f"{prefix}{name}")
    for adapter_name, keys in wrong.items():
        _refuse("rank", keys, "have another size, as of another rank, than the configuration says", adapter_name)


def _layers(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, LoomLayer)}


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Those of adapters, by their names in the model: ``<layer>.<attribute>.<adapter>.weight``."""
    for layer in _layers(model):
        for name, parameter in model.get_submodule(layer).named_parameters():
            if name.startswith(PREFIX):
                yield f"{layer}.{name}".removeprefix("."), parameter


def _adapter_of(name: str) -> str:
    return f".{name}".partition(f".{PREFIX}")[2].split(".")[1]


def _refuse(code: str, keys: Iterable[str], what: str, adapter_name: str) -> None:
    if keys := sorted(keys):
        more = ", ..." if len(keys) > 3 else ""
        raise InputError(
            f"The checkpoint does not fit adapter {adapter_name!r}: {len(keys)} {what} ({', '.join(keys[:3])}{more}). "
            "Was it trained with another configuration or base model?",
            code=code,
        )
