"""Convolutions: A is a convolution with r output channels and the base's kernel, B a 1x1 convolution."""

import torch.nn.functional as F
from torch import Tensor

from loraloom.tuner.config import LoomConfig
from loraloom.tuner.layer import LoomLayer
from loraloom.update.parts import Shape
from loraloom.update.terms import Term, fold

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoomConv(LoomLayer):
    """``y = c (W * x + B' * (A' * x)) + bias`` with A' = M A, B' = g s B; A (r, in, *kernel), B (out, r, 1, ...)."""

    def read_base(self, config: LoomConfig) -> None:
        base = self.get_base_layer()
        if base.groups != 1:
            raise ValueError(
                f"A convolution with groups={base.groups} has no low-rank update of this form: leave it out of "
                "target_modules, or name it in exclude_modules."
            )
        self.in_features, self.out_features = base.in_channels, base.out_channels
        self.channel_dim = -1 - len(base.kernel_size)

    def factor_shapes(self, r: int) -> tuple[Shape, Shape]:
        kernel = tuple(self.get_base_layer().kernel_size)
        return (r, self.in_features, *kernel), (self.out_features, r, *(1 for _ in kernel))

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.get_base_layer().weight.shape)

    def low_rank(self, x: Tensor, term: Term, dropout: float) -> Tensor:
        base = self.get_base_layer()
        kernel = tuple(base.kernel_size)
        A, B = (factor.to(term.A.dtype) for factor in fold([term]))
        x = F.dropout(x, dropout).to(A.dtype)
        # The base's own rule for stride, dilation and padding (of any mode), with A in place of its weight.
        h = base._conv_forward(x, A.reshape(-1, self.in_features, *kernel), None)
        return _CONVOLUTIONS[len(kernel)](h, B.reshape(*B.shape, *(1 for _ in kernel)))
