"""``AdapterSelection``: WeightLoRA over time. It finds the adapters that matter, and frees the rest.

See `loraloom.selection.phases` for the schedule. While selecting, an adapter whose gate was projected to zero does not
train: its A, B and mixer have no gradient, so neither momentum nor weight decay moves them. Its gate still has one, and
the adapter may come back.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor

from loraloom.errors import InputError, RunFailedError
from loraloom.optim.weight_adam import WeightAdam
from loraloom.selection.checks import gate_set, gated_adapter
from loraloom.selection.log import FILE_NAME
from loraloom.selection.phases import FillBudget, HalveAndDouble, Phase, Phases, is_fraction, resolve_phases
from loraloom.selection.rewire import (
    adapted_layers,
    average_gradients,
    count_parameters,
    disconnect,
    expand_ranks,
    factors,
    fold_gates,
    gate,
    largest_rank,
)
from loraloom.update.simplex import Constraint, KSparse


class AdapterSelection:
    """Runs the phases of WeightLoRA on a model and its optimizer, once per optimizer step.

    It hooks itself onto ``optimizer.step()``, so that a plain training loop needs no further call; for transformers'
    Trainer add a `SelectionCallback`. Pass the Trainer the same optimizer: ``optimizers=(optimizer, None)``.

    Args:
        model: a PEFT model whose active adapter has gates (``LoomConfig.weightlora``).
        optimizer: a `WeightAdam` over the model. Its constraint is set here, step by step.
        keep: how many adapters to keep, or a fraction of them (a float below 1); or a set of `loraloom.optim` itself,
            such as ``KSparse(20)``. After the last projection the adapters with gate zero go.
        constraint: the set that the gates are projected onto. "k_sparse": at most `keep` are not zero, the reference's.
            "simplex": none is negative and their sum is `radius`; how many stay is then a result. "sparse_simplex":
            both.
        by: which gates "k_sparse" keeps: the largest ("signed", the reference's), or the largest in absolute value
            ("magnitude"), so that an adapter may be subtracted.
        radius: the sum of the gates on a simplex.
        warmup_steps: optimizer steps before the first selection; a float below 1 is a fraction of the run.
        select_every: steps between two projections of the gates while selecting. 1 is the reference.
        select_until: the step after which what is not selected is disconnected; likewise a fraction if below 1.
        reentry: whether an adapter may come back while selecting. If not, it is disconnected when first dropped.
        expand: WeightLoRA+, see `HalveAndDouble` and `FillBudget`.
        total_steps: length of the run, for fractions. A `SelectionCallback` passes the Trainer's.
        seed: of the directions that expansion adds.

    Raises:
        InputError: an argument is out of range; or the model, its adapter or the optimizer is not of the kind above.
    """

    def __init__(
        self,
        model: PeftModel,
        optimizer: WeightAdam,
        keep: int | float | Constraint | None = None,
        *,
        constraint: Literal["k_sparse", "simplex", "sparse_simplex"] = "k_sparse",
        by: Literal["signed", "magnitude"] = "signed",
        radius: float = 1.0,
        warmup_steps: int | float = 0.05,
        select_every: int = 1,
        select_until: int | float = 0.3,
        reentry: bool = True,
        expand: HalveAndDouble | FillBudget | None = None,
        total_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.adapter = gated_adapter(model, optimizer)
        self._layers = adapted_layers(model, self.adapter)
        self.modules = list(self._layers)
        self.constraint = gate_set(keep, len(self.modules), constraint, by, radius)
        self.reentry, self.expand, self.seed = reentry, expand, seed
        self._check_expansion()
        self.step = 0
        self.frozen: set[str] = set()
        self.history: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.phases: Phases | None = None
        self._schedule = (warmup_steps, select_every, select_until, expand)
        if total_steps is not None or not (is_fraction(warmup_steps) or is_fraction(select_until)):
            self.start(total_steps)
        optimizer.constraint = None
        optimizer.register_step_pre_hook(lambda *_: self._before_step())
        optimizer.register_step_post_hook(lambda *_: self._after_step())

    def start(self, total_steps: int | None) -> None:
        """Fix the schedule, now that the length of the run is known.

        Raises:
            InputError: the schedule does not fit, or the gates are sharded.
        """
        if any(isinstance(g, DTensor) for g in self._gates().values()):
            raise InputError(
                "the gates are sharded (FSDP), but disconnecting needs whole adapters: train with DDP", code="sharded"
            )
        self.phases = resolve_phases(*self._schedule, total_steps)

    @property
    def phase(self) -> Phase:
        """The phase of the next step."""
        return self._resolved().phase(self.step + 1)

    @property
    def kept(self) -> dict[str, int]:
        """The layers that still have their adapter, and its rank."""
        return {name: layer.r[self.adapter] for name, layer in self._layers.items()}

    def gates(self) -> dict[str, float]:
        """The gates of the layers that have one; a folded gate is gone. One transfer from the device."""
        gates = self._gates()
        if not gates:
            return {}
        device = next(iter(gates.values())).device
        values = torch.cat([g.detach().to(device) for g in gates.values()]).tolist()
        return dict(zip(gates, values, strict=True))

    # Saving

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs besides the model's and the optimizer's own state; plain JSON."""
        return {
            "format_version": 1,
            "adapter": self.adapter,
            "step": self.step,
            "modules": self.modules,
            "kept": self.kept,
            "gates_folded": not self._gates(),
            "frozen": sorted(self.frozen),
            "history": self.history,
            "events": self.events,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring a fresh model and optimizer into the shape that they had when the state was saved.

        Call it on a selection made as in the first run, then load the weights and the optimizer's state, which now fit.

        Raises:
            InputError: the state is of another model, or this selection has already begun.
        """
        if state["modules"] != self.modules or self.step:
            raise InputError(
                f"this selection of {len(self.modules)} adapters is at step {self.step}; the state is of "
                f"{len(state['modules'])} adapters: build model, optimizer and selection as for a new run, then load",
                code="other-state",
            )
        kept: dict[str, int] = state["kept"]
        self._disconnect({name for name in self.modules if name not in kept})
        ranks = {name: r for name, r in kept.items() if r != self.kept[name]}
        expand_ranks(self.model, self.adapter, ranks, self.optimizer, self.seed)
        if state["gates_folded"]:
            fold_gates(self.model, self.adapter, self.optimizer)
        self.step, self.history, self.events = state["step"], list(state["history"]), list(state["events"])
        self.freeze(set(state["frozen"]))

    def save(self, directory: str | Path) -> None:
        """Write `state_dict` to ``selection.json`` in a directory."""
        (Path(directory) / FILE_NAME).write_text(json.dumps(self.state_dict()) + "\n")

    def restore(self, directory: str | Path) -> None:
        """`load_state_dict` from ``selection.json`` in a checkpoint. With the Trainer: before ``trainer.train``."""
        self.load_state_dict(json.loads((Path(directory) / FILE_NAME).read_text()))

    # The steps

    def freeze(self, names: set[str]) -> None:
        """Stop the training of these layers' A, B and mixers, and of no others'."""
        self.frozen = names
        for name, layer in self._layers.items():
            for parameter in factors(layer, self.adapter):
                parameter.requires_grad_(name not in names)
                if name in names:
                    parameter.grad = None

    def _before_step(self) -> None:
        if self.frozen:  # switching the adapter off and on again makes all of it trainable
            self.freeze(self.frozen)
        self.optimizer.constraint = self.constraint if self._resolved().selects(self.step + 1) else None

    def _after_step(self) -> None:
        phases = self._resolved()
        self.step += 1
        if self.step > phases.fixed_from:
            return
        if phases.selects(self.step):
            self._select()
        elif phases.halves(self.step):
            self._halve()
        elif self.step % phases.select_every == 0:
            self._record()
        if self.step == phases.fixed_from:
            if isinstance(self.expand, FillBudget):
                self._expand(self._ranks_within(self.expand.parameters))
            fold_gates(self.model, self.adapter, self.optimizer)

    def _select(self) -> None:
        gates = self._record()
        dropped = {name for name, g in gates.items() if g == 0}
        if self.step == self._resolved().select_until:
            if not any(group.get("started") for group in self.optimizer.param_groups):
                raise RunFailedError(
                    f"no gate has had a gradient in {self.step} steps, so nothing can be selected: raise select_until "
                    "beyond the first steps of the learning rate's own warm-up",
                    code="no-gradient",
                )
            self._drop(dropped)
        elif self.reentry:
            self.freeze(dropped)
        else:
            self._drop(dropped)

    def _halve(self) -> None:
        gates = self._record()
        by = self.constraint.by if isinstance(self.constraint, KSparse) else "signed"
        half = KSparse(max(1, len(gates) // 2), by).project(torch.tensor(list(gates.values())))
        self._drop({name for name, g in zip(gates, half.tolist(), strict=True) if g == 0})
        self._expand({name: 2 * r for name, r in self.kept.items()})

    def _drop(self, names: set[str]) -> None:
        if len(names) == len(self._layers):
            raise RunFailedError(
                f"after step {self.step} every gate is zero, so no adapter is left: lower gate_lr", code="nothing-kept"
            )
        self.freeze(set())
        if names:
            self._disconnect(names)
            self.events.append({"step": self.step, "event": "disconnect", "modules": sorted(names)})

    def _disconnect(self, names: set[str]) -> None:
        disconnect(self.model, self.adapter, names, self.optimizer)
        self._layers = adapted_layers(self.model, self.adapter)

    def _expand(self, ranks: dict[str, int]) -> None:
        conditions = expand_ranks(self.model, self.adapter, ranks, self.optimizer, self.seed)
        if dist.is_initialized() and dist.get_world_size() > 1:
            average_gradients(self.model, self.adapter, ranks)
        self.events.append({"step": self.step, "event": "expand", "ranks": ranks, "condition_numbers": conditions})

    def _ranks_within(self, budget: int) -> dict[str, int]:
        """The largest common rank whose parameters fit; layers that are above it, or can't reach it, keep their own."""

        def ranks(common: int) -> dict[str, int]:
            return {
                n: max(layer.r[self.adapter], min(common, largest_rank(layer, self.adapter)))
                for n, layer in self._layers.items()
            }

        def cost(common: int) -> int:
            return sum(count_parameters(self._layers[n], self.adapter, r) for n, r in ranks(common).items())

        best, limit = 0, max(largest_rank(layer, self.adapter) for layer in self._layers.values())
        while best < limit and cost(best + 1) <= budget:
            best += 1
        return {name: r for name, r in ranks(best).items() if r != self.kept[name]}

    def _check_expansion(self) -> None:
        if isinstance(self.expand, HalveAndDouble):
            for name, layer in self._layers.items():
                r = layer.r[self.adapter] * 2**self.expand.times
                if r > largest_rank(layer, self.adapter):
                    raise InputError(
                        f"expand={self.expand} raises the rank of {name} to {r}, which can be at most "
                        f"{largest_rank(layer, self.adapter)}: lower r or times",
                        code="out-of-range",
                    )

    def _record(self) -> dict[str, float]:
        gates = self.gates()
        self.history.append({"step": self.step, "gates": [gates.get(name) for name in self.modules]})
        return gates

    def _gates(self) -> dict[str, Tensor]:
        gates = {name: gate(layer, self.adapter) for name, layer in self._layers.items()}
        return {name: g for name, g in gates.items() if g is not None}

    def _resolved(self) -> Phases:
        if self.phases is None:
            raise InputError(
                "the schedule has fractions of a run of unknown length: pass total_steps, or add a SelectionCallback",
                code="unknown-length",
            )
        return self.phases
