"""The tensors and the configuration of an exported adapter: factors folded, cut or padded, named as PEFT names them."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from loraloom.adapter.base import BaseWeights, weight_update
from loraloom.adapter.serving import allowed_rank, features, is_embedding, kind_of_other, serving_data
from loraloom.adapter.stored import CONFIG, WEIGHTS, StoredAdapter
from loraloom.errors import InputError, RunFailedError
from loraloom.update.lowrank import best_approximation, truncate
from loraloom.update.terms import fold

# Target -> the programs of serving.yaml that must take the result.
TARGETS = {
    "portable": ("vllm", "sglang", "llamacpp"),
    "peft": ("peft",),
    "vllm": ("vllm",),
    "sglang": ("sglang",),
    "gguf-ready": ("llamacpp",),
}
Watch = Callable[[Sequence[str], str], Iterable[str]]


class ExportPlan:
    """The adapter's modules on their way to the new file.

    Attributes:
        factors: module -> A' (r, in) and B' (out, r), once they are folded.
        dropped: modules whose update is zero.
        rank: the largest of the ranks; that of all modules unless the target is "peft".
        truncated: whether an update was approximated.
    """

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

    def fold(self, watch: Watch) -> None:
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
        kinds = {kind_of_other(self.adapter, key) for key in self.adapter.others}
        bias = config.get("bias", "none") if "bias" in kinds else "none"
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
            "modules_to_save": config.get("modules_to_save") if "modules_to_save" in kinds else None,
            "trainable_token_indices": config.get("trainable_token_indices") if "tokens" in kinds else None,
            "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
            "init_lora_weights": True,
        }
