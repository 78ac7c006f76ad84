"""An adapter: low-rank updates of some modules of a base model, wherever it lives.

On disk it is a :class:`loraloom.adapter.stored.StoredAdapter`, in a model a :class:`loraloom.adapter.live.LiveAdapter`;
:func:`loraloom.adapter.open.open_adapter` gives either. Everything is in the orientation of the maths, A (r, in),
B (out, r), W (out, in): kernels of convolutions are flattened into `in`, and the table of an embedding is W^T.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from loraloom.adapter.experts import Expert
from loraloom.errors import InputError
from loraloom.update.composition import LayerComposition
from loraloom.update.terms import Term, fold
from loraloom.update.update import Update

Parts = dict[str, Tensor]
"""Name of a part in :mod:`loraloom.update.parts` -> its tensor as it is stored."""


class AdaptedModule(ABC):
    """One module with an update. Nothing here changes it.

    Attributes:
        name: of the module, in the base model.
        scaling: s, without the gate.
        composition: which rows of A are whose, for a composition.
        expert: which matrix of a parameter it is, for an expert of a mixture.
    """

    name: str
    scaling: float
    composition: LayerComposition | None = None
    expert: Expert | None = None

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Part -> shape of its tensor, without reading it."""

    @abstractmethod
    def unchecked_parts(self) -> Parts:
        """The parts that the update is made of, as they are stored, whatever they hold."""

    @property
    @abstractmethod
    def where(self) -> str:
        """How messages name it."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The base weight W (out, in), dequantised if need be.

        Raises:
            InputError: no base model is known, or it does not have the module.
        """

    @property
    @abstractmethod
    def embedding(self) -> bool:
        """Whether the module is a table of vectors."""

    @property
    def rank(self) -> int:
        """r: the rows of A."""
        return self.shapes()["A"][0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the update as a matrix."""
        shapes = self.shapes()
        return shapes["B"][0], math.prod(shapes["A"][1:])

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel of a convolution, () of anything else."""
        return self.shapes()["A"][2:]

    def parts(self) -> Parts:
        """The parts that the update is made of, as they are stored.

        Raises:
            InputError: a tensor holds NaN or infinity, or the product of the factors does not fit into float32
                ("not-finite").
        """
        parts = self.unchecked_parts()
        if broken := [part for part, tensor in parts.items() if not tensor.isfinite().all()]:
            raise InputError(
                f"{self.where}: {broken[0]} holds NaN or infinity (see loraloom inspect)", code="not-finite"
            )
        A, B = (torch.linalg.vector_norm(parts[part], dtype=torch.float64) for part in ("A", "B"))
        if abs(self.scaling) * A * B > torch.finfo(torch.float32).max:
            raise InputError(f"{self.where}: the product of its factors overflows", code="not-finite")
        return parts

    def terms(self) -> list[Term]:
        """What the update is the sum of, in the dtype that it is stored in; the first one is the trained one."""
        parts = self.parts()
        gate = self._members().gate(parts["logits"]) if "logits" in parts else parts.get("gate")
        terms = [Term(flat(parts["A"]), flat(parts["B"]), parts.get("mixer"), gate, self.scaling)]
        if "anchor_A" in parts:
            terms.append(Term(flat(parts["anchor_A"]), flat(parts["anchor_B"]), None, gate, -self.scaling))
        return terms

    def magnitude(self) -> Tensor | None:
        """DoRA's m (out,), or None."""
        magnitude = self.parts().get("magnitude")
        return None if magnitude is None else magnitude.flatten()  # PEFT stores (1, out, 1, 1) for convolutions

    def bias(self) -> Tensor | None:
        """What the update adds to the layer's bias (out,), scaled: PEFT's lora_bias, or that of a composition."""
        parts = self.parts()
        if "member_bias" in parts:
            biases = parts["member_bias"]
            return self._members().weights(parts["logits"]).to(biases.dtype) @ biases
        return parts["bias"] * self.scaling if "bias" in parts else None

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of the whole update, with scale 1."""
        return fold(self.terms())

    def update(self) -> Update:
        """What the adapter does to the module."""
        return Update(self.terms(), self.magnitude(), self.bias())

    @torch.no_grad()
    def adapted_weight(self) -> Tensor:
        """W' (out, in) in at least float32."""
        return self.update().adapted_weight(self.weight())

    def _members(self) -> LayerComposition:
        assert self.composition is not None
        return self.composition


class Adapter(ABC):
    """An adapter: its modules and what its configuration says.

    Attributes:
        where: how messages name it: its folder, or "adapter 'x' of the model".
        kind: its peft_type, "LORA" or "LOOM".
        config: what adapter_config.json holds, or would.
        modules: the adapted modules by their names in the base model, in the order of the file or of the model.
        sha256: of the weights file, in hexadecimal; "" in a model.
    """

    where: str
    kind: str
    config: dict[str, Any]
    modules: Mapping[str, AdaptedModule]
    sha256: str

    @property
    @abstractmethod
    def others(self) -> list[str]:
        """The names of the tensors that belong to no update: of modules_to_save, biases and tokens."""

    @abstractmethod
    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """These tensors, one after the other."""


def flat(factor: Tensor) -> Tensor:
    """A stored factor as a matrix: kernels of convolutions are flattened."""
    return factor if factor.dim() == 2 else factor.flatten(1)
