"""The engine of GaLore, Fira and APOLLO: an inner optimizer that steps in a low-rank space, and what goes around it.

    R = project(G)                 the gradient (m, n) in a basis P that is renewed every `update_gap` steps
    N = the inner optimizer's step for R, its state of R's shape
    W <- (W + change(N, ...)) (1 - lr * weight_decay)            the change is the method's, see `steps`

The inner optimizer holds a compact parameter in place of each projected weight. Zero it, give it R as gradient, step
the inner optimizer: its new value is N (learning rate included). An inner optimizer whose step depends on the weight
(LAMB, Adafactor) starts from project(W) instead of zero. Weights that are not projected are handed to it as they are.
"""

import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, ClassVar, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from loraloom.errors import InputError
from loraloom.optim.galore.bases import Bases, project
from loraloom.optim.galore.checks import check_arguments, check_weight
from loraloom.optim.galore.compact import (
    Slot,
    average_,
    fill,
    finite,
    float32_slot,
    free,
    laid_out_like,
    projected_slot,
)
from loraloom.optim.galore.groups import project_groups
from loraloom.optim.galore.inner import OuterOptimizer, complete, inner_class, reads_weights
from loraloom.optim.galore.layerwise import leave_gradients, project_during_backward
from loraloom.optim.options import ProjectionOptions, names
from loraloom.optim.param_groups import build_param_groups
from loraloom.optim.rounding import check_rounding, compensated, move_


