"""What is in an adapter's folder: its parts, its size, the spectrum of each update, and what is wrong with it.

With D = sum_n g_n s_n B_n M_n A_n of a module: ||D||_F, effective rank and stable rank of its singular values, all from
the factors; with the base model also ||dW|| / ||W||, where dW = D, or with DoRA m (W + D) / rownorm(W + D) - W.
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from loraloom.adapter.base import BaseWeights
from loraloom.adapter.findings import Finding, base_findings, config_findings, counted, name_findings
from loraloom.adapter.serving import Verdict, missing_siblings, serving_table
from loraloom.adapter.stored import StoredAdapter, StoredModule, read_adapter
from loraloom.errors import InputError
from loraloom.progress import Progress, silent, tracked
from loraloom.update.lowrank import effective_rank, factored_svd, stable_rank
from loraloom.update.terms import compute_dtype

# Part of the update -> the name under which the method was published.
_METHODS = {
    "mixer": "MoSLoRA",
    "gate": "WeightLoRA",
    "magnitude": "DoRA",
    "anchor_A": "an anchored start",
    "logits": "WLoRA",
}

# A DoRA layer whose magnitudes are the lengths of W's rows changes W by no more than float32's rounding.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class LayerReport:
    """One adapted module. What could not be computed is None: the numbers of a layer with NaN, ratios without a base.

    Attributes:
        module: its name in the base model.
        shape: (out, in) of the update.
        rank: r.
        scaling: s.
        parts: what the update is made of.
        parameters: numbers stored for it.
        gate: g, where there is one.
        norm: ||D||_F.
        relative_norm: ||dW||_F / ||W||_F, DoRA's rescaling included.
        effective_rank, stable_rank: of D.
        zero: why the update is zero ("B is zero", "the gate is zero"), or None.
        finite: no NaN and no infinity in its tensors.
    """

    module: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    parts: list[str]
    parameters: int
    gate: float | None = None
    norm: float | None = None
    relative_norm: float | None = None
    effective_rank: float | None = None
    stable_rank: float | None = None
    zero: str | None = None
    finite: bool = True


@dataclass(frozen=True)
class Inspection:
    """Everything that :func:`inspect_adapter` found out.

    Attributes:
        path: the adapter's folder.
        kind: its peft_type.
        method: what it is, in the names of the papers.
        base: the base model that it was compared with, or the one it names.
        ranks: rank -> number of modules.
        dtypes: dtype -> number of tensors.
        parameters, nbytes: of all tensors, and how many of the parameters are no part of an update.
        others: names of these tensors.
        layers: one entry per adapted module.
        findings: errors first.
        serving: one verdict per program.
    """

    path: str
    kind: str
    method: str
    base: str | None
    ranks: dict[int, int]
    dtypes: dict[str, int]
    parameters: int
    other_parameters: int
    nbytes: int
    others: list[str]
    layers: list[LayerReport]
    findings: list[Finding] = field(default_factory=list)
    serving: list[Verdict] = field(default_factory=list)

    @property
    def errors(self) -> list[Finding]:
        """The findings for which a program should stop."""
        return [finding for finding in self.findings if finding.level == "error"]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def inspect_adapter(
    path: str | Path,
    base: str | Path | None = None,
    progress: Progress = silent,
) -> Inspection:
    """Reads an adapter of PEFT's LoRA or of loraloom, and computes its numbers; no model is built.

    Args:
        path: the adapter's folder, or a repository of the hub.
        base: the base model's folder or repository, for ||dW|| / ||W|| and to check that every module is there.
        progress: is told of the modules read.

    Raises:
        InputError: a file is missing or broken.
    """
    adapter = read_adapter(path)
    weights = adapter.base = None if base is None else BaseWeights(base, adapter)
    findings = name_findings(adapter)
    misshapen = _named(findings)
    in_base = [] if weights is None else base_findings(adapter, weights)
    foreign = _named(in_base)
    findings += config_findings(adapter) + in_base
    layers = [
        _layer(
            adapter,
            adapter.modules[name],
            has_base=weights is not None and name not in foreign,
            misshapen=name in misshapen,
        )
        for name in tracked(adapter.modules, "Reading", progress)
    ]
    findings += _number_findings(adapter, layers, has_base=weights is not None)
    checkpoint = adapter.checkpoint
    sizes = {key: _count(checkpoint.shape(key)) for key in checkpoint}
    return Inspection(
        path=str(adapter.path),
        kind=adapter.kind,
        method=_method(adapter),
        base=adapter.config.get("base_model_name_or_path") if base is None else str(base),
        ranks=dict(sorted(Counter(layer.rank for layer in layers).items())),
        dtypes=dict(Counter(str(checkpoint.dtype(key)).removeprefix("torch.") for key in checkpoint)),
        parameters=sum(sizes.values()),
        other_parameters=sum(sizes[key] for key in adapter.others),
        nbytes=sum(checkpoint.nbytes(key) for key in checkpoint),
        others=adapter.others,
        layers=layers,
        findings=sorted(findings, key=lambda finding: finding.level != "error"),
        serving=serving_table(adapter, None if base is None else str(base)),
    )


def _named(findings: list[Finding]) -> set[str]:
    """The modules whose shapes are wrong."""
    return {name.partition(" ")[0] for finding in findings if finding.code == "shape" for name in finding.names}


@torch.no_grad()
def _layer(adapter: StoredAdapter, module: StoredModule, has_base: bool, misshapen: bool) -> LayerReport:
    shapes = module.shapes()
    common: dict[str, Any] = {
        "module": module.name,
        "shape": module.shape,
        "rank": module.rank,
        "scaling": module.scaling,
        "parts": list(shapes),
        "parameters": sum(map(_count, shapes.values())),
    }
    if misshapen:
        return LayerReport(**common)
    parts = module.unchecked_parts()
    gate = parts["gate"].item() if "gate" in parts else None
    try:
        module.parts()
    except InputError:
        return LayerReport(**common, gate=gate if gate is not None and math.isfinite(gate) else None, finite=False)
    S = factored_svd(*module.factors())[1]
    zero = None
    if not S.any():
        parts_of_zero = [part for part in ("gate", "B", "A", "mixer") if part in parts and not parts[part].any()]
        zero = f"{parts_of_zero[0] if parts_of_zero else 'the product'} is zero"
    relative = None
    if has_base and adapter.base is not None and adapter.base.keys[module.name] is not None:
        W = module.weight()
        norm = S.norm() if "magnitude" not in parts else module.update().change(W).norm()
        length = torch.linalg.vector_norm(W, dtype=compute_dtype(W))
        relative = float(norm / length) if length else None
    return LayerReport(
        **common,
        gate=gate,
        norm=float(S.norm()),
        relative_norm=relative,
        effective_rank=effective_rank(S),
        stable_rank=stable_rank(S),
        zero=zero,
    )


def _number_findings(adapter: StoredAdapter, layers: list[LayerReport], has_base: bool) -> list[Finding]:
    found = []
    broken = [layer.module for layer in layers if not layer.finite]
    broken += [
        key for key, tensor in adapter.other_tensors() if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if broken:
        found.append(Finding("error", "not-finite", f"{counted(broken)} hold NaN or infinity, or overflow", broken))
    # Zeros beside an adapted module are there for SGLang, see missing_siblings.
    moving = [layer.module for layer in layers if layer.zero is None]
    wanted = missing_siblings(moving) if moving else {}
    zero = [layer.module for layer in layers if layer.zero is not None and layer.module not in wanted]
    dora = any("magnitude" in layer.parts for layer in layers)
    unchanged = [layer for layer in layers if layer.zero and not (dora and _turns(layer))]
    if not layers:
        found.append(Finding("error", "does-nothing", "there are no low-rank factors in the file"))
    elif len(unchanged) == len(layers):
        reasons = ", ".join(sorted({layer.zero for layer in layers if layer.zero}))
        why = f"every update is zero ({reasons}): the model with this adapter is the model without it"
        why += f", but for {len(adapter.others)} tensors that are no update" if adapter.others else ""
        found.append(Finding("error", "does-nothing", f"{why}; was it trained, and were gradients on?", zero))
    elif len(zero) == len(layers):
        why = "every update is zero; only DoRA's magnitudes can change the model"
        found.append(
            Finding("warning", "zero", why + ("" if has_base else ", give --base to see whether they do"), zero)
        )
    elif zero:
        found.append(
            Finding("warning", "zero", f"{len(zero)} of {len(layers)} updates are zero: {counted(zero)}", zero)
        )
    return found


def _turns(layer: LayerReport) -> bool:
    """Whether a DoRA layer with D = 0 may change W all the same, by its magnitudes."""
    return layer.relative_norm is None or layer.relative_norm > _ROUNDING


def _method(adapter: StoredAdapter) -> str:
    present = {part for module in adapter.modules.values() for part in module.tensors}
    names = [name for part, name in _METHODS.items() if part in present] or ["LoRA"]
    if adapter.config.get("use_rslora"):
        names.append("rsLoRA's scale")
    return " + ".join(names)


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
