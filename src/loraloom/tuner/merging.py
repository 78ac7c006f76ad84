"""Merging adapters into the base weight, and giving the weight back bit for bit."""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from loraloom.tuner.composition import ComposedLayer
from loraloom.tuner.computed_weight import tensors_behind, write_weight
from loraloom.tuner.peft_internals import check_adapters_to_merge
from loraloom.tuner.quantized import restore, snapshot
from loraloom.tuner.row_norm import RowNormCache
from loraloom.update.one_pass import MakeNorm


class MergingLayer(ComposedLayer):
    """The part of a loom layer that merges. Merging in memory adds what :meth:`get_delta_weight` gives."""

    base_layer: Any
    quantization_backend: Any
    row_norms: dict[str, RowNormCache]
    merged_adapters: list[str]
    update: Any
    terms: Any
    as_matrix: Any
    as_weight: Any
    base_matrix: Any
    has_adapter: Any
    weight_name = "weight"
    """Name of the adapted parameter in the base layer."""
    _unmerged: Any = None
    """The base weight as it was before merging."""
    _unmerged_bias: Tensor | None = None
    _unmerged_tensors: list[Tensor] | None = None
    """What that weight is made of: itself, or what torch computes it from."""

    def _adapted_matrix(self, adapters: Iterable[str], W: Tensor) -> Tensor:
        """W with the adapters applied, in at least float32; each refers to the W given, so their order is free."""
        first, *others = adapters
        total = self.update(first).adapted_weight(W)
        for name in others:
            total = total + self.update(name).change(W)
        return total

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What merging this adapter alone adds to the base weight, in the base weight's shape.

        Returns:
            A tensor in the adapter's dtype; for DoRA it includes the rescaling of W.
        """
        change = self.update(adapter_name).change(self._unmerged_matrix())
        return self.as_weight(change).to(self.factor("A", adapter_name).dtype)

    def _unmerged_matrix(self) -> Tensor:
        if self._unmerged is None:
            return self.base_matrix()
        if self.quantization_backend is None:
            return self.as_matrix(self._unmerged.to(self.get_base_weight().device))
        merged, self.base_layer = snapshot(self.get_base_layer()), restore(self._unmerged)
        matrix = self.base_matrix()
        self.base_layer = restore(merged)
        return matrix

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges adapters into the base weight, which :meth:`unmerge` gives back bit for bit.

        For that the weight before merging is kept: a copy (in host memory) of a floating-point weight, the
        quantised weight itself otherwise. Merging into a quantised weight quantises the result anew.

        Args:
            safe_merge: check the result for NaN and infinity before anything is changed.
            adapter_names: the adapters; None merges the active ones.

        Raises:
            ValueError: with ``safe_merge``, the result is not finite.
            TypeError: the quantisation backend cannot merge.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        if not names:
            return
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise TypeError(
                f"Merging into a base quantised by {backend.backend_name} is not supported: load it in bf16."
            )
        merged = self._adapted_matrix([*self.merged_adapters, *names], self._unmerged_matrix())
        merged = self.as_weight(merged).to(self.get_base_weight().dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"Merging {', '.join(names)} gives NaN or infinity, so nothing was changed.")
        self._check_bias(names)
        if backend is None:
            base = self.get_base_layer()
            unmerged, behind = self._unmerged, self._unmerged_tensors
            if unmerged is None:
                unmerged = getattr(base, self.weight_name).detach().to("cpu", copy=True)
                plain = self.weight_name in base._parameters
                behind = [unmerged] if plain else [t.clone() for t in tensors_behind(base, self.weight_name)]
            write_weight(base, merged, self.weight_name)
            self._unmerged, self._unmerged_tensors = unmerged, behind
        else:
            if self._unmerged is None:
                self._unmerged = snapshot(self.get_base_layer())
            self.set_base_weight(merged)
        self._merge_bias([*self.merged_adapters, *names])
        self.merged_adapters.extend(names)
        self._base_changed()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives the base weight back as it was before :meth:`merge`, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self.quantization_backend is None:
            tensors = tensors_behind(self.get_base_layer(), self.weight_name)
            for tensor, value in zip(tensors, self._unmerged_tensors or (), strict=True):
                tensor.copy_(value)
        else:
            self.base_layer = restore(self._unmerged)
        if self._unmerged_bias is not None:
            self.get_base_layer().bias.copy_(self._unmerged_bias)
        self._unmerged = self._unmerged_bias = self._unmerged_tensors = None
        self.merged_adapters.clear()
        self._base_changed()

    def _check_bias(self, adapters: list[str]) -> None:
        if getattr(self.get_base_layer(), "bias", None) is None and any(
            self.bias_delta(name) is not None for name in adapters
        ):
            raise ValueError(
                "The adapter adds to the bias of a layer that has none, so it cannot be merged: use it as it is."
            )

    def _merge_bias(self, adapters: list[str]) -> None:
        deltas = [delta for delta in map(self.bias_delta, adapters) if delta is not None]
        if not deltas:
            return
        bias = self.get_base_layer().bias
        if self._unmerged_bias is None:
            self._unmerged_bias = bias.detach().clone()
        bias.copy_(self._unmerged_bias + sum(deltas))

    def _base_changed(self) -> None:
        for cache in self.row_norms.values():
            cache.clear()

    def row_norm(self, adapter_name: str) -> Tensor:
        """``rownorm(W + D)`` (out,) of a DoRA adapter, from its cache when nothing has changed."""
        norm = self.lazy_row_norm(adapter_name)
        return norm if isinstance(norm, Tensor) else norm(None)

    def lazy_row_norm(self, adapter_name: str) -> Tensor | MakeNorm:
        """The same, or a function that computes it, see :meth:`RowNormCache.lazily`."""
        # Where the weight is no parameter (torch's parametrizations), each access makes another tensor.
        parameter = self.get_base_layer()._parameters.get("weight")
        return self.row_norms[adapter_name].lazily(parameter, self.base_matrix, self.terms(adapter_name))
