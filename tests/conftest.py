"""Fixtures for every test: two pico models, built on disk once per session, with a tokenizer of their own.

`pico_llama_dir` is a causal language model with a chat template, `pico_bert_dir` an encoder. Both have two layers, a
hidden width of 32 and random weights from a fixed seed; both load with `Auto*.from_pretrained` and need no network.
"""

import os
import random

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same random state, so that order and selection of tests change nothing."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (transformers and datasets read the global generator)
    torch.manual_seed(0)


def _word_tokenizer() -> Tokenizer:
    vocab = {token: i for i, token in enumerate(dict.fromkeys(SPECIAL + WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    return tokenizer


@pytest.fixture(scope="session")
def pico_bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a two-layer BERT encoder (hidden 32, 4 heads) with its tokenizer."""
    directory = tmp_path_factory.mktemp("pico_bert")
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
    return directory


@pytest.fixture(scope="session")
def pico_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a two-layer Llama (hidden 32, 4 heads, 2 key-value heads) with its tokenizer and chat template."""
    directory = tmp_path_factory.mktemp("pico_llama")
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
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=fast.pad_token_id,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory
