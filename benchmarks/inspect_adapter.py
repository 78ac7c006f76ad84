"""Time of `loraloom inspect` on an adapter of 7B size: 32 layers, all seven linear modules of Llama-2-7b, r = 16, bf16.

The adapter is made of random tensors in a temporary folder (about 80 MB; 160 MB with --dtype float32). The time is
that of the whole process, the best and the median of several, after one that warms the file cache.

    python benchmarks/inspect_adapter.py --out inspect.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, LAYERS = 4096, 11008, 32
MODULES = {  # name -> (out, in)
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def make_adapter(folder: Path, rank: int, dtype: torch.dtype) -> int:
    """Writes a LoRA adapter with random factors; returns its size in bytes."""
    tensors = {}
    for layer in range(LAYERS):
        for name, (out, width) in MODULES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(rank, width).div_(width**0.5).to(dtype)
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, rank).mul_(1e-3).to(dtype)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    targets = [name.rpartition(".")[2] for name in MODULES]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in tensors.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a json file for the numbers")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        nbytes = make_adapter(Path(folder), options.rank, getattr(torch, options.dtype))
        command = [sys.executable, "-m", "loraloom.cli.main", "inspect", folder, "--json", "--quiet"]
        seconds = []
        for _ in range(options.runs + 1):
            started = time.perf_counter()
            outcome = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds.append(time.perf_counter() - started)
    modules = len(json.loads(outcome.stdout)["layers"])
    numbers = {
        "modules": modules,
        "rank": options.rank,
        "dtype": options.dtype,
        "megabytes": round(nbytes / 1e6, 1),
        "seconds_best": round(min(seconds[1:]), 2),
        "seconds_median": round(statistics.median(seconds[1:]), 2),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(numbers))
    if options.out is not None:
        options.out.write_text(json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
