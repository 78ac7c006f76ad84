"""AdamW's step with torch's own function; for bfloat16 weights also with moments in float32 and another rounding."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from loraloom.optim.rounding import compensated, move_

State = dict[str, Any]


def step_adamw(params: list[Tensor], states: list[State], group: dict[str, Any], seed: int) -> None:
    """One AdamW step of all parameters of a group, in place.

    The step of a weight with another rounding than to the nearest is made from zero, in float32, and then added, see
    `loraloom.optim.rounding`. All others are torch's, bit for bit.

    Args:
        params: with gradients.
        states: of each: step, exp_avg and exp_avg_sq, made here at the first step.
        group: with torch's options of AdamW, and rounding.
        seed: of what stochastic rounding draws; the place of a parameter and its step are added to it.
    """
    for p, state in zip(params, states, strict=True):
        _start(p, state, group)
    apart = [compensated(p, group["rounding"]) for p in params]
    usual = [
        (p, cast(Tensor, p.grad), state) for p, state, other in zip(params, states, apart, strict=True) if not other
    ]
    _adamw(usual, group, group["weight_decay"])
    decay = float(group["lr"]) * group["weight_decay"]
    for i, (p, state) in enumerate(zip(params, states, strict=True)):
        if apart[i]:
            D = torch.zeros_like(p, dtype=torch.float32)
            _adamw([(D, cast(Tensor, p.grad).to(torch.float32), state)], group, 0.0)
            move_(p, D, decay, group["rounding"], state.get("error"), seed + i + (int(state["step"]) << 32))


def _start(p: Tensor, state: State, group: dict[str, Any]) -> None:
    if "exp_avg" in state:
        return
    # As in torch's AdamW: the count stays on the host unless the fused kernel reads it.
    double = torch.get_default_dtype() == torch.float64 and not group["fused"]
    device = p.device if group["fused"] else torch.device("cpu")
    state["step"] = torch.zeros((), dtype=torch.float64 if double else torch.float32, device=device)
    dtype = torch.float32 if compensated(p, group["rounding"]) else p.dtype
    state["exp_avg"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    state["exp_avg_sq"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
    if group["rounding"] == "kahan" and compensated(p, "kahan"):
        state["error"] = torch.zeros_like(p)


def _adamw(rows: list[tuple[Tensor, Tensor, State]], group: dict[str, Any], weight_decay: float) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        [p for p, _, _ in rows],
        [grad for _, grad, _ in rows],
        [state["exp_avg"] for _, _, state in rows],
        [state["exp_avg_sq"] for _, _, state in rows],
        [],
        [state["step"] for _, _, state in rows],
        foreach=group["foreach"],
        fused=group["fused"],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=weight_decay,
        eps=group["eps"],
        maximize=False,
    )
