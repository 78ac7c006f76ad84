"""Bytes that a training run needs for weights, gradients and optimizer, from the shapes of Llama 2: nothing is loaded.

The models are built on the meta device with LoRA on all linear layers, so parameters are counted, not estimated. Bytes
of a parameter: bfloat16 2; NF4 with nested scales 0.5 + 1/64 + 4/(64 * 256) in a linear layer, 2 in others; adapters in
float32 with a gradient and AdamW's two moments 16; full fine-tuning 2 + 2 + 8 with moments in float32, 4 more with
float32 master weights. Activations come on top.

    python -m benchmarks.memory_arithmetic --out docs/benchmarks/memory_arithmetic.json
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

MODELS = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
RANK, TOKENS = 16, 4096
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
GB = 1e9


def counted(shape: dict[str, int]) -> dict[str, float]:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape))
        base = sum(p.numel() for p in model.parameters())
        linear = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
        one_layer = sum(p.numel() for p in model.model.layers[0].parameters())
        adapted = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = adapted.get_nb_trainable_parameters()[0]
    inputs = TOKENS * shape["hidden_size"] * shape["num_hidden_layers"] * 2
    logits = TOKENS * model.config.vocab_size * 4
    return {
        "parameters": base,
        "trained": trained,
        "bf16": 2 * base / GB,
        "nf4": (NF4 * linear + 2 * (base - linear)) / GB,
        "adapter with gradients and AdamW": 16 * trained / GB,
        "one layer, bf16": 2 * one_layer / GB,
        "full, bf16 with float32 moments": 12 * base / GB,
        "full, float32 master weights too": 16 * base / GB,
        f"checkpointed inputs of {TOKENS} tokens": inputs / GB,
        f"logits of {TOKENS} tokens in float32": logits / GB,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = {name: counted(shape) for name, shape in MODELS.items()}
    options.out.write_text(json.dumps({"rank": RANK, "gigabytes": found}, indent=1) + "\n")
    for name, values in found.items():
        for what, value in values.items():
            print(name, what, f"{value:,.2f}")


if __name__ == "__main__":
    main()
