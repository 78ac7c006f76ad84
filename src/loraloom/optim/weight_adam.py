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
from torch.optim.sgd import sgd

from loraloom.errors import InputError, RunFailedError
from loraloom.optim.adamw import step_adamw
from loraloom.optim.options import Rounding, WeightAdamOptions
from loraloom.optim.param_groups import build_param_groups
from loraloom.optim.rounding import check_rounding, compensated
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
        betas, eps: AdamW's, also for gates stepped by "adam". The WeightLoRA paper trains with eps=1e-6.
        weight_decay: decoupled decay of the groups that set none themselves. Gates never decay.
        gate_method, gate_momentum, rounding, seed: see `WeightAdamOptions`.
        foreach: torch's flag; None lets torch choose.
        fused: torch's flag. `torch.amp.GradScaler` unscales before the step all the same, as the gates need it.

    Raises:
        InputError: an argument is out of range; gates are given a weight decay; gate_lr or a constraint is given, but
            there are no gates, or fewer than the constraint's k.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-3,
        gate_lr: float | None = None,
        constraint: Constraint | None = None,
        *,
        betas: tuple[float, float] = WeightAdamOptions.betas,
        eps: float = WeightAdamOptions.eps,
        weight_decay: float = 1e-2,
        gate_method: Literal["sgd", "adam"] = WeightAdamOptions.gate_method,
        gate_momentum: float = WeightAdamOptions.gate_momentum,
        rounding: Rounding = WeightAdamOptions.rounding,
        seed: int = WeightAdamOptions.seed,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        options = WeightAdamOptions(
            betas=betas, eps=eps, gate_method=gate_method, gate_momentum=gate_momentum, rounding=rounding, seed=seed
        )
        if gate_momentum and gate_method == "adam":
            raise InputError(
                f"gate_momentum={gate_momentum} is for gate_method='sgd'; Adam's momentum is betas[0]", code="exclusive"
            )
        if foreach and fused:
            raise InputError("foreach=True and fused=True exclude each other; set one of them", code="exclusive")
        for name, value in (("lr", lr), ("gate_lr", gate_lr or 0.0), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise InputError(f"{name}={value} is negative; pass 0 or more", code="out-of-range")
        for name, value in (("betas[0]", betas[0]), ("betas[1]", betas[1]), ("gate_momentum", gate_momentum)):
            if not 0 <= value < 1:
                raise InputError(f"{name}={value} is out of range; pass 0 or more, less than 1", code="out-of-range")
        self.constraint = constraint
        self._gate_lr = DEFAULT_GATE_LR[gate_method] if gate_lr is None else gate_lr
        if isinstance(params, nn.Module):
            params = build_param_groups(params, lr, weight_decay=weight_decay)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "is_gate": False}
        defaults |= {"foreach": foreach, "fused": fused, "gate_method": gate_method, "gate_momentum": gate_momentum}
        super().__init__(params, {**defaults, "rounding": rounding, "seed": seed})
        check_rounding(options.rounding, [p for group in self.param_groups for p in group["params"]])

        gates = sum(p.numel() for group in self.param_groups if group["is_gate"] for p in group["params"])
        for option, given in (("gate_lr", gate_lr), ("constraint", constraint)):
            if given is not None and not gates:
                raise InputError(
                    f"{option}={given} was given, but there are no gates; train with use_gate=True, or mark the gates' "
                    "group with is_gate=True",
                    code="nothing-for-rate",
                )
        if getattr(constraint, "k", 0) > gates:
            raise InputError(
                f"constraint={constraint} keeps more gates than the {gates} there are; lower k", code="out-of-range"
            )

    def __getstate__(self) -> dict[str, Any]:
        # torch's own drops attributes, so that a copy could not step.
        return {**super().__getstate__(), "constraint": self.constraint, "_gate_lr": self._gate_lr}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group with ``is_gate=True`` takes gate_lr and no weight decay unless it sets its own rate."""
        if param_group.get("is_gate"):
            if decay := param_group.setdefault("weight_decay", 0.0):
                raise InputError(
                    f"weight_decay={decay} on the gates would pull each towards zero; pass 0", code="gates-decay"
                )
            param_group.setdefault("lr", self._gate_lr)
            # Whether a gate has had a non-zero gradient. In the group, so that it is saved and restored.
            param_group.setdefault("started", False)
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's; torch's AdamW's state is taken too. Options that it lacks stay; moments keep their precision.

        Raises:
            InputError: the saved gates are other parameters, or the saved rounding is another.
        """
        saved = []
        for mine, theirs in zip(self.param_groups, state_dict["param_groups"], strict=False):  # torch compares lengths
            for key in ("is_gate", "rounding"):
                if theirs.get(key, mine[key]) != mine[key]:
                    raise InputError(
                        f"the saved state has {key}={theirs[key]!r} where this optimizer has {mine[key]!r}; build it "
                        "as in the run that saved it",
                        code="other-state",
                    )
            saved.append({**{k: v for k, v in mine.items() if k not in ("params", "param_names")}, **theirs})
        saved += state_dict["param_groups"][len(saved) :]
        super().load_state_dict({**state_dict, "param_groups": saved})
        parameters = [p for group in self.param_groups for p in group["params"]]
        keys = [key for group in saved for key in group["params"]]
        for p, key in zip(parameters, keys, strict=True):
            if compensated(p, self.defaults["rounding"]):
                for name in ("exp_avg", "exp_avg_sq"):  # which torch has cast to bfloat16
                    if name in state_dict["state"].get(key, {}):
                        value = state_dict["state"][key][name]
                        self.state[p][name] = value.to(p.device, torch.float32, copy=True)
                if self.defaults["rounding"] == "kahan" and p in self.state:
                    self.state[p].setdefault("error", torch.zeros_like(p))

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
            RunFailedError: a gate or its gradient is not finite, which has no projection; nothing has moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # First, because they can fail, and then nothing may have moved.
        self._step_gates([group for group in self.param_groups if group["is_gate"]])
        for group in self.param_groups:
            if not group["is_gate"]:
                self._step_adamw(group)
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
        if self.constraint is not None:
            _check_finite(gates)
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
        number = next(i for i, other in enumerate(self.param_groups) if other is group)
        step_adamw(params, states, group, group["seed"] + (number << 16))

    def _step_sgd(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        buffers: list[Tensor | None] = [None] * len(params)
        if group["gate_momentum"]:
            for i, p in enumerate(params):
                state = self.state[p]
                if "momentum_buffer" not in state:
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


def _check_finite(gates: list[Tensor]) -> None:
    """Refuse a gate whose value or gradient is not finite. Waits for the device once.

    Raises:
        RunFailedError: "not-finite".
    """
    good = torch.ones(sum(g.numel() for g in gates), dtype=torch.bool, device=gates[0].device)
    good &= _vector(gates).isfinite()
    good &= _vector([torch.zeros_like(g) if g.grad is None else g.grad for g in gates]).isfinite()
    if not good.all():
        index = int(good.logical_not().nonzero()[0])
        raise RunFailedError(
            f"gate {index + 1} of {len(good)} or its gradient is not finite, so the gates have no projection; look for "
            "the overflow before it, or lower gate_lr",
            code="not-finite",
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
