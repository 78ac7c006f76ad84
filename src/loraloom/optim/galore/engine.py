"""GaLore: all weights are trained, and the optimizer's state is low-rank (Zhao et al., arXiv 2403.03507).

    R = project(G)                 the gradient (m, n) in a basis P that is renewed every `update_gap` steps
    N = the step that an inner optimizer takes for the gradient R                   (its state has R's shape)
    W <- (W + scale * back(N)) (1 - lr * weight_decay)

The inner optimizer is any torch optimizer class. It holds a compact parameter in place of each projected weight: the
compact parameter is set to zero, gets R as its gradient, and what the inner optimizer has made of it is N, learning
rate included. Weights that are not projected are handed to it as they are. Two successors are options:

    Fira     W <- W + scale * (back(N) - lr * limit(phi * (G - back(R))))           phi: ||N_j|| / (lr ||R_j||)
    APOLLO   W <- W - scale * lr * limit(phi * G)                                   P drawn at random, not stored
"""

import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from loraloom.optim.galore.bases import Bases, Side, change_of_bases, project, random_bases
from loraloom.optim.galore.compact import (
    Projected,
    average_,
    fill_with_zeros,
    free,
    laid_out_like,
    projected,
    replicated_like,
    rotate_state,
    whole,
)
from loraloom.optim.galore.groups import project_groups
from loraloom.optim.galore.inner import OuterOptimizer, complete
from loraloom.optim.galore.layerwise import leave_gradients, project_during_backward
from loraloom.optim.galore.options import check_options
from loraloom.optim.galore.steps import add_projected_step_, add_scaled_gradient_, finite, renewed_bases
from loraloom.optim.param_groups import build_param_groups


