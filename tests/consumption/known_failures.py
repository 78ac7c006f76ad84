"""Cells that fail, by cause, with the line of the audit. Each mend deletes its entries (`xfail(strict=True)`)."""

from tests.consumption.kinds import GROUPS

# Cause -> kind -> verbs, or groups of verbs.
_CAUSES: dict[str, dict[str, str]] = {
    "S2: to_lora sees no layers of PEFT's": {
        "lora": "to_lora",
        "rslora": "to_lora",
        "patterns": "to_lora",
        "rslora_patterns": "to_lora",
        "dora": "to_lora",
        "dora_rslora_patterns": "to_lora",
        "pissa": "to_lora",
        "pissa_dora": "to_lora",
        "pissa_converted": "to_lora",
        "olora": "to_lora",
        "kasa": "to_lora",
        "mica": "to_lora",
        "velora": "to_lora",
        "lora_bias": "to_lora",
        "bias_all": "to_lora",
        "bias_lora_only": "to_lora",
        "modules_to_save": "to_lora",
        "tokens": "to_lora",
        "tokens_tied": "to_lora",
        "modules_to_save_tied": "to_lora",
        "embedding_tied": "to_lora",
        "embedding": "to_lora",
        "head": "to_lora",
        "fan_in_fan_out": "to_lora",
        "target_parameters": "to_lora",
        "layer_replication": "to_lora",
        "alora": "to_lora",
        "bdlora": "to_lora",
        "monteclora": "to_lora",
        "dora_on_pruned_row": "to_lora",
    },
    "S6: ||dW|| / ||W|| of a base that was changed": {
        "pissa": "inspect",
        "pissa_dora": "inspect",
        "olora": "inspect",
    },
    "C2b: taken, or the feature is not named": {
        "kasa": "inspect compose intruders_disk",
        "layer_replication": "inspect export intruders_merged",
        "monteclora": "compose intruders_disk",
    },
    "C2b: refused, though it is s B A": {
        "mica": "intruders_disk intruders_memory intruders_merged",
    },
    "C2b: refused, though it differs in training alone": {
        "velora": "inspect merge export intruders_memory intruders_merged",
    },
    "C4: the second name of a tied table": {
        "embedding_tied": "inspect export_peft intruders_disk intruders_memory intruders_merged",
    },
    "C6: a LoRA on lm_head is exact in vLLM and llama.cpp": {
        "head": "export_vllm export_gguf-ready",
        "loom_head": "export_vllm export_gguf-ready",
    },
    "C2: what a live member trained beside its updates is dropped in silence": {
        "loom_bias_all": "compose_live",
        "loom_bias_only": "compose_live",
        "loom_modules_to_save": "compose_live",
        "loom_tokens": "compose_live",
    },
    "S2: to_lora drops trained tokens": {
        "loom_tokens": "to_lora",
    },
    "C2b: a composition is not named": {
        "loom_composition_softmax": "intruders_memory intruders_merged",
        "loom_composition_simplex": "intruders_memory intruders_merged",
        "loom_composition_free": "intruders_memory intruders_merged",
        "loom_composition_bias": "intruders_memory intruders_merged",
    },
    "Five answers: a base row of zeros under DoRA": {
        "dora_on_pruned_row": "intruders_merged",
    },
    "C2: refused without the code": {
        "lora_rank": "merge export",
        "lora_nan": "merge export intruders_disk",
        "lora_missing_tensor": "inspect merge export compose intruders_disk",
        "lora_unknown_tensor": "merge export",
        "lora_unknown_module": "merge compose intruders_disk",
        "loom_rank": "merge export",
        "loom_nan": "merge export intruders_disk",
        "loom_missing_tensor": "inspect merge export compose intruders_disk forward",
        "loom_unknown_tensor": "merge export forward",
        "loom_unknown_module": "merge compose intruders_disk forward",
    },
    "C2: a broken adapter is taken": {
        "lora_rank": "compose intruders_disk",
        "lora_nan": "compose",
        "lora_integers": "inspect merge export compose intruders_disk",
        "lora_unknown_tensor": "compose intruders_disk",
        "lora_unknown_module": "export_peft",
        "loom_rank": "compose intruders_disk",
        "loom_nan": "compose forward",
        "loom_integers": "inspect merge export compose intruders_disk forward",
        "loom_unknown_tensor": "compose intruders_disk",
        "loom_unknown_module": "export_peft",
    },
    "C2: refused by another sentence": {
        "lora_unknown_module": "export_portable export_vllm export_sglang export_gguf-ready",
        "loom_unknown_module": "export_portable export_vllm export_sglang export_gguf-ready",
    },
    "C2: torch's error in many lines": {
        "loom_rank": "forward",
    },
}
KNOWN_FAILURES = {
    (kind, verb): cause
    for cause, kinds in _CAUSES.items()
    for kind, names in kinds.items()
    for name in names.split()
    for verb in GROUPS.get(name, (name,))
}
