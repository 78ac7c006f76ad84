"""Which weights of a model GaLore projects, and at which rank."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from loraloom.errors import InputError


def project_groups(
    model: nn.Module,
    groups: Iterable[dict[str, Any]],
    target_modules: str | Iterable[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
) -> list[dict[str, Any]]:
    """Split the group "base" of `build_param_groups` into the weights to project, "projected", and the rest, "base".

    Every other group gets ``rank=None``: the inner optimizer takes its parameters as they are. By default the weights
    of all linear layers are projected, except the output embedding and weights tied to an embedding; embeddings, norms,
    biases, convolutions and modules_to_save are not.

    Args:
        model: the model that the groups were made of.
        groups: the result of `build_param_groups`.
        target_modules: patterns of module names to project instead, for example ``["*.mlp.*", "*.q_proj"]``; each may
            match any module with a trained matrix called weight, also an embedding.
        rank_pattern: pattern of module names to rank, where it is not the optimizer's; the last that matches counts.
            Each such rank is a group of its own, "projected (rank 64)".

    Raises:
        InputError: a pattern matches no module with a trained matrix, or one of rank_pattern none that is projected.
    """
    base = {id(p) for group in groups if group["name"] == "base" for p in group["params"]}
    matrices = {
        name: module.weight
        for name, module in model.named_modules()
        if isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim == 2 and id(weight) in base
    }
    if target_modules is None:
        chosen = {name: w for name, w in linear_weights(model).items() if name in matrices}
    else:
        patterns = [target_modules] if isinstance(target_modules, str) else target_modules
        chosen = {
            name: matrices[name] for pattern in patterns for name in _matched("target_modules", pattern, matrices)
        }
    rank_pattern = rank_pattern or {}
    ranks = {
        id(chosen[name]): rank
        for pattern, rank in rank_pattern.items()
        for name in _matched("rank_pattern", pattern, chosen)
    }
    projected = {id(weight) for weight in chosen.values()}
    result = []
    for group in groups:
        for rank in (None, *sorted(set(rank_pattern.values()))):
            if taken := [p for p in group["params"] if id(p) in projected and ranks.get(id(p)) == rank]:
                extra = {"name": "projected"} if rank is None else {"name": f"projected (rank {rank})", "rank": rank}
                result.append({**group, "params": taken, **extra})
        if rest := [p for p in group["params"] if id(p) not in projected]:
            result.append({**group, "params": rest, "rank": None})
    return result


def linear_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of linear layers that belong to no embedding, by the layers' names."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    excluded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding) or m is output}
    # transformers' Conv1D is a linear layer with its weight transposed.
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    return {n: cast(Tensor, m.weight) for n, m in linear.items() if id(m.weight) not in excluded}


def _matched(option: str, pattern: str, weights: dict[str, Tensor]) -> list[str]:
    matched = fnmatch.filter(weights, pattern)
    if not matched:
        kind = "module with a trained matrix" if option == "target_modules" else "module that is projected"
        raise InputError(
            f"{option} pattern {pattern!r} matches no {kind}; the model has, for example, {', '.join([*weights][:3])}",
            code="unmatched-pattern",
        )
    return matched
