"""Convolutions: A is a convolution with r output channels and the base's kernel, B a 1x1 convolution."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from loraloom.tuner.config import LoomConfig
from loraloom.tuner.layer import LoomLayer
from loraloom.update.linear import rescale
from loraloom.update.terms import fold
from loraloom.update.update import row_scale

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoomConv(LoomLayer):
    """``y = c (W * x + B' * (A' * x)) + bias`` with A' = M A, B' = g s B; A (r, in, *kernel), B (out, r, 1, ...)."""

    def __init__(
        self,
        base_layer: nn.Conv1d | nn.Conv2d | nn.Conv3d,
        adapter_name: str,
        config: LoomConfig,
        r: int,
        lora_alpha: int,
        quantization_backend: Any = None,
    ) -> None:
        super().__init__(base_layer, quantization_backend)
        if base_layer.groups != 1:
            raise ValueError(
                f"A convolution with groups={base_layer.groups} has no low-rank update of this form: leave it out of "
                "target_modules, or name it in exclude_modules."
            )
        self.in_features, self.out_features = base_layer.in_channels, base_layer.out_channels
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r, lora_alpha)

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        kernel = tuple(self.get_base_layer().kernel_size)
        return (r, self.in_features, *kernel), (self.out_features, r, *(1 for _ in kernel))

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.get_base_layer().weight.shape)

    def adapt(self, base_out: Tensor, x: Tensor, adapters: list[str]) -> Tensor:
        base = self.get_base_layer()
        kernel = tuple(base.kernel_size)
        channels = -1 - len(kernel)
        result = base_out
        for name in adapters:
            terms = self.terms(name)
            A, B = fold(terms)
            A, B = A.to(terms[0].A.dtype), B.to(terms[0].B.dtype)
            xd = F.dropout(x, self.dropout[name], self.training).to(A.dtype)
            # The base's own rule for stride, dilation and padding (of any mode), with A in place of its weight.
            h = base._conv_forward(xd, A.reshape(-1, self.in_features, *kernel), None)
            z = base_out + _CONVOLUTIONS[len(kernel)](h, B.reshape(*B.shape, *(1 for _ in kernel)))
            if (delta := self.bias_delta(name)) is not None:
                z = z + delta.to(z.dtype).view(-1, *(1 for _ in kernel))
            magnitude = self.magnitude(name)
            if magnitude is not None:
                z = rescale(z, row_scale(magnitude, self.row_norm(name)), base.bias, channels)
            result = result + (z - base_out) if len(adapters) > 1 else z
        return result.to(base_out.dtype)
