"""Parameters leave a running optimizer, or are replaced, and the rest goes on as if nothing had happened."""

import pytest
import torch
from torch import nn

from loraloom.errors import InputError
from loraloom.optim import remove_parameters, replace_parameter


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_parameters_are_removed_from_any_optimizer(cls) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = cls([{"params": list(module.named_parameters())} for module in model], lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    remove_parameters(optimizer, [model[0].weight, *model[1].parameters()])
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]
    assert [group["param_names"] for group in optimizer.param_groups] == [["bias"], []]
    assert model[0].weight.grad is None
    before = model[0].weight.clone()
    optimizer.step()
    assert torch.equal(model[0].weight, before)
    assert set(optimizer.state) <= {model[0].bias}


def test_removing_what_is_not_held_changes_nothing() -> None:
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW([model.weight])
    with pytest.raises(InputError) as caught:
        remove_parameters(optimizer, [model.weight, model.bias])
    assert caught.value.code == "foreign-parameter"
    assert optimizer.param_groups[0]["params"] == [model.weight]


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD])
def test_a_replaced_parameter_goes_on_where_the_old_one_was(cls) -> None:
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {"weight_decay": 0.1}
    old, other = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.ones(3))
    optimizer, straight = cls([other, old], lr=0.1, **options), cls([mirror := old.detach().clone()], lr=0.1, **options)

    def step(p: torch.Tensor, stepper, gradient: list[float]) -> None:
        p.grad = torch.tensor(gradient)
        stepper.step()

    for gradient in ([0.5, -1.0], [0.25, 3.0]):
        step(old, optimizer, gradient)
        step(mirror, straight, gradient)
    new = nn.Parameter(torch.cat([old.detach(), torch.zeros(1)]))
    replace_parameter(optimizer, old, new, lambda state: torch.cat([state, torch.zeros(1)]))
    assert optimizer.param_groups[0]["params"][1] is new
    assert old not in optimizer.state
    assert old.grad is None
    step(new, optimizer, [-1.0, 1.0, 0.0])
    step(mirror, straight, [-1.0, 1.0])
    assert torch.equal(new[:2], mirror)
    assert new[2] == 0


def test_replacing_what_is_not_held_is_an_error() -> None:
    held, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([held])
    with pytest.raises(InputError) as caught:
        replace_parameter(optimizer, other, held, lambda state: state)
    assert caught.value.code == "foreign-parameter"
