"""``W_e + L_e R_e`` for a stack of experts, without forming it: what reads the stack multiplies by W, L and R.

Shapes: W (E, m, n), L (E, m, r), R (E, r, n); or one expert's, without E. The models of transformers multiply their
experts' weights by ``linear``, ``matmul``, ``bmm`` or a grouped matmul, after indexing or transposing them. Those keep
the low-rank form; any other use gets the sum. W may be such a stack itself: then their updates add up.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.errors import InputError

_PRODUCTS = {torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__}
_GROUPED = {function for function in (getattr(torch, "_grouped_mm", None),) if function is not None}
_LIKE_W = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_meta", "is_sparse", "size", "dim", "numel"}
_LIKE_W |= {"element_size", "is_floating_point", "data_ptr"}
_ALIGNED = 8  # a grouped matmul wants strides of 16 bytes


class AdaptedStack:
    """Stands for the tensor ``W + L R`` in products; differentiable with respect to L and R.

    With ``dropout``, what is multiplied by L R loses that share of its entries at random, the others are scaled up.
    """

    def __init__(self, W: Any, L: Tensor, R: Tensor, dropout: float = 0.0) -> None:
        self.W, self.L, self.R, self.dropout = W, L, R, dropout

    def dense(self) -> Tensor:
        """The sum, in W's dtype.

        Raises:
            InputError: "parameter-dropout": there is no input to drop.
        """
        if self.dropout:
            raise InputError(
                f"lora_dropout={self.dropout} has nothing to act on: the module uses an adapted parameter otherwise "
                "than by multiplying it. Set lora_dropout=0.",
                code="parameter-dropout",
            )
        W = self.W.dense() if isinstance(self.W, AdaptedStack) else self.W
        return torch.baddbmm(W, self.L, self.R) if W.dim() == 3 else torch.addmm(W, self.L, self.R)

    def drop(self, x: Tensor) -> Tensor:
        """What L R is multiplied by."""
        return F.dropout(x, self.dropout) if self.dropout else x

    def transpose(self, first: int, second: int) -> Any:
        """As `torch.transpose`; of the last two dimensions, it keeps the low-rank form."""
        last = {self.W.dim() - 1, self.W.dim() - 2}
        if {first % self.W.dim(), second % self.W.dim()} == last:
            return AdaptedStack(self.W.mT, self.R.mT, self.L.mT, self.dropout)
        return self.dense().transpose(first, second)

    @property
    def mT(self) -> Any:
        """The matrices transposed."""
        return self.transpose(-2, -1)

    def __getitem__(self, index: Any) -> Any:
        whole_experts = self.W.dim() == 3 and (
            isinstance(index, int) or (isinstance(index, Tensor) and index.dim() <= 1)
        )
        if not whole_experts:
            return self.dense()[index]
        return AdaptedStack(self.W[index], self.L[index], self.R[index], self.dropout)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.W if name in _LIKE_W else self.dense(), name)

    def __matmul__(self, other: Any) -> Any:
        return torch.matmul(self, other)  # type: ignore[arg-type]

    def __rmatmul__(self, other: Any) -> Any:
        return torch.matmul(other, self)  # type: ignore[arg-type]

    @classmethod
    def __torch_function__(
        cls, function: Callable, _types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is F.linear and len(args) == 2 and isinstance(args[1], cls) and not kwargs:
            x, right = args[0], args[1].mT
            return torch.matmul(x, right.W) + torch.matmul(torch.matmul(right.drop(x), right.L), right.R)
        if function in _PRODUCTS and len(args) == 2 and not kwargs:
            left, right = args
            if isinstance(right, cls) and not isinstance(left, cls):
                return function(left, right.W) + function(function(right.drop(left), right.L), right.R)
            if isinstance(left, cls) and not isinstance(right, cls):
                return function(left.W, right) + function(left.L, function(left.R, left.drop(right)))
        if function in _GROUPED and isinstance(args[1], cls) and kwargs.get("bias") is None:
            x, right, *rest = args
            padding = -right.L.shape[-1] % _ALIGNED
            L, R = F.pad(right.L, (0, padding)), F.pad(right.R, (0, 0, 0, padding))
            h = function(right.drop(x), L, *rest, **kwargs)
            return function(x, right.W, *rest, **kwargs) + function(h, R, *rest, **kwargs)
        args, kwargs = torch.utils._pytree.tree_map(lambda a: a.dense() if isinstance(a, cls) else a, (args, kwargs))
        return function(*args, **kwargs)


def _of_the_sum(name: str) -> Callable:
    return lambda self, *args: getattr(self.dense(), name)(*args)


# Python looks operators up in the class, not by __getattr__.
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "neg", "len", "iter"):
    setattr(AdaptedStack, f"__{_name}__", _of_the_sum(f"__{_name}__"))
