"""Muon for the matrices of hidden layers, AdamW for everything else: torch's own, as one optimizer.

Muon replaces the momentum of a matrix by the nearest matrix with orthonormal rows or columns (Jordan, 2024). It is not
made for embeddings, output layers, vectors and convolutions. Its step is scaled to the size of AdamW's (Moonshot, arXiv
2502.16982), so that both take one rate.
"""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from loraloom.errors import InputError
from loraloom.optim.galore.groups import linear_weights
from loraloom.optim.options import MuonOptions

# Groups of `build_param_groups` that hold low-rank factors.
_FACTORS = ("lora_A", "lora_B", "mixers")


class Muon(Optimizer):
    """torch's Muon for groups with ``use_muon=True``, torch's AdamW for the others.

    Args:
        params: parameters or groups as torch takes them. A group that does not say ``use_muon`` is split: its matrices
            get Muon, the rest AdamW. `muon_groups` chooses by the layers of a model.
        lr: learning rate of both.
        momentum: of Muon.
        betas, eps: of AdamW.
        weight_decay: decoupled decay of the groups that set none themselves.

    Raises:
        InputError: there is no matrix for Muon, or a group with ``use_muon=True`` holds something else.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        momentum: float = MuonOptions.momentum,
        betas: tuple[float, float] = MuonOptions.betas,
        eps: float = MuonOptions.eps,
        weight_decay: float = 1e-2,
    ) -> None:
        self._options = {
            True: {"momentum": momentum, "nesterov": True, "eps": 1e-7, "adjust_lr_fn": "match_rms_adamw"},
            False: {"betas": betas, "eps": eps},
        }
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        taken = [group for group in self.param_groups if group["use_muon"]]
        if not taken:
            raise InputError("there is no matrix for Muon; use 'adamw'", code="nothing-for-muon")
        # They share our groups and our state.
        self.muon = torch.optim.Muon(taken)
        rest = [group for group in self.param_groups if not group["use_muon"]]
        self.adamw = torch.optim.AdamW(rest or [{"params": [nn.Parameter(torch.empty(0))]}])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a group that does not say ``use_muon`` becomes one or two that do."""
        if "use_muon" not in param_group:
            params = param_group["params"]
            params = [params] if isinstance(params, Tensor) else list(params)
            for use_muon in (True, False):
                if part := [p for p in params if (p.ndim == 2) == use_muon]:
                    self.add_param_group({**param_group, "params": part, "use_muon": use_muon})
            return
        if param_group["use_muon"]:
            for p in param_group["params"]:
                if p.ndim != 2:
                    raise InputError(
                        f"use_muon=True for a parameter of shape {tuple(p.shape)}; Muon is for matrices",
                        code="not-a-matrix",
                    )
        for key, value in self._options[param_group["use_muon"]].items():
            param_group.setdefault(key, value)
        super().add_param_group(param_group)
        if hasattr(self, "adamw"):
            inner = self.muon if param_group["use_muon"] else self.adamw
            for key, value in inner.defaults.items():
                param_group.setdefault(key, value)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for use_muon, optimizer in ((True, self.muon), (False, self.adamw)):
            optimizer.param_groups = [group for group in self.param_groups if group["use_muon"] == use_muon]
            optimizer.state = self.state
            optimizer.step()
        return loss


def muon_groups(model: nn.Module, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of `build_param_groups`, split into what Muon takes and the rest.

    Muon takes the matrices of adapters, and of whole weights those of linear layers, except the output embedding and
    weights tied to an embedding. Heads of modules_to_save get AdamW.
    """
    linear = {id(weight) for weight in linear_weights(model).values()}
    result = []
    for group in groups:
        taken = {
            id(p)
            for p in group["params"]
            if p.ndim == 2 and (group["name"] in _FACTORS or (group["name"] == "base" and id(p) in linear))
        }
        for use_muon in (True, False):
            if part := [p for p in group["params"] if (id(p) in taken) == use_muon]:
                result.append({**group, "params": part, "use_muon": use_muon})
    return result
