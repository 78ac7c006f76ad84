"""Whether a saved adapter's tensors fit the layers that its configuration made."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from loraloom.errors import InputError
from loraloom.tuner.layer import LoomLayer
from loraloom.tuner.peft_internals import PREFIX


def check_fit(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Raises where loading would leave something out, or load what cannot be computed with.

    PEFT loads with ``strict=False``: a tensor without a place, or a place without a tensor, would go unnoticed.

    Args:
        model: with layers of the adapter.
        adapter_name: its name in the model.
        state_dict: the tensors by their names in the model; those of other parts are passed over.

    Raises:
        InputError: "missing-tensor", "unknown-tensor", "unresolved" (of a module that has no such adapter), "rank" (or
            another size), "dtype" or "not-finite".
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, LoomLayer)}
    expected = {
        f"{layer}.{name}": parameter
        for layer in layers
        for name, parameter in model.get_submodule(layer).named_parameters()
        if name.startswith(PREFIX) and name.split(".")[1] == adapter_name
    }
    ours = {key: value for key, value in state_dict.items() if f".{PREFIX}" in key}
    extra = [key for key in ours if key not in expected]
    placed = [key for key in ours if key in expected]
    wrong_size = [key for key in placed if ours[key].shape != expected[key].shape]
    wrong_dtype = [key for key in placed if not ours[key].is_floating_point() or ours[key].itemsize == 1]
    problems: list[tuple[str, Iterable[str], str]] = [
        ("missing-tensor", expected.keys() - ours.keys(), "tensors are missing"),
        ("unresolved", [k for k in extra if k.partition(f".{PREFIX}")[0] not in layers], "have no module here"),
        ("unknown-tensor", extra, "tensors have no place in this model"),
        ("rank", wrong_size, "have another size, as of another rank, than the configuration says"),
        ("dtype", wrong_dtype, f"are {ours[wrong_dtype[0]].dtype if wrong_dtype else ''}, not floating point numbers"),
    ]
    for code, keys, what in problems:
        _refuse(code, keys, what, adapter_name)
    _refuse("not-finite", [k for k in placed if not ours[k].isfinite().all()], "hold NaN or infinity", adapter_name)


def _refuse(code: str, keys: Iterable[str], what: str, adapter_name: str) -> None:
    if keys := sorted(keys):
        more = ", ..." if len(keys) > 3 else ""
        raise InputError(
            f"The checkpoint does not fit adapter {adapter_name!r}: {len(keys)} {what} ({', '.join(keys[:3])}{more}). "
            "Was it trained with another configuration or base model?",
            code=code,
        )
