"""Convolutions: A is a convolution with r output channels and the base's kernel, B a 1x1 convolution.

The weight of a convolution with G groups is a matrix (out, in/G * kernel) whose rows see the inputs of their group.
Its update is such a matrix of rank r: A is applied to every group, and a row of B takes the r numbers of its group. So
it merges, for any rank and any number of groups. (PEFT's A sees the inputs of all groups, which no weight of the base's
shape can do, and its rank must be a multiple of G.)
"""

import torch.nn.functional as F
from torch import Tensor

from loraloom.tuner.config import LoomConfig
from loraloom.tuner.layer import LoomLayer
from loraloom.update.parts import Shape
from loraloom.update.terms import Term, fold

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class LoomConv(LoomLayer):
    """``y = c (W * x + B' * (A' * x)) + bias`` with A' = M A, B' = g s B; A (r, in/G, *kernel), B (out, r, 1, ...)."""

    def read_base(self, config: LoomConfig) -> None:
        base = self.get_base_layer()
        self.in_features, self.out_features = base.in_channels, base.out_channels
        self.channel_dim = -1 - len(base.kernel_size)

    def factor_shapes(self, r: int) -> tuple[Shape, Shape]:
        base = self.get_base_layer()
        kernel = tuple(base.kernel_size)
        return (r, self.in_features // base.groups, *kernel), (self.out_features, r, *(1 for _ in kernel))

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
        A = A.repeat(base.groups, 1).reshape(-1, self.in_features // base.groups, *kernel)
        h = base._conv_forward(x, A, None)
        return _CONVOLUTIONS[len(kernel)](h, B.reshape(*B.shape, *(1 for _ in kernel)), groups=base.groups)
