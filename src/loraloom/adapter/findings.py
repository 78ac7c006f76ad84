"""What is wrong with an adapter's files, before any number is computed: names, shapes, and config against tensors."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from loraloom.adapter.base import BaseWeights
from loraloom.adapter.peft_features import changed_base
from loraloom.adapter.serving import kind_of_other
from loraloom.adapter.stored import PREFIX, StoredAdapter, StoredModule, for_training_only
from loraloom.errors import InputError
from loraloom.patterns import ends_with, is_target, pattern_value
from loraloom.text import did_you_mean

# Names that wrappers leave in a state dict when the wrapped model is saved.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model", "base_layer")


@dataclass(frozen=True)
class Finding:
    """Something that a user should know.

    Attributes:
        level: "error" (the adapter does not do what it says) or "warning".
        code: a word for programs.
        message: one line, with the fix where there is one.
        names: the modules or tensors it is about.
    """

    level: str
    code: str
    message: str
    names: list[str] = field(default_factory=list)


def name_findings(adapter: StoredAdapter) -> list[Finding]:
    """Tensors that PEFT would drop without a word, and two that mean the same thing."""
    found = []
    keys = set(adapter.checkpoint)
    used = {key for module in adapter.modules.values() for key in module.tensors.values()}
    factors = [key for key in adapter.others if re.search(r"lora_|loom_", key)]
    if factors:
        found.append(
            _error("unknown-tensor", "are factors whose name no loader knows; save the adapter again", factors)
        )
    unprefixed = [key for key in adapter.checkpoint if not key.startswith(PREFIX)]
    if unprefixed:
        found.append(_error("unknown-tensor", f"do not start with {PREFIX}, so PEFT drops them silently", unprefixed))
    wrapped = [m for m in adapter.modules if any(part in _WRAPPERS for part in m.split("."))]
    if wrapped:
        why = "carry the name of a wrapper, so they match no module; save the unwrapped model"
        found.append(_error("unresolved", why, wrapped))
    training = set(filter(for_training_only, keys))
    twice = sorted(keys - used - training - adapter.twice - {*adapter.others})
    if twice:
        found.append(_error("duplicate", "say again what another tensor says; remove one of each", twice))
    shapes = {name: _misshapen(module) for name, module in adapter.modules.items()}
    misshapen = [f"{name} ({sizes})" for name, sizes in shapes.items() if sizes]
    if misshapen:
        found.append(_error("shape", "have factors that do not fit together; were shards gathered?", misshapen))
    return found


def base_findings(adapter: StoredAdapter, base: BaseWeights) -> list[Finding]:
    """Modules that the base does not have, or has in another shape; two modules that are one."""
    found = []
    missing = [module for module, key in base.keys.items() if key is None]
    if missing:
        near = did_you_mean(f"{missing[0]}.weight", base.checkpoint)
        found.append(_error("unresolved", f"are not in the base model{near}", missing))
    shapes = []
    for module, key in base.keys.items():
        try:
            if key is not None:
                base.transposed(module)
        except InputError as error:
            shapes.append((module, str(error)))
    if shapes:
        found.append(Finding("error", "shape", f"{shapes[0][1]} ({len(shapes)} in all)", [m for m, _ in shapes]))
    alone = {module: key for module, key in base.keys.items() if key is not None and module not in base.experts}
    counts = Counter(alone.values())
    same = [module for module, key in alone.items() if counts[key] > 1]
    if same:
        found.append(_error("duplicate", "resolve to a base weight that another module resolves to as well", same))
    return found


def config_findings(adapter: StoredAdapter) -> list[Finding]:
    """Where adapter_config.json says one thing and the tensors another."""
    config, found = adapter.config, []
    # A composition's own record says the ranks.
    modules = {} if config.get("composition") else adapter.modules
    wrong = [name for name, module in modules.items() if module.config_rank != module.rank]
    if wrong:
        first = adapter.modules[wrong[0]]
        example = f"{wrong[0]} has rank {first.rank}, the configuration says {first.config_rank}"
        found.append(_error("rank", f"have another rank, so loading fails or the scale is wrong: {example}", wrong))
    for name in ("rank_pattern", "alpha_pattern"):
        named = {module.pattern_name for module in adapter.modules.values()}
        stale = [k for k in config.get(name) or {} if not any(pattern_value({k: 1}, m, 0) for m in named)]
        if stale:
            found.append(_warning("pattern", f"of {name} match no adapted module", stale))
    # With ensure_weight_tying PEFT also adapts the tied twin of a target.
    tied = bool(config.get("ensure_weight_tying"))
    ordinary = [name for name, module in adapter.modules.items() if module.expert is None]
    unreached = [module for module in ordinary if not tied and not _is_target(config, module)]
    if unreached:
        why = "have tensors, but target_modules, exclude_modules or layers_to_transform leave them out: PEFT drops them"
        found.append(_error("target", why, unreached))
    targets = config.get("target_modules")
    names = targets if isinstance(targets, list) else []
    idle = [name for name in names if not any(ends_with(module, name) for module in adapter.modules)]
    if idle:
        found.append(_warning("target", "of target_modules match no adapted module", idle))
    found += _part_findings(adapter)
    found += _other_findings(adapter)
    if altered := changed_base(config):
        found.append(Finding("error", "altered-base", altered))
    return found


def _part_findings(adapter: StoredAdapter) -> list[Finding]:
    """Parts that the configuration asks for and tensors do not have, or the other way round."""
    switches = {"use_dora": "magnitude", "lora_bias": "bias"}
    if adapter.kind == "LOOM":
        switches = {"use_dora": "magnitude", "use_mixer": "mixer", "use_gate": "gate"}
    found = []
    for switch, part in switches.items():
        asked = bool(adapter.config.get(switch))
        differ = [name for name, module in adapter.modules.items() if (part in module.tensors) != asked]
        if differ:
            state = "lack" if asked else "have"
            value = adapter.config.get(switch)
            found.append(_error("parts", f"{state} a {part}, while {switch} is {value!r}", differ))
    return found


def _other_findings(adapter: StoredAdapter) -> list[Finding]:
    config, found = adapter.config, []
    saved = list(config.get("modules_to_save") or [])
    names = [key.removeprefix(PREFIX) for key in adapter.others]
    absent = [name for name in saved if not any(f".{name}." in f".{key}" for key in names)]
    if absent:
        found.append(_warning("modules-to-save", "of modules_to_save have no tensor", absent))
    stray = [
        key
        for key in adapter.others
        if kind_of_other(adapter, key) == "modules_to_save"
        and not any(f".{name}." in f".{key}" for name in saved)
        and not re.search(r"lora_|loom_", key)
    ]
    if stray:
        found.append(_warning("unknown-tensor", "are in none of modules_to_save, bias and trained tokens", stray))
    return found


def _is_target(config: dict[str, Any], module: str) -> bool:
    """Whether PEFT would adapt the module, by its rules for names and layer indices."""
    if any(ends_with(f"{module}.weight", name) for name in config.get("target_parameters") or []):
        return True
    targets = config.get("target_modules")
    rest = {key: config.get(key) for key in ("exclude_modules", "layers_to_transform", "layers_pattern")}
    if targets is None or targets == "all-linear":
        targets = [module]
    return bool(is_target(module, targets, **rest))


def _misshapen(module: StoredModule) -> str | None:
    """Which shapes do not fit those of A (r, in, ...) and B (out, r, ...), or None."""
    shapes = module.shapes()
    A, B = shapes["A"], shapes["B"]
    if any(len(shape) < 2 or 0 in shape for shape in (A, B)) or A[0] != B[1]:
        return f"A {_size(A)}, B {_size(B)}"
    entries = {"magnitude": B[0], "bias": B[0], "gate": 1}
    wanted = {"mixer": (A[0], A[0]), "anchor_A": A, "anchor_B": B}
    for part, shape in shapes.items():
        fits = shape == wanted[part] if part in wanted else math.prod(shape) == entries.get(part, math.prod(shape))
        if not fits:
            return f"A {_size(A)}, B {_size(B)}, {part} {_size(shape)}"
    return None


def _size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _error(code: str, why: str, names: list[str]) -> Finding:
    return Finding("error", code, f"{counted(names)} {why}", names)


def _warning(code: str, why: str, names: list[str]) -> Finding:
    return Finding("warning", code, f"{counted(names)} {why}", names)


def counted(names: list[str]) -> str:
    """The names, or the first and how many more."""
    return ", ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} more"
