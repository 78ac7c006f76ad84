"""The pico models load with the Auto classes and compute something that depends on their input."""

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def test_pico_llama_loads_and_depends_on_its_input(pico_llama_dir):
    tokenizer = AutoTokenizer.from_pretrained(pico_llama_dir)
    model = AutoModelForCausalLM.from_pretrained(pico_llama_dir)
    batch = tokenizer(["the red dog runs", "a blue cat sleeps"], return_tensors="pt")
    logits = model(**batch).logits
    assert logits.shape == (2, 4, len(tokenizer))
    assert not torch.equal(logits[0], logits[1])
    assert "assistant" in tokenizer.apply_chat_template([{"role": "assistant", "content": "yes"}], tokenize=False)


def test_pico_bert_loads_and_depends_on_its_input(pico_bert_dir):
    tokenizer = AutoTokenizer.from_pretrained(pico_bert_dir)
    model = AutoModelForSequenceClassification.from_pretrained(pico_bert_dir, num_labels=3).eval()
    batch = tokenizer(["the red dog runs", "a blue cat sleeps"], return_tensors="pt")
    assert batch["input_ids"][0, 0] == tokenizer.cls_token_id
    logits = model(**batch).logits
    assert logits.shape == (2, 3)
    assert not torch.equal(logits[0], logits[1])
