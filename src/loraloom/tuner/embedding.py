"""Embeddings: A is a table of r numbers per token, B maps them to the embedding's width."""

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from loraloom.tuner.config import LoomConfig
from loraloom.tuner.layer import LoomLayer
from loraloom.update.terms import Term, scale


class Call(NamedTuple):
    """The arguments of one call of the layer."""

    args: tuple
    kwargs: dict[str, Any]


class LoomEmbedding(LoomLayer):
    """``y = c (W[:, ids] + g s B M A[:, ids])^T`` with W (width, tokens): the table is W^T, DoRA's m is per dimension.

    A subclass with a forward of its own is called with A in place of its table: any rule that takes each column of the
    table by itself, such as an offset or a factor, applies to the update as well.

    ``lora_dropout`` has no effect: there is no activation to drop.
    """

    def read_base(self, config: LoomConfig) -> None:
        base = self.get_base_layer()
        if base.max_norm is not None:
            raise ValueError(
                f"An embedding with max_norm={base.max_norm} rewrites its own weight in the forward pass and "
                "cannot be adapted: leave it out of target_modules."
            )
        self.in_features, self.out_features = base.num_embeddings, base.embedding_dim

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def as_weight(self, matrix: Tensor) -> Tensor:
        return self.as_matrix(matrix)  # transposing twice is nothing

    def adapted_forward(self, x: Any, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        base_out = self.base_layer(x, *args, **kwargs)
        call: Any = Call((x, *args), kwargs) if self.looks_up_by_itself else x
        return self.adapt(base_out, call, adapters)

    @property
    def looks_up_by_itself(self) -> bool:
        """Whether the base is a subclass with a forward of its own, which may shift positions or scale the output."""
        return type(self.get_base_layer()).forward is not nn.Embedding.forward

    def low_rank(self, x: Any, term: Term, dropout: float) -> Tensor:
        base = self.get_base_layer()
        if self.looks_up_by_itself:
            call = x if isinstance(x, Call) else Call((x,), {})
            h = functional_call(base, {"weight": term.A.T}, call.args, call.kwargs)
        else:
            h = F.embedding(x, term.A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        if term.M is not None:
            h = F.linear(h, term.M)
        h = (h * scale(term)).to(term.B.dtype)  # a gate is float32 whatever the factors are
        return F.linear(h, term.B)
