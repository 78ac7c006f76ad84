"""Between LoRA's configuration and folders and ours: the function stays."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from loraloom import LoomConfig, load_lora
from loraloom.composition import to_lora
from loraloom.errors import InputError
from loraloom.tuner.lora import as_lora
from tests.tuner.support import Pair, randomise

LORAS = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 5},
    "dora": {"use_dora": True},
    "ranks": {"rank_pattern": {"first": 2}, "alpha_pattern": {"second": 7}},
    "bias": {"bias": "lora_only"},
}
PARTS = {
    "as it is": {},
    "mixer": {"use_mixer": "orthogonal"},
    "gate": {"use_gate": True},
    "dora": {"use_dora": True},
    "all": {"use_mixer": "kaiming", "use_gate": True, "use_dora": True},
}
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def pair():
    torch.manual_seed(0)
    return Pair()


@pytest.fixture(params=LORAS)
def folder(request, tmp_path):
    """A trained LoRA on disk, and its model."""
    model = get_peft_model(pair(), LoraConfig(**{"r": 4, "target_modules": ["first", "second"]} | LORAS[request.param]))
    randomise(model)
    model.save_pretrained(tmp_path)
    return tmp_path, model.eval()


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_a_lora_goes_on_with_other_parts_from_where_it_was(folder, parts):
    path, theirs = folder
    ours = load_lora(pair(), str(path), **parts).eval()
    assert ours.peft_config["default"].peft_type == "LOOM"
    torch.testing.assert_close(ours(X), theirs(X), rtol=1e-5, atol=1e-5)
    assert all(p.requires_grad for n, p in ours.named_parameters() if ".loom_" in n)
    ours.train()(X).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for n, p in ours.named_parameters() if ".loom_" in n)


def test_there_and_back(folder, tmp_path):
    path, theirs = folder
    if theirs.peft_config["default"].use_dora:
        pytest.skip("a DoRA stays one in `loraloom export --to peft`; to_lora makes plain LoRAs")
    if theirs.peft_config["default"].bias != "none":
        pytest.skip("biases are the model's: to_lora writes an adapter's low-rank part")
    ours = load_lora(pair(), str(path))
    to_lora(ours, "default", save_to=tmp_path / "back")
    back = PeftModel.from_pretrained(pair(), tmp_path / "back").eval()
    torch.testing.assert_close(back(X), theirs(X), rtol=1e-5, atol=1e-5)


def test_embeddings_and_convolutions_too(tmp_path):
    def base():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(7, 6), nn.Unflatten(-1, (6, 1)), nn.Flatten(0, 1), nn.Conv1d(6, 4, 1))

    theirs = get_peft_model(base(), LoraConfig(r=3, target_modules=["0", "3"]))
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ids = torch.tensor([[1, 2, 6]])
    torch.testing.assert_close(load_lora(base(), str(tmp_path))(ids), theirs(ids))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_lora_on_a_changed_base_is_an_error(tmp_path, start):
    get_peft_model(pair(), LoraConfig(r=2, target_modules=["first"], init_lora_weights=start)).save_pretrained(tmp_path)
    with pytest.raises(InputError) as excinfo:
        load_lora(pair(), str(tmp_path))
    assert excinfo.value.code == "altered-base"


def test_a_lora_of_another_base_is_an_error(tmp_path):
    model = get_peft_model(
        nn.ModuleDict({"first": nn.Linear(8, 8), "third": nn.Linear(8, 8)}),
        LoraConfig(target_modules=["first", "third"]),
    )
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError) as excinfo:
        load_lora(pair(), str(tmp_path))
    assert excinfo.value.code == "wrong-base"


def test_an_adapter_of_another_type_is_an_error(tmp_path):
    get_peft_model(pair(), LoomConfig(target_modules=["first"])).save_pretrained(tmp_path)
    with pytest.raises(InputError) as excinfo:
        load_lora(pair(), str(tmp_path))
    assert excinfo.value.code == "not-a-lora"


@pytest.mark.parametrize("keys", LORAS.values(), ids=LORAS)
def test_our_configuration_as_pefts_means_the_same(keys):
    keys = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"], "init_lora_weights": False} | keys
    loom = LoomConfig.from_lora(LoraConfig(**keys))
    lora = as_lora(loom, pair())
    outputs = []
    for config in (LoraConfig(**keys), lora):
        model = get_peft_model(pair(), config)
        randomise(model)
        outputs.append(model(X))
    assert torch.equal(*outputs)
    assert lora.to_dict() == LoraConfig(**keys).to_dict()


@pytest.mark.parametrize("keys", [{"use_mixer": "orthogonal"}, {"use_gate": True}, {"init_lora_weights": "pissa"}])
def test_what_lora_has_not_has_no_such_configuration(keys):
    assert as_lora(LoomConfig(target_modules=["first"], **keys), pair()) is None


def test_names_that_match_nothing_are_an_error_as_they_are_with_our_type():
    with pytest.raises(ValueError, match="frist"):
        as_lora(LoomConfig(target_modules=["frist", "second"]), pair())


def test_a_weight_that_is_read_keeps_our_type():
    class Reads(Pair):
        def forward(self, x):
            return torch.nn.functional.linear(x, self.first.weight) + self.second(x)

    assert as_lora(LoomConfig(target_modules=["first"]), Reads()) is None
    assert as_lora(LoomConfig(target_modules=["second"]), Reads()) is not None
