"""GaLore, Fira and APOLLO: AdamW, or any other torch optimizer, with its state in a low-rank space.

    GaLore    W <- W + scale * back(N)
    Fira      W <- W + scale * (back(N) - lr * limit(phi * (G - back(R))))
    APOLLO    W <- W - scale * lr * limit(phi * G)

G (m, n) is the gradient, R = project(G) its projection, N the inner optimizer's step for R, back the transpose of
project, phi = ||N_j|| / (lr ||R_j||) per channel. Decay is decoupled: W <- W (1 - lr * weight_decay).
"""

from typing import ClassVar, cast

import torch
from torch import Tensor

from loraloom.optim.galore.bases import Bases, change_of_bases, random_bases, subspace_bases, svd_bases
from loraloom.optim.galore.compact import Slot, average_, replicated_like, rotate_state, whole
from loraloom.optim.galore.engine import ProjectedOptimizer
from loraloom.optim.galore.state import store_bases, stored_bases
from loraloom.optim.galore.steps import apollo_change, fira_change, galore_change
from loraloom.optim.options import APOLLOOptions, BasisOptions, FiraOptions, GaLoreOptions, ProjectionOptions


class GaLore(ProjectedOptimizer):
    """Any torch optimizer with its state in the leading subspace of each weight's gradient (arXiv 2403.03507).

    Args:
        params: a model, of which the weights of linear layers are projected (see `project_groups`); or parameters or
            groups as torch takes them, of which every matrix is projected unless its group has ``rank=None``.
        inner: the inner optimizer: a name of `INNER`, or a class that is called with groups.
        lr: learning rate. A group's own rate, and a scheduler's, reach the inner optimizer before every step.
        weight_decay: decoupled decay of the groups that set none themselves.
        max_grad_norm: with ``layerwise``, clip the norm of all (projected) gradients at the step, where torch's
            clip_grad_norm_ finds none.
        process_group: average the gradients over these processes here, and the compact ones only, except where a basis
            is renewed. The model must then not be wrapped in DistributedDataParallel.
        **options: those of `GaLoreOptions`, and further arguments of the inner optimizer, for example ``betas``.

    Raises:
        InputError: an argument is out of range, options exclude each other, or there is no matrix to project, as
            after DeepSpeed ZeRO or FSDP1 flattened the parameters.
    """

    Options: ClassVar[type[ProjectionOptions]] = GaLoreOptions
    options: BasisOptions

    def bases(self, slot: Slot) -> Bases:
        """The weight's bases now, in float32; (None, None) before the first."""
        left, right = stored_bases(self.state[slot.held])
        return replicated_like(left, slot.compact), replicated_like(right, slot.compact)

    def renew(self, slot: Slot, G: Tensor) -> None:
        """Renew the bases if that is due, from the first gradient (m, n) of a step."""
        state, group, o = self.state[slot.held], self.param_groups[slot.group], self.options
        old = stored_bases(state)
        started = any(basis is not None for basis in old)
        phase = slot.index * group["update_gap"] // len(self.slots) if o.stagger else 0
        step = state["step"]
        if started and (not step or (step + phase) % group["update_gap"]):
            return
        if self.process_group is not None:
            average_(G, self.process_group)
        G = whole(G)
        largest = float(G.abs().max())
        if not 0 < largest < float("inf"):
            kind = "zero" if largest == 0 else "not finite"
            self.report_once(kind, f"a gradient was {kind} when its basis was to be renewed; the basis stays as it was")
            return
        rank = cast(int, slot.rank)
        if o.refresh == "svd":
            new = svd_bases(G, rank, slot.sides)
        else:
            generator = torch.Generator().manual_seed(o.seed + slot.index + (step << 32))
            new = subspace_bases(G, rank, slot.sides, old, generator)
        if o.rotate_moments and started:
            rotate_state(self.inner.state[slot.compact], change_of_bases(new, old), group.get("betas"))
        store_bases(state, new, o.basis_bits)

    def change(self, slot: Slot, N: Tensor, lr: float, scale: float) -> Tensor:
        """scale * back(N), (m, n)."""
        return galore_change(N, *self.bases(slot), scale)


class Fira(GaLore):
    """GaLore plus the gradient outside the basis, scaled as the inner optimizer scaled the part inside.

    Chen et al., arXiv 2410.01623. Full-rank steps at GaLore's memory; it holds the whole gradient until the step, so
    it goes neither layer-wise nor with FSDP2. In the released code ``scale`` multiplies neither the residual nor, in
    it, G; at 1 both are the paper.

    Args:
        params, inner, lr, weight_decay: as in `GaLore`.
        **options: those of `FiraOptions`, and further arguments of the inner optimizer.
    """

    Options: ClassVar[type[ProjectionOptions]] = FiraOptions
    needs_gradient = True

    def change(self, slot: Slot, N: Tensor, lr: float, scale: float) -> Tensor:
        """scale * (back(N) - lr * limit(phi * (G - back(R)))), (m, n)."""
        if not lr:
            return super().change(slot, N, lr, scale)
        state, R, G = self.state[slot.held], cast(Tensor, slot.compact.grad), cast(Tensor, slot.weight.grad)
        left, right = self.bases(slot)
        D, state["norm"] = fira_change(G.to(N.dtype), R, N, left, right, lr, scale, state.get("norm"))
        return D


class APOLLO(ProjectedOptimizer):
    """The gradient, each channel scaled as an inner optimizer scales its random projection.

    Zhu et al., arXiv 2412.05270. No SVD, and no basis in memory: it is drawn again from its seed. With ``rank=1`` the
    scaling is one number per weight (APOLLO-Mini; the paper's scale is then sqrt(128), about 11).

    Args:
        params, inner, lr, weight_decay: as in `GaLore`.
        **options: those of `APOLLOOptions`, and further arguments of the inner optimizer.
    """

    Options: ClassVar[type[ProjectionOptions]] = APOLLOOptions
    needs_gradient = True

    def bases(self, slot: Slot) -> Bases:
        """The weight's bases now, in float32, drawn again every `update_gap` steps."""
        draw = self.state[slot.held]["step"] // self.param_groups[slot.group]["update_gap"]
        seed = self.options.seed + slot.index + (draw << 32)
        m, n = slot.shape
        return random_bases((m, n), cast(int, slot.rank), slot.sides, seed, slot.compact)

    def change(self, slot: Slot, N: Tensor, lr: float, scale: float) -> Tensor:
        """-scale * lr * limit(phi * G), (m, n)."""
        state, R, G = self.state[slot.held], cast(Tensor, slot.compact.grad), cast(Tensor, slot.weight.grad)
        if not lr:
            return torch.zeros_like(G, dtype=N.dtype)
        D, state["norm"] = apollo_change(G.to(N.dtype), R, N, slot.sides, lr, scale, state.get("norm"))
        return D
