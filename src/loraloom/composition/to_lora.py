"""A composition, or any adapter without a magnitude, as one ordinary LoRA: exact, or truncated with a known error.

    D = sum_n w_n B_n A_n = B A,    A (R, in), B (out, R)          exact at rank R = sum_n r_n

Truncation to k < R is the best one (Eckart and Young): with B = Q_B R_B and A^T = Q_A R_A, the singular values of D
are those of the small R_B R_A^T = U S V^T (R x R), and D_k = (Q_B U_k S_k^(1/2)) (S_k^(1/2) V_k^T Q_A^T). The relative
error is ||D - D_k|| / ||D|| = (sum_(i>k) S_i^2 / sum_i S_i^2)^(1/2) in the Frobenius norm.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from loraloom.errors import InputError
from loraloom.tuner.config import LoomConfig
from loraloom.tuner.layer import LoomLayer
from loraloom.update.lowrank import factored_svd
from loraloom.update.terms import fold


@dataclass(frozen=True)
class LoraReport:
    """What `to_lora` made of an adapter. Errors are relative and in the Frobenius norm."""

    rank: int
    """Rank of the LoRA, the same in every layer (zero-padded where a layer needs less)."""
    relative_error: float
    """||D - D_k|| / ||D|| over all layers together."""
    layers: dict[str, dict[str, float]]
    """Module -> ``rank`` of the exact update, ``kept`` of it, and its ``relative_error``."""
    folder: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain dictionaries, for JSON."""
        return asdict(self)


class LowRank(NamedTuple):
    """The singular value decomposition ``U diag(S) V^T`` of a product B A: U (out, k), S (k,) descending, V (in, k)."""

    U: Tensor
    S: Tensor
    V: Tensor


def svd_of_product(A: Tensor, B: Tensor) -> LowRank:
    """Singular value decomposition of B A without forming it, by two QR and one small SVD, in float64.

    Args:
        A: (r, in).
        B: (out, r).
    """
    U, S, Vh = factored_svd(A.double(), B.double())
    return LowRank(U, S, Vh.T)


@torch.no_grad()
def to_lora(
    model: PeftModel,
    adapter_name: str = "composition",
    *,
    rank: int | None = None,
    energy: float | None = None,
    save_to: str | Path | None = None,
    new_adapter: str | None = None,
) -> LoraReport:
    """Turns a composition (or any loom adapter but DoRA) into an ordinary LoRA.

    The LoRA has one rank, lora_alpha = r, and no patterns or rsLoRA, so that every server scales it alike. Without
    ``rank`` and ``energy`` it is exact.

    Args:
        model: the model that has the adapter, which is not changed.
        adapter_name: the adapter.
        rank: largest rank to keep.
        energy: share of ||D||^2 to keep in every layer, in (0, 1]; the rank is the smallest with which all layers do.
        save_to: folder for the LoRA as PEFT saves it, modules_to_save included; loads without loraloom. With members'
            biases it has PEFT's lora_bias, with which PEFT can run layers that have no bias but not merge them.
        new_adapter: name of a new adapter of the model that holds the LoRA.

    Returns:
        Ranks and errors; with neither ``save_to`` nor ``new_adapter`` that is all.

    Raises:
        InputError: no such adapter, a DoRA adapter, options out of range, or members with a lora_bias where the result
            cannot have one.
    """
    if adapter_name not in model.peft_config:
        raise InputError(f"the model has no adapter {adapter_name!r}; it has {', '.join(model.peft_config)}")
    if rank is not None and (energy is not None or rank < 1):
        raise InputError(f"rank={rank!r}, energy={energy!r}: give one of them, a rank of at least 1")
    if energy is not None and not 0 < energy <= 1:
        raise InputError(f"energy={energy!r} must lie in (0, 1]")
    if new_adapter in model.peft_config:
        raise InputError(f"the model has an adapter {new_adapter!r} already: choose another name")
    layers = {
        module: layer
        for module, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoomLayer) and layer.has_adapter(adapter_name)
    }
    for module, layer in layers.items():
        if layer.magnitude(adapter_name) is not None:
            raise InputError(
                f"{module} has a DoRA magnitude, so its update is no product B A: merge the adapter instead"
            )
    biases = {module: layer.bias_delta(adapter_name) for module, layer in layers.items()}
    if biased := [module for module, bias in biases.items() if bias is not None]:
        if new_adapter is not None:
            raise InputError(
                f"{biased[0]} has a bias of its members', which an adapter of the model cannot: use save_to"
            )
        if tables := [m for m, layer in layers.items() if isinstance(layer.get_base_layer(), nn.Embedding)]:
            raise InputError(
                f"{biased[0]} has a bias of its members' (lora_bias), which PEFT refuses beside an adapted embedding "
                f"({tables[0]}): merge the adapter, or compose without one of the two"
            )
    full = {m: sum(term.A.shape[0] for term in layer.terms(adapter_name)) for m, layer in layers.items()}
    if energy is not None:
        rank = max(_rank_for(svd_of_product(*fold(layer.terms(adapter_name))).S, energy) for layer in layers.values())
    common = max(full.values()) if rank is None else min(rank, max(full.values()))

    report, factors, squared_error, squared_norm = {}, {}, 0.0, 0.0
    for module, layer in layers.items():
        A, B = fold(layer.terms(adapter_name))
        dropped = total = 0.0
        if rank is not None:
            U, S, V = svd_of_product(A, B)
            dropped, total = float(S[common:].square().sum()), float(S.square().sum())
            if full[module] > common:
                root = S[:common].sqrt()
                A, B = ((V[:, :common] * root).T.to(A.dtype), (U[:, :common] * root).to(B.dtype))
        squared_error, squared_norm = squared_error + dropped, squared_norm + total
        report[module] = {
            "rank": full[module],
            "kept": min(full[module], common),
            "relative_error": _ratio(dropped, total),
        }
        padding = common - A.shape[0]
        factors[module] = (nn.functional.pad(A, (0, 0, 0, padding)), nn.functional.pad(B, (0, padding)))
    if new_adapter is not None:
        _add(model, new_adapter, adapter_name, layers, factors)
    if save_to is not None:
        _save(model, Path(save_to), adapter_name, layers, factors, biases)
    error = _ratio(squared_error, squared_norm)
    return LoraReport(common, error, report, None if save_to is None else str(save_to))


