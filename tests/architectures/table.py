"""Tiny random models of many types: for each the class, its configuration and an input.

A row is built twice with equal weights by `build()`. Widths are 32, two layers, two or four heads: small enough that a
row with all its checks takes under a second. `model_type` is what transformers calls the architecture.
"""

import collections
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

VOCABULARY = 50
WITH_MAGNITUDE: tuple[type, ...] = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
ADAPTABLE = (*WITH_MAGNITUDE, nn.MultiheadAttention)
HEADS = {"classifier", "score", "qa_outputs", "classification_head"}  # trained in full, as modules to save
IDS = torch.arange(5, 17).reshape(2, 6)


def text() -> dict[str, Any]:
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}


def text_to_text() -> dict[str, Any]:
    return text() | {"decoder_input_ids": IDS[:, :4] + 7}


def with_end_token() -> dict[str, Any]:
    return {"input_ids": torch.cat((IDS, torch.full((2, 1), 49)), dim=1)}


def choices() -> dict[str, Any]:
    return {name: value.reshape(2, 1, 6).repeat(1, 2, 1) for name, value in text().items()}


def image(size: int = 32) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": _noise(2, 3, size, size)}


def image_and_text() -> dict[str, Any]:
    return text() | image()()


def waveform() -> dict[str, Any]:
    return {"input_values": _noise(2, 600)}


def spectrogram() -> dict[str, Any]:
    return {"input_features": _noise(2, 8, 40), "decoder_input_ids": IDS[:, :4]}


def _noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Row:
    """One architecture with a head."""

    head: str
    """Name of the model class in transformers."""
    options: dict[str, Any]
    """What its configuration has besides the defaults."""
    inputs: Callable[[], dict[str, Any]] = text
    task_type: str | None = None

    def build(self) -> nn.Module:
        """The model in eval mode, with the same random weights each time."""
        model_class = getattr(transformers, self.head)
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**self.options))
        # As initialised, many models hardly react to their input, and biases and norms are idle.
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.data.copy_(noise / parameter[0].numel() ** 0.5)
            elif "A_log" not in name and "dt" not in name:
                parameter.data.add_(0.1 * noise)
        return model.eval()

    def every_module(self, kinds: tuple[type, ...] = ADAPTABLE) -> list[str]:
        """Names of all modules of a kind that we adapt, but heads and tied weights.

        PEFT refuses some: the convolutions with many groups, and what it knows Mamba's kernels to read.
        """
        model: Any = self.build()
        left_out: set[str] = set()
        with contextlib.suppress(NotImplementedError):  # some models of images and sound have no embeddings
            left_out |= {name for name, module in model.named_modules() if module is model.get_output_embeddings()}
        owners = collections.Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        return [
            name
            for name, module in model.named_modules()
            if isinstance(module, kinds)
            and owners[id(getattr(module, "weight", None))] <= 1
            and name not in left_out
            and not HEADS & {*name.split(".")}
        ]

    @property
    def model_type(self) -> str:
        """What transformers calls the architecture."""
        return getattr(transformers, self.head).config_class.model_type


def _row(head: str, inputs: Callable[[], dict[str, Any]] = text, task: str | None = None, **options: Any) -> Row:
    return Row(head, options, inputs, task)


