"""Amounts of modules as a matrix: a row per layer, a column per kind of module."""

import math
from collections.abc import Mapping
from typing import Any

from loraloom.report.model import Heatmap
from loraloom.text import place, short_names

METRIC_NAMES = {"macro_f1": "macro-F1", "micro_f1": "micro-F1", "f1": "F1", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2"}
METRIC_NAMES |= {"rougeL": "ROUGE-L", "bleu": "BLEU", "matthews": "Matthews correlation", "mse": "mean squared error"}


def by_layer(values: Mapping[str, float | None], unit: str, **options: Any) -> Heatmap:
    """One amount per module as a heatmap of layers by modules.

    Args:
        values: module name to amount; not finite counts as missing.
        unit: what the colors measure.
        options: `signed`, `low` and `high` of `Heatmap`.
    """
    places = {name: place(name) for name in values}
    layers = sorted({layer for layer, _ in places.values()}, key=lambda layer: (layer == "-", len(layer), layer))
    heads = short_names(module for _, module in places.values())
    cells: dict[tuple[str, str], float | None] = {places[name]: finite(value) for name, value in values.items()}
    matrix = [[cells.get((layer, module)) for module in heads] for layer in layers]
    return Heatmap("layer", "module", layers, [*heads.values()], matrix, unit, **options)


def labels_of(modules: Mapping[str, Any]) -> list[str]:
    """One short name per module, with its layer: "3 query"."""
    places = [place(name) for name in modules]
    heads = short_names(module for _, module in places)
    return [heads[module] if layer == "-" else f"{layer} {heads[module]}" for layer, module in places]


def metric_name(metric: str) -> str:
    """A metric as people write it: "macro_f1" as "macro-F1", "eval_loss" as "eval loss"."""
    return METRIC_NAMES.get(metric, metric.replace("_", " "))


def finite(value: float | None) -> float | None:
    """The value, or None if it is not a number that JSON has."""
    return value if value is not None and math.isfinite(value) else None
