"""vLLM: WorkerLoRAManager loads the folder, LoRAModelManager packs it into the layers' buffers; what they then add.

The layers of the base model are stand-ins with vLLM's class names, sizes and packing (q, k, v; gate, up) of a Llama.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from scripts.loaders import stubs
from scripts.loaders.model import Sizes

RANK = 64
_REAL = ("vllm.lora.lora_model", "vllm.lora.lora_weights", "vllm.lora.peft_helper", "vllm.lora.utils")
_REAL += ("vllm.lora.layers", "vllm.lora.model_manager", "vllm.lora.worker_manager")
_LAYERS = ("base", "base_linear", "classifier", "column_parallel_linear", "custom_layer", "fused_moe")
_LAYERS += ("logits_processor", "replicated_linear", "row_parallel_linear", "utils", "vocab_parallel_embedding")
_REAL += tuple(f"vllm.lora.layers.{name}" for name in _LAYERS)


def prepare(wheels: Path) -> None:
    """Makes vLLM's loader importable, with stand-ins for the layers that it knows by class."""
    stubs.install(str(wheels / "vllm"), "vllm", _REAL)
    import vllm.utils.cache as cache

    class LRUCache(dict):
        """Of one entry: nothing is thrown out."""

        def __init__(self, capacity: int) -> None:
            super().__init__()

    cache.LRUCache = LRUCache
    import vllm.model_executor.layers.linear as linear
    import vllm.model_executor.layers.vocab_parallel_embedding as vocabulary

    class LinearBase(nn.Module):
        tp_size, tp_rank = 1, 0

        def __init__(self, width: int, *outputs: int, heads: tuple[int, int, int] = (0, 0, 0)) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(sum(outputs), width))
            self.input_size = self.input_size_per_partition = width
            self.output_size = self.output_size_per_partition = sum(outputs)
            self.output_sizes = list(outputs)
            self.num_heads, self.num_kv_heads, self.head_size = heads
            self.num_kv_head_replicas = 1

    linear.LinearBase = LinearBase
    for name in ("ColumnParallelLinear", "RowParallelLinear", "ReplicatedLinear"):
        setattr(linear, name, type(name, (LinearBase,), {}))
    for name in ("MergedColumnParallelLinear", "QKVParallelLinear"):
        setattr(linear, name, type(name, (linear.ColumnParallelLinear,), {}))

    class VocabParallelEmbedding(nn.Module):
        def __init__(self, count: int, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(count, width))
            self.org_vocab_size, self.embedding_dim = count, width

        def get_sharded_to_full_mapping(self) -> None:
            return None

    vocabulary.VocabParallelEmbedding = VocabParallelEmbedding
    vocabulary.ParallelLMHead = type("ParallelLMHead", (VocabParallelEmbedding,), {})
    import vllm.model_executor.custom_op as custom_op

    custom_op.maybe_get_oot_by_class = lambda kind: kind
    import vllm.distributed.utils as utils

    utils.divide = lambda a, b: a // b
    import vllm.model_executor.utils as executor

    executor.get_packed_modules_mapping = lambda model: model.packed_modules_mapping
    import vllm.model_executor.models as models

    models.is_pooling_model = models.supports_multimodal = lambda model: False


def _model(sizes: Sizes) -> Any:
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers import vocab_parallel_embedding as vocabulary

    heads = (sizes.heads, sizes.kv_heads, sizes.head)
    width, kv = sizes.width, sizes.kv_heads * sizes.head
    model = nn.Module()
    model.config = SimpleNamespace()
    model.packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    model.embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}
    model.model, model.model.layers = nn.Module(), nn.ModuleList()
    for _ in range(sizes.layers):
        layer = nn.Module()
        layer.self_attn, layer.mlp = nn.Module(), nn.Module()
        layer.self_attn.qkv_proj = linear.QKVParallelLinear(width, sizes.heads * sizes.head, kv, kv, heads=heads)
        layer.self_attn.o_proj = linear.RowParallelLinear(sizes.heads * sizes.head, width)
        layer.mlp.gate_up_proj = linear.MergedColumnParallelLinear(width, sizes.inner, sizes.inner)
        layer.mlp.down_proj = linear.RowParallelLinear(sizes.inner, width)
        model.model.layers.append(layer)
    model.model.embed_tokens = vocabulary.VocabParallelEmbedding(sizes.vocabulary, width)
    model.lm_head = vocabulary.ParallelLMHead(sizes.vocabulary, width)
    model.logits_processor = nn.Module()
    model.logits_processor.vocab_size = sizes.vocabulary
    return model


def effective(folder: Path, sizes: Sizes, base: Path) -> dict[str, Tensor]:
    """What the loaded adapter adds: module of transformers' model -> (out, in).

    Raises:
        Exception: whatever vLLM raises.
    """
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.worker_manager import WorkerLoRAManager

    options = {"fully_sharded_loras": False, "target_modules": None, "enable_moe_shared_loras": False}
    config = SimpleNamespace(max_lora_rank=RANK, max_loras=1, max_cpu_loras=1, lora_dtype=torch.float32, **options)
    config.enable_mixed_moe_lora_format = False
    manager = LoRAModelManager(_model(sizes), 1, 64, sizes.vocabulary, config, torch.device("cpu"), None)
    worker = object.__new__(WorkerLoRAManager)
    worker._adapter_manager, worker.lora_config = manager, config
    worker.max_position_embeddings, worker.vocab_size = 64, sizes.vocabulary
    from vllm.lora.lora_model import LoRAModel

    worker._lora_model_cls = LoRAModel
    request = SimpleNamespace(lora_path=str(folder), lora_int_id=1, lora_name="one", is_3d_lora_weight=False)
    manager.add_adapter(worker._load_adapter(request))
    manager.activate_adapter(1)
    found = {}
    for name, module in manager.modules.items():
        place, _, last = name.rpartition(".")
        names = manager.packed_modules_mapping.get(last, [last])
        As, Bs = module.lora_a_stacked, module.lora_b_stacked
        if last == "embed_tokens":
            found[name] = Bs[0, 0] @ As[0].T
            continue
        As, Bs = (stacked if isinstance(stacked, tuple) else (stacked,) for stacked in (As, Bs))
        for part, A, B in zip(names, As, Bs, strict=True):
            found[f"{place}.{part}".removeprefix(".")] = B[0, 0] @ A[0, 0]
    return found
