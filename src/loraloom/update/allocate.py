"""Ranks under a budget: which singular values of which matrices are worth their parameters.

A singular value s of an (out, in) update costs ``out + in`` parameters and holds ``s^2`` of the squared norm. Keeping
the values with the largest ``s^2 / (out + in)`` is the greedy solution of the knapsack; since every matrix's values
come largest first, each prefix is a valid rank, and the total is within one value of the optimum.
"""

from collections.abc import Mapping

import torch
from torch import Tensor


def ranks_for_energy(spectra: Mapping[str, Tensor], energy: float) -> dict[str, int]:
    """For each matrix the smallest rank that holds this share of its squared norm; at least 1.

    Args:
        spectra: name -> singular values (q,), descending.
        energy: in (0, 1].

    Raises:
        ValueError: energy is out of range.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy={energy!r} must lie in (0, 1]: it is the share of the squared norm to keep.")
    ranks = {}
    for name, S in spectra.items():
        # Summed from the small end, where a small loss has its digits.
        tail = S.double().square().flip(0).cumsum(0).flip(0)
        lost = torch.cat([tail[1:], tail.new_zeros(1)])
        ranks[name] = 1 + int((lost > (1 - energy) * tail[0]).sum()) if tail.numel() and tail[0] else 1
    return ranks


def ranks_for_parameters(
    spectra: Mapping[str, Tensor], costs: Mapping[str, int], parameters: int, *, least: int = 1
) -> dict[str, int]:
    """The ranks that lose least of the whole squared norm with at most so many parameters.

    Args:
        spectra: name -> singular values (q,), descending.
        costs: name -> parameters of one rank, ``out + in``.
        parameters: the budget over all matrices.
        least: rank of every matrix, whatever its values; 0 lets a matrix go.

    Returns:
        name -> rank, between ``least`` and q.

    Raises:
        ValueError: the budget does not hold rank ``least`` everywhere.
    """
    ranks = {name: min(least, len(S)) for name, S in spectra.items()}
    left = parameters - sum(ranks[name] * costs[name] for name in ranks)
    if left < 0:
        raise ValueError(
            f"parameters={parameters} is less than {parameters - left}, which rank {least} of all {len(ranks)} "
            "modules takes: allow more."
        )
    values = [
        (float(s) ** 2 / costs[name], name, i)
        for name, S in spectra.items()
        for i, s in enumerate(S.double().tolist())
        if i >= ranks[name] and s > 0
    ]
    closed = set()  # a matrix of which one value did not fit: later ones are smaller, and must not come without it
    for _, name, _ in sorted(values, key=lambda value: (-value[0], value[1], value[2])):
        if name in closed or costs[name] > left:
            closed.add(name)
            continue
        ranks[name] += 1
        left -= costs[name]
    return ranks
