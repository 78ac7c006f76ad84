"""Linear layers: nn.Linear, transformers' Conv1D, and every quantised linear that PEFT's backends resolve."""

from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraloom.tuner.config import LoomConfig
from loraloom.tuner.functional import adapted_linear, stack
from loraloom.tuner.layer import LoomLayer
from loraloom.tuner.registration import features_of


class LoomLinear(LoomLayer):
    """``y = c (x W^T + g s drop(x) A^T M^T B^T) + bias`` with c = m / rownorm(W + D) for DoRA, else 1."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoomConfig,
        r: int,
        lora_alpha: int,
        quantization_backend: Any = None,
    ) -> None:
        super().__init__(base_layer, quantization_backend)
        self.in_features, self.out_features = features_of(base_layer)
        self.fan_in_fan_out = isinstance(base_layer, Conv1D) or (
            config.fan_in_fan_out and not isinstance(base_layer, nn.Linear)
        )
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r, lora_alpha)

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.in_features), (self.out_features, r)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T if self.fan_in_fan_out else weight

    def as_weight(self, matrix: Tensor) -> Tensor:
        return self.as_matrix(matrix)  # transposing twice is nothing

    def adapted_forward(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        # A plain nn.Linear called with a matrix returns a fresh tensor that nothing else refers to, and its backward
        # does not need it: the adapter can add to it in place. With a batch dimension it would return a view.
        if not (type(base) is nn.Linear and self.quantization_backend is None and not base._forward_hooks):
            return self.adapt(base(x, *args, **kwargs), x, adapters)
        flat = x.reshape(-1, x.shape[-1])
        return self.adapt(base(flat), flat, adapters, in_place=True).view(*x.shape[:-1], self.out_features)

    def adapt(self, base_out: Tensor, x: Tensor, adapters: list[str], in_place: bool = False) -> Tensor:
        out, x = base_out.reshape(-1, self.out_features), x.reshape(-1, self.in_features)
        plain = [name for name in adapters if name not in self.loom_lora_magnitude_vector]
        dora = [name for name in adapters if name in self.loom_lora_magnitude_vector]
        rates = [self.dropout[name] if self.training else 0.0 for name in plain]
        result = out
        for name in dora:
            # Each DoRA adapter refers to the base weight alone, as in merging; several of them add their differences.
            alone = len(adapters) == 1
            y = self._adapt_dora(out, x, name, in_place and alone)
            result = y if alone else result + (y - out)
        # Without dropout the sum of several adapters is one adapter with stacked factors; masks are drawn one each.
        groups = [plain] if not any(rates) else [[name] for name in plain]
        for group in filter(None, groups):
            term = stack([term for name in group for term in self.terms(name)])
            rate = self.dropout[group[0]] if self.training else 0.0
            result = adapted_linear(result, x, term, dropout=rate, in_place=in_place and not dora)
        return result.view(base_out.shape)

    def _adapt_dora(self, out: Tensor, x: Tensor, name: str, in_place: bool) -> Tensor:
        return adapted_linear(
            out,
            x,
            stack(self.terms(name)),
            magnitude=self.magnitude(name),
            norm=self.row_norm(name),
            bias=getattr(self.get_base_layer(), "bias", None),
            dropout=self.dropout[name] if self.training else 0.0,
            in_place=in_place,
        )
