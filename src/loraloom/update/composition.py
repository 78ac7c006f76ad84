"""A composition: many pre-trained adapters as one, with one weight for each (WLoRA, 2402.15414).

    W' = W + sum_n w_n(v) D_n,    D_n = B_n A_n  with mixers, gates and scales multiplied in

In every layer the members' A_n lie above each other, A (R, in), and their B_n side by side, B (out, R), R = sum_n r_n,
so that a layer costs two products however many members it has: y = x W^T + (w(v)[owner] * x A^T) B^T, where owner (R,)
says which member a row of A belongs to. A and B are frozen. The weights w (N,) come from v (N,) by a constraint:

    softmax          w = c softmax(v), over the members that the layer has, or over all
    scaled_softmax   the same with c trained: v is (N + 1,), its last entry c
    simplex          w = c v with v >= 0, sum v = 1   v is projected before it is used, hence after every optimizer step
    free             w = v

c is the total weight: 1, or what the composition says. With related members a larger total is what helps.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_type_hints

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from loraloom.annotations import describe, matches
from loraloom.update.simplex import nearest_in_simplex
from loraloom.update.traced import is_traced

CONSTRAINTS = ("softmax", "scaled_softmax", "simplex", "free")
SCOPES = ("layer", "module_type", "model")
NORMALIZATIONS = ("present", "all")


@dataclass
class Composition:
    """What ``LoomConfig.composition`` says about the members. Written by `loraloom.compose`.

    Raises:
        ValueError: names, ranks and options do not fit together.
    """

    members: list[dict[str, str]]
    """For each member its ``name``, its ``source`` (folder, repository or adapter) and the ``sha256`` of its file."""
    ranks: dict[str, list[int]]
    """Module name -> rank of each member there, 0 where a member does not adapt the module."""
    biased: list[str] = field(default_factory=list)
    """Modules in which at least one member adds to the bias (PEFT's lora_bias)."""
    scope: Literal["layer", "module_type", "model"] = "layer"
    """Which layers share one v: "layer" none, "module_type" those of one kind (all q_proj), "model" all."""
    constraint: Literal["softmax", "scaled_softmax", "simplex", "free"] = "softmax"
    normalize: Literal["present", "all"] = "present"
    """"present": in each layer the weights of the members that adapt it add up to the total. "all": the weights of all
    members do, so a layer that lacks some gets less. "free" weights need not add up."""
    trainable: bool = True
    total: float = 1.0
    """What the weights of a layer add up to: always with "softmax" and "simplex", at the start with the others."""

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("scope", self.scope, SCOPES),
            ("constraint", self.constraint, CONSTRAINTS),
            ("normalize", self.normalize, NORMALIZATIONS),
        ):
            if value not in allowed:
                raise ValueError(f"composition: {name}={value!r} is not known; use one of {', '.join(allowed)}.")
        if isinstance(self.total, bool) or not isinstance(self.total, int | float) or not 0 < self.total < math.inf:
            raise ValueError(f"composition: total={self.total!r}; expected a positive number, 1 or more.")
        names = [member.get("name") for member in self.members]
        if not names or None in names or len({*names}) < len(names):
            raise ValueError(f"composition: members are {names}; each needs a name of its own.")
        for module, ranks in self.ranks.items():
            if len(ranks) != len(names):
                raise ValueError(
                    f"composition: {module} has ranks for {len(ranks)} members, but there are {len(names)} "
                    f"({', '.join(map(str, names))}). Members cannot be taken out of a saved composition: compose anew."
                )
            if not all(isinstance(rank, int) and rank >= 0 for rank in ranks) or not any(ranks):
                raise ValueError(f"composition: {module} has ranks {ranks}; expected integers >= 0, not all 0.")
        if stray := sorted({*self.biased} - self.ranks.keys()):
            raise ValueError(f"composition: biased modules {stray} have no ranks.")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Composition":
        """From ``adapter_config.json``.

        Raises:
            ValueError: as for the class, or a key is unknown or missing.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(
                f"composition has no field {', '.join(map(repr, unknown))}. An adapter that has it needs a newer "
                "loraloom: pip install -U loraloom."
            )
        if missing := sorted({"members", "ranks"} - values.keys()):
            raise ValueError(f"composition: {', '.join(missing)} is missing from the adapter's configuration.")
        for name, hint in get_type_hints(cls).items():
            if name in values and not matches(values[name], hint):
                raise ValueError(f"composition: {name} is {values[name]!r:.80}; expected {describe(hint)}.")
        return cls(**values)

    @property
    def names(self) -> list[str]:
        return [member["name"] for member in self.members]

    def group(self, module: str) -> str:
        """A name for the layers that share one v with this one."""
        if self.scope == "layer":
            return module
        if self.scope == "model":
            return ""
        return ".".join(part for part in module.split(".") if not part.isdigit())


def member_weights(v: Tensor, present: Tensor | None, constraint: str, total: float = 1.0) -> Tensor:
    """The weights w (N,) of the members.

    Args:
        v: the parameter, (N,), or (N + 1,) for "scaled_softmax"; for "simplex" it is taken as it is, see
            :func:`project`.
        present: mask (N,) of the members among which a softmax is taken; None for all. Others get 0.
        constraint: one of ``CONSTRAINTS``.
        total: c of "softmax" and "simplex".
    """
    if constraint == "free":
        return v
    if constraint == "simplex":
        return v if total == 1 else total * v
    scale: Tensor | float = total
    if constraint == "scaled_softmax":
        v, scale = v[:-1], v[-1]
    w = torch.softmax(v if present is None else v.masked_fill(~present, float("-inf")), dim=0)
    return w if isinstance(scale, float) and scale == 1 else scale * w


def project(v: Tensor, among: Tensor | None) -> Tensor:
    """The nearest point to v (N,) of the simplex over the members of a mask (N,) (None: all); others get 0."""
    return nearest_in_simplex(v if among is None else v.masked_fill(~among, float("-inf")))


class Tie:
    """Layers with one v: each keeps a copy, and each copy gets the gradient of all layers' sum.

    Copies that start equal and get equal gradients stay equal under any optimizer that works entry by entry, so the
    model trains as with a single v, while tensors remain per layer (for saving, loading and DDP).
    """

    def __init__(self, factors: list[nn.Module]) -> None:
        self.factors = factors
        self._devices: dict[int, torch.device] = {}
        self._zero = torch.empty(0)

    def __getstate__(self) -> dict:  # graphs cannot be copied
        return {"factors": self.factors, "_devices": {}, "_zero": torch.empty(0)}

    def __call__(self, v: Tensor) -> Tensor:
        """v, one of the copies, as a tensor whose gradient goes to every copy."""
        if not (v.requires_grad and torch.is_grad_enabled()):
            return v
        if self._devices.get(id(v)) == v.device:
            return v.detach() + self._zero.to(v.device)
        # The first time, and after somebody has replaced or moved the parameters.
        copies: list[Any] = [factor.weight for factor in self.factors]
        if any(isinstance(copy, DTensor) for copy in copies):
            raise RuntimeError(
                "A composition whose layers share weights cannot be trained sharded (FSDP2), where a layer sees only "
                "its own tensors: use scope='layer', or DDP."
            )
        # Zero, and depends on every copy with derivative 1. Negated twice, as else the gradients of the copies would
        # be views of one memory, which adding in place corrupts.
        zero = -torch.stack([(copy.detach() - copy).to(v.device) for copy in copies]).sum(0)
        if not is_traced():  # its graph holds no tensors, so it serves every step
            self._zero, self._devices = zero, {id(copy): copy.device for copy in copies}
        return v.detach() + zero


class LayerComposition:
    """A composition in one layer: which rows of A are whose, and the weights from v."""

    def __init__(self, composition: Composition, module: str) -> None:
        self.names = composition.names
        self.ranks = composition.ranks[module]
        self.constraint = composition.constraint
        self.trainable = composition.trainable
        self.total = float(composition.total)
        self.tie: Tie | None = None
        self.owner = torch.arange(len(self.ranks)).repeat_interleave(torch.tensor(self.ranks))
        # The members whose weights add up. A softmax is taken in each layer; a projection of v serves all layers that
        # share v.
        together = [self.ranks]
        if composition.constraint in ("simplex", "free") and composition.scope != "layer":
            group = composition.group(module)
            together = [ranks for other, ranks in composition.ranks.items() if composition.group(other) == group]
        self.among = torch.tensor(together).bool().any(0)
        self.everyone = composition.normalize == "all" or bool(self.among.all())

    def start(self) -> Tensor:
        """v for equal weights that add up to the total: (N,), or (N + 1,) for "scaled_softmax"."""
        if self.constraint == "softmax":
            return torch.zeros(len(self.ranks))
        if self.constraint == "scaled_softmax":
            return torch.tensor([0.0] * len(self.ranks) + [self.total])
        among = torch.ones_like(self.among) if self.everyone else self.among
        return among / among.sum() * (self.total if self.constraint == "free" else 1.0)

    def weights(self, v: Tensor) -> Tensor:
        """w (N,), differentiable with respect to v, which for "simplex" is projected in place while it trains."""
        if self.owner.device != v.device:
            self.owner, self.among = self.owner.to(v.device), self.among.to(v.device)
        among = None if self.everyone else self.among
        if self.constraint == "simplex":
            projected = project(v.detach(), among)
            if not (v.requires_grad and torch.is_grad_enabled()):
                return member_weights(projected, among, self.constraint, self.total)
            with torch.no_grad():
                v.copy_(projected)
        return member_weights(v if self.tie is None else self.tie(v), among, self.constraint, self.total)

    def gate(self, v: Tensor) -> Tensor:
        """The weight of each row of A (R,)."""
        return self.weights(v).index_select(0, self.owner)
