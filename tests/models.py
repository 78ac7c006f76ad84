"""Pico models: two layers, random weights, no network. The only place of the tests that spells out their sizes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

VOCABULARY = """
the a of to and in is it for on with as at by an be this that from or are was not but have all can one two three
red green blue yellow apple pear plum cherry dog cat bird fish runs jumps sleeps eats opens closes reads writes
file line word name list number what who where when why how yes no good bad small large old new . , ? !
"""
WORDS = VOCABULARY.split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "<s>", "</s>", "user", "assistant", "system", ":"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {{ eos_token }} {% endfor %}"
)


def llama(width: int = 32, vocab_size: int = 60, **options) -> LlamaForCausalLM:
    """Four heads and two of keys and values, or half of that at width 16; `intermediate_size` is 3/2 of the width."""
    return LlamaForCausalLM(LlamaConfig(**_decoder(width, vocab_size) | options))


def mixtral(width: int = 16, vocab_size: int = 60, **options) -> MixtralForCausalLM:
    """A mixture of two experts a layer, whose weights are bare parameters."""
    return MixtralForCausalLM(MixtralConfig(**_decoder(width, vocab_size) | {"num_local_experts": 2} | options))


def gpt2(vocab_size: int = 50, **options) -> GPT2LMHeadModel:
    """One layer of width 16; its layers are Conv1D."""
    sizes = {"n_layer": 1, "n_embd": 16, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, **sizes | options))


def bert_classifier(num_labels: int = 3, **options) -> BertForSequenceClassification:
    """Width 16, vocabulary 40."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = BertConfig(vocab_size=40, max_position_embeddings=16, num_labels=num_labels, **sizes | options)
    return BertForSequenceClassification(config)


def save_pico_bert(directory: Path) -> None:
    """An encoder of width 32 with its tokenizer."""
    tokenizer = _word_tokenizer()
    ids = {token: tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]")}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=list(ids.items())
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        # With the usual 0.02 a net of this width hardly mixes its tokens, and [CLS] would know nothing of the others.
        initializer_range=0.2,
        pad_token_id=fast.pad_token_id,
    )
    BertModel(config).save_pretrained(directory)


def save_pico_llama(directory: Path) -> None:
    """A causal language model of width 32 with its tokenizer and a chat template."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer(),
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=64,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    ids = {name: getattr(fast, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    llama(vocab_size=len(fast), intermediate_size=64, **ids).save_pretrained(directory)


def _decoder(width: int, vocab_size: int) -> dict[str, int]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": width * 3 // 2,
        "num_hidden_layers": 2,
        "num_attention_heads": width // 8,
        "num_key_value_heads": width // 16,
        "max_position_embeddings": 64,
    }


def _word_tokenizer() -> Tokenizer:
    vocab = {token: i for i, token in enumerate(dict.fromkeys(SPECIAL + WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return tokenizer