def _ratio(squared_error: float, squared_norm: float) -> float:
    return (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0


def _rank_for(S: Tensor, energy: float) -> int:
    kept = S.square().cumsum(0)
    # Rounding may leave the last sum below energy * total when energy is 1.
    return min(int((kept < energy * kept[-1]).sum()) + 1, len(S))


def _add(model: PeftModel, name: str, source: str, layers: dict, factors: dict) -> None:
    config = model.peft_config[source]
    rank = next(iter(factors.values()))[0].shape[0]
    values = {"r": rank, "lora_alpha": rank, "target_modules": list(factors), "task_type": config.task_type}
    model.add_adapter(name, LoomConfig(**values))
    for module, layer in layers.items():
        for factor, value in zip((layer.factor("A", name), layer.factor("B", name)), factors[module], strict=True):
            factor.copy_(value.reshape(factor.shape))


def _save(model: PeftModel, folder: Path, adapter_name: str, layers: dict, factors: dict, biases: dict) -> None:
    source: Any = model.peft_config[adapter_name]
    rank = next(iter(factors.values()))[0].shape[0]
    biased = any(bias is not None for bias in biases.values())
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(factors),
        lora_bias=biased,
        fan_in_fan_out=any(getattr(layer, "fan_in_fan_out", False) for layer in layers.values()),
        task_type=source.task_type,
        modules_to_save=source.modules_to_save,
        base_model_name_or_path=source.base_model_name_or_path,
        inference_mode=True,
    )
    others = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {key: value for key, value in others.items() if ".loom_" not in key}
    for module, layer in layers.items():
        key, dtype = f"base_model.model.{module}", layer.factor("A", adapter_name).dtype
        A, B = (factor.to(dtype) for factor in factors[module])
        if isinstance(layer.get_base_layer(), nn.Embedding):
            tensors |= {f"{key}.lora_embedding_A": A, f"{key}.lora_embedding_B": B}
            continue
        kernel = layer.factor_shapes(rank)
        tensors |= {f"{key}.lora_A.weight": A.reshape(kernel[0]), f"{key}.lora_B.weight": B.reshape(kernel[1])}
        if biased:
            bias = biases[module]
            tensors[f"{key}.lora_B.bias"] = torch.zeros(B.shape[0], dtype=dtype) if bias is None else bias.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {k: v.cpu().contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"}
    )
    config.save_pretrained(str(folder))
