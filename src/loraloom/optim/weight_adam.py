"""WeightAdam: AdamW for the adapters, projected gradient descent for the gates that weigh them.

WeightLoRA (arXiv 2506.02724) gives each adapted layer one gate w_i and minimises over A, B and w in a set C:

    A, B:  AdamW                                       (torch's own, decoupled weight decay)
    w:     w <- P_C(w - gate_lr * dL/dw)               all gates of the model are one vector

P_C is a projection of `loraloom.update.simplex`. While every B is zero, every gate's gradient is zero and a
projection would choose by index alone; hence no gate moves before the first non-zero gradient.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from loraloom.optim.param_groups import build_param_groups
from loraloom.update.simplex import Constraint

# The reference's rate for encoders (8.0 for Llama-2-7b); Adam's steps have the rate's own size.
DEFAULT_GATE_LR = {"sgd": 5.0, "adam": 5e-2}


class WeightAdam(Optimizer):
    """AdamW with projected gradient descent for the gates; without gates it is torch's AdamW, bit for bit.

    Args:
        params: a model, which `build_param_groups` groups; or parameters or groups as torch takes them. Gates are the
            parameters of groups with ``is_gate=True``. Schedulers multiply their rate as they do the others'.
        lr: rate of everything but the gates.
        gate_lr: rate of the gates; default 5.0 with "sgd", 0.05 with "adam".
        constraint: the set that the gates are projected onto after each step, for example ``KSparse(20)``; None leaves
            them free. Assign to ``optimizer.constraint`` to change it.
        betas: AdamW's averaging rates, also for gates stepped by "adam".
        eps: AdamW's epsilon; torch's default. The WeightLoRA paper trains with 1e-6.
        weight_decay: decoupled decay of the groups that set none themselves. Gates never decay.
        gate_method: "sgd" as in the paper, or "adam" where the gradients of the layers differ by orders of magnitude.
        gate_momentum: heavy-ball momentum of "sgd"; 0 in the paper.
        foreach: torch's flag; None lets torch choose.
        fused: torch's flag. `torch.amp.GradScaler` unscales before the step all the same, as the gates need it.

    Raises:
        ValueError: an argument is out of range; gates are given a weight decay; gate_lr or a constraint is given, but
            there are no gates, or fewer than the constraint's k.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        gate_lr: float | None = None,
        constraint: Constraint | None = None,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        gate_method: Literal["sgd", "adam"] = "sgd",
        gate_momentum: float = 0.0,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        if gate_method not in DEFAULT_GATE_LR:
            raise ValueError(f"gate_method={gate_method!r} is unknown; use 'sgd' or 'adam'")
        if gate_momentum and gate_method == "adam":
            raise ValueError(f"gate_momentum={gate_momentum} is for gate_method='sgd'; Adam's momentum is betas[0]")
        if foreach and fused:
            raise ValueError("foreach=True and fused=True exclude each other; set one of them")
        for name, value in (("lr", lr), ("gate_lr", gate_lr or 0.0), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name}={value} is negative; pass 0 or more")
        for name, value in (("betas[0]", betas[0]), ("betas[1]", betas[1]), ("gate_momentum", gate_momentum)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}={value} is out of range; pass 0 or more and less than 1")
        self.constraint = constraint
        self._gate_lr = DEFAULT_GATE_LR[gate_method] if gate_lr is None else gate_lr
        if isinstance(params, nn.Module):
            params = build_param_groups(params, lr, weight_decay=weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "is_gate": False}
        defaults |= {"foreach": foreach, "fused": fused, "gate_method": gate_method, "gate_momentum": gate_momentum}
        super().__init__(params, defaults)

        gates = sum(p.numel() for group in self.param_groups if group["is_gate"] for p in group["params"])
        for option, given in (("gate_lr", gate_lr), ("constraint", constraint)):
            if given is not None and not gates:
                raise ValueError(
                    f"{option}={given} was given, but there are no gates; train with use_gate=True, or mark the gates' "
                    "group with is_gate=True"
                )
        if getattr(constraint, "k", 0) > gates:
            raise ValueError(f"constraint={constraint} keeps more gates than the {gates} there are; lower k")

    def __getstate__(self) -> dict[str, Any]:
        # torch's own drops attributes, so that a copy could not step.
        return {**super().__getstate__(), "constraint": self.constraint, "_gate_lr": self._gate_lr}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group with ``is_gate=True`` takes gate_lr and no weight decay unless it sets its own rate."""
        if param_group.get("is_gate"):
            if decay := param_group.setdefault("weight_decay", 0.0):
                raise ValueError(f"weight_decay={decay} on the gates would pull each towards zero; pass 0")
            param_group.setdefault("lr", self._gate_lr)
            # Whether a gate has had a non-zero gradient. In the group, so that it is saved and restored.
            param_group.setdefault("started", False)
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of all parameters that have a gradient, and one projection of all gates.

        Args:
            closure: recomputes the loss and the gradients, and returns the loss.

        Returns:
            The closure's loss, if there is a closure.

        Raises:
            ValueError: a gate is not finite after its step, or the constraint's k exceeds the number of gates.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if not group["is_gate"]:
                self._step_adamw(group)
        self._step_gates([group for group in self.param_groups if group["is_gate"]])
        return loss

    def _step_gates(self, groups: list[dict[str, Any]]) -> None:
        gates = [p for group in groups for p in group["params"]]
        grads = [p.grad for p in gates if p.grad is not None]
        if not grads:
            return
        if not any(group["started"] for group in groups):
            # Waits for the device, but only until the first non-zero gradient: as a rule, twice.
            if not _vector(grads).any():
                return
            for group in groups:
                group["started"] = True
        for group in groups:
            if group["gate_method"] == "adam":
                self._step_adamw(group)
            else:
                self._step_sgd(group)
        if self.constraint is not None:
            _scatter_(gates, self.constraint.project(_vector(gates)))

    def _step_adamw(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        states = [self.state[p] for p in params]
        for p, state in zip(params, states, strict=True):
            if not state:
                # As in torch's AdamW: the count stays on the host unless the fused kernel reads it.
                precise = torch.get_default_dtype() == torch.float64 and not group["fused"]
                state["step"] = torch.zeros(
                    (),
                    dtype=torch.float64 if precise else torch.float32,
                    device=p.device if group["fused"] else "cpu",
                )
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            foreach=group["foreach"],
            fused=group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _step_sgd(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        buffers: list[Tensor | None] = [None] * len(params)
        if group["gate_momentum"]:
            for i, p in enumerate(params):
                state = self.state[p]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffers[i] = state["momentum_buffer"]
        sgd(
            params,
            [p.grad for p in params],
            buffers,
            foreach=group["foreach"],
            fused=group["fused"],
            weight_decay=0.0,
            momentum=group["gate_momentum"],
            lr=group["lr"],
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )


def _vector(tensors: list[Tensor]) -> Tensor:
    """All entries as one vector on the first tensor's device; sharded tensors are gathered."""
    whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]
    return torch.cat([t.flatten().to(whole[0].device) for t in whole])


def _scatter_(tensors: list[Tensor], vector: Tensor) -> None:
    """The inverse of `_vector`, into the tensors' own storage."""
    targets, values = [], []
    for t, piece in zip(tensors, vector.split([t.numel() for t in tensors]), strict=True):
        value = piece.view(t.shape)
        if isinstance(t, DTensor):
            # Every rank has the whole vector and keeps its shard: nothing is sent.
            value = DTensor.from_local(value, t.device_mesh, [Replicate()] * t.device_mesh.ndim)
            value = value.redistribute(placements=t.placements).to_local()
        targets.append(t.to_local() if isinstance(t, DTensor) else t)
        values.append(value)
    torch._foreach_copy_(targets, values)
