"""Any adapter as a plain LoRA that others load: ``B' A' = sum_n g_n s_n B_n M_n A_n`` with scale 1 (lora_alpha = r).

Exact for LoRA, rsLoRA, MoSLoRA, WeightLoRA, anchored starts and compositions, up to one rounding of each factor. DoRA's
``dW = m (W + D) / rownorm(W + D) - W`` has no low rank: it is kept for PEFT, and elsewhere becomes its best
approximation of the rank asked for (Eckart and Young, 1936). What was written is read back and compared.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from loraloom.adapter.open import open_adapter, open_stored
from loraloom.adapter.peft_features import changed_base
from loraloom.adapter.protocol import Adapter
from loraloom.adapter.serving import features, serving_data, serving_rows
from loraloom.adapter.stored import StoredAdapter
from loraloom.card import Card, write_card
from loraloom.errors import InputError, RunFailedError
from loraloom.export.card import export_card
from loraloom.export.plan import TARGETS, ExportPlan
from loraloom.export.result import ExportReport, ModuleExport
from loraloom.io.files import check_apart, folder_atomically
from loraloom.progress import Progress, silent, tracked
from loraloom.update.lowrank import factored_svd
from loraloom.update.terms import Term, fold

if TYPE_CHECKING:
    from peft import PeftModel

ALLOWED_LOSS = 0.01
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.no_grad()
def export_adapter(
    adapter: "str | Path | tuple[PeftModel, str] | Adapter",
    target: str,
    out: str | Path,
    base: str | Path | None = None,
    rank: int | None = None,
    *,
    energy: float | None = None,
    one_rank: bool | None = None,
    allow_lossy: bool = False,
    overwrite: bool = False,
    dtype: str = "float32",
    progress: Progress = silent,
    command: str = "",
    card: Callable[[Card, ExportReport], Card] | None = None,
) -> ExportReport:
    """Writes an adapter as a plain LoRA, reads it back, and compares every module's update with the original.

    Args:
        adapter: its folder or a repository of the hub, or a model and the name of its adapter.
        target: "portable" (vLLM, SGLang and llama.cpp), "peft", "vllm", "sglang" or "gguf-ready".
        out: the new folder; it appears when everything is written and compared.
        base: the base model, which DoRA's update needs unless the target is "peft".
        rank: the rank to export with; smaller ones are padded with zeros (not for "peft"), larger ones truncated.
        energy: in place of a rank: the smallest one that keeps this share of ||D||^2 in every module.
        one_rank: pad every module to one rank; None does so unless the target is "peft".
        allow_lossy: write the result though the error is above 1%.
        overwrite: replace `out`.
        dtype: of the written factors. float32 keeps what folding the scale computes; 16 bits round it once more.
        progress: is told of the modules folded, then of those compared.
        command: what was typed, for the model card.
        card: makes the model card of export's own card and the report; None keeps export's own.

    Raises:
        InputError: the target cannot hold the adapter, or only with a larger error than allowed, or a file is broken.
        RunFailedError: what was read back is not what was written.
    """
    if target not in TARGETS:
        raise InputError(f"unknown target {target!r}; expected one of {', '.join(TARGETS)}", code="unknown-target")
    source: Adapter = open_adapter(adapter, base)
    _check(source, target)
    if isinstance(source, StoredAdapter):
        check_apart(Path(out), [source.path, *([] if source.base is None else [source.base.checkpoint.path])])
    with folder_atomically(Path(out), overwrite) as folder:
        plan = ExportPlan(source, target, rank, getattr(torch, dtype), energy=energy, one_rank=one_rank)
        plan.fold(progress)
        plan.write(folder)
        report = _compare(plan, open_stored(folder), str(out), progress)
        if report.error > ALLOWED_LOSS and not allow_lossy:
            raise InputError(
                f"rank {report.rank} in {dtype} loses {report.error:.1%} of the update (at worst "
                f"{report.worst.error:.1%}, {report.worst.module}), more than {ALLOWED_LOSS:.0%}: give a larger "
                "--rank, or --allow-lossy, or use loraloom merge, which is exact",
                code="lossy",
            )
        own = export_card(report, source, serving_rows(folder, out), command)
        write_card(own if card is None else card(own, report), folder)
    return report


def _check(adapter: Adapter, target: str) -> None:
    if why := changed_base(adapter.config):
        raise InputError(f"{adapter.where}: {why}", code="altered-base")
    has_base = not isinstance(adapter, StoredAdapter) or adapter.base is not None
    data, found = serving_data(), features(adapter)
    for name in TARGETS[target]:
        server = data["servers"][name]
        for feature, detail in found.items():
            way, rule = data["ways_out"][feature], server["rules"].get(feature, {"effect": "ok"})
            if rule["effect"] == "ok" or way == "export":
                continue
            if way == "merge":
                raise InputError(
                    f"the adapter {detail}, and {server['name']}: {rule['why']}; use loraloom merge", code="not-served"
                )
            if way == "lossy" and not has_base:
                raise InputError(
                    f"the adapter {detail}, and {server['name']}: {rule['why']}; give --base for the nearest plain "
                    "LoRA, or use loraloom merge, which is exact",
                    code="not-served",
                )


def _compare(plan: ExportPlan, written: StoredAdapter, path: str, progress: Progress) -> ExportReport:
    """Reads the new adapter back and compares every module's update with the original's.

    Raises:
        RunFailedError: a module, a magnitude or another tensor is not what it was, or an exact update is off.
    """
    modules, squared_error, squared_norm = [], 0.0, 0.0
    if {*written.modules} != {*plan.factors, *plan.completed} or {*written.others} != {*plan.others}:
        raise RunFailedError(
            f"{path}: the tensors read back are not those that were written; nothing was kept", code="not-verified"
        )
    if any(factor.any() for name in plan.completed for factor in written.modules[name].parts().values()):
        raise RunFailedError(
            f"{path}: {plan.completed[0]} was to have no effect; nothing was kept", code="not-verified"
        )
    for module in tracked(plan.factors, "Comparing", progress):
        error, norm, rounding = _difference(plan, written, module)
        if error > rounding and not plan.truncated:
            raise RunFailedError(
                f"{module}: the update read back is {error / norm:.1e} off; nothing was kept. Please report this",
                code="not-verified",
            )
        squared_error, squared_norm = squared_error + error**2, squared_norm + norm**2
        rank = plan.factors[module][0].shape[0]
        modules.append(ModuleExport(module, plan.adapter.modules[module].rank, rank, error / norm if norm else 0.0))
    return ExportReport(
        path=path,
        target=plan.target,
        rank=int(plan.rank or 0),
        dtype=str(plan.dtype).removeprefix("torch."),
        modules=modules,
        dropped=plan.dropped,
        completed=plan.completed,
        error=math.sqrt(squared_error / squared_norm) if squared_norm else 0.0,
        lossy=plan.truncated,
    )


def _difference(plan: ExportPlan, written: StoredAdapter, module: str) -> tuple[float, float, float]:
    """``||dW - dW'||``, ``||dW||``, and how large the first may be by rounding alone."""
    original, copy = plan.adapter.modules[module], written.modules[module]
    A, B = (factor.double() for factor in copy.factors())
    if plan.approximates(original):
        update = original.update().change(original.weight())
        difference = torch.addmm(update, B.to(update.dtype), A.to(update.dtype), alpha=-1)
        return float(difference.norm()), float(update.norm()), math.inf
    old_magnitude, new_magnitude = original.magnitude(), copy.magnitude()
    if old_magnitude is not None and not (new_magnitude is not None and torch.equal(old_magnitude, new_magnitude)):
        raise RunFailedError(
            f"{module}: the magnitude read back is another; nothing was kept. Please report this", code="not-verified"
        )
    old = [_double(term) for term in original.terms()]
    old_A, old_B = fold(old)
    # Each factor is rounded at most twice on its way. Rounding goes with the factors, not with their product, which is
    # small where terms cancel (anchored starts); and under the smallest normal number it is absolute.
    finfo = torch.finfo(plan.dtype)
    a, b = float(old_A.norm()), float(old_B.norm())
    rounding = 4 * finfo.eps * (a + finfo.tiny * old_A.numel()) * (b + finfo.tiny * old_B.numel())
    difference = factored_svd(*fold([*old, Term(A, B, scaling=-1.0)]))[1]
    return float(difference.norm()), float(factored_svd(old_A, old_B)[1].norm()), rounding


def _double(term: Term) -> Term:
    M, gate = (None if tensor is None else tensor.double() for tensor in (term.M, term.gate))
    return Term(term.A.double(), term.B.double(), M, gate, term.scaling)
