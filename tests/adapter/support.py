"""Trained adapters on disk, and what their models answer."""

import copy

import peft
import torch
from transformers import AutoModelForCausalLM

IDS = torch.arange(12).reshape(2, 6)


def trained(model, config, folder):
    """A PEFT model with random weights in all that it trains, saved; in eval mode."""
    model = peft.get_peft_model(model, copy.deepcopy(config))  # PEFT writes into a configuration
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model.eval()


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def same_logits(folder, reference, auto=AutoModelForCausalLM, ids=IDS, tolerance=1e-5):
    """The merged model loads without a missing, unexpected or reshaped tensor, and answers like the reference."""
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(model, ids), logits(reference, ids), atol=tolerance, rtol=0)
    return model
