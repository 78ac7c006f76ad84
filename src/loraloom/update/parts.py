"""What an adapter of one module consists of: one table, from which names, groups, dtypes and shapes derive.

A state key is the attribute of the layer, and what follows the module's name in a file: ``<module>.<key>.weight``. Ours
say how others treat the tensor: optimizers group by "lora_A" and "lora_B", and TRL casts all but
"lora_magnitude_vector" to bf16 on a quantised base, which a gate or a magnitude must not be.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Name = Literal["A", "B", "mixer", "gate", "magnitude", "logits", "anchor_A", "anchor_B", "member_bias", "bias"]
Group = Literal["lora_A", "mixers", "lora_B", "gates", "logits", "magnitudes", "no_decay"]
Shape = tuple[int, ...]


def _always(_config: Any) -> bool:
    return True


def _never(_config: Any) -> bool:
    return False


def _from_base(config: Any) -> bool:
    return config.init_lora_weights in ("pissa", "olora")


@dataclass(frozen=True)
class Part:
    """One tensor that an adapter may have in a module."""

    name: Name
    group: Group | None
    """Group of `loraloom.optim.build_param_groups`; None for a frozen part."""
    loom: str | None = None
    """Its state key in our layers and files (type LOOM)."""
    lora: str | None = None
    """Its state key in PEFT's LoRA layers and files (type LORA)."""
    lora_embedding: str | None = None
    """The same for embeddings, where it differs."""
    shape: Callable[[Shape, Shape], Shape] | None = None
    """From the shapes of A (r, in, ...) and B (out, r, ...); None where something else decides."""
    present: Callable[[Any], bool] = _never
    """Whether an adapter with this ``LoomConfig`` starts with it; compositions add theirs."""
    float32: bool = False
    """Always float32; else of the adapter's dtype."""
    in_delta: bool = True
    """Stands in ``D = sum g s B M A``; else beside it."""

    @property
    def keys(self) -> list[str]:
        """Its state keys, ours and PEFT's."""
        return [key for key in (self.loom, self.lora, self.lora_embedding) if key]

    @property
    def trainable(self) -> bool:
        return self.group is not None


PARTS = (
    Part("A", "lora_A", "loom_lora_A", "lora_A", "lora_embedding_A", lambda A, B: A, _always),
    Part("B", "lora_B", "loom_lora_B", "lora_B", "lora_embedding_B", lambda A, B: B, _always),
    Part(
        "mixer",
        "mixers",
        "loom_mixer",
        shape=lambda A, B: (A[0], A[0]),
        present=lambda config: bool(config.use_mixer),
    ),
    Part(
        "gate",
        "gates",
        "loom_gate_lora_magnitude_vector",
        shape=lambda A, B: (1,),
        present=lambda config: config.use_gate,
        float32=True,
    ),
    Part(
        "magnitude",
        "magnitudes",
        "loom_lora_magnitude_vector",
        "lora_magnitude_vector",
        shape=lambda A, B: (B[0],),
        present=lambda config: config.use_dora,
        float32=True,
        in_delta=False,
    ),
    # Of compositions: what the members' weights come from (N,), and what members add to the bias (N, out).
    Part("logits", "logits", "loom_logits_lora_magnitude_vector", float32=True),
    # What PiSSA and OLoRA start from, subtracted, so that the base weight itself never changes.
    Part("anchor_A", None, "loom_anchor_A", shape=lambda A, B: A, present=_from_base),
    Part("anchor_B", None, "loom_anchor_B", shape=lambda A, B: B, present=_from_base),
    Part("member_bias", None, "loom_member_bias", in_delta=False),
    # PEFT's lora_bias.
    Part("bias", "no_decay", lora="lora_B.bias", in_delta=False),
)

# Name of a part -> its state key.
LOOM: dict[str, str] = {part.name: part.loom for part in PARTS if part.loom}
LORA: dict[str, str] = {part.name: part.lora for part in PARTS if part.lora}
LORA_EMBEDDING: dict[str, str] = {part.name: part.lora_embedding for part in PARTS if part.lora_embedding}
# PEFT's type of an adapter -> state key -> name of the part.
NAMES: dict[str, dict[str, str]] = {
    "LOOM": {key: name for name, key in LOOM.items()},
    "LORA": {key: name for keys in (LORA, LORA_EMBEDDING) for name, key in keys.items()},
}
