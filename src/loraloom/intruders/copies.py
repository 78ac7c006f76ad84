"""What a changed copy of an adapted layer is made of. A copy has the parts of its original; its rank may be another:

    appended    A' = [A; a],  B' = [B, b / (g s)],  M' = diag(M, I)     the update plus b a, everything else kept
    rewritten   A', B' / s,  M' = I,  g' = 1                            any other factors; anchors B0' = g B0

with rows and columns of zeros to fill the rank, and the scale s as it was, whatever alpha that takes. Nothing here
knows where an adapter is: in a model (:mod:`loraloom.adapter.live`) or in files (:mod:`loraloom.intruders.stored`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter import stored as adapter
from loraloom.intruders.find import LayerIntruders
from loraloom.intruders.reduce import Rank, Scope, correction, reduced
from loraloom.intruders.solvers.matrix import row_norms
from loraloom.update.terms import Term, alpha_of, fold
from loraloom.update.update import Update

# LoRA initialisations of PEFT that change the base weight by an amount that depends on the rank.
CHANGES_BASE = (*adapter.CHANGES_BASE, "mica")

Parts = dict[str, Tensor]  # attribute of the layer -> tensor


class AdaptedLayer:
    """One layer with an adapter, in a model or in files. Nothing here changes it.

    Attributes:
        name: of the module, in the base model.
        A_name, B_name: of the factors among its parts.
        rank: r.
        scaling: s, without the gate.
    """

    name: str
    A_name: str
    B_name: str
    rank: int
    scaling: float

    def weight(self) -> Tensor:
        """The base weight W (out, in), dequantised if need be."""
        raise NotImplementedError

    def parts(self) -> Parts:
        """The adapter's tensors as they are stored."""
        raise NotImplementedError

    def terms(self) -> list[Term]:
        """What the update is the sum of; the first one is the trained one."""
        raise NotImplementedError

    def magnitude(self) -> Tensor | None:
        """DoRA's m (out,)."""
        raise NotImplementedError

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the whole update, with scale 1."""
        return fold(self.terms())

    @torch.no_grad()
    def adapted_weight(self) -> Tensor:
        """W' (out, in) in float32."""
        return Update(self.terms(), self.magnitude()).adapted_weight(self.weight().float())

    def gate(self) -> float:
        """g, or 1 for an adapter without one."""
        gate = self.terms()[0].gate
        return 1.0 if gate is None else gate.detach().item()

    def copied(self) -> Parts:
        """The parts of an exact copy."""
        return {name: part.detach().clone() for name, part in self.parts().items()}

    @torch.no_grad()
    def appended(self, A: Tensor, B: Tensor, magnitude: Tensor | None) -> Parts | None:
        """The parts of a copy with ``B A`` added, A (q, in) and B (out, q); None where the gate is closed."""
        gate = self.gate()
        if gate == 0:
            return None
        parts, total = self.copied(), self.rank + len(A)
        scale = self.scaling * gate
        old_A, old_B = (flat(parts[name]) for name in (self.A_name, self.B_name))
        parts[self.A_name] = self._like(self.A_name, torch.cat([old_A, A.to(old_A)]))
        parts[self.B_name] = self._like(self.B_name, torch.cat([old_B, (B / scale).to(old_B)], 1))
        if "loom_mixer" in parts:
            M = parts["loom_mixer"]
            parts["loom_mixer"] = torch.block_diag(M, torch.eye(len(A)).to(M))
        self._fill_anchors(parts, total, gate=1.0)
        return self._with_magnitude(parts, magnitude)

    @torch.no_grad()
    def rewritten(self, A: Tensor, B: Tensor, magnitude: Tensor | None, rank: int) -> Parts:
        """The parts of a copy whose trained term is ``B A``, filled up to the rank."""
        parts = self.copied()
        A = torch.cat([A, A.new_zeros(rank - len(A), A.shape[1])])
        B = torch.cat([B, B.new_zeros(len(B), rank - B.shape[1])], 1)
        parts[self.A_name] = self._like(self.A_name, A)
        parts[self.B_name] = self._like(self.B_name, B / self.scaling)
        if "loom_mixer" in parts:
            parts["loom_mixer"] = torch.eye(rank).to(parts["loom_mixer"])
        if "loom_gate_lora_magnitude_vector" in parts:
            parts["loom_gate_lora_magnitude_vector"].fill_(1.0)
        self._fill_anchors(parts, rank, self.gate())
        return self._with_magnitude(parts, magnitude)

    def _fill_anchors(self, parts: Parts, rank: int, gate: float) -> None:
        """Anchors have the rank of A; it cannot be less than theirs."""
        if "loom_anchor_A" not in parts:
            return
        A, B = flat(parts["loom_anchor_A"]), flat(parts["loom_anchor_B"]) * gate
        if rank < len(A):
            raise ValueError(
                f"{self.name}: rank={rank} is less than the rank {len(A)} of what this adapter started from "
                "(PiSSA, OLoRA): use rank='keep', 'exact' or a larger number."
            )
        A = torch.cat([A, A.new_zeros(rank - len(A), A.shape[1])])
        B = torch.cat([B, B.new_zeros(len(B), rank - B.shape[1])], 1)
        parts["loom_anchor_A"], parts["loom_anchor_B"] = self._like("loom_anchor_A", A), self._like("loom_anchor_B", B)

    def _with_magnitude(self, parts: Parts, magnitude: Tensor | None) -> Parts:
        for name in parts:
            if magnitude is not None and name.endswith("lora_magnitude_vector") and "gate" not in name:
                parts[name] = self._like(name, magnitude)
        return parts

    def _like(self, name: str, value: Tensor) -> Tensor:
        """The value in the dtype of a stored part, and with its trailing (kernel) dimensions."""
        stored = self.parts()[name]
        if value.dim() == 1:
            return value.to(stored).reshape(stored.shape)
        shape = (value.shape[0], -1, *stored.shape[2:])
        return value.to(stored).reshape(shape).contiguous()


