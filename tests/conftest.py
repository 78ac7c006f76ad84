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

from tests.models import save_pico_bert, save_pico_llama


@pytest.fixture(autouse=True)
def fixed_seeds():
    """Every test starts from the same random state, so that order and selection of tests change nothing."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (transformers and datasets read the global generator)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def pico_bert_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a two-layer BERT encoder (hidden 32, 4 heads) with its tokenizer."""
    directory = tmp_path_factory.mktemp("pico_bert")
    save_pico_bert(directory)
    return directory


@pytest.fixture(scope="session")
def pico_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a two-layer Llama (hidden 32, 4 heads, 2 key-value heads) with its tokenizer and chat template."""
    directory = tmp_path_factory.mktemp("pico_llama")
    save_pico_llama(directory)
    return directory