class GaLore(OuterOptimizer):
    """Any torch optimizer with its state in the leading subspace of each weight's gradient.

    Args:
        params: a model, of which the weights of linear layers are projected (see `project_groups`); or parameters or
            groups as torch takes them, of which every matrix is projected unless its group has ``rank=None``.
        inner: the class of the inner optimizer, called with groups.
        lr: learning rate. A group's own rate, and a scheduler's, reach the inner optimizer before every step.
        rank: columns of the basis. The state of an (m, n) weight is that of max(m, n) x rank numbers. Raise it first
            if GaLore trails AdamW; a quarter of the model's width is the paper's choice.
        update_gap: steps from one refresh of a weight's basis to the next; 200 in the paper, 50 to 1000 work alike.
        scale: multiplies the step of projected weights only; 0.25 in the paper. 1 with APOLLO.
        side: "std" projects the shorter axis; "reverse_std", "left", "right" and "full" (both axes) are the others.
        refresh: "subspace" warm-starts from the old basis, "svd" is the paper's full SVD, "random" is APOLLO: the
            compact step only scales the gradient, per channel, or per weight where rank is 1 (APOLLO-Mini).
        stagger: spread the refreshes of the weights evenly over the gap. False refreshes all in one step, as published.
        rotate_moments: carry momentum and Adam's averages into the new basis (LDAdam) instead of keeping them as they
            are. Worth it where update_gap is small.
        residual: Fira: also apply the part of the gradient outside the basis, scaled as the inner optimizer scaled R.
        layerwise: take each gradient during backward, project it and free it; see `loraloom.optim.galore.layerwise`.
        max_grad_norm: with `layerwise`, clip the norm of all (projected) gradients at the step, where torch's
            clip_grad_norm_ finds none.
        process_group: average the gradients over these processes here, and the compact ones only, except where a basis
            is refreshed. The model must then not be wrapped in DistributedDataParallel.
        weight_decay: decoupled decay of the groups that set none themselves.
        seed: of what "subspace" and "random" draw.
        **inner_options: further arguments of `inner`, for example ``betas``. torch's Adafactor, which scales its step
            by the size of the parameter, here zero, gets ``eps=(None, 1.0)`` unless you pass it.

    Raises:
        ValueError: an argument is out of range, options exclude each other, or there is no matrix to project, as
            after DeepSpeed ZeRO or FSDP1 flattened the parameters.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        inner: Callable[..., Optimizer] = torch.optim.AdamW,
        lr: float = 1e-3,
        *,
        rank: int = 128,
        update_gap: int = 200,
        scale: float = 0.25,
        side: Side = "std",
        refresh: Literal["subspace", "svd", "random"] = "subspace",
        stagger: bool = True,
        rotate_moments: bool = False,
        residual: bool = False,
        layerwise: bool = False,
        max_grad_norm: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        weight_decay: float = 0.0,
        seed: int = 0,
        **inner_options: Any,
    ) -> None:
        check_options(
            refresh,
            side,
            residual=residual,
            rotate_moments=rotate_moments,
            layerwise=layerwise,
            max_grad_norm=max_grad_norm,
            process_group=process_group,
        )
        for name, value, least in (("rank", rank, 1), ("update_gap", update_gap, 1), ("weight_decay", weight_decay, 0)):
            if not value >= least:
                raise ValueError(f"{name}={value} is out of range; pass {least} or more")
        self.refresh, self.stagger, self.residual, self.layerwise = refresh, stagger, residual, layerwise
        self.rotate_moments, self.max_grad_norm, self.seed = rotate_moments, max_grad_norm, seed
        self.process_group = process_group
        self.projected = {}
        self._reported: set[str] = set()
        if isinstance(params, nn.Module):
            params = project_groups(params, build_param_groups(params, lr, weight_decay=weight_decay))
        defaults = {"lr": lr, "weight_decay": weight_decay, "rank": rank, "update_gap": update_gap, "scale": scale}
        super().__init__(params, {**defaults, "side": side})
        if not self.projected:
            raise ValueError(
                f"GaLore found no matrix whose sides exceed rank={rank}; lower rank, or use the inner optimizer alone. "
                "DeepSpeed ZeRO and FSDP1 flatten weights and can't be used with it; DDP and FSDP2 can"
            )
        if inner is torch.optim.Adafactor:
            inner_options.setdefault("eps", (None, 1.0))
        self.adopt(inner([self.inner_group(group) for group in self.param_groups], **inner_options))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group is projected with its own rank, side, scale and update_gap if it sets them."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        too_small = []
        for i, p in enumerate(group["params"]):
            if group["rank"] is None or p.ndim != 2:
                continue
            if group["rank"] >= min(p.shape):
                too_small.append(tuple(p.shape))
                continue
            if isinstance(p, DTensor) and (self._needs_gradient or self.layerwise or self.process_group is not None):
                raise ValueError(
                    "a weight is sharded by FSDP2, where residual=True, refresh='random', layerwise=True and "
                    "process_group can't be used; leave them out, or use DDP"
                )
            if self._needs_gradient and group["side"] == "full":
                option = "residual=True" if self.residual else "refresh='random'"
                raise ValueError(f"{option} scales channels, and side='full' leaves none; use side='std'")
            slot = projected(p, len(self.projected), len(self.param_groups) - 1, group["rank"], group["side"])
            if self.layerwise:
                group["params"][i] = slot.compact
                project_during_backward(self, slot)
            else:
                leave_gradients(p)
            self.projected[group["params"][i]] = slot
        if too_small:
            self._report_once(
                "small",
                f"{len(too_small)} matrices with a side of rank={group['rank']} or less are not projected and get the "
                f"inner optimizer as it is, for example {too_small[0]}",
            )
        if hasattr(self, "inner"):
            self.inner.add_param_group(self.inner_group(group))
            complete(group, self.inner.param_groups[-1])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of all parameters that have a gradient.

        A weight whose gradient is not finite is left out of the step. A gradient that is zero or not finite renews no
        basis. Each is reported once, as a warning.

        Args:
            closure: recomputes the loss and the gradients, and returns the loss.

        Returns:
            The closure's loss, if there is a closure.

        Raises:
            ValueError: the groups hold a parameter that GaLore was not given, or one that has changed its shape.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.synchronise()
        slots = []
        for group in self.param_groups:
            for p in group["params"]:
                if slot := self.projected.get(p):
                    if not self.layerwise and p.grad is not None:
                        self.receive(slot, p.grad)
                    if (R := slot.compact.grad) is not None:
                        slots.append(slot)
                        if self.process_group is not None:
                            average_(R, self.process_group)
                elif p.grad is not None:
                    if self.process_group is not None:
                        average_(p.grad, self.process_group)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], self.max_grad_norm)
        active = finite(slots)
        if len(active) < len(slots):
            count = len(slots) - len(active)
            self._report_once("left out", f"{count} gradients are not finite; their weights are left out of the step")
        for slot in active:
            fill_with_zeros(slot.compact)
        self.inner.step()
        for slot in active:
            self._apply(slot)
        return loss

    def receive(self, slot: Projected, gradient: Tensor) -> None:
        """Add a weight's projected gradient to its compact gradient; renew its basis first, if that is due.

        Args:
            slot: the weight, a value of ``projected``.
            gradient: (m, n), averaged over the processes unless there is a process_group.
        """
        state, group = self._state(slot), self.param_groups[slot.group]
        if tuple(gradient.shape) != slot.shape:
            raise ValueError(
                f"a gradient of shape {tuple(gradient.shape)} is not that of the weight, {slot.shape}; "
                "wrappers that flatten weights (DeepSpeed ZeRO, FSDP1) can't be used with GaLore; DDP and FSDP2 can"
            )
        G = gradient.to(slot.compact.dtype)
        sum_so_far = slot.compact.grad
        step = state.setdefault("step", 0)
        if sum_so_far is None and self.refresh != "random":
            phase = slot.index * group["update_gap"] // len(self.projected) if self.stagger else 0
            started = "left" in state or "right" in state
            if not started or (step and (step + phase) % group["update_gap"] == 0):
                if self.process_group is not None:
                    average_(G, self.process_group)
                self._renew(slot, G)
        bases = self._bases(slot)
        if any(basis is not None for basis in bases):
            R = laid_out_like(project(G, bases), slot.compact)
            slot.compact.grad = R if sum_so_far is None else sum_so_far + R

    def _renew(self, slot: Projected, G: Tensor) -> None:
        state = self._state(slot)
        G = whole(G)
        largest = float(G.abs().max())
        if not 0 < largest < float("inf"):
            kind = "zero" if largest == 0 else "not finite"
            self._report_once(
                kind, f"a gradient was {kind} when its basis was to be renewed; the basis stays as it was"
            )
            return
        old: Bases = (state.get("left"), state.get("right"))
        new = renewed_bases(self.refresh, G, slot, old, self.seed, state["step"])
        if self.rotate_moments and any(basis is not None for basis in old):
            betas = self.param_groups[slot.group].get("betas")
            rotate_state(self.inner.state[slot.compact], change_of_bases(new, old), betas)
        state |= {name: basis for name, basis in zip(("left", "right"), new, strict=True) if basis is not None}

    def _bases(self, slot: Projected) -> Bases:
        state = self._state(slot)
        if self.refresh == "random":
            draw = state["step"] // self.param_groups[slot.group]["update_gap"]
            seed = self.seed + slot.index + (draw << 32)
            return random_bases(slot.shape, slot.rank, slot.sides, seed, slot.compact)
        return replicated_like(state.get("left"), slot.compact), replicated_like(state.get("right"), slot.compact)

    def _apply(self, slot: Projected) -> None:
        """Move a weight by what the inner optimizer has made of zeros, and free the compact tensors."""
        state, group = self._state(slot), self.param_groups[slot.group]
        lr, scale = float(group["lr"]), group["scale"]
        bases = None if self.refresh == "random" else self._bases(slot)
        if bases is not None:
            add_projected_step_(slot, bases, scale)
        if self._needs_gradient and lr:
            state["norm"] = add_scaled_gradient_(slot, bases, lr, scale, state.get("norm"))
        if group["weight_decay"]:
            slot.weight.mul_(1 - lr * group["weight_decay"])
        slot.compact.grad = None
        free(slot.compact)
        state["step"] += 1

    @property
    def _needs_gradient(self) -> bool:
        return self.residual or self.refresh == "random"

    def _state(self, slot: Projected) -> dict[str, Any]:
        return self.state[slot.compact if self.layerwise else slot.weight]

    def _report_once(self, kind: str, message: str) -> None:
        if kind not in self._reported:
            self._reported.add(kind)
            warnings.warn(f"GaLore: {message}", stacklevel=3)
