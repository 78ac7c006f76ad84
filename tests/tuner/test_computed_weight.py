"""Base weights that torch computes from others: the forward pass is right, merging is exact or refused."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune

from loraloom import LoomConfig
from loraloom.errors import InputError
from tests.tuner.support import PART_IDS, PARTS, Dense, Toy, adapter_tensors, assert_near, randomise

KINDS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "old weight_norm": nn.utils.weight_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}
EXACT = ("weight_norm",)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("parts", PARTS, ids=PART_IDS)
def test_forward_is_that_of_the_adapted_weight(kind, parts):
    base = Toy(KINDS[kind](nn.Linear(6, 10))).eval()
    model = get_peft_model(base, LoomConfig(r=4, lora_alpha=6, target_modules=["target"], **parts)).eval()
    randomise(model)
    x = torch.randn(3, 6)
    with torch.no_grad():
        output = model(x)  # first: a hook may compute the weight
        dense = Dense.of("linear", model.get_base_model().target.get_base_layer())
        assert_near(output, dense(x, dense.adapted_weight(adapter_tensors(model), parts)), torch.float32, factor=10)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@torch.no_grad()
def test_merging_is_exact_or_refused_and_then_nothing_has_changed(kind):
    base = Toy(KINDS[kind](nn.Linear(6, 6))).eval()
    model = get_peft_model(base, LoomConfig(r=2, target_modules=["target"], use_mixer="orthogonal")).eval()
    randomise(model)
    x = torch.randn(3, 6)
    expected, before = model(x), {name: value.clone() for name, value in model.state_dict().items()}
    if kind in EXACT:
        model.merge_adapter()
        assert_near(model(x), expected, factor=10)
        assert (model.get_base_model().target.base_layer(x) - expected).abs().max() < 1e-4
        model.unmerge_adapter()
    else:
        with pytest.raises(InputError) as raised:
            model.merge_adapter()
        assert raised.value.code == "computed-weight"
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(model(x), expected)
