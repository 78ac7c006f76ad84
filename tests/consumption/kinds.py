"""The kinds of adapters: how each is made, and what every verb of ``consumers.py`` has to do with it.

A verb is exact unless the kind's row says otherwise: `Refused(word)`, where it must raise an error of one line that has
the word; `Part(word)`, where it does what it can and warns about the rest by that word; `APPROXIMATE`, where it states
its error. A row's keys are verbs or groups of them; later ones win.
"""

from dataclasses import dataclass, field
from typing import Any

from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig

from tests.consumption import ours
from tests.consumption.builders import (
    ATTENTION,
    CONV1D,
    Build,
    Edit,
    composition,
    edit_config,
    edit_tensors,
    elsewhere,
    integers,
    loom,
    lora,
    missing,
    nan,
    pissa_converted,
    pruned,
    selected,
    unknown,
)

SERVERS = ("portable", "vllm", "sglang", "gguf-ready")
GROUPS = {
    "servers": tuple(f"export_{name}" for name in SERVERS),
    "export": ("export_peft", *(f"export_{name}" for name in SERVERS)),
    "intruders": ("intruders_disk", "intruders_memory", "intruders_merged"),
    "in memory": ("intruders_memory", "intruders_merged", "compose_live", "to_lora"),
    "compositions": ("compose", "compose_live"),
}
GROUPS["disk"] = ("inspect", "merge", *GROUPS["export"], "compose", "intruders_disk")
GROUPS["all"] = ("from_lora", *GROUPS["disk"], *GROUPS["in memory"])


@dataclass(frozen=True)
class Refused:
    """A ValueError of one line with this in it (a regular expression, case ignored)."""

    word: str


@dataclass(frozen=True)
class Part:
    """The low-rank updates are exact, and a warning of one line with this in it says what was left out."""

    word: str


EXACT, APPROXIMATE = "exact", "approximate"


@dataclass(frozen=True)
class Kind:
    """A row of the table.

    Attributes:
        name: of the row.
        build: gives the base model a trained adapter "default"; its second argument is a folder for what it needs.
        base: its base model.
        expects: verb or group -> outcome, where it is not exact.
        per_weight: whether the adapter is an update of each weight at all.
        edit: what happens to the saved folder afterwards.
        code: of the error that every verb must raise, for broken adapters.
        disk_only: PEFT itself cannot load it on this machine; every verb has to refuse the files.
        elsewhere: verbs that have tests of their own, because the reference does not know such an adapter.
    """

    name: str
    build: Build
    base: str = "llama"
    expects: dict[str, Any] = field(default_factory=dict)
    per_weight: bool = True
    edit: Edit | None = None
    code: str = ""
    disk_only: bool = False
    elsewhere: tuple[str, ...] = ()

    @property
    def ours(self) -> bool:
        return self.name.startswith("loom")

    @property
    def verbs(self) -> list[str]:
        """What is asked of it. A broken file never gets as far as a model."""
        return [verb for verb in self._verbs if verb not in self.elsewhere]

    @property
    def _verbs(self) -> list[str]:
        in_memory = ["forward"] if self.ours else []
        if self.disk_only:
            return [*GROUPS["disk"], "from_lora"]
        if self.code:
            return [*GROUPS["disk"], *in_memory]
        return [
            *GROUPS["disk"],
            *GROUPS["in memory"],
            *(["forward", "merged"] if self.ours else ["from_lora", "speed_up"]),
        ]

    def expected(self, verb: str) -> Any:
        if verb == "compose_live" and not self.ours:  # our layers cannot stand beside PEFT's
            return Refused("LoraModel|type LORA")
        found: Any = EXACT
        for key, value in self.expects.items():
            if verb == key or verb in GROUPS.get(key, ()):
                found = value
        return found


def _altered(word: str, **more: Any) -> dict[str, Any]:
    """Of a start of PEFT's that changes the base weights, which the file does not say."""
    return {"disk": Refused(word), "in memory": Refused(word)} | more


