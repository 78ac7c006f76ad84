"""Adapters on disk, PEFT's LoRA and our own, as the terms of ``W' = m * norm(W + sum g s B M A)``."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from loraloom.adapter.experts import Expert, wrapped_parameters
from loraloom.adapter.peft_features import TRAINING_ONLY, check_config
from loraloom.adapter.protocol import AdaptedModule, Adapter, Parts
from loraloom.errors import InputError
from loraloom.io.checkpoint import Checkpoint, locate, open_checkpoint, read_json
from loraloom.patterns import pattern_value
from loraloom.update.composition import Composition, LayerComposition
from loraloom.update.parts import LORA_EMBEDDING, NAMES
from loraloom.update.terms import scaling

if TYPE_CHECKING:
    from loraloom.adapter.base import BaseWeights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
_HEADS = ("lm_head", "embed_out", "decoder")
_MOST_EXPERTS = 4096


class StoredModule(AdaptedModule):
    """One module of an adapter on disk. Every call reads the tensors again.

    Attributes:
        tensors: part -> name of its tensor; the experts of a parameter share them.
        pattern_name: what the patterns of the configuration are matched against.
    """

    def __init__(
        self, adapter: "StoredAdapter", name: str, tensors: dict[str, str], expert: Expert | None = None
    ) -> None:
        self.name, self.tensors, self.expert = name, tensors, expert
        self._adapter = adapter
        config = adapter.config
        self.pattern_name = name if expert is None else expert.parameter
        r = pattern_value(config.get("rank_pattern"), self.pattern_name, config.get("r", 8))
        alpha = pattern_value(config.get("alpha_pattern"), self.pattern_name, config.get("lora_alpha", 8))
        self.scaling = scaling(r, alpha, bool(config.get("use_rslora")))
        self.config_rank: int = r
        """The rank that the configuration says, which :attr:`rank` has to be."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        stored = {part: self._adapter.checkpoint.shape(key) for part, key in self.tensors.items()}
        return stored if self.expert is None else {p: self.expert.shape(p, shape) for p, shape in stored.items()}

    @property
    def where(self) -> str:
        return f"{self.name} of {self._adapter.where}"

    @property
    def place(self) -> str:
        """The module that the file says its factors are of."""
        return split_name(self.tensors["A"], self._adapter.kind)[0]

    def unchecked_parts(self) -> Parts:
        if self.expert is not None:
            return self.expert.share(self._adapter.shared_parts(self.tensors))
        read = dict(self._adapter.checkpoint.tensors([*self.tensors.values()]))
        return {part: read[key] for part, key in self.tensors.items()}

    def weight(self) -> Tensor:
        if self._adapter.base is None:
            raise InputError(f"{self._adapter.where}: {self.name} takes its base weight: give --base", code="no-base")
        return self._adapter.base.matrix(self.name)

    @property
    def embedding(self) -> bool:
        if self.expert is not None:
            return False
        if self._adapter.kind == "LORA":
            return LORA_EMBEDDING["A"] in self.tensors["A"]
        from loraloom.adapter.base import looks_like_embedding

        base = self._adapter.base
        return looks_like_embedding(self.name) if base is None else base.is_embedding(self.name)

    def _members(self) -> LayerComposition:
        composition = self._adapter.composition
        if composition is None or self.name not in composition.ranks:
            raise InputError(
                f"{self._adapter.path / CONFIG} does not say which members {self.name} has: compose the adapter again",
                code="members",
            )
        return LayerComposition(composition, self.name)


