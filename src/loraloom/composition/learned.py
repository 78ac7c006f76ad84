"""What a composition has learned: its weights per layer and on average, and penalties on them while they train."""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from loraloom.errors import InputError
from loraloom.text import did_you_mean, text_table
from loraloom.tuner.layer import LoomLayer


@dataclass(frozen=True)
class LearnedWeights:
    """The weights of a composition's members."""

    layers: dict[str, dict[str, float]]
    """Module -> weight of each member that adapts it."""
    mean: dict[str, float]
    """Member -> mean of its weights over the layers that it adapts."""

    def to_dict(self) -> dict[str, Any]:
        """As plain dictionaries, for JSON."""
        return asdict(self)


@torch.no_grad()
def learned_weights(model: nn.Module, adapter_name: str = "composition") -> LearnedWeights:
    """The weights of a composition as they are now.

    Raises:
        InputError: the model has no composition of that name.
    """
    layers = {}
    for module, layer in composed_layers(model, adapter_name):
        part, weights = layer.compositions[adapter_name], _weights(layer, adapter_name).tolist()
        layers[module] = {n: w for n, w, rank in zip(part.names, weights, part.ranks, strict=True) if rank}
    means = {}
    for name in part.names:
        present = [weights[name] for weights in layers.values() if name in weights]
        means[name] = statistics.fmean(present)
    return LearnedWeights(layers, means)


def format_weights(learned: LearnedWeights) -> str:
    """The weights as a table of text: one line per layer, one column per member, and a line of means."""
    names = list(learned.mean)
    rows = [["layer", *names]]
    for module, weights in [*learned.layers.items(), ("mean", learned.mean)]:
        rows.append([module, *(f"{weights[name]:.3f}" if name in weights else "-" for name in names)])
    return text_table(rows)


def penalty(
    model: nn.Module, adapter_name: str = "composition", *, l1: float = 0.0, l2: float = 0.0, entropy: float = 0.0
) -> Tensor:
    """A penalty on the weights, to be added to the loss: the mean over the layers of

        l1 sum_n |w_n| / N  +  l2 sum_n w_n^2  +  entropy H(p),    p = |w| / sum |w|,    N members in the layer

    The first is LoraHub's (2307.13269, with l1 = 0.05), for free weights; a positive ``entropy`` draws the weights
    towards few members, a negative one towards equal shares.

    Returns:
        A scalar, differentiable with respect to the weights.

    Raises:
        InputError: the model has no composition of that name.
    """
    terms = []
    for _, layer in composed_layers(model, adapter_name):
        present = torch.tensor(layer.compositions[adapter_name].ranks).bool()
        w = _weights(layer, adapter_name)
        w = w[present.to(w.device)]
        p = (w.abs() / w.abs().sum().clamp_min(torch.finfo(w.dtype).tiny)).clamp_min(torch.finfo(w.dtype).tiny)
        terms.append(l1 * w.abs().mean() + l2 * w.square().sum() + entropy * torch.special.entr(p).sum())
    return torch.stack([term.to(terms[0].device) for term in terms]).mean()


def composed_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoomLayer]]:
    """Name (relative to the base model) and layer, for each that the composition adapts.

    Raises:
        InputError: there is none.
    """
    found = False
    others: set[str] = set()
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    for module, layer in base.named_modules():
        if isinstance(layer, LoomLayer):
            others |= layer.compositions.keys()
            if adapter_name in layer.compositions:
                found = True
                yield module, layer
    if not found:
        near = did_you_mean(adapter_name, others)
        raise InputError(
            f"the model has no composition {adapter_name!r}{near} (it has {', '.join(others) or 'none'})",
            code="no-adapter",
        )


def _weights(layer: LoomLayer, adapter_name: str) -> Tensor:
    logits = layer.factor("logits", adapter_name)
    return layer.compositions[adapter_name].weights(logits)