_DORA = {"servers": APPROXIMATE, "compositions": Refused("DoRA"), "to_lora": Refused("DoRA|magnitude")}
_HEAD = {"servers": Refused("head"), "compositions": Part("lm_head")}
_ON_TABLE = {"servers": Refused("embed"), "export_gguf-ready": EXACT, "export_sglang": EXACT}
_BIAS = {"servers": Refused("bias"), "compositions": Refused("bias")}
_TOKENS = {"servers": Refused("token"), "compositions": Refused("token")}
_ALL = {"use_mixer": "orthogonal", "use_gate": True, "use_dora": True, "use_rslora": True}
_PATTERNS = {"rank_pattern": {"q_proj": 2, "1.mlp.up_proj": 5}, "alpha_pattern": {"k_proj": 3, "0.mlp.up_proj": 8}}
_EXPERTS = {
    "target_modules": ATTENTION,
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
_BY_EXPERT = ("inspect", "merge", "export_peft", "intruders_disk")  # tests/adapter/test_experts.py
_EMBEDDING = {"target_modules": [*ATTENTION, "embed_tokens"]}


def _other_function(word: str) -> dict[str, Any]:
    return {"all": Refused(word)}


KINDS = [
    Kind("lora", lora()),
    Kind("rslora", lora(use_rslora=True)),
    Kind("patterns", lora(**_PATTERNS)),
    Kind("rslora_patterns", lora(**_PATTERNS, use_rslora=True)),
    Kind("dora", lora(use_dora=True), expects=_DORA),
    Kind("dora_rslora_patterns", lora(use_dora=True, use_rslora=True, **_PATTERNS), expects=_DORA),
    Kind("pissa", lora(init_lora_weights="pissa"), expects=_altered("pissa")),
    Kind("pissa_dora", lora(init_lora_weights="pissa", use_dora=True), expects=_altered("pissa|DoRA")),
    Kind("pissa_converted", pissa_converted),
    Kind("olora", lora(init_lora_weights="olora"), expects=_altered("olora")),
    Kind(
        "loftq",
        lora(),
        expects=_altered("loftq", from_lora=Refused("loftq")),
        edit=edit_config(init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1}),
        disk_only=True,  # PEFT quantises on the GPU only
    ),
    Kind("kasa", lora(kasa_config=KasaConfig()), expects=_other_function("kasa")),
    Kind("mica", lora(init_lora_weights="mica"), expects={"from_lora": Refused("mica")}),
    Kind("velora", lora(velora_config=VeloraConfig(num_groups=2)), expects={"from_lora": Refused("velora")}),
    Kind(
        "lora_bias",
        lora(target_modules=ATTENTION[:3], lora_bias=True),
        expects={"from_lora": Refused("lora_bias"), "servers": Refused("bias")},
    ),
    Kind("bias_all", lora(bias="all"), expects=_BIAS),
    Kind("bias_lora_only", lora(bias="lora_only"), expects=_BIAS),
    Kind("modules_to_save", lora(modules_to_save=["lm_head"]), expects=_HEAD),
    Kind("tokens", lora(trainable_token_indices=[1, 3]), expects=_TOKENS),
    Kind(
        "tokens_tied",
        lora(trainable_token_indices=[1, 3], ensure_weight_tying=True),
        base="tied",
        expects=_TOKENS | {"from_lora": Refused("ensure_weight_tying")},
    ),
    Kind(
        "modules_to_save_tied",
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        base="tied",
        expects={"servers": Refused("embed_tokens|lm_head"), "compositions": Refused("embed_tokens|lm_head")}
        | {"from_lora": Refused("ensure_weight_tying")},
    ),
    Kind(
        "embedding_tied",
        lora(**_EMBEDDING, ensure_weight_tying=True),
        base="tied",
        expects={"servers": Refused("embed"), "from_lora": Refused("ensure_weight_tying")}
        | {
            "intruders_memory": Refused("output head"),
            "intruders_merged": Refused("output head"),
        },
    ),
    Kind("embedding", lora(**_EMBEDDING), expects=_ON_TABLE),
    Kind("head", lora(target_modules=[*ATTENTION, "lm_head"])),
    Kind("fan_in_fan_out", lora(target_modules=CONV1D, fan_in_fan_out=True), base="gpt2"),
    Kind(
        "target_parameters",
        lora(**_EXPERTS),
        base="moe",
        per_weight=False,
        elsewhere=_BY_EXPERT,
        expects=_other_function("target_parameters|ParamWrapper|experts") | {"from_lora": EXACT},
    ),
    Kind(
        "layer_replication",
        lora(layer_replication=[[0, 2], [1, 2]]),
        expects=_other_function("layer_replication") | {"intruders_memory": EXACT},
    ),
    Kind(
        "alora",
        lora(alora_invocation_tokens=[4, 5], task_type="CAUSAL_LM"),
        per_weight=False,
        expects=_other_function("alora"),
    ),
    Kind(
        "bdlora",
        lora(use_bdlora=BdLoraConfig(target_modules_bd_a=["o_proj", "down_proj"], nblocks=2, match_strict=False)),
        per_weight=False,
        expects=_other_function("bdlora"),
    ),
    Kind("monteclora", lora(monteclora_config=MontecloraConfig()), expects=_other_function("monteclora")),
    # Ours.
    Kind("loom_lora", loom()),
    Kind("loom_mixer", loom(use_mixer="orthogonal")),
    Kind("loom_gate", loom(use_gate=True)),
    Kind("loom_rslora", loom(use_rslora=True)),
    Kind("loom_patterns", loom(**_PATTERNS)),
    Kind("loom_dora", loom(use_dora=True), expects=_DORA),
    Kind("loom_all", loom(**_ALL, **_PATTERNS), expects=_DORA),
    Kind("loom_pissa", loom(init_lora_weights="pissa")),
    Kind("loom_olora", loom(init_lora_weights="olora")),
    Kind("loom_pissa_all", loom(init_lora_weights="pissa", **_ALL, **_PATTERNS), expects=_DORA),
    Kind("loom_bias_all", loom(bias="all"), expects=_BIAS),
    Kind("loom_bias_only", loom(bias="loom_only"), expects=_BIAS),
    Kind("loom_modules_to_save", loom(modules_to_save=["lm_head"]), expects=_HEAD),
    Kind("loom_tokens", loom(trainable_token_indices=[1, 3]), expects=_TOKENS),
    Kind("loom_embedding", loom(**_EMBEDDING, use_mixer="orthogonal"), expects=_ON_TABLE),
    Kind("loom_head", loom(target_modules=[*ATTENTION, "lm_head"], use_gate=True)),
    Kind("loom_conv1d_all", loom(target_modules=CONV1D, **_ALL), base="gpt2", expects=_DORA),
    Kind(
        "loom_target_parameters",
        loom(**_EXPERTS),
        base="moe",
        per_weight=False,
        elsewhere=_BY_EXPERT,
        expects=_other_function("target_parameters|experts"),
    ),
    Kind("loom_pruned", selected()),
    Kind("loom_pruned_all", selected(use_mixer="orthogonal", use_rslora=True)),
    Kind("loom_expanded", selected(ours.HalveAndDouble(times=1, every=1))),
    Kind("loom_composition_scaled", composition(), expects={"intruders": Refused("composition")}),
    Kind("loom_composition_softmax", composition(constraint="softmax"), expects={"intruders": Refused("composition")}),
    Kind("loom_composition_simplex", composition(constraint="simplex"), expects={"intruders": Refused("composition")}),
    Kind("loom_composition_free", composition(constraint="free"), expects={"intruders": Refused("composition")}),
    Kind(
        "loom_composition_bias",
        composition(biased=True),
        expects={"servers": Refused("bias"), "intruders": Refused("composition")},
    ),
]


