"""Embeddings: A is a table of r numbers per token, B maps them to the embedding's width."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from loraloom.tuner.config import LoomConfig
from loraloom.tuner.layer import LoomLayer
from loraloom.update.linear import rescale
from loraloom.update.terms import scale
from loraloom.update.update import row_scale


class LoomEmbedding(LoomLayer):
    """``y = c (W[:, ids] + g s B M A[:, ids])^T`` with W (width, tokens): the table is W^T, DoRA's m is per dimension.

    ``lora_dropout`` has no effect: there is no activation to drop.
    """

    def __init__(
        self,
        base_layer: nn.Embedding,
        adapter_name: str,
        config: LoomConfig,
        r: int,
        lora_alpha: int,
        quantization_backend: Any = None,
    ) -> None:
        super().__init__(base_layer, quantization_backend)
        if base_layer.max_norm is not None:
            raise ValueError(
                f"An embedding with max_norm={base_layer.max_norm} rewrites its own weight in the forward pass and "
                "cannot be adapted: leave it out of target_modules."
            )
        self.in_features, self.out_features = base_layer.num_embeddings, base_layer.embedding_dim
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, r, lora_alpha)

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (r, self.in_features), (self.out_features, r)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def as_weight(self, matrix: Tensor) -> Tensor:
        return self.as_matrix(matrix)  # transposing twice is nothing

    def adapt(self, base_out: Tensor, x: Tensor, adapters: list[str]) -> Tensor:
        base = self.get_base_layer()
        multiplier = getattr(base, "embed_scale", 1.0)  # Gemma scales its embeddings after the lookup
        result = base_out
        for name in adapters:
            z = base_out
            for term in self.terms(name):
                h = F.embedding(x, term.A.T, base.padding_idx, scale_grad_by_freq=base.scale_grad_by_freq)
                if term.M is not None:
                    h = F.linear(h, term.M)
                h = (h * scale(term)).to(term.B.dtype)  # a gate is float32 whatever the factors are
                z = z + F.linear(h, term.B) * multiplier
            magnitude = self.magnitude(name)
            if magnitude is not None:
                z = rescale(z, row_scale(magnitude, self.row_norm(name)), None)
            result = result + (z - base_out) if len(adapters) > 1 else z
        return result.to(base_out.dtype)
