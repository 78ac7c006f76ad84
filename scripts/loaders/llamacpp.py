"""llama.cpp: convert_lora_to_gguf.py writes the adapter; its tensors are added up as llama.cpp adds them.

``delta = alpha / rank * B A`` with the rank of the tensor and 1 where alpha is 0 (src/llama-adapter.h); the table of
embeddings holds A^T (src/llama-graph.cpp, build_inp_embd). The converter changes the order of the rows of q and k.
"""

import logging
import runpy
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from scripts.loaders.model import Sizes

_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_wheels = Path()


class _Last(logging.Handler):
    """Keeps the first error that is logged."""

    message = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR and not self.message:
            self.message = record.getMessage()


def prepare(wheels: Path) -> None:
    """Makes gguf importable."""
    global _wheels
    _wheels = wheels / "llamacpp"
    sys.path[:0] = [str(_wheels / "gguf-py"), str(_wheels)]


def effective(folder: Path, sizes: Sizes, base: Path) -> dict[str, Tensor]:
    """What the converted adapter adds: module of transformers' model -> (out, in).

    Raises:
        RuntimeError: the converter's last line, where it stops.
    """
    from gguf import GGUFReader

    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "adapter.gguf"
        script = str(_wheels / "convert_lora_to_gguf.py")
        sys.argv = [script, str(folder), "--base", str(base), "--outtype", "f32", "--outfile", str(out)]
        said = _Last()
        logging.getLogger().addHandler(said)
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(said.message) from None
        finally:
            logging.getLogger().removeHandler(said)
        reader = GGUFReader(out)
        alpha = float(reader.fields["adapter.lora.alpha"].contents())
        tensors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    found = {}
    for name, A in ((name, A) for name, A in tensors.items() if name.endswith(".lora_a")):
        place, B = name.removesuffix(".weight.lora_a"), tensors[name.removesuffix("a") + "b"]
        scale = alpha / B.shape[1] if alpha else 1.0
        if place == "token_embd":
            found["model.embed_tokens"] = scale * B @ A.T
        elif place == "output":
            found["lm_head"] = scale * B @ A
        else:
            _, layer, kind = place.split(".")
            delta = scale * B @ A
            if kind in ("attn_q", "attn_k"):
                heads = sizes.heads if kind == "attn_q" else sizes.kv_heads
                delta = delta.unflatten(0, (heads, sizes.head // 2, 2)).transpose(1, 2).flatten(0, 2)
            found[f"model.layers.{layer}.{_NAMES[kind]}"] = delta
    return found
