"""SGLang: LoRAManager checks the adapter, LoRAAdapter reads and stacks it, LoRAMemoryPool fills the layers' buffers."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig

from scripts.loaders import stubs
from scripts.loaders.model import Sizes

RANK = 64
_LORA = ("lora", "lora_config", "utils", "mem_pool", "eviction_policy", "lora_manager")
_TARGETS = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"}


def prepare(wheels: Path) -> None:
    """Makes SGLang's loader importable."""
    stubs.install(str(wheels / "sglang"), "sglang", tuple(f"sglang.srt.lora.{name}" for name in _LORA))
    import re

    import sglang.srt.distributed as distributed
    import sglang.srt.layers.utils as utils
    import sglang.srt.model_loader.loader as loader
    import sglang.srt.runtime_context as context

    class DefaultModelLoader:
        """Gives the tensors of the folder."""

        Source = staticmethod(lambda path, **_: path)

        def __init__(self, _: Any) -> None: ...

        def _get_weights_iterator(self, path: str) -> Any:
            return iter(load_file(f"{path}/adapter_model.safetensors").items())

    def layer_id(name: str) -> int | None:
        match = re.search(r"layers\.(\d+)\.", name)
        return None if match is None else int(match[1])

    one = SimpleNamespace(tp_size=1, tp_rank=0, attn_tp_size=1, attn_tp_rank=0, moe_ep_size=1, moe_ep_rank=0)
    one.moe_tp_size, one.moe_tp_rank, one.pp_group = 1, 0, SimpleNamespace(is_last_rank=True)
    distributed.divide = lambda a, b: a // b
    utils.get_layer_id, loader.DefaultModelLoader, context.get_parallel = layer_id, DefaultModelLoader, lambda: one


class _Layer(nn.Module):
    """A wrapped layer of one process: nothing is cut."""

    def slice_lora_a_weights(self, weights: Any, *_: Any) -> Any:
        return weights

    slice_lora_b_weights = slice_lora_a_weights


def effective(folder: Path, sizes: Sizes, base: Path) -> dict[str, Tensor]:
    """What the loaded adapter adds: module of transformers' model -> (out, in).

    Raises:
        Exception: whatever SGLang raises, when it loads the adapter or when a request asks for it.
    """
    from sglang.srt.lora.lora import LoRAAdapter
    from sglang.srt.lora.lora_config import LoRAConfig
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.lora.mem_pool import LoRAMemoryPool

    base = AutoConfig.for_model(
        "llama",
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head,
    )
    model = nn.Linear(1, 1)
    model.config = base
    options: dict[str, Any] = {"eviction_policy": "lru", "lora_added_tokens_size": 0}
    pool = LoRAMemoryPool(base, 1, torch.float32, RANK, set(_TARGETS), model, **options)
    config = LoRAConfig(str(folder), base_vocab_size=sizes.vocabulary)
    manager = SimpleNamespace(attn_dp_enabled=False, lora_refs={}, memory_pool=pool, num_pinned_loras=0)
    LoRAManager.validate_new_adapter(manager, config, SimpleNamespace(lora_name="one", lora_path="", pinned=False))
    adapter = LoRAAdapter("one", config, base, None, None)
    adapter.initialize_weights()
    places = {"qkv_proj": "self_attn", "o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}
    layers = [
        {f"model.layers.{i}.{place}.{name}": _Layer() for name, place in places.items()} for i in range(sizes.layers)
    ]
    pool.load_lora_weight_to_buffer("one", 0, adapter, layers, _Layer(), _Layer())
    q, kv, r = sizes.heads * sizes.head, sizes.kv_heads * sizes.head, config.r
    packed = {
        "qkv_proj": {"q_proj": q, "k_proj": kv, "v_proj": kv},
        "o_proj": {"o_proj": sizes.width},
        "gate_up_proj": {"gate_proj": sizes.inner, "up_proj": sizes.inner},
        "down_proj": {"down_proj": sizes.width},
    }
    found = {}
    for name, place in places.items():
        for layer in range(sizes.layers):
            A, B = pool.A_buffer[name][layer][0], pool.B_buffer[name][layer][0]
            start = 0
            for i, (part, out) in enumerate(packed[name].items()):
                delta = B[start : start + out, :r] @ A[i * r : (i + 1) * r]
                found[f"model.layers.{layer}.{place}.{part}"] = adapter.scaling * delta
                start += out
    A, B = pool.embedding_A_buffer["embed_tokens"][0], pool.embedding_B_buffer["embed_tokens"][0]
    found["model.embed_tokens"] = adapter.scaling * B[:, :r] @ A[:r]
    A, B = pool.lm_head_A_buffer["lm_head"][0], pool.lm_head_B_buffer["lm_head"][0]
    found["lm_head"] = adapter.scaling * B[:, :r] @ A[:r]
    return found