class ProjectedOptimizer(OuterOptimizer):
    """What `GaLore`, `Fira` and `APOLLO` have in common; see there.

    Attributes:
        Options: the dataclass of the method's options.
        needs_gradient: whether a step reads the whole gradient, and not its projection alone.
        options: their values. Those in ``param_groups`` count where a group has them.
    """

    Options: ClassVar[type[ProjectionOptions]] = ProjectionOptions
    needs_gradient: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Show the options in the constructor's signature."""
        super().__init_subclass__(**kwargs)
        own = [p for p in inspect.signature(ProjectedOptimizer.__init__).parameters.values() if p.name != "self"]
        explicit = {p.name for p in own}
        listed = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=getattr(cls.Options(), f.name))
            for f in fields(cls.Options)
            if f.name not in explicit
        ]
        cls.__signature__ = inspect.Signature([*own[:-1], *listed, own[-1]])  # type: ignore[attr-defined]

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        inner: str | Callable[..., Optimizer] = "adamw",
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        **options: Any,
    ) -> None:
        mine = {name: options.pop(name) for name in names(self.Options) if name in options}
        self.options = self.Options(**mine)
        self.max_grad_norm, self.process_group = max_grad_norm, process_group
        check_arguments(self, weight_decay)
        # With a GradScaler the step itself skips what overflowed: it alone knows of the compact gradients.
        self._step_supports_amp_scaling = self.layerwise
        self.slots = {}
        self._reported: set[str] = set()
        o = self.options
        if isinstance(params, nn.Module):
            groups = build_param_groups(params, lr, weight_decay=weight_decay)
            params = project_groups(params, groups, o.target_modules, o.rank_pattern)
        elif o.target_modules or o.rank_pattern:
            raise InputError("target_modules and rank_pattern name modules; pass the model as params", code="no-model")
        defaults = {"lr": lr, "weight_decay": weight_decay, "rank": o.rank, "update_gap": o.update_gap}
        super().__init__(params, {**defaults, "scale": o.scale, "side": o.side})
        if not self.projected:
            raise InputError(
                f"{type(self).__name__} found no matrix whose sides exceed rank={o.rank}; lower rank, or use the inner "
                "optimizer alone. DeepSpeed ZeRO and FSDP1 flatten weights and can't be used; DDP and FSDP2 can",
                code="nothing-to-project",
            )
        check_rounding(self.options.rounding, [slot.weight for slot in self.slots.values()])
        build = inner_class(inner)
        self.adopt(build([self.inner_group(group) for group in self.param_groups], **options))
        like = next(iter(self.slots.values())).compact
        self._reads_weights = reads_weights(
            lambda groups: build(groups, **options), self.inner_group(self.param_groups[0]), like
        )
        if process_group is not None:  # all start from the weights of the first, as in DistributedDataParallel
            first = dist.get_global_rank(process_group, 0)
            for held in (p for group in self.param_groups for p in group["params"]):
                dist.broadcast(self.slots[held].weight if held in self.slots else held, first, process_group)
        identity = self._identity()
        for group in [self.defaults, *self.param_groups]:
            group.update(identity)

    @property
    def layerwise(self) -> bool:
        """Whether gradients are projected and freed during backward."""
        return getattr(self.options, "layerwise", False)

    @property
    def projected(self) -> dict[Tensor, Slot]:
        """The slots of the weights that are projected, by the tensor in ``param_groups``."""
        return {held: slot for held, slot in self.slots.items() if slot.rank is not None}

    # What a method adds

    def bases(self, slot: Slot) -> Bases:
        """The weight's bases now, in float32; (None, None) before the first."""
        raise NotImplementedError

    def renew(self, slot: Slot, G: Tensor) -> None:
        """Renew the bases if that is due, from the first gradient (m, n) of a step."""

    def change(self, slot: Slot, N: Tensor, lr: float, scale: float) -> Tensor:
        """The change of a projected weight, (m, n), from the inner optimizer's compact step N."""
        raise NotImplementedError

    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group is projected with its own rank, side, scale and update_gap if it sets them."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        too_small = []
        for i, p in enumerate(group["params"]):
            small = group["rank"] is not None and p.ndim == 2 and group["rank"] >= min(p.shape)
            if small:
                too_small.append(tuple(p.shape))
            if small or group["rank"] is None or p.ndim != 2:
                if compensated(p, self.options.rounding):
                    self.slots[p] = float32_slot(p, len(self.slots), len(self.param_groups) - 1)
                continue
            check_weight(self, p, group["side"])
            place = (len(self.slots), len(self.param_groups) - 1)
            slot = projected_slot(p, *place, group["rank"], group["side"], self.layerwise)
            group["params"][i] = slot.held
            self.slots[slot.held] = slot
            if self.layerwise:
                project_during_backward(self, slot)
            else:
                leave_gradients(p)
        if too_small:
            self.report_once(
                "small",
                f"{len(too_small)} matrices with a side of rank={group['rank']} or less are not projected and get the "
                f"inner optimizer as it is, for example {too_small[0]}",
            )
        if hasattr(self, "inner"):
            self.inner.add_param_group(self.inner_group(group))
            complete(group, self.inner.param_groups[-1])

    # The step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of all parameters that have a gradient.

        A weight whose gradient is not finite is left out of the step. A gradient that is zero or not finite renews no
        basis. Each is reported once, as a warning. In layer-wise mode under a GradScaler the whole step is skipped.

        Args:
            closure: recomputes the loss and the gradients, and returns the loss.

        Returns:
            The closure's loss, if there is a closure.

        Raises:
            InputError: the groups hold a parameter that the optimizer was not given, or one that changed its shape.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._overflowed():
            return loss
        self.synchronize()
        slots = self._collect()
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], self.max_grad_norm)
        active = finite(slots)
        if len(active) < len(slots):
            count = len(slots) - len(active)
            self.report_once("left out", f"{count} gradients are not finite; their weights are left out of the step")
        for slot in active:
            fill(slot.compact, self._start(slot))
        self.inner.step()
        for slot in active:
            self._apply(slot)
        return loss

    def receive(self, slot: Slot, gradient: Tensor) -> None:
        """Add a weight's projected gradient to its compact gradient; renew its basis first, if that is due.

        Args:
            slot: the weight, a value of ``slots``.
            gradient: of the weight's shape, averaged over the processes unless there is a process_group.
        """
        state = self.state[slot.held]
        if tuple(gradient.shape) != slot.shape:
            raise InputError(
                f"a gradient of shape {tuple(gradient.shape)} is not that of the weight, {slot.shape}; "
                "wrappers that flatten weights (DeepSpeed ZeRO, FSDP1) can't be used with GaLore; DDP and FSDP2 can",
                code="flattened",
            )
        G, sum_so_far = gradient.to(slot.compact.dtype), slot.compact.grad
        state.setdefault("step", 0)
        if slot.rank is None:
            slot.compact.grad = G
            return
        if sum_so_far is None:
            self.renew(slot, G)
        bases = self.bases(slot)
        if any(basis is not None for basis in bases):
            R = laid_out_like(project(G, bases), slot.compact)
            slot.compact.grad = R if sum_so_far is None else sum_so_far + R
        elif not G.isfinite().all():
            # There is no basis to project it to, but a GradScaler has to see that it overflowed.
            slot.compact.grad = torch.full_like(slot.compact, float("nan"))

    def report_once(self, kind: str, message: str) -> None:
        """Warn, unless something of this kind was warned of before."""
        if kind not in self._reported:
            self._reported.add(kind)
            warnings.warn(f"GaLore: {message}", stacklevel=4)

    def _collect(self) -> list[Slot]:
        """Project what is not projected yet, average over the processes, and decay what is not projected."""
        slots = []
        for group in self.param_groups:
            for p in group["params"]:
                slot = self.slots.get(p)
                if slot is not None:
                    if slot.held is slot.weight and p.grad is not None:
                        self.receive(slot, p.grad)
                    if (R := slot.compact.grad) is not None:
                        slots.append(slot)
                        if self.process_group is not None:
                            average_(R, self.process_group)
                elif p.grad is not None:
                    if self.process_group is not None:
                        average_(p.grad, self.process_group)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
        return slots

    def _start(self, slot: Slot) -> Tensor | None:
        """Where the inner optimizer's step begins: zero (None), or the projected weight if its step depends on it."""
        if not self._reads_weights:
            return None
        return laid_out_like(project(slot.weight.to(slot.compact.dtype), self._known_bases(slot)), slot.compact)

    def _apply(self, slot: Slot) -> None:
        """Move a weight by what the inner optimizer has made of its start, and free the compact tensors."""
        state, group = self.state[slot.held], self.param_groups[slot.group]
        lr, start = float(group["lr"]), self._start(slot)
        N = slot.compact.detach() if start is None else slot.compact.detach() - start
        D = N if slot.rank is None else laid_out_like(self.change(slot, N, lr, group["scale"]), slot.weight)
        rounding = self.options.rounding
        if rounding == "kahan" and compensated(slot.weight, rounding):
            state.setdefault("error", torch.zeros_like(slot.weight))
        # Bases are drawn with the seeds below 2^62.
        seed = (1 << 62) + self.options.seed + slot.index + (state["step"] << 32)
        move_(slot.weight, D, lr * group["weight_decay"], rounding, state.get("error"), seed)
        slot.compact.grad = None
        free(slot.compact)
        state["step"] += 1

    def _known_bases(self, slot: Slot) -> Bases:
        return (None, None) if slot.rank is None else self.bases(slot)

    def _overflowed(self) -> bool:
        """In layer-wise mode: unscale what a GradScaler scaled; or drop it, if something overflowed."""
        if not self.layerwise:
            return False
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is not None and self.process_group is not None:
            found = torch.as_tensor(found, dtype=torch.float32, device=next(iter(self.slots.values())).compact.device)
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.process_group)
        if found is not None and float(found):
            for slot in self.slots.values():
                slot.compact.grad = None
            return True
        if scale is not None:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.div_(scale.to(p.grad.device))
        return False

    def _identity(self) -> dict[str, Any]:
        """What decides the meaning of a saved state; see `state.IDENTITY`."""
        kind, o = type(self.inner), self.options
        inner = f"{kind.__module__.removesuffix(f'.{kind.__name__.lower()}')}.{kind.__qualname__}"
        keys = {key: getattr(o, key) for key in ("refresh", "basis_bits", "rounding") if hasattr(o, key)}
        return {"method": type(self).__name__, "inner": inner, **keys}
