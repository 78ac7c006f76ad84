"""What a changed copy of an adapted module is made of. A copy has the parts of its original; its rank may be another:

    appended    A' = [A; a],  B' = [B, b / (g s)],  M' = diag(M, I)     the update plus b a, everything else kept
    rewritten   A', B' / s,  M' = I,  g' = 1                            any other factors; anchors B0' = g B0

with rows and columns of zeros to fill the rank, and the scale s as it was, whatever alpha that takes. Nothing here
knows where an adapter lives.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter.protocol import AdaptedModule, Adapter, Parts, flat
from loraloom.errors import InputError
from loraloom.intruders.find import LayerIntruders, analyse_matrix
from loraloom.intruders.reduce import Rank, Scope, correction, reduced
from loraloom.intruders.solvers.basis import LeftBasis
from loraloom.intruders.solvers.matrix import row_norms
from loraloom.update.lowrank import factored_svd
from loraloom.update.terms import alpha_of, fold


@torch.no_grad()
def analyse_module(
    module: AdaptedModule, W: Tensor, left: LeftBasis | None = None, *, top_k: int, epsilon: float
) -> LayerIntruders:
    """:func:`loraloom.intruders.find.analyse_matrix` of a module, with its base weight W (out, in)."""
    A, B = module.factors()
    return analyse_matrix(W, A, B, module.magnitude(), left, top_k=top_k, epsilon=epsilon, name=module.name)


def check_room(adapter: Adapter) -> None:
    """Raises InputError for a composition, whose members cannot take a change, and for experts, stored together."""
    if expert := next((module.expert for module in adapter.modules.values() if module.expert is not None), None):
        raise InputError(
            f"{adapter.where} adapts the experts of {expert.parameter}: their intruders are found, and not reduced",
            code="experts",
        )
    if adapter.config.get("composition") is not None:
        raise InputError(
            f"{adapter.where} is a composition, whose members cannot take a change: make a LoRA of it "
            "(loraloom export --to peft, or to_lora), and reduce the intruders of that",
            code="composition",
        )


def copied(module: AdaptedModule) -> Parts:
    """The parts of an exact copy."""
    return {name: part.detach().clone() for name, part in module.parts().items()}


@torch.no_grad()
def appended(module: AdaptedModule, A: Tensor, B: Tensor, magnitude: Tensor | None) -> Parts | None:
    """The parts of a copy with ``B A`` added, A (q, in) and B (out, q); None where the gate is closed."""
    gate = _gate(module)
    if gate == 0:
        return None
    parts = copied(module)
    old_A, old_B = flat(parts["A"]), flat(parts["B"])
    changed = {
        "A": torch.cat([old_A, A.to(old_A)]),
        "B": torch.cat([old_B, (B / (module.scaling * gate)).to(old_B)], 1),
    }
    if "mixer" in parts:
        M = parts["mixer"]
        changed["mixer"] = torch.block_diag(M, torch.eye(len(A)).to(M))
    changed |= _filled_anchors(module, parts, module.rank + len(A), gate=1.0)
    return _with(parts, changed, magnitude)


@torch.no_grad()
def rewritten(module: AdaptedModule, A: Tensor, B: Tensor, magnitude: Tensor | None, rank: int) -> Parts:
    """The parts of a copy whose trained term is ``B A``, filled up to the rank."""
    parts = copied(module)
    changed = {"A": _filled(A, rank), "B": _filled(B.T / module.scaling, rank).T}
    if "mixer" in parts:
        changed["mixer"] = torch.eye(rank)
    if "gate" in parts:
        changed["gate"] = torch.ones_like(parts["gate"])
    changed |= _filled_anchors(module, parts, rank, _gate(module))
    return _with(parts, changed, magnitude)


def _gate(module: AdaptedModule) -> float:
    """g, or 1 for an adapter without one."""
    gate = module.terms()[0].gate
    return 1.0 if gate is None else gate.detach().item()


def _filled_anchors(module: AdaptedModule, parts: Parts, rank: int, gate: float) -> Parts:
    """Anchors have the rank of A; it cannot be less than theirs."""
    if "anchor_A" not in parts:
        return {}
    A, B = flat(parts["anchor_A"]), flat(parts["anchor_B"]) * gate
    if rank < len(A):
        raise InputError(
            f"{module.name}: rank={rank} is less than the rank {len(A)} of what this adapter started from "
            "(PiSSA, OLoRA): use rank='keep', 'exact' or a larger number",
            code="rank",
        )
    return {"anchor_A": _filled(A, rank), "anchor_B": _filled(B.T, rank).T}


def _filled(rows: Tensor, rank: int) -> Tensor:
    """Rows (k, n) with rows of zeros, up to the rank."""
    return torch.cat([rows, rows.new_zeros(rank - len(rows), rows.shape[1])])


def _with(parts: Parts, changed: Parts, magnitude: Tensor | None) -> Parts:
    """The parts with changed ones in their dtypes and with their trailing (kernel) dimensions."""
    if magnitude is not None:
        changed = changed | {"magnitude": magnitude}
    for name, value in changed.items():
        stored = parts[name]
        shape = stored.shape if value.dim() == 1 else (value.shape[0], -1, *stored.shape[2:])
        parts[name] = value.to(stored).reshape(shape).contiguous()
    return parts


@torch.no_grad()
def mitigated_copy(
    module: AdaptedModule, found: LayerIntruders, scale: float, scope: Scope, rank: Rank
) -> tuple[Parts, int, float]:
    """The parts of a copy of the module with its intruders scaled down, its rank, and what that lost.

    Args:
        module: the original.
        found: what :func:`loraloom.intruders.find.analyse_matrix` found in it.
        scale, scope, rank: see :func:`loraloom.intruders.reduce.mitigate_matrix`.
    """
    term, *anchors = module.terms()
    device = term.A.device
    extra_A, extra_B = (x.to(device) for x in correction(found, scale, scope))
    if not len(extra_A) and rank in ("exact", "keep", module.rank):
        return copied(module), module.rank, 0.0
    magnitude = module.magnitude()
    if isinstance(rank, int):
        rank = min(rank, max(min(found.shape), module.rank))  # no matrix of that shape has more
    A, B = fold([term])
    new_A, new_B, error = reduced(A, B, extra_A, extra_B, rank, min(found.shape))
    anchor_A, anchor_B = fold(anchors) if anchors else (A[:0], B[:, :0])
    if error and anchors:  # relative to the update, of which the anchors are a part
        A, B = torch.cat([A, extra_A.to(A)]), torch.cat([B, extra_B.to(B)], 1)
        error *= _norm(A, B) / _norm(torch.cat([A, anchor_A]), torch.cat([B, anchor_B], 1))
    if found.row_scale is not None and magnitude is not None:
        whole = torch.cat([new_A, anchor_A.to(new_A)]), torch.cat([new_B, anchor_B.to(new_B)], 1)
        magnitude = found.row_scale.to(device) * row_norms(module.weight().float(), *whole)
    total = module.rank + len(extra_A)
    if rank == "exact" and len(new_A) == total and (parts := appended(module, extra_A, extra_B, magnitude)) is not None:
        return parts, total, error
    new_rank = rank if isinstance(rank, int) else max(len(new_A), module.rank if anchors else 0)
    return rewritten(module, new_A, new_B, magnitude, new_rank), new_rank, error


def _norm(A: Tensor, B: Tensor) -> float:
    return float(factored_svd(A, B)[1].norm())


def patterns(modules: Iterable[AdaptedModule], ranks: dict[str, int], use_rslora: bool) -> dict[str, dict[str, Any]]:
    """rank_pattern and alpha_pattern of copies with these ranks and the same scales."""
    # Longest first: a pattern also matches names that end in it.
    longest = sorted(modules, key=lambda module: len(module.name), reverse=True)
    alphas = {module.name: alpha_of(module.scaling, ranks[module.name], use_rslora) for module in longest}
    return {"rank_pattern": {module.name: ranks[module.name] for module in longest}, "alpha_pattern": alphas}