class StoredAdapter(Adapter):
    """An adapter in a folder, read lazily. :func:`loraloom.adapter.open.open_adapter` checks it besides.

    Attributes:
        path: the folder.
        config: adapter_config.json as it is.
        checkpoint: its tensors.
        modules: the adapted modules, in the file's order.
        base: the base model's weights, where they are known.
        twins: the output head of a tied table, whose update PEFT saves a second time, transposed.
        twice: their tensors.
    """

    modules: dict[str, StoredModule]

    def __init__(self, path: Path, config: dict[str, Any], checkpoint: Checkpoint) -> None:
        self.path, self.config, self.checkpoint = path, config, checkpoint
        self.where = str(path)
        self.kind = config["peft_type"]
        self.base: BaseWeights | None = None
        self.composition = _composition(path, config.get("composition"))
        found: dict[str, dict[str, str]] = {}
        self._others: list[str] = []
        for key in checkpoint:
            module, part = split_name(key, self.kind)
            if part is not None:
                found.setdefault(module, {})[part] = key
            elif not for_training_only(key):
                self._others.append(key)
        for module, parts in found.items():
            for part in ("A", "B"):
                if part not in parts:
                    raise InputError(
                        f"{path}: {module} has no {part} ({', '.join(parts.values())}): save it again",
                        code="missing-tensor",
                    )
            for part, key in parts.items():
                dtype = checkpoint.dtype(key)
                if part in ("A", "B") and not checkpoint.shape(key):
                    raise InputError(f"{path}: {key} is a single number; expected a matrix", code="shape")
                if not dtype.is_floating_point or dtype.itemsize == 1:
                    raise InputError(
                        f"{path}: {key} is stored as {dtype}; expected a floating point of 16 bits or more",
                        code="dtype",
                    )
        parameters = wrapped_parameters(config, found, str(path))
        self.modules = {}
        for module, parts in found.items():
            self.modules |= (
                self._experts(parameters[module], parts)
                if module in parameters
                else {module: StoredModule(self, module, parts)}
            )
        self._shared: tuple[str, Parts] | None = None
        self.twins: dict[str, StoredModule] = {}
        self.twice: set[str] = set()
        self._drop_wrapped()
        if config.get("ensure_weight_tying"):
            self._drop_twins()

    def _experts(self, parameter: str, parts: dict[str, str]) -> dict[str, StoredModule]:
        """A module for each expert of a parameter."""
        A, B = (self.checkpoint.shape(parts[part]) for part in ("A", "B"))
        r = pattern_value(self.config.get("rank_pattern"), parameter, self.config.get("r", 8))
        count = A[0] // r if A else 0
        if (len(A), len(B)) != (2, 2) or A[0] != count * r or B[1] != A[0] or not 0 < count <= _MOST_EXPERTS:
            raise InputError(
                f"{self.path}: the factors of {parameter} are {list(A)} and {list(B)}; expected (experts * {r}, in) "
                f"and (out, {r} * experts) with rank {r}",
                code="rank",
            )
        experts = [Expert(parameter, index, count) for index in range(count)]
        if count == 1 and parameter.endswith(".weight"):
            name = parameter.removesuffix(".weight")
            return {name: StoredModule(self, name, parts)}
        return {expert.name: StoredModule(self, expert.name, parts, expert) for expert in experts}

    def shared_parts(self, tensors: dict[str, str]) -> Parts:
        """What the experts of a parameter share. Those read last are kept: the other experts ask next."""
        if self._shared is None or self._shared[0] != tensors["A"]:
            read = dict(self.checkpoint.tensors([*tensors.values()]))
            self._shared = tensors["A"], {part: read[key] for part, key in tensors.items()}
        return self._shared[1]

    def _drop_wrapped(self) -> None:
        """With a resized vocabulary PEFT saves modules_to_save again, with what they were: NAME.weight says it all."""
        for key in self._others:
            module, _, rest = key.rpartition(".modules_to_save.")
            if rest and f"{module}.{rest}" in self.checkpoint:
                own = self.checkpoint.tensor(f"{module}.{rest}")
                if not torch.equal(own, self.checkpoint.tensor(key)):
                    raise InputError(f"{self.path}: {key} is not {module}.{rest}: save it again", code="duplicate")
                self.twice |= {key, key.replace(".modules_to_save.", ".original_module.")} & set(self.checkpoint)
        self._others = [key for key in self._others if key not in self.twice]

    def _drop_twins(self) -> None:
        """PEFT saves the update of a table that is the output head as well twice, the second one transposed."""
        tables = [module for module in self.modules.values() if module.embedding]
        for name, module in list(self.modules.items()):
            table = next((table for table in tables if table.shape == module.shape[::-1]), None)
            if module.embedding or table is None or name.rpartition(".")[2] not in _HEADS:
                continue
            mine, its = module.unchecked_parts(), table.unchecked_parts()
            if not (torch.equal(mine["A"], its["B"].T) and torch.equal(mine["B"], its["A"].T)):
                raise InputError(
                    f"{self.path}: ensure_weight_tying is true, and {name} has another update than {table.name}: save "
                    "the adapter again",
                    code="tied",
                )
            self.twins[name] = self.modules.pop(name)
            twice = {*module.tensors.values(), f"{PREFIX}{name}.base_layer.weight"}
            self._others = [key for key in self._others if key not in twice]
            self.twice |= twice

    @property
    def others(self) -> list[str]:
        return self._others

    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        return self.checkpoint.tensors(self._others)

    @property
    def sha256(self) -> str:  # type: ignore[override]  # read when asked for
        with open(next(iter(self.checkpoint.files)), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def read_adapter(path_or_id: str | Path) -> StoredAdapter:
    """Reads a folder (or a repository of the hub) with ``adapter_config.json`` and ``adapter_model.safetensors``.

    What the names, shapes and ranks say is not compared: :func:`loraloom.adapter.open.open_adapter` does.

    Raises:
        InputError: a file is missing or broken, a value or a tensor has a wrong type, or the adapter is none that is
            understood (see :mod:`loraloom.adapter.peft_features`).
    """
    folder = locate(path_or_id, (CONFIG, WEIGHTS))
    if not (folder / CONFIG).is_file():
        inside = sorted(config.parent.name for config in folder.glob(f"*/{CONFIG}"))  # PEFT's place for named adapters
        hint = "expected the folder that save_pretrained wrote for an adapter"
        raise InputError(
            f"{folder} has no {CONFIG}; {f'its subfolder {inside[0]} has' if inside else hint}", code="no-config"
        )
    config = read_json(folder / CONFIG)
    check_config(config, str(folder))
    if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
        raise InputError(
            f"{folder} holds adapter_model.bin, a pickle, which can run code when it is loaded: "
            "save the adapter with save_pretrained(..., safe_serialization=True)",
            code="pickle",
        )
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder} has no {WEIGHTS}", code="no-weights")
    return StoredAdapter(folder, config, open_checkpoint(folder / WEIGHTS))


def _composition(path: Path, values: Any) -> Composition | None:
    if values is None:
        return None
    try:
        return Composition.from_dict(values)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{path / CONFIG}: {error}", code="composition") from None


def for_training_only(key: str) -> bool:
    """Whether the function does not use the tensor."""
    return any(f".{name}" in key for name in TRAINING_ONLY)


def split_name(key: str, kind: str) -> tuple[str, str | None]:
    """The module and the part that a tensor's name stands for; the name and None where it is of no update."""
    name = key.removeprefix(PREFIX)
    for suffix, part in NAMES[kind].items():
        for ending in (f".{suffix}.weight", f".{suffix}"):
            if name.endswith(ending) and not (suffix.endswith(".bias") and ending.endswith(".weight")):
                return name.removesuffix(ending), part
    return name, None
