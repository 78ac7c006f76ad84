"""Any adapter as a plain LoRA that others load: ``B' A' = sum_n g_n s_n B_n M_n A_n`` with scale 1 (lora_alpha = r).

Exact for LoRA, rsLoRA, MoSLoRA, WeightLoRA, anchored starts and compositions, up to one rounding of each factor. DoRA's
``dW = m (W + D) / rownorm(W + D) - W`` has no low rank: it is kept for PEFT, and elsewhere becomes its best
approximation of the rank asked for (Eckart and Young, 1936). What was written is read back and compared.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from loraloom.checkpoint.adapter import CONFIG, WEIGHTS, StoredAdapter, open_adapter
from loraloom.checkpoint.base import BaseWeights, weight_update
from loraloom.checkpoint.findings import config_findings, name_findings
from loraloom.checkpoint.serving import allowed_rank, features, is_embedding, serving_data
from loraloom.errors import InputError, RunFailedError
from loraloom.files import folder_atomically
from loraloom.functional import Term, fold
from loraloom.spectral.factored import factored_svd, truncate

ALLOWED_LOSS = 0.01
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Target -> the programs of serving.yaml that must take the result.
TARGETS = {
    "portable": ("vllm", "sglang", "llamacpp"),
    "peft": ("peft",),
    "vllm": ("vllm",),
    "sglang": ("sglang",),
    "gguf-ready": ("llamacpp",),
}


@dataclass(frozen=True)
class ModuleExport:
    """One module: its rank before and after, and ``||dW - dW'||_F / ||dW||_F`` of what was read back."""

    module: str
    rank: int
    exported_rank: int
    error: float


@dataclass(frozen=True)
class ExportReport:
    """What was exported, and how exact it is.

    Attributes:
        path: the new folder.
        target: for whom.
        rank: the largest rank, which is that of all modules unless the target is "peft".
        dtype: of the factors.
        modules: one entry per exported module.
        dropped: modules whose update is zero.
        error: ``||dW - dW'|| / ||dW||`` over all modules together, Frobenius norms.
        lossy: whether something was truncated, so that the error is not rounding alone.
    """

    path: str
    target: str
    rank: int
    dtype: str
    modules: list[ModuleExport]
    dropped: list[str] = field(default_factory=list)
    error: float = 0.0
    lossy: bool = False

    @property
    def worst(self) -> ModuleExport:
        """The module with the largest error."""
        return max(self.modules, key=lambda module: module.error)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


@torch.no_grad()
def export_adapter(
    path: str | Path,
    target: str,
    out: str | Path,
    base: str | Path | None = None,
    rank: int | None = None,
    allow_lossy: bool = False,
    overwrite: bool = False,
    dtype: str = "float32",
    watch: Callable[[Sequence[str], str], Iterable[str]] = lambda modules, _: modules,
) -> ExportReport:
    """Writes an adapter as a plain LoRA, reads it back, and compares every module's update with the original.

    Args:
        path: the adapter's folder, or a repository of the hub.
        target: "portable" (vLLM, SGLang and llama.cpp), "peft", "vllm", "sglang" or "gguf-ready".
        out: the new folder; it appears when everything is written and compared.
        base: the base model, which DoRA's update needs unless the target is "peft".
        rank: the rank to export with; smaller ones are padded with zeros (not for "peft"), larger ones truncated.
        allow_lossy: write the result though the error is above 1%.
        overwrite: replace `out`.
        dtype: of the written factors. float32 keeps what folding the scale computes; 16 bits round it once more.
        watch: wraps the module names, with a word for what is done, while they are gone through.

    Raises:
        InputError: the target cannot hold the adapter, or only with a larger error than allowed, or a file is broken.
        RunFailedError: what was read back is not what was written.
    """
    if target not in TARGETS:
        raise InputError(f"unknown target {target!r}; expected one of {', '.join(TARGETS)}")
    if rank is not None and rank < 1:
        raise InputError(f"rank {rank} must be a positive integer")
    adapter = open_adapter(path)
    weights = None if base is None else BaseWeights(base, adapter)
    _check(adapter, target, weights)
    with folder_atomically(Path(out), overwrite) as folder:
        plan = _Plan(adapter, target, weights, rank, getattr(torch, dtype))
        plan.fold(watch)
        plan.write(folder)
        report = plan.compare(open_adapter(folder), str(out), watch)
        if report.lossy and report.error > ALLOWED_LOSS and not allow_lossy:
            raise InputError(
                f"rank {report.rank} loses {report.error:.1%} of the update (at worst {report.worst.error:.1%}, "
                f"{report.worst.module}), more than {ALLOWED_LOSS:.0%}: give a larger --rank, or --allow-lossy, or use "
                "loraloom merge, which is exact"
            )
        # A model card goes here: the report is complete, and the folder not yet at its place.
    return report


