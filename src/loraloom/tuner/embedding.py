"""Embeddings: A is a table of r numbers per token, B maps them to the embedding's width."""

import torch.nn.functional as F
from torch import Tensor

from loraloom.tuner.config import LoomConfig
from loraloom.tuner.layer import LoomLayer
from loraloom.update.terms import Term, scale


class LoomEmbedding(LoomLayer):
    """``y = c (W[:, ids] + g s B M A[:, ids])^T`` with W (width, tokens): the table is W^T, DoRA's m is per dimension.

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

    def low_rank(self, x: Tensor, term: Term, dropout: float) -> Tensor:
        base = self.get_base_layer()
        h = F.embedding(x, term.A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
        if term.M is not None:
            h = F.linear(h, term.M)
        h = (h * scale(term)).to(term.B.dtype)  # a gate is float32 whatever the factors are
        multiplier = getattr(base, "embed_scale", 1.0)  # Gemma scales its embeddings after the lookup
        return F.linear(h, term.B) * multiplier
