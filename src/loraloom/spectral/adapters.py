"""An adapter of a PEFT model, layer by layer: what it is made of, and how a changed copy of it is stored.

One class for our layers and one for PEFT's LoRA layers, of every kind: linear, Conv1D, embedding, convolution, and
quantised ones. A copy has the parts of its original. Its rank may be another:

    appended    A' = [A; a],  B' = [B, b / (g s)],  M' = diag(M, I)     the update plus b a, everything else kept
    rewritten   A', B' / s,  M' = I,  g' = 1                            any other factors; anchors B0' = g B0

with rows and columns of zeros to fill the rank, and the scale s as it was, whatever alpha that takes.
"""

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from loraloom.functional import Term, fold
from loraloom.spectral.matrix import row_norms
from loraloom.tuner.layer import LoomLayer
from loraloom.tuner.quantized import prevent_cpu_repacking
from loraloom.tuner.registration import BaseTunerLayer, resolve_quantization_backend

Parts = dict[str, Tensor]  # attribute of the layer -> tensor


class AdaptedLayer:
    """One layer with an adapter. Nothing here changes the layer but :meth:`store`."""

    A_name: str
    B_name: str

    def __init__(self, name: str, layer: Any, adapter: str) -> None:
        self.name, self.layer, self.adapter = name, layer, adapter

    @property
    def rank(self) -> int:
        return self.layer.r[self.adapter]

    @property
    def quantized(self) -> bool:
        return self.layer.quantization_backend is not None

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

    def store(self, adapter: str, parts: Parts) -> None:
        """Gives another adapter of this layer, of the same make, these tensors."""
        raise NotImplementedError

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the whole update, with scale 1."""
        return fold(self.terms())

    @torch.no_grad()
    def adapted_weight(self) -> Tensor:
        """W' (out, in) in float32."""
        W, (A, B), m = self.weight().float(), self.factors(), self.magnitude()
        return W + B @ A if m is None else (m.float() / row_norms(W, A, B))[:, None] * (W + B @ A)

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
        scale = self.layer.scaling[self.adapter] * gate
        old_A, old_B = (_flat(parts[name]) for name in (self.A_name, self.B_name))
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
        parts[self.B_name] = self._like(self.B_name, B / self.layer.scaling[self.adapter])
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
        A, B = _flat(parts["loom_anchor_A"]), _flat(parts["loom_anchor_B"]) * gate
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


class _Loom(AdaptedLayer):
    A_name, B_name = "loom_lora_A", "loom_lora_B"

    def weight(self) -> Tensor:
        return self.layer.base_matrix().detach()

    def parts(self) -> Parts:
        names = (*self.layer.adapter_layer_names, "loom_anchor_A", "loom_anchor_B")
        found = ((name, self.layer.optional_factor(name, self.adapter)) for name in names)
        return {name: part for name, part in found if part is not None}

    def terms(self) -> list[Term]:
        return self.layer.terms(self.adapter)

    def magnitude(self) -> Tensor | None:
        m = self.layer.magnitude(self.adapter)
        return None if m is None else m.detach()

    def store(self, adapter: str, parts: Parts) -> None:
        for name, value in parts.items():
            factor = getattr(self.layer, name)[adapter]
            factor.weight = nn.Parameter(value, requires_grad=factor.weight.requires_grad)
            factor.dtype_is_settled = True


