"""Kernel launches and bytes moved by an adapter layer, counted and not timed: any machine gives the same numbers.

One forward and one backward of a linear layer with an adapter, as torch dispatches it, less what the bare layer takes
(output and gradient of the input). A launch is an operation that is no view and writes something; its bytes are those
of the tensors that it reads and writes, each once. Nothing is computed: the tensors are on torch's "meta" device, where
loraloom takes the way that it takes on an accelerator.

    python benchmarks/counts.py --out counts.json
"""

import argparse
import json
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import loraloom
from loraloom import LoomConfig

WIDTH, TOKENS, RANK, ALPHA = 4096, 8192, 16, 32
_NO_KERNEL = {
    "_unsafe_view",
    "detach",
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "set_",
    "lift_fresh",
}
_GATHERS = {"index", "index_select", "embedding"}  # they read what they write
_SCATTERS = {"index_add_", "index_copy_", "index_put_"}
_WRITTEN_UNREAD = {"copy_", "fill_", "zero_", "bernoulli_", "normal_"}


class Counter(TorchDispatchMode):
    """Counts launches and bytes of what runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0
        self.log: list[tuple[str, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _NO_KERNEL:
            out = (kwargs or {}).get("out")
            read = [t for t in tree_leaves((args, {k: v for k, v in (kwargs or {}).items() if k != "out"})) if _is(t)]
            if name in _WRITTEN_UNREAD or (out is not None and args and args[0] is out):
                read = read[1:]
            written = list(filter(_is, tree_leaves(result)))
            if name in _SCATTERS:  # some rows of the first are read and written
                written, read = read[-1:], [*read[1:], read[-1]]
            moved = sum(map(_size, [*(written if name in _GATHERS else read), *written]))
            if moved:
                self.launches += 1
                self.bytes += moved
                self.log.append((str(func), moved / 1e6))
        return result


def _is(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; a dimension along which it repeats itself is read once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count * tensor.element_size()


def base(dtype: torch.dtype, tokens: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    layer = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False, device="meta", dtype=dtype)).requires_grad_(False)
    x, grad = (torch.empty(1, tokens, WIDTH, device="meta", dtype=dtype) for _ in range(2))
    return layer, x.requires_grad_(), grad


def count(config: PeftConfig | None, dtype: torch.dtype, tokens: int) -> Counter:
    layer, x, grad = base(dtype, tokens)
    model = layer if config is None else get_peft_model(layer, config).train()
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    with Counter() as counter:
        torch.autograd.grad(model(x), wanted, grad)
    return counter


def count_mixed(config: PeftConfig, dtype: torch.dtype, tokens: int, adapters: int) -> Counter:
    """A forward pass of 32 samples that use so many adapters in turn."""
    layer, x, _ = base(dtype, tokens)
    names = [f"a{i}" for i in range(adapters)]
    model = get_peft_model(layer, config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    model.eval()
    with torch.no_grad(), Counter() as counter:
        model(x.view(32, -1, WIDTH), adapter_names=[names[i % adapters] for i in range(32)])
    return counter


def configs() -> dict[str, tuple[PeftConfig, PeftConfig]]:
    """Name -> the same adapter of PEFT and of loraloom."""
    common = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ["0"]}
    return {
        "LoRA": (LoraConfig(**common), LoomConfig(**common)),
        "DoRA": (LoraConfig(use_dora=True, **common), LoomConfig(use_dora=True, **common)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON to this file")
    parser.add_argument("--log", action="store_true", help="print every launch of loraloom's layers")
    args = parser.parse_args()
    rows = []
    console = Console(width=120)

    def add(what: str, dtype: torch.dtype, tokens: int, by: str, counter: Counter, bare: Counter) -> None:
        extra = {"launches": counter.launches - bare.launches, "megabytes": round((counter.bytes - bare.bytes) / 1e6)}
        place = {"base": str(dtype).removeprefix("torch."), "tokens": tokens, "adapter": what, "by": by}
        rows.append(place | extra)
        if args.log and by == "loraloom":
            console.print(place)
            for name, megabytes in counter.log:
                console.print(f"  {name:40} {megabytes:9.1f} MB")

    for dtype, tokens in ((torch.bfloat16, TOKENS), (torch.bfloat16, 512), (torch.float32, TOKENS)):
        bare = count(None, dtype, tokens)
        for name, pair in configs().items():
            for library, config in zip(("PEFT", "loraloom"), pair, strict=True):
                add(name, dtype, tokens, library, count(config, dtype, tokens), bare)
    bare = Counter()
    for adapters in (1, 8, 32):
        for library, config in zip(("PEFT", "loraloom"), configs()["LoRA"], strict=True):
            counter = count_mixed(config, torch.bfloat16, TOKENS, adapters)
            add(f"adapter_names, {adapters}, forward with the base", torch.bfloat16, TOKENS, library, counter, bare)
    table = Table(title=f"{WIDTH} wide, r {RANK}, float32 adapter, forward and backward, less the bare layer")
    for heading in rows[0]:
        table.add_column(heading, justify="right" if heading in ("tokens", "launches", "megabytes") else "left")
    for row in rows:
        table.add_row(*map(str, row.values()))
    console.print(table)
    if args.out:
        versions = {module.__name__: module.__version__ for module in (torch, peft, loraloom)}
        args.out.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
