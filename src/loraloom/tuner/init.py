"""How an adapter starts. Every choice but ``False`` makes it an exact identity."""

import math

import torch
from torch import Tensor, nn

from loraloom.tuner.config import INITS_WITH_IDENTITY_MIXER, LoomConfig


@torch.no_grad()
def init_factors(A: Tensor, B: Tensor, kind: bool | str, lookup: bool = False) -> None:
    """Fills A (r, in, ...) and B (out, r, ...) in place.

    Args:
        A, B: the factors.
        kind: ``LoomConfig.init_lora_weights``; "pissa" and "olora" are completed by :func:`from_base`.
        lookup: A is a table of vectors (embeddings); then A is zero and B normal, as in PEFT and loralib.
    """
    if kind is False:
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.kaiming_uniform_(B, a=math.sqrt(5))
    elif kind == "orthogonal":
        # B A = 0 with both nonzero: A lies in the span of the even rows of an orthogonal matrix, B in that of the odd.
        r = A.shape[0]
        q = torch.linalg.qr(torch.randn(r, r)).Q
        A.copy_((q[0::2].T @ torch.randn(r // 2, A[0].numel()) / 10).reshape(A.shape))
        B.copy_((torch.randn(B.shape[0], r // 2) @ q[1::2] / 10).reshape(B.shape))
    elif lookup:
        nn.init.zeros_(A)
        nn.init.normal_(B)
    else:
        if kind == "gaussian":
            nn.init.normal_(A, std=1 / A.shape[0])
        else:
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        nn.init.zeros_(B)


@torch.no_grad()
def init_mixer(M: Tensor, config: LoomConfig) -> None:
    """Fills the mixer M (r, r): orthogonal or Kaiming-uniform (MoSLoRA, 2406.11909), or I where B is not 0."""
    if config.init_lora_weights in INITS_WITH_IDENTITY_MIXER:
        nn.init.eye_(M)
    elif config.use_mixer == "orthogonal":
        M.copy_(nn.init.orthogonal_(torch.empty(M.shape)))
    else:
        nn.init.kaiming_uniform_(M, a=math.sqrt(5))


@torch.no_grad()
def from_base(W: Tensor, r: int, scaling: float, kind: bool | str) -> tuple[Tensor, Tensor]:
    """Factors A (r, in) and B (out, r) taken from the base weight W (out, in).

    "pissa" (2404.02948, eq. 2-3): ``s B A`` is the best rank-r approximation of W, A and B with equal singular values.
    "olora" (2406.01775, algorithm 1): B is Q[:, :r] and A is R[:r] of W = Q R.

    Raises:
        ValueError: r exceeds the smaller side of W.
    """
    if r > min(W.shape):
        raise ValueError(
            f"init_lora_weights={kind!r} needs r <= {min(W.shape)} for a weight {tuple(W.shape)}, got r={r}."
        )
    W = W.float()
    if kind == "olora":
        Q, R = torch.linalg.qr(W)
        return R[:r], Q[:, :r]
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root