_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
_DECODER = _ENCODER | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8}
_GROUPED = _DECODER | {"num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
_DECODER_PLAIN = {k: v for k, v in _DECODER.items() if k != "head_dim"}
_GROUPED_PLAIN = _DECODER_PLAIN | {"num_key_value_heads": 2}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_T5 |= {"decoder_start_token_id": 0}
_BART = {"vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 40}
_BART |= {f"{side}_layers": 2 for side in ("encoder", "decoder")}
_BART |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
_BART |= {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
_MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
_MAMBA_SSD = {
    "mamba_d_state": 4,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
_SPEECH = {k: v for k, v in _ENCODER.items() if k != "max_position_embeddings"} | {
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
_TEXT_TOWER = {k: v for k, v in _ENCODER.items()} | {"eos_token_id": 16}
_WHISPER = _BART | {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 40, "pad_token_id": 0}
_WHISPER.pop("max_position_embeddings")


def _llava() -> dict[str, Any]:
    ids = torch.tensor([[5, 6, 49, 49, 49, 49, 7, 8]]).repeat(2, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | image(16)()


def _qwen2_vl() -> dict[str, Any]:
    ids = torch.tensor([[5, 45, 49, 46, 7, 8]])
    types = (ids == 49).int()
    patches = _noise(4, 3 * 2 * 8 * 8)
    grid = torch.tensor([[1, 2, 2]])
    return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": types}


def _idefics3() -> dict[str, Any]:
    ids = torch.tensor([[5, 6, 49, 49, 49, 49, 7, 8]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _noise(1, 1, 3, 16, 16)}


ROWS = {
    # Encoders, with heads of several kinds
    "bert": _row("BertForSequenceClassification", task="SEQ_CLS", **_ENCODER),
    "bert-tokens": _row("BertForTokenClassification", task="TOKEN_CLS", **_ENCODER),
    "bert-questions": _row("BertForQuestionAnswering", task="QUESTION_ANS", **_ENCODER),
    "bert-choices": _row("BertForMultipleChoice", choices, **_ENCODER),
    "bert-features": _row("BertModel", task="FEATURE_EXTRACTION", **_ENCODER),
    "bert-masked": _row("BertForMaskedLM", **_ENCODER),
    "roberta": _row("RobertaForSequenceClassification", task="SEQ_CLS", **_ENCODER),
    "roberta-tokens": _row("RobertaForTokenClassification", task="TOKEN_CLS", **_ENCODER),
    "xlm-roberta": _row("XLMRobertaForQuestionAnswering", task="QUESTION_ANS", **_ENCODER),
    "deberta": _row(
        "DebertaForSequenceClassification", task="SEQ_CLS", relative_attention=True, pos_att_type="p2c|c2p", **_ENCODER
    ),
    "deberta-v2": _row(
        "DebertaV2ForSequenceClassification",
        task="SEQ_CLS",
        relative_attention=True,
        position_buckets=4,
        pos_att_type="p2c|c2p",
        share_att_key=True,
        **_ENCODER,
    ),
    "distilbert": _row(
        "DistilBertForSequenceClassification",
        task="SEQ_CLS",
        vocab_size=VOCABULARY,
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=48,
        max_position_embeddings=40,
    ),
    "electra": _row("ElectraForSequenceClassification", task="SEQ_CLS", embedding_size=16, **_ENCODER),
    "albert": _row("AlbertForSequenceClassification", task="SEQ_CLS", embedding_size=16, **_ENCODER),
    "modernbert": _row(
        "ModernBertForSequenceClassification", task="SEQ_CLS", **_DECODER_PLAIN, cls_token_id=3, sep_token_id=4
    ),
    "mpnet": _row("MPNetForSequenceClassification", task="SEQ_CLS", **_ENCODER),
    # Decoders
    "gpt2": _row("GPT2LMHeadModel", task="CAUSAL_LM", **_GPT2),
    "gpt2-classes": _row("GPT2ForSequenceClassification", task="SEQ_CLS", pad_token_id=0, **_GPT2),
    "gpt_neo": _row(
        "GPTNeoForCausalLM",
        task="CAUSAL_LM",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=40,
    ),
    "gptj": _row("GPTJForCausalLM", task="CAUSAL_LM", rotary_dim=4, **_GPT2),
    "gpt_neox": _row("GPTNeoXForCausalLM", task="CAUSAL_LM", **_DECODER_PLAIN),
    "gpt_bigcode": _row("GPTBigCodeForCausalLM", task="CAUSAL_LM", **_GPT2),
    "codegen": _row("CodeGenForCausalLM", task="CAUSAL_LM", rotary_dim=4, **_GPT2),
    "opt": _row(
        "OPTForCausalLM",
        task="CAUSAL_LM",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=48,
        word_embed_proj_dim=16,
        max_position_embeddings=40,
    ),
    "bloom": _row("BloomForCausalLM", task="CAUSAL_LM", vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
    "mpt": _row("MptForCausalLM", task="CAUSAL_LM", vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4),
    "llama": _row("LlamaForCausalLM", task="CAUSAL_LM", **_GROUPED),
    "llama-classes": _row("LlamaForSequenceClassification", task="SEQ_CLS", **_GROUPED),
    "llama-tokens": _row("LlamaForTokenClassification", task="TOKEN_CLS", **_GROUPED),
    "mistral": _row("MistralForCausalLM", task="CAUSAL_LM", **_GROUPED),
    "qwen2": _row("Qwen2ForCausalLM", task="CAUSAL_LM", **_GROUPED),
    "qwen3": _row("Qwen3ForCausalLM", task="CAUSAL_LM", **_GROUPED),
    "gemma": _row("GemmaForCausalLM", task="CAUSAL_LM", **_GROUPED),
    "gemma2": _row("Gemma2ForCausalLM", task="CAUSAL_LM", **_GROUPED),
    "gemma3_text": _row("Gemma3ForCausalLM", task="CAUSAL_LM", **_GROUPED),
    "phi": _row("PhiForCausalLM", task="CAUSAL_LM", **_DECODER_PLAIN),
    "phi3": _row("Phi3ForCausalLM", task="CAUSAL_LM", **_GROUPED_PLAIN),
    "olmo": _row("OlmoForCausalLM", task="CAUSAL_LM", **_GROUPED),
    "olmo2": _row("Olmo2ForCausalLM", task="CAUSAL_LM", **_GROUPED),
    "falcon": _row("FalconForCausalLM", task="CAUSAL_LM", **_DECODER_PLAIN),
    "stablelm": _row("StableLmForCausalLM", task="CAUSAL_LM", **_GROUPED),
    "granite": _row("GraniteForCausalLM", task="CAUSAL_LM", **_GROUPED),
    "cohere": _row("CohereForCausalLM", task="CAUSAL_LM", **_GROUPED),
    "smollm3": _row("SmolLM3ForCausalLM", task="CAUSAL_LM", **_GROUPED),
    "starcoder2": _row("Starcoder2ForCausalLM", task="CAUSAL_LM", **_GROUPED),
    # Mixtures of experts
    "mixtral": _row("MixtralForCausalLM", task="CAUSAL_LM", **_GROUPED, **_MOE),
    "qwen3_moe": _row(
        "Qwen3MoeForCausalLM",
        task="CAUSAL_LM",
        **_GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        decoder_sparse_step=1,
    ),
    "olmoe": _row("OlmoeForCausalLM", task="CAUSAL_LM", **_GROUPED, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": _row("GptOssForCausalLM", task="CAUSAL_LM", **_GROUPED, **_MOE, sliding_window=4),
    "deepseek_v3": _row(
        "DeepseekV3ForCausalLM",
        task="CAUSAL_LM",
        **(_DECODER_PLAIN | {"num_key_value_heads": 4}),
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=12,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    # State space and recurrence
    "mamba": _row("MambaForCausalLM", task="CAUSAL_LM", **_MAMBA),
    "mamba2": _row("Mamba2ForCausalLM", task="CAUSAL_LM", **_MAMBA, num_heads=8, head_dim=8, n_groups=1, chunk_size=4),
    "falcon_mamba": _row("FalconMambaForCausalLM", task="CAUSAL_LM", **_MAMBA),
    "jamba": _row(
        "JambaForCausalLM",
        task="CAUSAL_LM",
        **_GROUPED_PLAIN,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        num_experts=2,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "bamba": _row(
        "BambaForCausalLM",
        task="CAUSAL_LM",
        **_GROUPED_PLAIN,
        **_MAMBA_SSD,
        mamba_chunk_size=4,
        attn_layer_indices=[1],
    ),
    "granitemoehybrid": _row(
        "GraniteMoeHybridForCausalLM",
        task="CAUSAL_LM",
        **_GROUPED_PLAIN,
        **_MOE,
        **_MAMBA_SSD,
        mamba_chunk_size=4,
        shared_intermediate_size=24,
        layer_types=["mamba", "attention"],
    ),
    "zamba2": _row(
        "Zamba2ForCausalLM",
        task="CAUSAL_LM",
        **_DECODER_PLAIN,
        mamba_d_state=4,
        mamba_ngroups=1,
        mamba_headdim=8,
        n_mamba_heads=8,
        chunk_size=4,
        num_mem_blocks=1,
        use_mem_rope=True,
        adapter_rank=4,
        layers_block_type=["mamba", "hybrid"],
        hybrid_layer_ids=[1],
    ),
    "falcon_h1": _row(
        "FalconH1ForCausalLM",
        task="CAUSAL_LM",
        **_GROUPED,
        mamba_d_ssm=64,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_chunk_size=4,
    ),
    "nemotron_h": _row(
        "NemotronHForCausalLM",
        task="CAUSAL_LM",
        **_GROUPED,
        layers_block_type=["mamba", "attention"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=4,
        n_groups=1,
        chunk_size=4,
        use_mamba_kernels=False,
    ),
    "lfm2": _row(
        "Lfm2ForCausalLM",
        task="CAUSAL_LM",
        **_GROUPED_PLAIN,
        layer_types=["conv", "full_attention"],
        block_multiple_of=8,
    ),
    "qwen3_next": _row(
        "Qwen3NextForCausalLM",
        task="CAUSAL_LM",
        **_GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "recurrent_gemma": _row(
        "RecurrentGemmaForCausalLM",
        task="CAUSAL_LM",
        **(_GROUPED | {"num_hidden_layers": 3}),
        lru_width=32,
        attention_window_size=8,
        block_types=("recurrent", "attention"),
    ),
    "rwkv": _row(
        "RwkvForCausalLM",
        lambda: {"input_ids": IDS, "use_cache": False},  # its cache is written in place
        task="CAUSAL_LM",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        attention_hidden_size=32,
        intermediate_size=48,
        context_length=16,
    ),
    # Sequence to sequence
    "t5": _row("T5ForConditionalGeneration", text_to_text, "SEQ_2_SEQ_LM", **_T5),
    "flan-t5": _row(
        "T5ForConditionalGeneration",
        text_to_text,
        "SEQ_2_SEQ_LM",
        **_T5,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "bart": _row("BartForConditionalGeneration", text_to_text, "SEQ_2_SEQ_LM", **_BART),
    "bart-classes": _row(
        "BartForSequenceClassification", with_end_token, "SEQ_CLS", **_BART, eos_token_id=49, pad_token_id=0
    ),
    "mbart": _row("MBartForConditionalGeneration", text_to_text, "SEQ_2_SEQ_LM", **_BART),
    "pegasus": _row("PegasusForConditionalGeneration", text_to_text, "SEQ_2_SEQ_LM", **_BART),
    "whisper": _row("WhisperForConditionalGeneration", spectrogram, **_WHISPER),
    # Vision
    "vit": _row("ViTForImageClassification", image(), **_VISION),
    "dinov2": _row("Dinov2Model", image(), **_VISION),
    "clip": _row(
        "CLIPModel",
        image_and_text,
        text_config=_TEXT_TOWER,
        vision_config=_VISION,
        projection_dim=16,
    ),
    "siglip": _row(
        "SiglipModel", image_and_text, text_config=_TEXT_TOWER | {"projection_size": 32}, vision_config=_VISION
    ),
    "convnext": _row(
        "ConvNextForImageClassification", image(), hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], num_stages=4
    ),
    "resnet": _row(
        "ResNetForImageClassification",
        image(),
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
    ),
    "swin": _row(
        "SwinForImageClassification",
        image(),
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    "segformer": _row(
        "SegformerForImageClassification",
        image(),
        depths=[1, 1],
        hidden_sizes=[16, 32],
        num_attention_heads=[1, 2],
        num_encoder_blocks=2,
        sr_ratios=[2, 1],
        patch_sizes=[7, 3],
        strides=[4, 2],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    ),
    # Audio
    "wav2vec2": _row("Wav2Vec2ForCTC", waveform, **_SPEECH, pad_token_id=0),
    "hubert": _row("HubertModel", waveform, **_SPEECH),
    "wavlm": _row("WavLMModel", waveform, **_SPEECH),
    # Several modalities
    "llava": _row(
        "LlavaForConditionalGeneration",
        _llava,
        vision_config=_VISION | {"model_type": "clip_vision_model", "image_size": 16},
        text_config=_GROUPED | {"model_type": "llama"},
        image_token_index=49,
        vision_feature_layer=-1,
    ),
    "qwen2_vl": _row(
        "Qwen2VLForConditionalGeneration",
        _qwen2_vl,
        vision_config={"embed_dim": 32, "hidden_size": 32, "depth": 2, "num_heads": 4, "patch_size": 8, "mlp_ratio": 2},
        text_config=_GROUPED | {"rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]}},
        image_token_id=49,
        vision_start_token_id=45,
        vision_end_token_id=46,
    ),
    "idefics3": _row(
        "Idefics3ForConditionalGeneration",
        _idefics3,
        vision_config=_VISION | {"image_size": 16, "patch_size": 4},
        text_config=_GROUPED | {"model_type": "llama"},
        image_token_id=49,
        scale_factor=2,
        pad_token_id=0,
    ),
}
