"""What a user does with an adapter, on one row of the table: train, merge, disable, save and load again.

`walk` does it with any configuration of PEFT, so that LoraConfig is judged by the same code as ours. It knows nothing
of either beyond the prefix of their parameters.
"""

import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from tests.architectures.table import Row

OK = "ok"
# Float32: the same sums in another order, relative to the largest output. Some layers choose their kernel by whether
# gradients are asked for.
TOLERANCE = 1e-5
# The same through two layers and a norm, relative to the adapter's effect; a module left out is off by about as much.
MERGE_TOLERANCE = 2e-3


class WrongResultError(Exception):
    """A step that ran but gave something else than it should."""


def outputs(model: nn.Module, row: Row) -> torch.Tensor:
    """All floating-point outputs, flat."""
    found = [value for value in model(**row.inputs()).values() if isinstance(value, torch.Tensor)]
    return torch.cat([value.flatten() for value in found if value.is_floating_point()])


def weighted_sum(values: torch.Tensor) -> torch.Tensor:
    """A loss that reaches every output; a sum of squares would be constant behind a normalisation."""
    return values @ torch.randn(values.shape, generator=torch.Generator().manual_seed(3))


def weights_in_use(row: Row) -> set[str]:
    """Modules whose weight has an effect on the outputs: it gets a gradient in the bare model."""
    model = row.build().requires_grad_(True)
    weighted_sum(outputs(model, row)).backward()
    return {
        name
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and moves(weight)
    }


def moves(parameter: nn.Parameter) -> bool:
    gradient = parameter.grad
    return gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.abs().sum() > 0)


def walk(row: Row, make_config: Callable[[], PeftConfig], prefix: str) -> dict[str, str]:
    """Each step's name -> "ok", "refused: ..." (the injection raised) or "wrong: ..."."""
    steps = ("trains", "disables", "merges", *ROUTES)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        with torch.no_grad():
            base = outputs(row.build(), row)
        torch.manual_seed(4)
        try:
            model = get_peft_model(row.build(), make_config()).eval()
        except Exception as error:
            return dict.fromkeys(steps, f"refused: {type(error).__name__}: {error}")
        result = {"trains": attempt(lambda: check_gradients(model, row, prefix))}
        with torch.no_grad():
            _randomise_saved_modules(model)
            try:
                adapted = outputs(model, row)
            except Exception as error:
                return dict.fromkeys(steps, f"wrong: {type(error).__name__}: {error}")
            with model.disable_adapter():
                result["disables"] = attempt(lambda: check_equal(outputs(model, row), base))
            with tempfile.TemporaryDirectory() as folder:
                saved = attempt(lambda: model.save_pretrained(folder))
                for name, load in ROUTES.items():
                    check = lambda load=load: check_equal(load(model, row, folder), adapted)  # noqa: E731
                    result[name] = attempt(check) if saved == OK or load is as_reference else saved
            result["merges"] = attempt(lambda: check_merge(model, row, base, adapted))
    return {step: result[step] for step in steps}


def attempt(step: Callable[[], None]) -> str:
    try:
        step()
    except Exception as error:
        return f"wrong: {type(error).__name__}: {' '.join(str(error).split())}"
    return OK


def check_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    if not (actual - expected).abs().max() <= TOLERANCE * expected.abs().max():
        raise WrongResultError(f"outputs differ by {(actual - expected).abs().max():.2g} of {expected.abs().max():.2g}")


def check_gradients(model: PeftModel, row: Row, prefix: str) -> None:
    used = weights_in_use(row)
    weighted_sum(outputs(model, row)).backward()
    adapters = {name: p for name, p in model.named_parameters() if f".{prefix}" in name and p.requires_grad}
    if not adapters:
        raise WrongResultError("nothing trains")
    idle = [
        name
        for name, parameter in adapters.items()
        if name.removeprefix("base_model.model.").split(f".{prefix}")[0] in used and not moves(parameter)
    ]
    model.zero_grad()
    if idle:
        raise WrongResultError(
            f"{len(idle)} of {len(adapters)} adapter tensors have no gradient: {', '.join(idle[:3])}"
        )


def _randomise_saved_modules(model: PeftModel) -> None:
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.add_(torch.randn_like(parameter))


def check_merge(model: PeftModel, row: Row, base: torch.Tensor, adapted: torch.Tensor) -> None:
    merged = outputs(model.merge_and_unload(), row)
    error, effect = (merged - adapted).abs().max().item(), (adapted - base).abs().max().item()
    if not error <= MERGE_TOLERANCE * effect:
        raise WrongResultError(
            f"merged and adapted outputs differ by {error:.2g}, the adapter's effect is {effect:.2g}"
        )


# The ways by which users load an adapter into a fresh base


def by_peft(_model: PeftModel, row: Row, folder: str) -> torch.Tensor:
    return outputs(PeftModel.from_pretrained(row.build(), folder).eval(), row)


def by_load_adapter(model: PeftModel, row: Row, folder: str) -> torch.Tensor:
    """Into a model that has the adapter already, beside it."""
    with _removed(model, "second"):
        model.load_adapter(folder, adapter_name="second")
        model.set_adapter("second")
        return outputs(model.eval(), row)


def by_transformers(_model: PeftModel, row: Row, folder: str) -> torch.Tensor:
    fresh: Any = row.build()
    fresh.load_adapter(folder)
    return outputs(fresh.eval(), row)


def as_reference(model: PeftModel, row: Row, _folder: str) -> torch.Tensor:
    """As TRL's DPO and GRPO make the reference model: a second adapter by the first one's configuration."""
    with _removed(model, "ref"):
        model.add_adapter("ref", model.peft_config["default"])
        for name, parameter in model.named_parameters():
            if ".default." in name or name.endswith(".default"):
                model.get_parameter(name.replace(".default", ".ref")).copy_(parameter)
        model.set_adapter("ref")
        return outputs(model.eval(), row)


@contextlib.contextmanager
def _removed(model: PeftModel, adapter: str) -> Iterator[None]:
    try:
        yield
    finally:
        model.set_adapter("default")
        if adapter in model.peft_config:
            model.delete_adapter(adapter)


ROUTES = {
    "PeftModel.from_pretrained": by_peft,
    "load_adapter": by_load_adapter,
    "transformers' load_adapter": by_transformers,
    "add_adapter of its config": as_reference,
}