class _Lora(AdaptedLayer):
    def __init__(self, name: str, layer: Any, adapter: str) -> None:
        super().__init__(name, layer, adapter)
        self.embedding = adapter in layer.lora_embedding_A
        self.A_name, self.B_name = ("lora_embedding_A", "lora_embedding_B") if self.embedding else ("lora_A", "lora_B")

    @property
    def quantized(self) -> bool:
        return resolve_quantization_backend(self.layer.get_base_layer()) is not None

    def weight(self) -> Tensor:
        base = self.layer.get_base_layer()
        backend = resolve_quantization_backend(base)
        weight = base.weight.detach() if backend is None else backend.get_base_weight(base).detach()
        if self.embedding or (backend is None and getattr(self.layer, "fan_in_fan_out", False)):
            return weight.T
        return weight.flatten(1)

    def parts(self) -> Parts:
        parts = {name: _weight(getattr(self.layer, name)[self.adapter]) for name in (self.A_name, self.B_name)}
        if not self.embedding and self.layer.lora_B[self.adapter].bias is not None:
            parts["lora_B.bias"] = self.layer.lora_B[self.adapter].bias
        if self.adapter in self.layer.lora_magnitude_vector:
            parts["lora_magnitude_vector"] = self.layer.lora_magnitude_vector[self.adapter].weight
        return parts

    def terms(self) -> list[Term]:
        parts = self.parts()
        A, B = _flat(parts[self.A_name]), _flat(parts[self.B_name])
        return [Term(A, B, scaling=self.layer.scaling[self.adapter])]

    def magnitude(self) -> Tensor | None:
        if self.adapter not in self.layer.lora_magnitude_vector:
            return None
        return self.layer.lora_magnitude_vector[self.adapter].weight.detach().flatten()

    def store(self, adapter: str, parts: Parts) -> None:
        for name, value in parts.items():
            attribute, _, leaf = name.partition(".")
            holder = getattr(self.layer, attribute)
            if (self.embedding and attribute == self.A_name) or (self.embedding and attribute == self.B_name):
                holder[adapter] = nn.Parameter(value, requires_grad=holder[adapter].requires_grad)
            else:
                leaf = leaf or "weight"
                old = getattr(holder[adapter], leaf)
                setattr(holder[adapter], leaf, nn.Parameter(value, requires_grad=old.requires_grad))


def _weight(holder: Any) -> Tensor:
    return holder if isinstance(holder, Tensor) else holder.weight


def _flat(factor: Tensor) -> Tensor:
    return factor if factor.dim() == 2 else factor.flatten(1)


def adapted_layers(model: PeftModel, adapter: str) -> Iterator[AdaptedLayer]:
    """The layers that have this adapter, with their names in the base model.

    Raises:
        ValueError: the model or the adapter is not of a kind that can be analysed, or adapters are merged.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"A {type(model).__name__} is not a PeftModel: load the adapter with PeftModel.from_pretrained."
        )
    if adapter not in model.peft_config:
        raise ValueError(
            f"adapter={adapter!r} is not in the model, which has {', '.join(map(repr, model.peft_config))}."
        )
    kind = str(getattr(model.peft_config[adapter].peft_type, "value", model.peft_config[adapter].peft_type))
    if kind not in ("LORA", "LOOM"):
        raise ValueError(f"adapter={adapter!r} is of type {kind!s}: intruders are defined here for LORA and LOOM.")
    prevent_cpu_repacking(model)
    base: Any = model.base_model
    for name, layer in base.model.named_modules():
        if not isinstance(layer, BaseTunerLayer) or not _has(layer, adapter):
            continue
        if layer.merged:
            raise ValueError(f"{name} has merged adapters: call unmerge_adapter() first.")
        if isinstance(layer, LoomLayer):
            yield _Loom(name, layer, adapter)
        else:
            _check_lora(name, layer, adapter)
            yield _Lora(name, layer, adapter)


def _has(layer: Any, adapter: str) -> bool:
    if isinstance(layer, LoomLayer):
        return adapter in layer.loom_lora_A
    return isinstance(layer, lora.LoraLayer) and (adapter in layer.lora_A or adapter in layer.lora_embedding_A)


def _check_lora(name: str, layer: Any, adapter: str) -> None:
    variant = layer.lora_variant.get(adapter)
    if isinstance(layer, MultiheadAttention | ParamWrapper):
        what = type(layer).__name__
    elif variant is not None and adapter not in layer.lora_magnitude_vector:
        what = type(variant).__name__
    else:
        return
    raise ValueError(f"{name}: a {what} of PEFT is not W + s B A, and has no intruders that are defined here.")
