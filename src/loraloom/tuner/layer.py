"""What every adapted layer has in common: the parts and their parameters, and the forward pass.

A subclass says how its base weight looks as a matrix W (out, in) and how the low-rank path is applied to its input.
Everything that changes weights is derived from :meth:`LoomLayer.update`, everything that names tensors from the table
`loraloom.update.parts`.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from loraloom.tuner import init as initialization
from loraloom.tuner.composition import Factor
from loraloom.tuner.config import LoomConfig
from loraloom.tuner.merging import MergingLayer
from loraloom.tuner.mixed_batch import samples_of
from loraloom.tuner.peft_internals import gather_params_ctx
from loraloom.tuner.row_norm import RowNormCache
from loraloom.tuner.scaled import ScaledLayer
from loraloom.update.composition import LayerComposition
from loraloom.update.parts import LOOM, PARTS, Name, Part, Shape
from loraloom.update.rescale import rescale
from loraloom.update.terms import Term, scaling, stack
from loraloom.update.update import Update, row_scale

BASE = "__base__"  # PEFT's name for "no adapter" in adapter_names


class LoomLayer(nn.Module, MergingLayer, ScaledLayer):
    """Base of the adapted layers; the adapter's tensors are ``<state key>.<adapter>.weight``."""

    adapter_layer_names = tuple(part.loom for part in PARTS if part.loom and part.trainable)
    other_param_names = (
        *(part.loom for part in PARTS if part.loom and not part.trainable),
        *("compositions", "r", "lora_alpha", "scaling", "unscaled", "dropout", "row_norms"),
    )
    base_layer: Any  # of many kinds, some from packages that need not be installed
    in_features: int
    out_features: int
    channel_dim = -1
    """The output's dimension of size out_features."""
    weight_is_read = False
    """Whether the model reads the weight besides calling the layer, see `loraloom.tuner.weight_reads`."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoomConfig,
        r: int,
        lora_alpha: float,
        quantization_backend: Any = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend
        for key in LOOM.values():
            self.add_module(key, nn.ModuleDict())
        self.compositions: dict[str, LayerComposition] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.unscaled: dict[str, float] = {}
        self.dropout: dict[str, float] = {}
        self.row_norms: dict[str, RowNormCache] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.read_base(config)
        self.update_layer(adapter_name, config, r, lora_alpha)

    # What a subclass says of itself

    def read_base(self, config: LoomConfig) -> None:
        """Sets in_features, out_features and what else follows from the base layer.

        Raises:
            ValueError: the base layer cannot be adapted.
        """
        raise NotImplementedError

    def factor_shapes(self, r: int) -> tuple[Shape, Shape]:
        """Shapes in which A and B are stored."""
        return (r, self.in_features), (self.out_features, r)

    def part_shape(self, part: Part, r: int) -> Shape:
        """Shape in which a part of rank r is stored."""
        return cast(Any, part.shape)(*self.factor_shapes(r))

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The base weight as W (out, in)."""
        raise NotImplementedError

    def as_weight(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`as_matrix`."""
        raise NotImplementedError

    def low_rank(self, x: Tensor, term: Term, dropout: float) -> Tensor:
        """The update applied to the layer's input: what the output is without W and the bias."""
        raise NotImplementedError

    # Adapters

    def update_layer(self, adapter_name: str, config: LoomConfig, r: int, lora_alpha: float) -> None:
        """Adds an adapter, or replaces the one of that name."""
        self.remove_adapter(adapter_name)  # with parts that the new configuration may not have
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if dtype is None or not dtype.is_floating_point:
            dtype = torch.float32
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = self.unscaled[adapter_name] = scaling(r, lora_alpha, config.use_rslora)
        self.dropout[adapter_name] = config.lora_dropout
        for part in PARTS:
            if part.shape is not None and part.present(config):
                empty = torch.empty(self.part_shape(part, r), dtype=torch.float32 if part.float32 else dtype)
                self.holder(part.name)[adapter_name] = Factor(empty, part.trainable)
        if config.use_dora:
            self.row_norms[adapter_name] = RowNormCache()
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if not self.factor("A", adapter_name).is_meta:  # on meta, the values come from a checkpoint
            with gather_params_ctx(self.get_base_layer().parameters()), torch.no_grad():
                self._initialize(adapter_name, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def remove_adapter(self, adapter_name: str) -> None:
        """Takes an adapter's parts off the layer. (``delete_adapter`` would activate another one in its place.)"""
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            if adapter_name in getattr(self, attribute):
                del getattr(self, attribute)[adapter_name]

    def _initialize(self, adapter_name: str, config: LoomConfig) -> None:
        def part(name: Name) -> Tensor | None:
            return self.optional_factor(name, adapter_name)

        A, B = self.factor("A", adapter_name), self.factor("B", adapter_name)
        if config.composition is not None:
            A.zero_()
            B.zero_()
            return
        initialization.init_factors(
            A, B, config.init_lora_weights, lookup=isinstance(self.get_base_layer(), nn.Embedding)
        )
        if (mixer := part("mixer")) is not None:
            initialization.init_mixer(mixer, config)
        if (gate := part("gate")) is not None:
            gate.fill_(1)
        if (anchor_A := part("anchor_A")) is not None:
            W, kind = self._unmerged_matrix(), config.init_lora_weights
            A0, B0 = initialization.from_base(W, self.r[adapter_name], self.scaling[adapter_name], kind)
            for parameter, value in ((A, A0), (B, B0)):
                parameter.copy_(value.reshape(parameter.shape))
            anchor_A.copy_(A)
            self.factor("anchor_B", adapter_name).copy_(B)
        if (magnitude := part("magnitude")) is not None:
            magnitude.copy_(self.update(adapter_name).row_norm(self._unmerged_matrix()))

    def has_adapter(self, adapter_name: str) -> bool:
        """Whether the layer carries the adapter."""
        # In every forward pass, so by way of nn.Module's dictionaries: its attribute look-up costs a microsecond each.
        return adapter_name in self._modules[LOOM["A"]]._modules  # type: ignore[union-attr]

    def holder(self, name: Name) -> nn.ModuleDict:
        """Where the layer keeps one part of its adapters: adapter name -> Factor."""
        return cast(nn.ModuleDict, self._modules[LOOM[name]])

    def factor(self, name: Name, adapter_name: str) -> Tensor:
        """One of the adapter's tensors as it is stored, by its name in `loraloom.update.parts`."""
        factor: Any = self.optional_factor(name, adapter_name)
        return factor

    def optional_factor(self, name: Name, adapter_name: str) -> Tensor | None:
        """The same, or None where the adapter does not have that part."""
        module = self._modules[LOOM[name]]._modules.get(adapter_name)  # type: ignore[union-attr]
        weight: Any = None if module is None else module._parameters["weight"]
        return module() if weight is not None and weight.is_meta else weight  # type: ignore[misc]

    def parts(self, adapter_name: str) -> dict[Name, Tensor]:
        """All of the adapter's tensors as they are stored, by their names in `loraloom.update.parts`."""
        found = ((part.name, self.optional_factor(part.name, adapter_name)) for part in PARTS if part.loom)
        return {name: tensor for name, tensor in found if tensor is not None}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version also casts to the base layer's dtype, which would round gates, magnitudes and whatever a
        # checkpoint loaded with low_cpu_mem_usage holds. Here an adapter has its dtype from the start.
        device = device or self._get_base_layer_device_and_dtype(self.get_base_layer())[0]
        if device is None:
            return
        for key in LOOM.values():
            factors = getattr(self, key)
            if adapter_name in factors and not factors[adapter_name].weight.is_meta:
                factors[adapter_name].to(device)

    def terms(self, adapter_name: str) -> list[Term]:
        """What the adapter's update is the sum of, as matrices, with live parameters."""
        composition = self.compositions.get(adapter_name)
        if composition is None:
            gate = self.optional_factor("gate", adapter_name)
        else:
            gate = composition.gate(self.factor("logits", adapter_name))
        scaling = self.scaling[adapter_name]
        mixer = self.optional_factor("mixer", adapter_name)
        terms = [Term(self._matrix("A", adapter_name), self._matrix("B", adapter_name), mixer, gate, scaling)]
        if self.optional_factor("anchor_A", adapter_name) is not None:
            anchors = self._matrix("anchor_A", adapter_name), self._matrix("anchor_B", adapter_name)
            terms.append(Term(*anchors, None, gate, -scaling))
        return terms

    def _matrix(self, name: Name, adapter_name: str) -> Tensor:
        factor = self.factor(name, adapter_name)
        return factor if factor.dim() == 2 else factor.flatten(1)

    def magnitude(self, adapter_name: str) -> Tensor | None:
        """DoRA's m (out,), or None for an adapter without one."""
        return self.optional_factor("magnitude", adapter_name)

    def update(self, adapter_name: str) -> Update:
        """What the adapter does to this layer, with live parameters."""
        return Update(self.terms(adapter_name), self.magnitude(adapter_name), self.bias_delta(adapter_name))

    def base_matrix(self) -> Tensor:
        """The base weight W (out, in) as it is in the layer now, dequantised if need be."""
        return self.as_matrix(self.get_base_weight())

    def get_base_weight(self) -> Tensor:
        """The base layer's weight without gradient, dequantised if need be."""
        # PEFT's version takes `.data`, which torch.export cannot follow.
        return (
            super().get_base_weight()
            if self.quantization_backend is not None
            else self.get_base_layer().weight.detach()
        )

    @property
    def weight(self) -> Tensor:
        """The base weight; where the model reads it instead of calling the layer, W' of the active adapters.

        W' is differentiable. ``lora_dropout`` has no effect on it: there is no input to drop.
        """
        adapters = [name for name in self.active_adapters if self.has_adapter(name)]
        if not self.weight_is_read or not adapters:
            return super().weight
        if self._disable_adapters and self.merged:
            self.unmerge()
        if self._disable_adapters or self.merged_adapters:
            return super().weight
        adapted = self._adapted_matrix(adapters, self.base_matrix())
        return self.as_weight(adapted).to(self.get_base_weight().dtype)

    def __getattr__(self, name: str) -> Any:
        # Models ask a convolution for its stride, an embedding for its size: what torch calls a module's constants.
        base = self.__dict__["_modules"].get("base_layer")
        if base is not None and name in getattr(type(base), "__constants__", ()):
            return getattr(base, name)
        return super().__getattr__(name)

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
        present = self._modules[LOOM["A"]]._modules  # type: ignore[union-attr]
        adapters = [name for name in self.active_adapters if name in present]
        if self.merged_adapters or not adapters:
            return self.base_layer(x, *args, **kwargs)
        return self.adapted_forward(x, adapters, *args, **kwargs)

    def adapted_forward(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The forward pass with the given adapters, which are unmerged."""
        return self.adapt(self.base_layer(x, *args, **kwargs), x, adapters)

    def adapt(self, base_out: Tensor, x: Tensor, adapters: list[str]) -> Tensor:
        """The output with the given adapters (at least one), from that of the base layer."""
        if self.add_up(adapters):
            return self.adapt_together(adapters, x, base_out)
        dora = [name for name in adapters if self.magnitude(name) is not None]
        plain = [name for name in adapters if name not in dora]
        result = base_out
        for name in dora:
            # Each DoRA adapter refers to the base weight alone, as in merging; several of them add their differences.
            result = result + (self.adapt_together([name], x, base_out) - base_out)
        for names in [plain] if plain and self.add_up(plain) else [[name] for name in plain]:
            result = self.adapt_together(names, x, result)
        return result

    def add_up(self, adapters: list[str]) -> bool:
        """Whether the adapters are as one with stacked factors: plain ones, none with a dropout mask of its own."""
        if len(adapters) == 1:
            return True
        magnitudes = self._modules[LOOM["magnitude"]]._modules  # type: ignore[union-attr]
        return not any(name in magnitudes or (self.training and self.dropout[name]) for name in adapters)

    def adapt_together(self, adapters: list[str], x: Tensor, base_out: Tensor) -> Tensor:
        """:meth:`adapt` for adapters that add up."""
        shape = [1] * base_out.dim()
        shape[self.channel_dim] = -1
        z = base_out + self.low_rank(x, self.stacked(adapters), self.dropout[adapters[0]] if self.training else 0.0)
        for name in adapters:
            if (delta := self.bias_delta(name)) is not None:
                z = z + delta.to(z.dtype).view(shape)
        magnitude = self.magnitude(adapters[0])
        if magnitude is not None:
            c = row_scale(magnitude, self.row_norm(adapters[0]))
            z = rescale(z, c, getattr(self.get_base_layer(), "bias", None), self.channel_dim)
        return z.to(base_out.dtype)

    def stacked(self, adapters: list[str]) -> Term:
        """The update of adapters that add up, as one term."""
        return stack([term for name in adapters for term in self.terms(name)])

    def _mixed_batch_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)}: give one name per sample, {BASE!r} for none."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        names = [name for name in dict.fromkeys(adapter_names) if self.has_adapter(name)]
        if len(names) == 1 and adapter_names.count(names[0]) == len(x):
            return self.adapted_forward(x, names, *args, **kwargs)
        # Nobody else has the base layer's output yet, so it is changed in place.
        result = self.base_layer(x, *args, **kwargs)
        places = samples_of(adapter_names, x.device)
        for name in names:
            index = places[name]
            part = x.index_select(0, index)
            if self.magnitude(name) is None and name not in self.compositions:
                change = self.low_rank(part, self.stacked([name]), self.dropout[name] if self.training else 0.0)
            else:
                before = result.index_select(0, index)
                change = self.adapt_together([name], part, before) - before
            result.index_add_(0, index, change.to(result.dtype))
        return result

    def __repr__(self) -> str:
        return "loom." + super().__repr__()