def flat(factor: Tensor) -> Tensor:
    """A stored factor as a matrix: kernels of convolutions are flattened."""
    return factor if factor.dim() == 2 else factor.flatten(1)


@torch.no_grad()
def mitigated_copy(
    layer: AdaptedLayer, found: LayerIntruders, scale: float, scope: Scope, rank: Rank
) -> tuple[Parts, int, float]:
    """The parts of a copy of the layer with its intruders scaled down, its rank, and what that lost.

    Args:
        layer: the original.
        found: what :func:`loraloom.intruders.find.analyse_matrix` found in it.
        scale, scope, rank: see :func:`loraloom.intruders.reduce.mitigate_matrix`.
    """
    term, *anchors = layer.terms()
    device = term.A.device
    extra_A, extra_B = (x.to(device) for x in correction(found, scale, scope))
    if not len(extra_A) and rank in ("exact", "keep", layer.rank):
        return layer.copied(), layer.rank, 0.0
    magnitude = layer.magnitude()
    A, B = fold([term])
    new_A, new_B, error = reduced(A, B, extra_A, extra_B, rank, min(found.shape))
    if found.row_scale is not None and magnitude is not None:
        A_all, B_all = fold(anchors) if anchors else (A[:0], B[:, :0])
        whole = torch.cat([new_A, A_all.to(new_A)]), torch.cat([new_B, B_all.to(new_B)], 1)
        magnitude = found.row_scale.to(device) * row_norms(layer.weight().float(), *whole)
    total = layer.rank + len(extra_A)
    if rank == "exact" and len(new_A) == total and (parts := layer.appended(extra_A, extra_B, magnitude)) is not None:
        return parts, total, error
    new_rank = rank if isinstance(rank, int) else max(len(new_A), layer.rank if anchors else 0)
    return layer.rewritten(new_A, new_B, magnitude, new_rank), new_rank, error


def patterns(layers: Sequence[AdaptedLayer], ranks: dict[str, int], use_rslora: bool) -> dict[str, dict[str, Any]]:
    """rank_pattern and alpha_pattern of copies with these ranks and the same scales."""
    # Longest first: a pattern also matches names that end in it.
    layers = sorted(layers, key=lambda layer: len(layer.name), reverse=True)
    alphas = {layer.name: alpha_of(layer.scaling, ranks[layer.name], use_rslora) for layer in layers}
    return {"rank_pattern": {layer.name: ranks[layer.name] for layer in layers}, "alpha_pattern": alphas}
