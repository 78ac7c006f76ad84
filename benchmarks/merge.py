"""Peak memory and time of merging a DoRA adapter on every linear layer into a model of 2.2 GB in 4 shards.

The model has the sizes of a Llama with 1.1 billion parameters, in bfloat16, with random weights; it is made on disk
first. The merge runs in a process of its own, and so does the interpreter that has imported the same and done nothing,
whose memory is not the merge's. At the end some merged rows are computed again from the formula.

    python benchmarks/merge.py --folder /tmp/merge-benchmark --out docs/benchmarks/merge.json
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import loraloom
from loraloom.io.checkpoint import INDEX, open_checkpoint
from loraloom.io.stream import write_safetensors

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCABULARY, RANK, SHARDS = 2048, 5632, 22, 32, 4, 32000, 16, 4
GOAL = 0.35  # of the model's size, above the interpreter's own
KV = HIDDEN * KV_HEADS // HEADS
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
CHILD = """
import json, sys
from loraloom.merge.merge import merge_checkpoint, peak_memory
before = peak_memory()
result = merge_checkpoint(sys.argv[1:2], sys.argv[2], sys.argv[3]).to_dict() if sys.argv[1:] else {}
print(json.dumps({"imported": before, "peak": peak_memory(), **result}))
"""


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the model."""
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        result |= {f"{prefix}{name}.weight": shape for name, shape in LINEAR.items()}
        result |= {f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    return result | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make_model(folder: Path) -> int:
    """Writes the base model; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    noise = torch.randn(2 * HIDDEN * INTERMEDIATE, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    tensors = shapes()
    names = list(tensors)
    per_shard = -(-len(names) // SHARDS)
    size, weight_map = 0, {}
    for i in range(SHARDS):
        held = {name: (torch.bfloat16, tensors[name]) for name in names[i * per_shard : (i + 1) * per_shard]}
        file = f"model-{i + 1:05}-of-{SHARDS:05}.safetensors"
        size += write_safetensors(
            folder / file, held, lambda name: pieces(noise, tensors[name], name), {"format": "pt"}
        )
        weight_map |= dict.fromkeys(held, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}))
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False, "torch_dtype": "bfloat16"}))
    return size


def pieces(noise: torch.Tensor, shape: tuple[int, ...], name: str):
    """A tensor's entries out of the noise, from a place of its own."""
    left = torch.Size(shape).numel()
    start = sum(map(ord, name)) * 97 % (noise.numel() // 2)
    while left:
        piece = noise[start : start + min(left, noise.numel() // 2)]
        yield piece
        left -= piece.numel()


def make_adapter(folder: Path) -> None:
    """Writes a DoRA adapter on every linear layer but the head, as PEFT saves it."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(LAYERS):
        for name, (rows, columns) in LINEAR.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.02
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.02
            tensors[f"{prefix}.lora_magnitude_vector"] = torch.rand(rows, generator=generator) + 0.5
    held = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(folder / "adapter_model.safetensors", held, lambda name: [tensors[name]])
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "use_dora": True, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def largest_error(folder: Path) -> float:
    """Of some merged rows, relative to the largest entry, from W' = m (W + D) / rownorm(W + D)."""
    base, merged = open_checkpoint(folder / "base"), open_checkpoint(folder / "merged")
    adapter = open_checkpoint(folder / "adapter" / "adapter_model.safetensors")
    errors = []
    for module in (f"model.layers.{LAYERS - 1}.mlp.down_proj", "model.layers.0.self_attn.k_proj"):
        prefix, rows = f"base_model.model.{module}", slice(3, 40)
        A, B = (adapter.tensor(f"{prefix}.lora_{part}.weight").double() for part in "AB")
        W = base.tensor(f"{module}.weight")[rows].double() + 2 * B[rows] @ A
        W *= (adapter.tensor(f"{prefix}.lora_magnitude_vector")[rows] / W.norm(dim=1))[:, None]
        difference = merged.tensor(f"{module}.weight")[rows].double() - W
        errors.append((difference.abs().max() / W.abs().max()).item())
    return max(errors)


def child(*arguments: Path) -> dict:
    command = [sys.executable, "-c", CHILD, *map(str, arguments)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="a new folder for 4.5 GB, removed at the end")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON to this file")
    args = parser.parse_args()
    try:
        size = make_model(args.folder / "base")
        make_adapter(args.folder / "adapter")
        own = child()["peak"]
        merge = child(args.folder / "adapter", args.folder / "base", args.folder / "merged")
        error = largest_error(args.folder)
    finally:
        shutil.rmtree(args.folder)
    above = merge["peak"] - own
    report = {
        "machine": platform.machine(),
        "versions": {"torch": torch.__version__, "loraloom": loraloom.__version__},
        "model_bytes": size,
        "shards": SHARDS,
        "largest_tensor_bytes": 2 * VOCABULARY * HIDDEN,
        "interpreter_peak_bytes": own,
        "merge_peak_bytes": merge["peak"],
        "above_interpreter": above / size,
        "goal": GOAL,
        "reached": above / size < GOAL,
        "seconds": merge["seconds"],
        "merged_tensors": len(merge["modules"]),
        "largest_relative_error": error,
        "rounding": merge["rounding"],
    }
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
