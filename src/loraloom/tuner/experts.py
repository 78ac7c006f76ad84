"""Bare parameters: the experts of mixtures (``target_parameters``), the input projection of nn.MultiheadAttention.

A parameter holds E matrices W_e (out, in), as (E, out, in), or (E, in, out) where the module says `is_transposed`. Each
has an update of its own, ``D_e = g s B_e M_e A_e``. They are stored as PEFT stores them: A (E r, in) expert by expert,
B (out, r E) with the expert as the fastest index; our mixer (E r, r) as A. The gate is one for all experts.
"""

from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from loraloom.errors import InputError
from loraloom.tuner import init as initialization
from loraloom.tuner.config import LoomConfig
from loraloom.tuner.layer import LoomLayer
from loraloom.tuner.peft_internals import PREFIX
from loraloom.update.adapted_stack import AdaptedStack
from loraloom.update.parts import Part, Shape
from loraloom.update.terms import compute_dtype


class ParamWrapper(LoomLayer):
    """The module that holds an adapted parameter. The name is PEFT's: it looks for it when it adds an adapter.

    While the module runs, its parameter is an :class:`AdaptedStack`, so that no update of all experts is ever formed.
    Several parameters of one module are wrappers within each other.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoomConfig,
        r: int,
        lora_alpha: float,
        parameter_name: str,
    ) -> None:
        self.parameter_name = self.weight_name = parameter_name
        super().__init__(base_layer, adapter_name, config, r, lora_alpha)

    def read_base(self, config: LoomConfig) -> None:
        shape = self.get_base_weight().shape
        if len(shape) not in (2, 3):
            raise InputError(
                f"target_parameters: {self.parameter_name} has the shape {tuple(shape)}; a matrix or a stack of "
                "matrices can be adapted.",
                code="parameter-shape",
            )
        self.num_experts, self.out_features, self.in_features = self.as_matrix(self.get_base_weight()).shape

    def update_layer(self, adapter_name: str, config: LoomConfig, r: int, lora_alpha: float) -> None:
        unsupported = {
            "use_dora": config.use_dora,
            # torch has several ways to compute attention, and only one of them multiplies by the weight.
            "lora_dropout": config.lora_dropout and isinstance(self.get_base_layer(), nn.MultiheadAttention),
            "init_lora_weights": config.init_lora_weights not in (True, False, "gaussian"),
            "composition": config.composition is not None,
        }
        if names := [name for name, used in unsupported.items() if used]:
            raise InputError(
                f"target_parameters does not go with {names[0]}={getattr(config, names[0])!r}: leave one of them out.",
                code="parameter-option",
            )
        super().update_layer(adapter_name, config, r, lora_alpha)

    def factor_shapes(self, r: int) -> tuple[Shape, Shape]:
        return (self.num_experts * r, self.in_features), (self.out_features, r * self.num_experts)

    def part_shape(self, part: Part, r: int) -> Shape:
        return (self.num_experts * r, r) if part.name == "mixer" else super().part_shape(part, r)

    def _initialize(self, adapter_name: str, config: LoomConfig) -> None:
        A, B = self.factor("A", adapter_name), self.factor("B", adapter_name)
        initialization.init_factors(A, B, config.init_lora_weights, lookup=False)
        if (mixer := self.optional_factor("mixer", adapter_name)) is not None:
            for block in mixer.split(self.r[adapter_name]):
                initialization.init_mixer(block, config)
        if (gate := self.optional_factor("gate", adapter_name)) is not None:
            gate.fill_(1)

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"

    # The base: a parameter in place of a module's weight

    def get_base_weight(self) -> Tensor:
        """The parameter, as the model stores it."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.get_base_weight().device, self.get_base_weight().dtype

    @property
    def _is_transposed(self) -> bool:
        return bool(getattr(self.get_base_layer(), "is_transposed", False))

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The parameter as (E, out, in)."""
        return weight[None] if weight.dim() == 2 else weight.mT if self._is_transposed else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        if self.get_base_weight().dim() == 2:
            return matrix[0]
        return matrix.mT if self._is_transposed else matrix

    @property
    def weight(self) -> Tensor:
        """The base layer's weight, adapted if it is this parameter."""
        return self._adapted_parameter() if self.parameter_name == "weight" else self.get_base_layer().weight

    def __getattr__(self, name: str) -> Any:
        # What the model asks the module for; the adapted parameter too, where it is read from outside.
        if name == self.__dict__["parameter_name"]:
            return self._adapted_parameter()
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__["_modules"].get("base_layer")
            if base is None or name.startswith((PREFIX, "__")):
                raise
            return getattr(base, name)

    # The update

    def _adapted_parameter(self) -> Tensor:
        adapters = [name for name in self.active_adapters if self.has_adapter(name)]
        W = self.get_base_weight()
        if not adapters or self._disable_adapters or self.merged_adapters:
            return W
        return self.as_weight(self._adapted_matrix(adapters, self.as_matrix(W))).to(W.dtype)

    def expert_factors(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """A (E, r, in) and B (E, out, r) of every expert, with ``D_e = B_e A_e``: mixer, gate and scale included."""
        E, r = self.num_experts, self.r[adapter_name]
        A = self.factor("A", adapter_name).reshape(E, r, self.in_features)
        B = self.factor("B", adapter_name).reshape(self.out_features, r, E).permute(2, 0, 1)
        if (mixer := self.optional_factor("mixer", adapter_name)) is not None:
            A = mixer.to(A.dtype).reshape(E, r, r) @ A
        gate = self.optional_factor("gate", adapter_name)
        scale = self.scaling[adapter_name] if gate is None else gate * self.scaling[adapter_name]
        return A, (B * scale).to(B.dtype)

    def _adapted_matrix(self, adapters: Iterable[str], W: Tensor) -> Tensor:
        total = W.to(compute_dtype(W))
        for name in adapters:
            A, B = (factor.to(total.dtype) for factor in self.expert_factors(name))
            total = torch.baddbmm(total, B, A)
        return total

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What merging this adapter adds to the parameter, in its shape."""
        A, B = self.expert_factors(adapter_name)
        return self.as_weight(B.to(compute_dtype(B)) @ A.to(compute_dtype(A))).to(A.dtype)

    def terms(self, adapter_name: str) -> NoReturn:
        raise InputError(
            f"The adapter has target_parameters ({self.parameter_name}), which this does not support: merge it, or use "
            "it as it is.",
            code="parameter-adapter",
        )

    def adapted_forward(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        adapted: Any = self.get_base_weight()
        drops = [name for name in adapters if self.training and self.dropout[name]]
        plain = [name for name in adapters if name not in drops]
        for names in [plain] * bool(plain) + [[name] for name in drops]:  # each mask is one adapter's
            adapted = self._adapt_stack(adapted, names, self.dropout[names[0]] if names is not plain else 0.0)
        module = self.get_base_layer()
        # In front of the module's own parameter, which is not touched.
        vars(module)[self.parameter_name] = adapted
        try:
            return self.base_layer(x, *args, **kwargs)
        finally:
            del vars(module)[self.parameter_name]

    def _adapt_stack(self, W: Any, adapters: list[str], dropout: float) -> AdaptedStack:
        factors = [self.expert_factors(name) for name in adapters]
        A = torch.cat([A for A, _ in factors], dim=1).to(W.dtype)
        B = torch.cat([B for _, B in factors], dim=2).to(W.dtype)
        if W.dim() == 2:
            return AdaptedStack(W, B[0], A[0], dropout)
        return AdaptedStack(W, *((A.mT, B.mT) if self._is_transposed else (B, A)), dropout)

    def _mixed_batch_forward(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        raise InputError(
            f"adapter_names cannot be used with target_parameters ({self.parameter_name}): use set_adapter and one "
            "batch per adapter.",
            code="parameter-adapter-names",
        )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module without this wrapper and those within it; PEFT calls it for the outermost."""
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        for name, child in list(layer.named_children()):
            if isinstance(child, LoomLayer):  # the output projection of nn.MultiheadAttention
                if merge:
                    child.merge(safe_merge=safe_merge, adapter_names=adapter_names)
                setattr(layer, name, child.get_base_layer())
        return layer


def check_attention(module: nn.MultiheadAttention, name: str) -> str:
    """The parameter by which attention is adapted; its output projection is adapted as a linear layer.

    Raises:
        InputError: "attention-widths": queries, keys and values have weights of their own.
    """
    if module.in_proj_weight is None:
        raise InputError(
            f"{name} is an nn.MultiheadAttention whose keys or values have another width than its queries: name its "
            "out_proj in target_modules, or q_proj_weight, k_proj_weight and v_proj_weight in target_parameters.",
            code="attention-widths",
        )
    return "in_proj_weight"
