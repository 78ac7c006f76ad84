"""``compose``: an adapter made of pre-trained adapters."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from loraloom.adapter.protocol import Adapter
from loraloom.composition.sources import layer_shapes, modules_of, open_source, ranks_of
from loraloom.errors import InputError
from loraloom.tuner.config import LoomConfig
from loraloom.tuner.layer import LoomLayer
from loraloom.tuner.model import LoomModel
from loraloom.update.composition import Composition

# Total weight that learned weights start from: the better one of 1 and 3 with related members (docs/composition.md).
STRENGTH = 3.0


def compose(
    model: nn.Module,
    members: Mapping[str, str | Path],
    weights: Literal["learned", "uniform"] | Mapping[str, float] = "learned",
    *,
    scope: Literal["layer", "module_type", "model"] = "layer",
    constraint: Literal["softmax", "scaled_softmax", "simplex", "free"] = "scaled_softmax",
    total: float | None = None,
    normalize: Literal["present", "all"] = "present",
    adapter_name: str = "composition",
    task_type: str | None = None,
    modules_to_save: list[str] | None = None,
) -> PeftModel:
    """Adds to the model one adapter ``W' = W + sum_n w_n D_n`` of pre-trained updates D_n, and activates it.

    With learned weights it is WLoRA (2402.15414): only the weights train, and they start equal. With fixed equal
    weights it is uniform composition. The members are copied into the adapter, frozen, with mixers, gates, scales and
    patterns multiplied in; it costs two products per layer however many they are, and is saved, loaded and merged as
    one. `to_lora` turns it into an ordinary LoRA.

    Args:
        model: a model, or a PeftModel with loom adapters, which stay.
        members: name -> folder or hub repository of a LoRA of PEFT or an adapter of loraloom; in a PeftModel also the
            name of one of its adapters, which goes first. They may adapt different modules.
        weights: "learned" from equal ones, "uniform", or a weight for each member, taken as given.
        scope: whether each layer learns weights of its own, or layers of one kind (all q_proj) or all layers share
            them.
        constraint: of learned weights. "softmax": positive, with the given total. "scaled_softmax": the same, and the
            total trains. "simplex": as "softmax" by projection, so that weights can become 0. "free": any.
        total: what the weights of a layer add up to, with "scaled_softmax" and "free" at the start. At 1, N equal
            members have an N-th of their strength each. None: 1 for "uniform", else `STRENGTH`, or as much less as
            keeps every member at its full strength or below in every layer (1 for a single member).
        normalize: "present": in each layer the weights of the members that adapt it sum to 1. "all": they sum to 1 over
            all members, so a layer that lacks some gets less.
        adapter_name: name of the new adapter.
        task_type: of the PeftModel; None takes that of the members if they agree. With those of classification PEFT
            trains the model's head as well.
        modules_to_save: modules to train in full with the weights, such as a new head.

    Returns:
        The PeftModel (``model`` itself if it was one), in which nothing but the weights (and heads) is trainable.

    Raises:
        InputError: a member is missing, broken, of another base model or no sum of low-rank updates (DoRA, trained
            biases or tokens); weights and members do not match. The model is unchanged.
    """
    base = _base_of(model, adapter_name)
    if not members:
        raise InputError(
            "members is empty; expected a name and a folder for each, {'squad': 'path/to/squad'}", code="members"
        )
    fixed = _fixed_weights(weights, members)
    if total is not None and (not 0 < total < math.inf or (fixed and total != 1)):
        raise InputError(
            f"total={total!r}: expected a positive number, and 1 where the weights are given", code="composition-total"
        )
    sources = {name: open_source(model, name, where) for name, where in members.items()}
    shapes = layer_shapes(base, {module for source in sources.values() for module in modules_of(source)})
    ranks = {name: ranks_of(name, source, shapes) for name, source in sources.items()}
    learned = weights == "learned"
    by_module = {
        module: [ranks[name].get(module, 0) for name in sources]
        for module, _ in base.named_modules()
        if module in shapes
    }
    composition = Composition(
        members=[_describe(name, source) for name, source in sources.items()],
        ranks=by_module,
        biased=[m for m in shapes if any(_biased(source, m) for source in sources.values())],
        scope=scope,
        # A total that does not train needs no parameter.
        constraint="free" if fixed else "softmax" if not learned and constraint == "scaled_softmax" else constraint,
        normalize=normalize,
        total=_total(by_module, normalize) if total is None and learned else 1.0 if total is None else total,
        trainable=learned,
    )
    largest = max(map(sum, composition.ranks.values()))
    config = LoomConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=list(composition.ranks),
        composition=composition,
        task_type=task_type or _common_task(sources.values()),
        modules_to_save=modules_to_save,
    )
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        model.set_adapter(adapter_name)
    else:
        model = get_peft_model(model, config, adapter_name)
    for module in composition.ranks:
        _fill(cast(LoomLayer, base.get_submodule(module)), adapter_name, module, list(sources.values()), fixed)
    return model


def _total(ranks: Mapping[str, list[int]], normalize: str) -> float:
    """`STRENGTH`, or the number of members that the weights of a layer are shared by, where that is less."""
    if normalize == "all":
        return min(STRENGTH, len(next(iter(ranks.values()))))
    return min(STRENGTH, min(sum(rank > 0 for rank in of_module) for of_module in ranks.values()))


def _base_of(model: nn.Module, adapter_name: str) -> nn.Module:
    if not isinstance(model, PeftModel):
        return model
    if not isinstance(model.base_model, LoomModel):
        raise InputError(
            f"the model has adapters of type {type(model.base_model).__name__}: save them, take the base model by "
            "model.unload(), and compose from the folders",
            code="adapters",
        )
    if adapter_name in model.peft_config:
        raise InputError(
            f"the model has an adapter {adapter_name!r} already: choose another adapter_name", code="name-taken"
        )
    return model.get_base_model()


def _fixed_weights(weights: str | Mapping[str, float], members: Mapping[str, Any]) -> dict[str, float]:
    if isinstance(weights, str):
        if weights not in ("learned", "uniform"):
            raise InputError(
                f"weights={weights!r} is not known; use 'learned', 'uniform' or a weight for each member",
                code="weights",
            )
        return {}
    if weights.keys() != members.keys():
        raise InputError(
            f"weights are for {', '.join(weights)}, members are {', '.join(members)}: name each once", code="weights"
        )
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise InputError(f"the weight of {name!r} is {weight!r}; expected a finite number", code="not-finite")
    return dict(weights)


def _biased(source: Adapter, module: str) -> bool:
    return module in modules_of(source) and bool({"bias", "member_bias"} & modules_of(source)[module].shapes().keys())


def _describe(name: str, source: Adapter) -> dict[str, str]:
    return {"name": name, "source": source.where, "sha256": source.sha256}


def _common_task(sources: Any) -> str | None:
    tasks = {source.config.get("task_type") for source in sources}
    return tasks.pop() if len(tasks) == 1 else None


@torch.no_grad()
def _fill(layer: LoomLayer, adapter_name: str, module: str, sources: list[Adapter], fixed: dict[str, float]) -> None:
    part = layer.compositions[adapter_name]
    A, B = layer.factor("A", adapter_name), layer.factor("B", adapter_name)
    start = 0
    for i, (source, rank) in enumerate(zip(sources, part.ranks, strict=True)):
        if not rank:
            continue
        rows = slice(start, start + rank)
        A_n, B_n = modules_of(source)[module].factors()
        A[rows].copy_(A_n.reshape(A[rows].shape))
        B[:, rows].copy_(B_n.reshape(B[:, rows].shape))
        bias = modules_of(source)[module].bias()
        if bias is not None:
            layer.factor("member_bias", adapter_name)[i].copy_(bias)
        start += rank
    if fixed:
        logits = layer.factor("logits", adapter_name)
        logits.copy_(torch.tensor(list(fixed[name] for name in part.names)))
