"""The memory that is announced before the first step is what is there after it."""

import pytest
import torch
from torch import nn

from loraloom.optim import APOLLO, Fira, GaLore, WeightAdam, adamw_memory, build_optimizer, expected_memory, state_bytes
from loraloom.optim.galore.groups import project_groups
from loraloom.optim.param_groups import build_param_groups

from .galore.support import Chain, chain, loss_of
from .support import gated_model

pytestmark = pytest.mark.filterwarnings("ignore:bfloat16 weights lose steps")  # so they do here
PLAIN = {
    "adamw": lambda p: torch.optim.AdamW(p),
    "amsgrad": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p),
    "momentum": lambda p: torch.optim.SGD(p, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p),
}
GALORE = {
    **{side: {"side": side} for side in ("std", "reverse_std", "full")},
    "svd": {"refresh": "svd"},
    "8 bits": {"basis_bits": 8},
    "fira": {"kind": Fira},
    "apollo": {"kind": APOLLO},
    "layerwise": {"layerwise": True},
    "momentum": {"inner": torch.optim.SGD, "momentum": 0.9},
    "adafactor": {"inner": torch.optim.Adafactor},
}


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype) -> None:
    loss_of(model, 0, dtype).backward()
    optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_state_of_plain_optimizers(name: str, dtype: torch.dtype) -> None:
    model = chain(dtype)
    model.norm.requires_grad_(False)
    optimizer = PLAIN[name]([p for p in model.parameters() if p.requires_grad])
    memory = expected_memory(model, optimizer)
    one_step(model, optimizer, dtype)
    assert memory.state == state_bytes(optimizer)
    size = torch.finfo(dtype).bits // 8
    assert memory.weights == size * sum(p.numel() for p in model.parameters())
    assert memory.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    if name == "adamw":
        assert memory == adamw_memory(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", GALORE)
def test_state_of_galore(variant: str, dtype: torch.dtype) -> None:
    model = chain(dtype)
    groups = project_groups(model, build_param_groups(model, 1e-2))
    options = dict(GALORE[variant])
    optimizer = options.pop("kind", GaLore)(groups, rank=4, **options)
    memory = expected_memory(model, optimizer)
    one_step(model, optimizer, dtype)
    assert memory.state == state_bytes(optimizer)


def test_gradients_of_the_layerwise_mode() -> None:
    """The most there is: the compact gradients, those that are not projected, and one whole gradient."""
    model = chain()
    optimizer = GaLore(model, rank=4, layerwise=True)
    loss_of(model, 0).backward()
    left = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    compact = sum(slot.compact.grad.nbytes for slot in optimizer.projected.values())
    largest = max(slot.weight.nbytes for slot in optimizer.projected.values())
    assert expected_memory(model, optimizer).gradients == left + compact + largest < adamw_memory(model).gradients


@pytest.mark.parametrize("options", [{}, {"gate_method": "adam"}, {"gate_momentum": 0.9}])
def test_state_of_weight_adam(options: dict) -> None:
    model = gated_model()
    optimizer = build_optimizer(model, "weight_adam", lr=1e-3, **options)
    assert isinstance(optimizer, WeightAdam)
    expected = expected_memory(model, optimizer).state
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert expected == state_bytes(optimizer)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw", "lion", "lion_8bit"])
def test_state_of_bitsandbytes_but_for_its_tables(name: str) -> None:
    """8 bits: blocks for the large matrix, 32 bits for the embedding and the bias; all share tables of 1 KiB."""
    model = nn.Sequential(nn.Embedding(90, 64), nn.Linear(64, 70))
    optimizer = build_optimizer(model, name, lr=1e-3)
    expected = expected_memory(model, optimizer).state
    model(torch.arange(8)).square().mean().backward()
    optimizer.step()
    assert 0 <= state_bytes(optimizer) - expected <= (2048 if "8bit" in name else 0) + 4 * 3


def test_an_optimizer_that_is_not_known_has_no_number() -> None:
    model = Chain()
    assert expected_memory(model, torch.optim.Adagrad(model.parameters())).state is None
