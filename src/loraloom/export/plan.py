"""The tensors and the configuration of an exported adapter: factors folded, cut or padded, named as PEFT names them.

Truncation of D = B A to rank k is the best one (Eckart and Young, 1936), of relative error
||D - D_k|| / ||D|| = (sum_(i>k) S_i^2 / sum_i S_i^2)^(1/2) in the Frobenius norm, S the singular values of D.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loraloom.adapter.base import BaseWeights, base_key
from loraloom.adapter.experts import joined
from loraloom.adapter.protocol import AdaptedModule, Adapter
from loraloom.adapter.serving import (
    allowed_rank,
    copies_of_base,
    features,
    kind_of_other,
    missing_siblings,
    serving_data,
)
from loraloom.adapter.stored import CONFIG, PREFIX, WEIGHTS
from loraloom.errors import InputError, RunFailedError
from loraloom.io.stream import save_tensors
from loraloom.progress import Progress, silent, tracked
from loraloom.update.lowrank import best_approximation, factored_svd, truncate
from loraloom.update.parts import LORA, LORA_EMBEDDING

# Target -> the programs of serving.yaml that must take the result.
TARGETS = {
    "portable": ("vllm", "sglang", "llamacpp"),
    "peft": ("peft",),
    "vllm": ("vllm",),
    "sglang": ("sglang",),
    "gguf-ready": ("llamacpp",),
}


class ExportPlan:
    """The adapter's modules on their way to the new file.

    Args:
        adapter: what is exported.
        target: for whom.
        rank: the largest rank to keep; None keeps all.
        dtype: of the factors.
        energy: share of ||D||^2 to keep in every module, in (0, 1]; the rank is the smallest with which all do.
        one_rank: pad every module to one rank; None does so unless the target is "peft".

    Attributes:
        factors: module -> A' (r, in) and B' (out, r), once they are folded.
        ranks, errors: module -> rank of its exact update, and ||D - D'|| / ||D|| of what truncation lost; DoRA's
            error is known once the result is compared.
        dropped: modules whose update is zero.
        completed: modules that get factors of zeros, because SGLang stacks them with one that is adapted.
        rank: the largest of the ranks; that of all modules with ``one_rank``.
        truncated: whether an update was approximated.
    """

    def __init__(
        self,
        adapter: Adapter,
        target: str,
        rank: int | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        energy: float | None = None,
        one_rank: bool | None = None,
    ) -> None:
        if rank is not None and (energy is not None or rank < 1):
            raise InputError(f"rank={rank!r}, energy={energy!r}: give one of them, a rank of at least 1", code="rank")
        if energy is not None and not 0 < energy <= 1:
            raise InputError(f"energy={energy!r} must lie in (0, 1]", code="energy")
        self.adapter, self.target, self.dtype = adapter, target, dtype
        self.rank, self.energy = rank, energy
        self.one_rank = target != "peft" if one_rank is None else one_rank
        self.factors: dict[str, tuple[Tensor, Tensor]] = {}
        self.ranks: dict[str, int] = {}
        self.errors: dict[str, float] = {}
        self._squares = [0.0, 0.0]  # of what is lost, and of all
        self.dropped: list[str] = []
        self.completed: list[str] = []
        self.truncated = False

    @property
    def error(self) -> float:
        """||D - D'|| / ||D|| over all modules together, of truncation alone."""
        lost, norm = self._squares
        return math.sqrt(lost / norm) if norm else 0.0

    @cached_property
    def twins(self) -> dict[str, str]:
        """Output heads that are tied to an adapted table -> the table; PEFT wants the update of both."""
        heads: Mapping[str, AdaptedModule] = getattr(self.adapter, "twins", {})
        modules = self.adapter.modules.items()
        return {
            head: next(name for name, table in modules if table.embedding and table.shape == twin.shape[::-1])
            for head, twin in heads.items()
        }

    @cached_property
    def others(self) -> list[str]:
        """Tensors of no update that go along; for servers without the base's own tables."""
        copies = [] if self.target == "peft" else copies_of_base(self.adapter)
        return [key for key in self.adapter.others if key not in copies]

    def approximates(self, module: AdaptedModule) -> bool:
        """Whether the module's update has to be approximated, having a magnitude that the target does not take."""
        return self.target != "peft" and "magnitude" in module.shapes()

    def fold(self, progress: Progress = silent) -> None:
        """Fills `factors` with A' (r, in) and B' (out, r)."""
        if self.energy is not None:
            modules = self.adapter.modules.values()
            self.rank = max(_rank_for(factored_svd(*_double(module))[1], self.energy) for module in modules)
        for name in tracked(self.adapter.modules, "Folding", progress):
            module = self.adapter.modules[name]
            A, B = self._fold(module)
            # With DoRA or a bias, a module whose factors are zero may change the model all the same; experts are
            # stored together.
            more = module.expert is not None or module.shapes().keys() & {"magnitude", "bias", "member_bias"}
            if not more and not (A.any() and B.any()):
                self.dropped.append(name)
            else:
                self.factors[name] = (A, B)
        if not self.factors:
            raise RunFailedError(f"{self.adapter.where}: every update is zero, there is nothing to export", code="zero")
        largest = max(A.shape[0] for A, _ in self.factors.values())
        if not self.one_rank:
            self.rank = largest
            return
        wanted = largest if self.target == "peft" else self.rank or largest
        self.rank = self._allowed(wanted)
        for name, (A, B) in self.factors.items():
            padding = self.rank - A.shape[0]
            self.factors[name] = (F.pad(A, (0, 0, 0, padding)), F.pad(B, (0, padding)))
        if "sglang" in TARGETS[self.target]:
            self.completed = [*missing_siblings(self.factors)]

    def zeros(self, name: str) -> tuple[Tensor, Tensor]:
        """Factors without an effect for a module that is not adapted.

        Raises:
            InputError: nothing says how large the module is.
        """
        kind = name.rpartition(".")[2]
        alike = [m for m in self.adapter.modules.values() if m.name.rpartition(".")[2] == kind]
        shape = alike[0].shape if alike else self._in_base(name)
        if shape is None:
            raise InputError(
                f"{self.adapter.where}: SGLang needs factors of {name} beside {missing_siblings(self.factors)[name]}, "
                "and no other layer says how large they are: give --base",
                code="siblings",
            )
        assert self.rank is not None
        return torch.zeros(self.rank, shape[1]), torch.zeros(shape[0], self.rank)

    def _in_base(self, name: str) -> tuple[int, int] | None:
        """(out, in) of a Linear of the base model, where that is known."""
        base = getattr(self.adapter, "base", None)
        if base is None and (folder := Path(self.adapter.config.get("base_model_name_or_path") or "")).name:
            base = BaseWeights(folder, self.adapter) if (folder / "config.json").is_file() else None
        key = None if base is None else base_key(name, base.checkpoint)
        if base is None or key is None or len(base.checkpoint.shape(key)) != 2:
            return None
        out, width = base.checkpoint.shape(key)
        return out, width

    def _fold(self, module: AdaptedModule) -> tuple[Tensor, Tensor]:
        if self.approximates(module):
            self.truncated = True
            return best_approximation(module.update().change(module.weight()), self.rank or module.rank)
        A, B = module.factors()
        self.ranks[module.name], error = A.shape[0], 0.0
        if self.rank is not None:
            norm = float(factored_svd(*_double(module))[1].square().sum())
            if A.shape[0] > self.rank:
                self.truncated = True
                exact, (A, B, error) = A, truncate(*_double(module), self.rank)
                A, B = A.to(exact.dtype), B.to(exact.dtype)
            self._squares[0] += error**2 * norm
            self._squares[1] += norm
        self.errors[module.name] = error
        return A, B

    def _allowed(self, rank: int) -> int:
        for name in TARGETS[self.target] if self.target != "portable" else ():
            allowed = allowed_rank(name, rank)
            if allowed is None:
                ranks = serving_data()["servers"][name]["ranks"]
                raise InputError(
                    f"rank {rank} is above {ranks[-1]}, the largest that {name} allows: give --rank", code="rank"
                )
            rank = allowed
        return rank

    def write(self, folder: Path) -> None:
        """Writes tensors and configuration.

        Raises:
            InputError: biases beside an adapted embedding, which PEFT refuses.
        """
        tensors: dict[str, Tensor] = {}
        with_bias = self.target == "peft" and "lora_bias" in features(self.adapter)
        modules = {name: self.adapter.modules[name] for name in self.factors}
        tables = [name for name, module in modules.items() if module.embedding]
        if with_bias and tables:
            raise InputError(
                f"the adapter adds to biases (lora_bias), which PEFT refuses beside an adapted embedding "
                f"({tables[0]}): merge the adapter, or compose without one of the two",
                code="bias",
            )
        tensors |= self._experts()
        for name, (A, B) in self.factors.items():
            if modules[name].expert is not None:
                continue
            tensors |= self._named(modules[name], A.to(self.dtype), B.to(self.dtype))
            if with_bias:
                bias = modules[name].bias()
                tensors[f"{PREFIX}{name}.{LORA['bias']}"] = (
                    torch.zeros(B.shape[0], dtype=self.dtype) if bias is None else bias.to(self.dtype)
                )
        for name in self.completed:
            A, B = (factor.to(self.dtype) for factor in self.zeros(name))
            tensors |= {f"{PREFIX}{name}.{LORA['A']}.weight": A, f"{PREFIX}{name}.{LORA['B']}.weight": B}
        for twin, table in self.twins.items():
            A, B = (factor.to(self.dtype) for factor in self.factors[table])
            tensors |= {f"{PREFIX}{twin}.{LORA['A']}.weight": B.T, f"{PREFIX}{twin}.{LORA['B']}.weight": A.T}
        tensors |= {key: tensor for key, tensor in self.adapter.other_tensors() if key in self.others}
        save_tensors(folder / WEIGHTS, tensors)
        config = self._config(with_bias)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def _experts(self) -> dict[str, Tensor]:
        """The factors of experts as PEFT stores them, those of a parameter together."""
        shares: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for name, (A, B) in self.factors.items():
            if self.adapter.modules[name].expert is not None:
                place = self.adapter.modules[name].place  # type: ignore[attr-defined]  # only files have experts
                shares.setdefault(place, []).append((A.to(self.dtype), B.to(self.dtype)))
        named: dict[str, Tensor] = {}
        for place, factors in shares.items():
            A, B = joined(factors)
            named |= {f"{PREFIX}{place}.{LORA['A']}.weight": A, f"{PREFIX}{place}.{LORA['B']}.weight": B}
        return named

    def _named(self, module: AdaptedModule, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """The factors in the shapes and under the names of PEFT's LoRA."""
        key, ones = f"{PREFIX}{module.name}", [1] * len(module.kernel)
        if module.embedding:
            named = {f"{key}.{LORA_EMBEDDING['A']}": A, f"{key}.{LORA_EMBEDDING['B']}": B}
        else:
            named = {
                f"{key}.{LORA['A']}.weight": A.reshape(-1, *module.shapes()["A"][1:]),
                f"{key}.{LORA['B']}.weight": B.reshape(*B.shape, *ones),
            }
        magnitude = module.magnitude()
        if magnitude is not None and not self.approximates(module):
            named[f"{key}.{LORA['magnitude']}"] = magnitude.reshape(1, -1, *ones) if ones else magnitude
        return named

    def _config(self, with_bias: bool) -> dict[str, Any]:
        config = self.adapter.config
        modules = self.adapter.modules
        experts = {name: expert.parameter for name in self.factors if (expert := modules[name].expert) is not None}
        named = config.get("target_parameters") or []  # a layer's weight is written as that layer
        ranks = {experts.get(module, module): A.shape[0] for module, (A, _) in self.factors.items()}
        r = Counter(ranks.values()).most_common(1)[0][0]
        pattern = {module: rank for module, rank in ranks.items() if rank != r}
        kinds = {kind_of_other(self.adapter, key) for key in self.others}
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
            "target_modules": [*(name for name in self.factors if name not in experts), *self.completed],
            "target_parameters": [name for name in named if any(f".{p}".endswith(f".{name}") for p in experts.values())]
            or None,
            "bias": "lora_only" if bias == "loom_only" else bias,
            "use_rslora": False,
            "use_dora": self.target == "peft" and "use_dora" in features(self.adapter),
            "lora_bias": with_bias,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "modules_to_save": config.get("modules_to_save") if "modules_to_save" in kinds else None,
            "trainable_token_indices": config.get("trainable_token_indices") if "tokens" in kinds else None,
            "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
            "ensure_weight_tying": bool(self.twins),
            "init_lora_weights": True,
        }


def _double(module: AdaptedModule) -> tuple[Tensor, Tensor]:
    A, B = module.factors()
    return A.double(), B.double()


def _rank_for(S: Tensor, energy: float) -> int:
    kept = S.square().cumsum(0)
    # Rounding may leave the last sum below energy * total when energy is 1.
    return min(int((kept < energy * kept[-1]).sum()) + 1, len(S))
