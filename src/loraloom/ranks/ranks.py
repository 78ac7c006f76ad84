"""Where an adapter should have its rank, from gradients of a few batches, before anything is trained.

    G = mean over the batches of dL/dW,     G = sum_i s_i u_i v_i^T

A LoRA of rank r moves W within r directions. To first order the loss falls by eta ||P G||^2 for a step of size eta
within the directions of P, and the best r directions hold ``s_1^2 + ... + s_r^2``. One rank of an (out, in) matrix
costs out + in parameters, so ranks go, over all matrices, to the largest ``s_i^2 / (out + in)``
(:mod:`loraloom.update.allocate`); a matrix that gets none is left out of target_modules. LoRA-GA (2407.05000) starts
from the same directions; what is chosen here is only how many.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loraloom.errors import InputError
from loraloom.progress import Progress, silent
from loraloom.tuner.config import LoomConfig
from loraloom.tuner.model import LoomModel
from loraloom.tuner.targets import prepare_targets
from loraloom.update.allocate import ranks_for_parameters
from loraloom.update.lowrank import best_approximation

Loss = Callable[[nn.Module, Any], Tensor]
SCALE = 2  # lora_alpha / r of every module: the usual choice, and the same step for every rank


@dataclass(frozen=True)
class RankReport:
    """The ranks, and what they were chosen by."""

    ranks: dict[str, int]
    """Module -> rank, in the model's order; 0: not worth a rank."""
    energies: dict[str, float]
    """Module -> ``||G||^2``."""
    kept: dict[str, float]
    """Module -> share of its energy within its rank's best directions."""
    parameters: int
    """Of the factors altogether."""
    budget: int
    """How many they may have."""
    batches: int
    loss: float
    """Mean over the batches."""

    @property
    def share(self) -> float:
        """Share of the whole energy that the ranks hold."""
        total = sum(self.energies.values())
        return sum(self.energies[name] * self.kept[name] for name in self.energies) / total if total else 0.0

    def config(self) -> dict[str, Any]:
        """Keyword arguments of ``LoraConfig`` and ``LoomConfig``, and keys of `method` in RUN.yaml.

        lora_alpha is twice the rank in every module.
        """
        ranks = {name: rank for name, rank in self.ranks.items() if rank}
        r = Counter(ranks.values()).most_common(1)[0][0]
        # Longest first: a pattern also matches names that end in it.
        longest = sorted(ranks, key=len, reverse=True)
        pattern = {}
        for name in longest:
            shadowed = any(ranks[other] != r for other in ranks if name.endswith(f".{other}"))
            if ranks[name] != r or shadowed:
                pattern[name] = ranks[name]
        return {
            "r": r,
            "lora_alpha": SCALE * r,
            "target_modules": [*ranks],
            "rank_pattern": pattern,
            "alpha_pattern": {name: SCALE * rank for name, rank in pattern.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON, the configuration among them."""
        return asdict(self) | {"share": self.share, "config": self.config()}


def suggest_ranks(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    rank: int | None = None,
    parameters: int | None = None,
    max_rank: int | None = None,
    target_modules: str | list[str] = "all-linear",
    loss: Loss | None = None,
    progress: Progress = silent,
) -> RankReport:
    """Chooses a rank for every linear layer from the gradients of a few batches. The model is as it was afterwards.

    One float32 matrix of each layer's size is held in the CPU's memory; on the model's device one gradient at a time.

    Args:
        model: the base model, not quantised, without adapters; it is put into evaluation mode meanwhile.
        batches: what the model is called with, each a mapping of keyword arguments with labels.
        rank: the budget as the rank that all modules could have had; None: 8, or `parameters`.
        parameters: the budget in its place, in parameters of all factors.
        max_rank: the largest rank of any module; None: four times the mean.
        target_modules: the layers to choose from, as in ``LoraConfig``.
        loss: computes the loss of a batch; None: ``model(**batch).loss``.
        progress: is told of the matrices decomposed.

    Raises:
        InputError: a number is out of range, there are no batches, a loss is not finite, or a layer is quantised.
        ValueError: a name in target_modules matches nothing.
    """
    check_budget(rank, parameters, max_rank)
    layers = _layers(model, target_modules)
    costs = {name: sum(layer.weight.shape) for name, layer in layers.items()}
    budget = parameters or (rank or 8) * sum(costs.values())
    most = max_rank or max(4 * budget // sum(costs.values()), 4)
    gradients, losses = _mean_gradients(model, layers, batches, loss or _loss_of)
    spectra, energies = {}, {}
    progress("Decomposing", 0, len(layers))
    for done, name in enumerate(layers, 1):
        G = gradients.pop(name)
        A, _ = best_approximation(G, most)
        spectra[name], energies[name] = A.square().sum(1).double(), float(G.double().square().sum())
        progress("Decomposing", done, len(layers))
    if not any(energies.values()):
        raise InputError("every gradient is zero: does the loss depend on the model?", code="zero-gradient")
    ranks = ranks_for_parameters(spectra, costs, budget, least=0)
    if not any(ranks.values()):
        raise InputError(
            f"parameters={parameters} is less than {min(costs.values())}, one rank of the smallest module: allow more",
            code="budget",
        )
    kept = {n: float(spectra[n][:r].square().sum()) / e if (e := energies[n]) else 0.0 for n, r in ranks.items()}
    return RankReport(
        ranks=ranks,
        energies=energies,
        kept=kept,
        parameters=sum(ranks[name] * costs[name] for name in ranks),
        budget=budget,
        batches=len(losses),
        loss=sum(losses) / len(losses),
    )


def check_budget(rank: int | None = None, parameters: int | None = None, max_rank: int | None = None) -> None:
    """Raises InputError for numbers that are no budget."""
    for name, value in (("rank", rank), ("parameters", parameters), ("max_rank", max_rank)):
        if value is not None and value < 1:
            raise InputError(f"{name}={value!r}: expected a positive integer", code="rank")
    if rank is not None and parameters is not None:
        raise InputError(f"rank={rank} and parameters={parameters} are both a budget: give one", code="budget")


def _loss_of(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss


def _layers(model: nn.Module, target_modules: str | list[str]) -> dict[str, Any]:
    """The linear layers that PEFT would adapt, each weight once."""
    config = LoomConfig(target_modules=target_modules)
    prepare_targets(config, model, partial(LoomModel._check_target_module_exists, config))
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not LoomModel._check_target_module_exists(config, name) or not hasattr(module, "weight"):
            continue
        if not isinstance(module, nn.Linear | Conv1D) or not module.weight.is_floating_point():
            raise InputError(
                f"{name} is a {type(module).__name__}: ranks are chosen for linear layers whose weights are floating "
                "point numbers; give other target_modules, or load the model without quantization",
                code="not-linear",
            )
        if id(module.weight) not in seen:
            seen.add(id(module.weight))
            found[name] = module
    if not found:
        raise InputError(f"target_modules={target_modules!r} match no linear layer of the model", code="no-target")
    return found


def _mean_gradients(
    model: nn.Module, layers: dict[str, Any], batches: Iterable[Any], loss_of: Loss
) -> tuple[dict[str, Tensor], list[float]]:
    """The mean gradient of each weight, in float32 on the CPU, and the losses."""
    sums: dict[str, Tensor] = {}
    losses: list[float] = []

    def take(name: str, weight: Tensor) -> None:
        assert weight.grad is not None
        gradient = weight.grad.detach().to("cpu", torch.float32)
        sums[name] = sums[name].add_(gradient) if name in sums else gradient
        weight.grad = None

    with _only_these_train(model, layers):
        hooks = [layer.weight.register_post_accumulate_grad_hook(partial(take, name)) for name, layer in layers.items()]
        try:
            for batch in batches:
                loss = loss_of(model, batch)
                losses.append(loss.item())
                if not torch.isfinite(loss):
                    raise InputError(f"the loss of batch {len(losses)} is {loss.item()}", code="not-finite")
                loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
    if not losses:
        raise InputError("there are no batches to take gradients of", code="no-batch")
    missing = {name: torch.zeros(layer.weight.shape) for name, layer in layers.items() if name not in sums}
    return {name: total.div_(len(losses)) for name, total in (sums | missing).items()}, losses


@contextmanager
def _only_these_train(model: nn.Module, layers: dict[str, Any]) -> Iterator[None]:
    """Gradients of these weights alone, in evaluation mode; afterwards everything is as it was."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for p, _, _ in before:
            p.requires_grad_(False)
            p.grad = None
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, trains, gradient in before:
            p.requires_grad_(trains)
            p.grad = gradient
        for module, training in modes:
            module.training = training