def _check(adapter: StoredAdapter, target: str, base: BaseWeights | None) -> None:
    errors = [finding for finding in name_findings(adapter) + config_findings(adapter) if finding.level == "error"]
    if errors:
        raise InputError(f"{adapter.path}: {errors[0].message} (see loraloom inspect)")
    data, found = serving_data(), features(adapter, base)
    for name in TARGETS[target]:
        server = data["servers"][name]
        for feature, detail in found.items():
            way, rule = data["ways_out"][feature], server["rules"].get(feature, {"effect": "ok"})
            if rule["effect"] == "ok" or way == "export":
                continue
            if way == "merge":
                raise InputError(f"the adapter {detail}, and {server['name']}: {rule['why']}; use loraloom merge")
            if way == "lossy" and base is None:
                raise InputError(
                    f"the adapter {detail}, and {server['name']}: {rule['why']}; give --base for the nearest plain "
                    "LoRA, or use loraloom merge, which is exact"
                )
    if "altered_base" in found:
        raise InputError(
            f"{found['altered_base']}, which changed the base weights that the update belongs to: save it from PEFT "
            "with save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER) and export that"
        )


class _Plan:
    """The adapter's modules on their way to the new file."""

    def __init__(
        self, adapter: StoredAdapter, target: str, base: BaseWeights | None, rank: int | None, dtype: torch.dtype
    ) -> None:
        self.adapter, self.target, self.base, self.dtype = adapter, target, base, dtype
        self.rank = rank
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.dropped: list[str] = []
        self.truncated = False

    def approximates(self, module: str) -> bool:
        """Whether the module's update has to be approximated, having a magnitude that the target does not take."""
        return self.target != "peft" and "magnitude" in self.adapter.parts(module)

    def fold(self, watch: Callable[[Sequence[str], str], Iterable[str]]) -> None:
        """Fills `factors` with A' (r, in) and B' (out, r), of one rank for all unless the target is "peft"."""
        for module in watch(self.adapter.modules, "Folding"):
            A, B = self._fold(module)
            if not (A.isfinite().all() and B.isfinite().all()):
                raise InputError(f"{module} holds NaN or infinity (see loraloom inspect)")
            # Of PEFT's DoRA and lora_bias a module without an update may do something still.
            if not self.adapter.parts(module).keys() & {"magnitude", "bias", "member_bias"} and not (
                A.any() and B.any()
            ):
                self.dropped.append(module)
            else:
                self.factors[module] = (A, B)
        if not self.factors:
            raise RunFailedError(f"{self.adapter.path}: every update is zero, there is nothing to export")
        largest = max(A.shape[0] for A, _ in self.factors.values())
        if self.target == "peft":
            self.rank = largest
            return
        self.rank = self._allowed(self.rank or largest)
        for module, (A, B) in self.factors.items():
            padding = self.rank - A.shape[0]
            self.factors[module] = (F.pad(A, (0, 0, 0, padding)), F.pad(B, (0, padding)))

    def _fold(self, module: str) -> tuple[Tensor, Tensor]:
        if self.approximates(module):
            if self.base is None or self.base.keys[module] is None:
                raise InputError(f"{module} is not in the base model; its DoRA update cannot be computed")
            self.truncated = True
            update = weight_update(self.adapter, module, self.base.matrix(module))
            return best_approximation(update, self.rank or self.adapter.rank(module))
        A, B = fold(self.adapter.terms(module))
        if self.rank is not None and A.shape[0] > self.rank:
            self.truncated = True
            A, B, _ = truncate(A, B, self.rank)
        return A, B

    def _allowed(self, rank: int) -> int:
        for name in TARGETS[self.target] if self.target != "portable" else ():
            allowed = allowed_rank(name, rank)
            if allowed is None:
                ranks = serving_data()["servers"][name]["ranks"]
                raise InputError(f"rank {rank} is above {ranks[-1]}, the largest that {name} allows: give --rank")
            rank = allowed
        return rank

    def write(self, folder: Path) -> None:
        """Writes tensors and configuration."""
        tensors: dict[str, Tensor] = {}
        with_bias = self.target == "peft" and "lora_bias" in features(self.adapter)
        for module, (A, B) in self.factors.items():
            tensors |= self._named(module, A.to(self.dtype), B.to(self.dtype))
            if with_bias:
                bias = self.adapter.lora_bias(module)
                tensors[f"base_model.model.{module}.lora_B.bias"] = (
                    torch.zeros(B.shape[0], dtype=self.dtype) if bias is None else bias.to(self.dtype)
                )
        tensors |= dict(self.adapter.checkpoint.tensors(self.adapter.others))
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        config = self._config(with_bias)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _named(self, module: str, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """The factors in the shapes and under the names of PEFT's LoRA."""
        key, shape = f"base_model.model.{module}", self.adapter.checkpoint.shape(self.adapter.parts(module)["A"])
        if is_embedding(self.adapter, module, self.base):
            named = {f"{key}.lora_embedding_A": A, f"{key}.lora_embedding_B": B}
        else:
            kernel = [1] * (len(shape) - 2)
            named = {
                f"{key}.lora_A.weight": A.reshape(-1, *shape[1:]),
                f"{key}.lora_B.weight": B.reshape(*B.shape, *kernel),
            }
        magnitude = self.adapter.magnitude(module)
        if magnitude is not None and not self.approximates(module):
            ones = [1] * (len(shape) - 2)
            named[f"{key}.lora_magnitude_vector"] = magnitude.reshape(1, -1, *ones) if ones else magnitude
        return named

    def _config(self, with_bias: bool) -> dict[str, Any]:
        config = self.adapter.config
        ranks = {module: A.shape[0] for module, (A, _) in self.factors.items()}
        r = Counter(ranks.values()).most_common(1)[0][0]
        pattern = {module: rank for module, rank in ranks.items() if rank != r}
        bias = config.get("bias", "none")
        return {
            "peft_type": "LORA",
            "task_type": config.get("task_type"),
            "base_model_name_or_path": config.get("base_model_name_or_path"),
            "revision": config.get("revision"),
            "inference_mode": True,
            "r": r,
            "lora_alpha": r,
            "lora_dropout": 0.0,
            "target_modules": list(ranks),
            "bias": "lora_only" if bias == "loom_only" else bias,
            "use_rslora": False,
            "use_dora": self.target == "peft" and "use_dora" in features(self.adapter),
            "lora_bias": with_bias,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "modules_to_save": config.get("modules_to_save"),
            "trainable_token_indices": config.get("trainable_token_indices"),
            "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
            "init_lora_weights": True,
        }

    def compare(
        self, written: StoredAdapter, path: str, watch: Callable[[Sequence[str], str], Iterable[str]]
    ) -> ExportReport:
        """Reads the new adapter back and compares every module's update with the original's.

        Raises:
            RunFailedError: a module, a magnitude or another tensor is not what it was, or an exact update is off.
        """
        modules, squared_error, squared_norm = [], 0.0, 0.0
        if {*written.modules} != {*self.factors} or {*written.others} != {*self.adapter.others}:
            raise RunFailedError(f"{path}: the tensors read back are not those that were written; nothing was kept")
        # Eight roundings of the coarsest dtype on the way: the exact path has four (two factors, mixer, product).
        tolerance = 8 * torch.finfo(self.dtype).eps
        for module in watch(list(self.factors), "Comparing"):
            error, norm = self._difference(written, module)
            exact = not self.truncated
            if exact and error > tolerance * norm:
                raise RunFailedError(
                    f"{module}: the update read back is {error / norm:.1e} off; nothing was kept. Please report this"
                )
            squared_error, squared_norm = squared_error + error**2, squared_norm + norm**2
            rank = self.factors[module][0].shape[0]
            modules.append(ModuleExport(module, self.adapter.rank(module), rank, error / norm if norm else 0.0))
        return ExportReport(
            path=path,
            target=self.target,
            rank=int(self.rank or 0),
            dtype=str(self.dtype).removeprefix("torch."),
            modules=modules,
            dropped=self.dropped,
            error=math.sqrt(squared_error / squared_norm) if squared_norm else 0.0,
            lossy=self.truncated,
        )

    def _difference(self, written: StoredAdapter, module: str) -> tuple[float, float]:
        """``||dW - dW'||`` and ``||dW||``."""
        new = Term(*(factor.double() for factor in fold(written.terms(module))), None, None, -1.0)
        if self.approximates(module):
            assert self.base is not None
            update = weight_update(self.adapter, module, self.base.matrix(module))
            difference = torch.addmm(update, new.B.to(update.dtype), new.A.to(update.dtype), alpha=-1)
            return float(difference.norm()), float(update.norm())
        old_magnitude, new_magnitude = self.adapter.magnitude(module), written.magnitude(module)
        if old_magnitude is not None and not (new_magnitude is not None and torch.equal(old_magnitude, new_magnitude)):
            raise RunFailedError(f"{module}: the magnitude read back is another; nothing was kept. Please report this")
        old = Term(*fold([_double(term) for term in self.adapter.terms(module)]))
        difference_norm = factored_svd(*fold([old, new]))[1].norm()
        return float(difference_norm), float(factored_svd(old.A, old.B)[1].norm())


def _double(term: Term) -> Term:
    tensors = (None if tensor is None else tensor.double() for tensor in term[:4])
    return Term(*tensors, scaling=term.scaling)  # type: ignore[arg-type]


def best_approximation(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) whose product is the best approximation of a matrix (out, in), or near it.

    Small matrices by an exact SVD, others by subspace iteration from a fixed random start (Halko et al., 0909.4061).
    """
    rank = min(rank, *matrix.shape)
    if min(matrix.shape) <= 1024:
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            U, S, V = torch.svd_lowrank(matrix, q=min(rank + 16, *matrix.shape), niter=4)
        Vh = V.T
    root = S[:rank].sqrt()
    return root[:, None] * Vh[:rank], U[:, :rank] * root