# Broken adapters. Every verb has to refuse them with one code, except for what is no fault.


# Name -> the edit, a word that the error has, and its code.
_BREAKS: dict[str, tuple[Edit, str, str]] = {
    "rank": (edit_config(r=2), "rank", "rank"),
    "nan": (edit_tensors(nan), "nan", "not-finite"),
    "integers": (edit_tensors(integers), "int8", "dtype"),
    "missing_tensor": (edit_tensors(missing), "q_proj", "missing-tensor"),
    "unknown_tensor": (edit_tensors(unknown), "lora_C", "unknown-tensor"),
    "unknown_module": (edit_tensors(elsewhere), r"layers\.7", "unresolved"),
}
BROKEN = [
    Kind(
        f"{name}_{cause}",
        build,
        expects={"forward": Refused(word), "disk": Refused(word)},
        edit=edit,
        code=code,
    )
    for name, build in (("lora", lora()), ("loom", loom()))
    for cause, (edit, word, code) in _BREAKS.items()
]
# A base row of zeros has no direction: W' = m (W + D) / ||W + D|| there, with D = 0 where B's row is zero: W' = 0.


KINDS += [
    Kind(
        "dora_on_pruned_row",
        pruned(lora(use_dora=True)),
        base="pruned",
        expects=_DORA | {"intruders_merged": Refused("zero|finite")},  # PEFT's merge divides by zero
    ),
    Kind("loom_dora_on_pruned_row", pruned(loom(use_dora=True)), base="pruned", expects=_DORA),
    Kind("loom_all_on_pruned_row", pruned(loom(**_ALL)), base="pruned", expects=_DORA),
]
ALL_KINDS = {kind.name: kind for kind in KINDS + BROKEN}
