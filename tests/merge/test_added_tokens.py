"""The usual ways to add tokens, on tied and untied models: the merged model is exact, or refused in one line."""

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from loraloom.adapter.inspect import inspect_adapter
from loraloom.errors import InputError
from loraloom.io.checkpoint import open_checkpoint
from loraloom.merge.merge import merge_checkpoint
from tests.adapter.support import logits, same_logits, trained
from tests.models import llama

ROWS = 64  # of 60
CONFIGS = {
    "embed and head in full": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embed in full": {"modules_to_save": ["embed_tokens"]},
    "embed in full, tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "trained rows": {"trainable_token_indices": [60, 61, 62, 63]},
    "trained rows, tied": {"trainable_token_indices": [60, 61, 62, 63], "ensure_weight_tying": True},
    "lora on the table": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora on the linears": {},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_after_a_resize_the_merge_is_exact_or_refused(tmp_path, options, tied):
    base = llama(tie_word_embeddings=tied)
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.resize_token_embeddings(ROWS)
    config = peft.LoraConfig(**({"r": 2, "target_modules": ["q_proj"]} | options))
    reference = trained(model, config, tmp_path / "adapter")
    try:
        merge_checkpoint([tmp_path / "adapter"], tmp_path / "base", tmp_path / "out")
    except InputError as error:
        refusal = error
    else:
        refusal = None
    if refusal is not None:
        assert "\n" not in str(refusal)
        assert refusal.code
        assert not (tmp_path / "out").exists()
        return
    ids = torch.tensor([[1, 5, 60, 63]])
    same_logits(tmp_path / "out", reference, ids=ids)
    assert logits(reference, ids).shape[-1] == ROWS
    names = [*open_checkpoint(tmp_path / "base"), "lm_head.weight"]
    assert set(open_checkpoint(tmp_path / "out")) <= set(names)
    assert not [f for f in inspect_adapter(tmp_path / "adapter").errors if f.code == "duplicate"]
