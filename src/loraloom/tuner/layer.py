"""What every adapted layer has in common: the parts and their parameters, the delta, merging and unmerging.

A subclass says how its base weight looks as a matrix W (out, in) and how the low-rank path is applied to its input.
Everything that changes weights is derived from the terms of :meth:`LoomLayer.terms`.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from loraloom.tuner import init as initialization
from loraloom.tuner.composition import ComposedLayer, Factor
from loraloom.tuner.config import LoomConfig
from loraloom.tuner.peft_internals import check_adapters_to_merge, gather_params_ctx
from loraloom.tuner.quantized import restore, snapshot
from loraloom.tuner.row_norm import RowNormCache
from loraloom.update.composition import LayerComposition
from loraloom.update.terms import Term, scaling
from loraloom.update.update import Update

BASE = "__base__"  # PEFT's name for "no adapter" in adapter_names


class LoomLayer(nn.Module, ComposedLayer):
    """Base of the adapted layers; the adapter's tensors are ``<attribute>.<adapter>.weight``."""

    # The names decide how others treat the tensors: "lora_A" and "lora_B" are what optimizers group by, and TRL casts
    # all but "lora_magnitude_vector" to bf16 on a quantised base, which gates and magnitudes must not be.
    adapter_layer_names = (
        "loom_lora_A",
        "loom_lora_B",
        "loom_mixer",
        "loom_gate_lora_magnitude_vector",
        "loom_lora_magnitude_vector",
        "loom_logits_lora_magnitude_vector",
    )
    other_param_names = (
        *("loom_anchor_A", "loom_anchor_B", "loom_member_bias", "compositions"),
        *("r", "lora_alpha", "scaling", "dropout", "row_norms"),
    )
    base_layer: Any  # of many kinds, some from packages that need not be installed

    def __init__(self, base_layer: nn.Module, quantization_backend: Any = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend
        self.loom_lora_A = nn.ModuleDict()
        self.loom_lora_B = nn.ModuleDict()
        self.loom_mixer = nn.ModuleDict()
        self.loom_gate_lora_magnitude_vector = nn.ModuleDict()
        self.loom_lora_magnitude_vector = nn.ModuleDict()
        # What PiSSA and OLoRA start from, frozen and subtracted, so that the base weight itself never changes.
        self.loom_anchor_A = nn.ModuleDict()
        self.loom_anchor_B = nn.ModuleDict()
        # Of compositions: what the members' weights come from (N,), and what members add to the bias (N, out), frozen.
        self.loom_logits_lora_magnitude_vector = nn.ModuleDict()
        self.loom_member_bias = nn.ModuleDict()
        self.compositions: dict[str, LayerComposition] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.row_norms: dict[str, RowNormCache] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: Any = None  # the base weight as it was before merging
        self._unmerged_bias: Tensor | None = None

    # What a subclass says of itself

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes in which A and B are stored."""
        raise NotImplementedError

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The base weight as W (out, in)."""
        raise NotImplementedError

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`as_matrix`."""
        raise NotImplementedError

    def adapt(self, base_out: Tensor, x: Tensor, adapters: list[str]) -> Tensor:
        """The output with the given adapters (at least one), from that of the base layer."""
        raise NotImplementedError

    # Adapters

    def update_layer(self, adapter_name: str, config: LoomConfig, r: int, lora_alpha: int) -> None:
        """Adds an adapter, or replaces the one of that name."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if dtype is None or not dtype.is_floating_point:
            dtype = torch.float32
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in getattr(self, attribute):  # parts that the new configuration may not have
                del getattr(self, attribute)[adapter_name]
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = scaling(r, lora_alpha, config.use_rslora)
        self.dropout[adapter_name] = config.lora_dropout
        shape_A, shape_B = self.factor_shapes(r)
        self.loom_lora_A[adapter_name] = Factor(torch.empty(shape_A, dtype=dtype))
        self.loom_lora_B[adapter_name] = Factor(torch.empty(shape_B, dtype=dtype))
        if config.use_mixer:
            self.loom_mixer[adapter_name] = Factor(torch.empty(r, r, dtype=dtype))
        if config.use_gate:
            self.loom_gate_lora_magnitude_vector[adapter_name] = Factor(torch.ones(1))
        if config.init_lora_weights in ("pissa", "olora"):
            self.loom_anchor_A[adapter_name] = Factor(torch.empty(shape_A, dtype=dtype), trainable=False)
            self.loom_anchor_B[adapter_name] = Factor(torch.empty(shape_B, dtype=dtype), trainable=False)
        if config.use_dora:
            self.loom_lora_magnitude_vector[adapter_name] = Factor(torch.empty(shape_B[0]))
            self.row_norms[adapter_name] = RowNormCache()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if not self.factor("loom_lora_A", adapter_name).is_meta:  # on meta, the values come from a checkpoint
            with gather_params_ctx(self.get_base_layer().parameters()), torch.no_grad():
                self._initialize(adapter_name, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _initialize(self, adapter_name: str, config: LoomConfig) -> None:
        A, B = self.factor("loom_lora_A", adapter_name), self.factor("loom_lora_B", adapter_name)
        if config.composition is not None:
            A.zero_()
            B.zero_()
            return
        initialization.init_factors(
            A, B, config.init_lora_weights, lookup=isinstance(self.get_base_layer(), nn.Embedding)
        )
        if adapter_name in self.loom_mixer:
            initialization.init_mixer(self.factor("loom_mixer", adapter_name), config)
        if adapter_name in self.loom_anchor_A:
            W, kind = self._unmerged_matrix(), config.init_lora_weights
            A0, B0 = initialization.from_base(W, self.r[adapter_name], self.scaling[adapter_name], kind)
            for parameter, value in ((A, A0), (B, B0)):
                parameter.copy_(value.reshape(parameter.shape))
            self.factor("loom_anchor_A", adapter_name).copy_(A)
            self.factor("loom_anchor_B", adapter_name).copy_(B)
        magnitude = self.magnitude(adapter_name)
        if magnitude is not None:
            magnitude.copy_(self.update(adapter_name).row_norm(self._unmerged_matrix()))

    def factor(self, attribute: str, adapter_name: str) -> Tensor:
        """One of the adapter's tensors, as it is stored."""
        factor: Any = self.optional_factor(attribute, adapter_name)
        return factor

    def optional_factor(self, attribute: str, adapter_name: str) -> Tensor | None:
        """The same, or None where the adapter does not have that part."""
        # In every forward pass, so by way of nn.Module's dictionaries: its attribute look-up costs a microsecond each.
        module = self._modules[attribute]._modules.get(adapter_name)  # type: ignore[union-attr]
        weight: Any = None if module is None else module._parameters["weight"]
        return module() if weight is not None and weight.is_meta else weight  # type: ignore[misc]

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base layer's dtype, which would round gates, magnitudes and whatever a
        # checkpoint loaded with low_cpu_mem_usage holds. Here an adapter has its dtype from the start.
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if device is None:
            return
        for name in (*self.adapter_layer_names, "loom_anchor_A", "loom_anchor_B", "loom_member_bias"):
            factors = getattr(self, name)
            if adapter_name in factors and not factors[adapter_name].weight.is_meta:
                factors[adapter_name].to(device)

    def terms(self, adapter_name: str) -> list[Term]:
        """What the adapter's update is the sum of, as matrices, with live parameters."""

        if adapter_name in self.compositions:
            logits = self.factor("loom_logits_lora_magnitude_vector", adapter_name)
            gate: Tensor | None = self.compositions[adapter_name].gate(logits)
        else:
            gate = self.optional_factor("loom_gate_lora_magnitude_vector", adapter_name)
        mixer = self.optional_factor("loom_mixer", adapter_name)
        scaling = self.scaling[adapter_name]

        def matrix(attribute: str) -> Tensor:
            factor = self.factor(attribute, adapter_name)
            return factor if factor.dim() == 2 else factor.flatten(1)

        terms = [Term(matrix("loom_lora_A"), matrix("loom_lora_B"), mixer, gate, scaling)]
        if adapter_name in self._modules["loom_anchor_A"]._modules:  # type: ignore[union-attr]
            terms.append(Term(matrix("loom_anchor_A"), matrix("loom_anchor_B"), None, gate, -scaling))
        return terms

    def magnitude(self, adapter_name: str) -> Tensor | None:
        """DoRA's m (out,), or None for an adapter without one."""
        return self.optional_factor("loom_lora_magnitude_vector", adapter_name)

    def update(self, adapter_name: str) -> Update:
        """What the adapter does to this layer, with live parameters."""
        return Update(self.terms(adapter_name), self.magnitude(adapter_name), self.bias_delta(adapter_name))

    def row_norm(self, adapter_name: str) -> Tensor:
        """``rownorm(W + D)`` (out,) of a DoRA adapter, from its cache when nothing has changed."""
        parameter = self.get_base_layer().weight
        return self.row_norms[adapter_name](parameter, self.base_matrix, self.terms(adapter_name))

    def get_base_layer(self) -> Any:
        """The wrapped layer."""
        return super().get_base_layer()

    def base_matrix(self) -> Tensor:
        """The base weight W (out, in) as it is in the layer now, dequantised if need be."""
        return self.as_matrix(self.get_base_weight())

    # Deltas

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
        return self.as_weight(change).to(self.factor("loom_lora_A", adapter_name).dtype)

    # Merging

    def _unmerged_matrix(self) -> Tensor:
        if self._unmerged is None:
            return self.base_matrix()
        if self.quantization_backend is None:
            return self.as_matrix(self._unmerged.to(self.get_base_layer().weight.device))
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
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.loom_lora_A]
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
        self._merge_bias([*self.merged_adapters, *names])
        weight = self.get_base_layer().weight
        if backend is None:
            if self._unmerged is None:
                self._unmerged = weight.detach().to("cpu", copy=True)
            weight.copy_(merged)
        else:
            if self._unmerged is None:
                self._unmerged = snapshot(self.get_base_layer())
            self.set_base_weight(merged)
        self.merged_adapters.extend(names)
        self._base_changed()

    @torch.no_grad()
    def unmerge(self) -> None:
        """Gives the base weight back as it was before :meth:`merge`, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self.quantization_backend is None:
            self.get_base_layer().weight.copy_(self._unmerged)
        else:
            self.base_layer = restore(self._unmerged)
        if self._unmerged_bias is not None:
            self.get_base_layer().bias.copy_(self._unmerged_bias)
        self._unmerged = self._unmerged_bias = None
        self.merged_adapters.clear()
        self._base_changed()

    def _merge_bias(self, adapters: list[str]) -> None:
        deltas = [delta for delta in map(self.bias_delta, adapters) if delta is not None]
        if not deltas:
            return
        bias = self.get_base_layer().bias
        if bias is None:
            raise ValueError(
                "The adapter adds to the bias of a layer that has none, so it cannot be merged: use it as it is."
            )
        if self._unmerged_bias is None:
            self._unmerged_bias = bias.detach().clone()
        bias.copy_(self._unmerged_bias + sum(deltas))

    def _base_changed(self) -> None:
        for cache in self.row_norms.values():
            cache.clear()

    # Forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output with the active adapters, or with ``adapter_names`` one per sample."""
        adapter_names = kwargs.pop("adapter_names", None) if kwargs else None
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, adapter_names, *args, **kwargs)
        present = self._modules["loom_lora_A"]._modules  # type: ignore[union-attr]
        adapters = [name for name in self.active_adapters if name in present]
        if self.merged_adapters or not adapters:
            return self.base_layer(x, *args, **kwargs)
        return self.adapted_forward(x, adapters, *args, **kwargs)

    def adapted_forward(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The forward pass with the given adapters, which are unmerged."""
        return self.adapt(self.base_layer(x, *args, **kwargs), x, adapters)

    def _mixed_batch_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} entries for {len(x)} samples: give one name per sample, "
                f"{BASE!r} for none."
            )
        if self.merged:
            raise ValueError("adapter_names cannot be used while adapters are merged: call unmerge_adapter() first.")
        result = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name in self.loom_lora_A:
                index = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
                result = result.index_copy(0, index, self.adapt(result[index], x[index], [name]))
        return result

    def __repr__(self) -> str:
        return "loom." + super().__repr__()
