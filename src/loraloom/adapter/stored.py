"""Adapters on disk, PEFT's LoRA and our own, as the terms of ``W' = m * norm(W + sum g s B M A)``.

Everything is in the orientation of the maths: A (r, in), B (out, r), W (out, in), with kernels of convolutions
flattened into `in`, and with W^T the table of an embedding. :func:`as_matrix` brings a stored weight into it.
"""

import hashlib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from loraloom.errors import InputError
from loraloom.io.checkpoint import Checkpoint, locate, open_checkpoint, read_json
from loraloom.update.composition import Composition, LayerComposition
from loraloom.update.terms import Term, scaling

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# What follows the module's name in a tensor's name -> which part it is; PEFT drops ".weight" where it likes.
_PARTS = {
    "LORA": {
        "lora_A": "A",
        "lora_B": "B",
        "lora_embedding_A": "A",
        "lora_embedding_B": "B",
        "lora_magnitude_vector": "magnitude",
        "lora_B.bias": "bias",
    },
    "LOOM": {
        "loom_lora_A": "A",
        "loom_lora_B": "B",
        "loom_mixer": "mixer",
        "loom_gate_lora_magnitude_vector": "gate",
        "loom_lora_magnitude_vector": "magnitude",
        "loom_anchor_A": "anchor_A",
        "loom_anchor_B": "anchor_B",
        "loom_logits_lora_magnitude_vector": "logits",
        "loom_member_bias": "member_bias",
    },
}
# Fields of PEFT's LoraConfig that make another function of the same tensors.
_OTHER_FUNCTIONS = ("target_parameters", "use_qalora", "alora_invocation_tokens", "arrow_config", "use_bdlora")
# Of PEFT's LoRA: starts that take something away from the base weight, in the model and not in the adapter.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# transformers' Conv1D stores (in, out). A square one looks like a Linear on disk, so these are known by name.
CONV1D_MODELS = frozenset({"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
_CONV1D_NAMES = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})


