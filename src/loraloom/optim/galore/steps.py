"""The step of each method for one weight W (m, n), as a pure function: tensors in, the change of W out.

    GaLore    scale * back(N)                                                (Zhao et al., arXiv 2403.03507)
    Fira      scale * (back(N) - lr * limit(phi * (G - back(R))))            (Chen et al., arXiv 2410.01623)
    APOLLO    -scale * lr * limit(phi * G)                                   (Zhu et al., arXiv 2412.05270)

R is the projected gradient, and N the inner optimizer's step for it, learning rate and sign included; phi says how much
that step scaled R: ||N_j|| / (lr ||R_j||). What multiplies a bracket is applied to N, the smaller of the two.
"""

from torch import Tensor

from loraloom.optim.galore.bases import limit_growth, norm_ratio, project_back


def galore_change(N: Tensor, left: Tensor | None, right: Tensor | None, scale: float) -> Tensor:
    """The change of W by GaLore.

    Args:
        N: the compact step.
        left, right: the bases, (m, r) and (n, r); None on a side that is not projected.
        scale: multiplies the step.

    Returns:
        (m, n).
    """
    return project_back(scale * N, (left, right))


def fira_change(
    G: Tensor, R: Tensor, N: Tensor, left: Tensor | None, right: Tensor | None, lr: float, scale: float,
    previous: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The change of W by Fira: GaLore's, and the gradient outside the basis scaled as the compact one was.

    Args:
        G: the gradient, (m, n).
        R: its projection.
        N: the compact step.
        left, right: the bases, one of them None.
        lr: the learning rate that N includes, not zero.
        scale: multiplies the step.
        previous: the norm that the last step returned; None at the first.

    Returns:
        (m, n), and the norm of the part outside the basis after `limit_growth`.
    """
    phi = norm_ratio(N, R, (left is not None, right is not None)) / lr
    outside, norm = limit_growth(phi * (G - project_back(R, (left, right))), previous)
    return galore_change(N, left, right, scale).sub_(outside, alpha=lr * scale), norm


def apollo_change(
    G: Tensor, R: Tensor, N: Tensor, sides: tuple[bool, bool], lr: float, scale: float, previous: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The change of W by APOLLO: the gradient, each channel scaled as the compact one was.

    Args:
        G: the gradient, (m, n).
        R: its projection. If it has one column or row, all of W is scaled by one number (APOLLO-Mini).
        N: the compact step.
        sides: which side is projected, (left, right).
        lr: the learning rate that N includes, not zero.
        scale: multiplies the step.
        previous: the norm that the last step returned; None at the first.

    Returns:
        (m, n), and the norm of the scaled gradient after `limit_growth`.
    """
    phi = norm_ratio(N, R, sides, whole=R.shape[0 if sides[0] else 1] == 1) / lr
    scaled, norm = limit_growth(phi * G, previous)
    return scaled.mul_(-lr * scale), norm
