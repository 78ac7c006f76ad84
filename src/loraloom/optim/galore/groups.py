"""Which weights of a model GaLore projects."""

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def project_groups(
    model: nn.Module, groups: Iterable[dict[str, Any]], target_modules: str | Iterable[str] | None = None
) -> list[dict[str, Any]]:
    """Split the group "base" of `build_param_groups` into the weights to project, "projected", and the rest, "base".

    Every group but "projected" gets ``rank=None``: the inner optimizer takes its parameters as they are. By default
    the weights of all linear layers are projected, except the output embedding and weights tied to an embedding;
    embeddings, norms, biases, convolutions and modules_to_save are not.

    Args:
        model: the model that the groups were made of.
        groups: the result of `build_param_groups`.
        target_modules: patterns of module names to project instead, for example ``["*.mlp.*", "*.q_proj"]``; each may
            match any module with a trained matrix called weight, also an embedding.

    Raises:
        ValueError: a pattern matches no module with a trained matrix.
    """
    base = {id(p) for group in groups if group["name"] == "base" for p in group["params"]}
    matrices = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim == 2 and id(weight) in base
    }
    if target_modules is None:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        excluded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) or m is output}
        # transformers' Conv1D is a linear layer with its weight transposed.
        linear = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
        chosen = {id(w) for name, w in matrices.items() if name in linear and id(w) not in excluded}
    else:
        chosen = set()
        for pattern in [target_modules] if isinstance(target_modules, str) else target_modules:
            matched = fnmatch.filter(matrices, pattern)
            if not matched:
                raise ValueError(
                    f"target_modules pattern {pattern!r} matches no module with a trained matrix; the model has, for "
                    f"example, {', '.join(list(matrices)[:3])}"
                )
            chosen |= {id(matrices[name]) for name in matched}
    result = []
    for group in groups:
        if taken := [p for p in group["params"] if id(p) in chosen]:
            result.append({**group, "params": taken, "name": "projected"})
        if rest := [p for p in group["params"] if id(p) not in chosen]:
            result.append({**group, "params": rest, "rank": None})
    return result