class StoredAdapter:
    """An adapter in a folder, read lazily. See :func:`open_adapter`.

    Attributes:
        path: the folder.
        config: adapter_config.json as it is.
        kind: its peft_type, "LORA" or "LOOM".
        checkpoint: its tensors.
        modules: the names of the adapted modules, relative to the base model, in the file's order.
        others: the names of tensors that are no part of a low-rank update: of modules_to_save, biases, tokens.
    """

    def __init__(self, path: Path, config: dict[str, Any], checkpoint: Checkpoint) -> None:
        self.path, self.config, self.checkpoint = path, config, checkpoint
        self.kind: str = config["peft_type"]
        self._composition = _composition(path, config.get("composition"))
        self._keys: dict[str, dict[str, str]] = {}
        self.others: list[str] = []
        for key in checkpoint:
            module, part = _split(key, _PARTS[self.kind])
            if part is None:
                self.others.append(key)
            else:
                self._keys.setdefault(module, {})[part] = key
        self.modules = list(self._keys)
        for module, parts in self._keys.items():
            for part in ("A", "B"):
                if part not in parts:
                    raise InputError(f"{path}: {module} has no {part} ({', '.join(parts.values())}): save it again")

    def parts(self, module: str) -> dict[str, str]:
        """What the module's update is made of: "A", "B", "mixer", "gate", "magnitude", "bias"... -> tensor name."""
        return self._keys[module]

    def rank(self, module: str) -> int:
        """r of one module, from its tensors."""
        return self.checkpoint.shape(self._keys[module]["A"])[0]

    def shape(self, module: str) -> tuple[int, int]:
        """(out, in) of one module's update as a matrix, from the headers."""
        A, B = (self.checkpoint.shape(self._keys[module][part]) for part in ("A", "B"))
        return B[0], math.prod(A[1:])

    def scaling(self, module: str) -> float:
        """s of one module: alpha / r, or alpha / sqrt(r) with rsLoRA, by the configuration's patterns."""
        r = pattern_value(self.config.get("rank_pattern"), module, self.config.get("r", 8))
        alpha = pattern_value(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha", 8))
        return scaling(r, alpha, bool(self.config.get("use_rslora")))

    def part(self, module: str, part: str) -> Tensor | None:
        """One tensor of the module as it is stored, or None where the adapter has no such part."""
        key = self._keys[module].get(part)
        return None if key is None else self.checkpoint.tensor(key)

    def terms(self, module: str) -> list[Term]:
        """What the module's update is the sum of, as matrices A (r, in), B (out, r), in the dtype of the file."""
        scaling, gate = self.scaling(module), self.part(module, "gate")
        if (logits := self.part(module, "logits")) is not None:
            gate = self._members(module).gate(logits)
        terms = [Term(self._matrix(module, "A"), self._matrix(module, "B"), self.part(module, "mixer"), gate, scaling)]
        if "anchor_A" in self._keys[module]:
            anchors = self._matrix(module, "anchor_A"), self._matrix(module, "anchor_B")
            terms.append(Term(*anchors, None, gate, -scaling))
        return terms

    def magnitude(self, module: str) -> Tensor | None:
        """DoRA's m (out,), or None."""
        magnitude = self.part(module, "magnitude")
        return None if magnitude is None else magnitude.flatten()  # PEFT stores (1, out, 1, 1) for convolutions

    def lora_bias(self, module: str) -> Tensor | None:
        """What the update adds to the layer's bias (out,), scaled: PEFT's lora_bias, or that of a composition."""
        bias, member_bias = self.part(module, "bias"), self.part(module, "member_bias")
        if member_bias is not None:
            logits: Any = self.part(module, "logits")
            return self._members(module).weights(logits).to(member_bias.dtype) @ member_bias
        return None if bias is None else bias * self.scaling(module)

    @property
    def changed_base(self) -> str | None:
        """The init_lora_weights of a PEFT LoRA that changed the base weights when it started, or None."""
        start = self.config.get("init_lora_weights")
        changed = self.kind == "LORA" and isinstance(start, str) and start.lower().startswith(CHANGES_BASE)
        return start if changed else None

    @property
    def sha256(self) -> str:
        """Hash of the weights file, in hexadecimal."""
        with open(next(iter(self.checkpoint.files)), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _members(self, module: str) -> LayerComposition:
        if self._composition is None or module not in self._composition.ranks:
            raise InputError(f"{self.path / CONFIG} does not say which members {module} has: compose the adapter again")
        return LayerComposition(self._composition, module)

    def _matrix(self, module: str, part: str) -> Tensor:
        return self.checkpoint.tensor(self._keys[module][part]).flatten(1)


def open_adapter(path_or_id: str | Path) -> StoredAdapter:
    """Opens a folder (or a repository of the hub) with ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        InputError: a file is missing or broken, or the adapter is of another type than LORA and LOOM, or uses a
            feature of PEFT's LoRA whose update is not ``s B A``.
    """
    folder = locate(path_or_id, (CONFIG, WEIGHTS))
    if not (folder / CONFIG).is_file():
        inside = sorted(config.parent.name for config in folder.glob(f"*/{CONFIG}"))  # PEFT's place for named adapters
        hint = "expected the folder that save_pretrained wrote for an adapter"
        raise InputError(f"{folder} has no {CONFIG}; {f'its subfolder {inside[0]} has' if inside else hint}")
    config = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    if kind not in _PARTS:
        raise InputError(f"{folder} is an adapter of type {kind!r}; expected one of {', '.join(_PARTS)}")
    used = [name for name in _OTHER_FUNCTIONS if config.get(name)]
    if used:
        raise InputError(f"{folder} uses {used[0]}={config[used[0]]!r}, whose update is not a product s B A per module")
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise InputError(
            f"{folder} holds adapter_model.bin, a pickle, which can run code when it is loaded: "
            "save the adapter with save_pretrained(..., safe_serialization=True)"
        )
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} has no {WEIGHTS}")
    return StoredAdapter(folder, config, open_checkpoint(folder / WEIGHTS))


def base_key(module: str, base: Checkpoint, kind: str = "weight") -> str | None:
    """The name of an adapted module's weight in a base checkpoint, or None.

    The same network is saved with and without the name of its body in front (``model.``, ``bert.``, ``transformer.``),
    and a head may be new, so one name may be an ending of the other; it must be the only one.
    """
    return base_keys([module], base, kind)[module]


def base_keys(modules: Iterable[str], base: Checkpoint, kind: str = "weight") -> dict[str, str | None]:
    """:func:`base_key` for many modules, in one pass over the checkpoint."""
    keys = [key for key in base if key.endswith(f".{kind}")]
    exact = set(keys)
    # A checkpoint's name without its first component, for a base saved inside another model.
    shorter: dict[str, list[str]] = {}
    for key in keys:
        shorter.setdefault(key.partition(".")[2], []).append(key)
    found: dict[str, str | None] = {}
    for module in modules:
        name = f"{module}.{kind}"
        candidates = [name] if name in exact else shorter.get(name, [])
        tail = name.partition(".")[2]
        if not candidates and tail in exact:
            candidates = [tail]
        found[module] = candidates[0] if len(candidates) == 1 else None
    return found


def stored_transposed(module: str, update: tuple[int, int], weight: tuple[int, ...], base: dict, adapter: dict) -> bool:
    """Whether a base weight is stored as W^T: tables of embeddings, and transformers' Conv1D.

    Args:
        module: the adapted module's name.
        update: (out, in) of the adapter's update.
        weight: shape of the stored weight.
        base: the base model's config.json, {} when there is none.
        adapter: adapter_config.json.

    Raises:
        InputError: the shapes fit neither way.
    """
    flat = (weight[0], math.prod(weight[1:]))
    fits, fits_transposed = flat == update, len(weight) == 2 and flat[::-1] == update
    if fits and fits_transposed:
        if base.get("model_type") in CONV1D_MODELS:
            return module.rpartition(".")[2] in _CONV1D_NAMES
        return bool(adapter.get("fan_in_fan_out"))
    if not (fits or fits_transposed):
        raise InputError(
            f"{module}: the update is {update[0]} x {update[1]}, the base weight {'x'.join(map(str, weight))}; "
            "the adapter belongs to another base model"
        )
    return fits_transposed


def as_matrix(weight: Tensor, transposed: bool) -> Tensor:
    """A stored weight as W (out, in)."""
    return weight.T if transposed else weight.flatten(1)


def as_weight(matrix: Tensor, shape: tuple[int, ...], transposed: bool) -> Tensor:
    """The inverse of :func:`as_matrix`."""
    return matrix.T if transposed else matrix.reshape(shape)


def _composition(path: Path, values: dict[str, Any] | None) -> Composition | None:
    try:
        return None if values is None else Composition.from_dict(values)
    except ValueError as error:
        raise InputError(f"{path / CONFIG}: {error}") from None


def _split(key: str, parts: dict[str, str]) -> tuple[str, str | None]:
    name = key.removeprefix(_PREFIX)
    for suffix, part in parts.items():
        for ending in (f".{suffix}.weight", f".{suffix}"):
            if name.endswith(ending) and not (suffix.endswith(".bias") and ending.endswith(".weight")):
                return name.removesuffix(ending), part
    return name, None


def pattern_value(pattern: dict[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the whole name, or its ending after a dot."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default
