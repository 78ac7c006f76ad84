"""Muon with a companion: each half is torch's own, bit for bit, and the whole resumes, schedules and scales as one."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM

from loraloom.errors import InputError
from loraloom.optim import Muon, build_optimizer, expected_memory, remove_parameters, state_bytes

from .galore.support import chain, loss_of, train
from .support import assert_identical, backward, gated_model, snapshot


def halves(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    return [p for p in model.parameters() if p.ndim == 2], [p for p in model.parameters() if p.ndim != 2]


def test_it_is_torchs_muon_and_torchs_adamw() -> None:
    ours, theirs = chain(), chain()
    optimizer = Muon(ours.parameters(), lr=1e-2, weight_decay=0.1, momentum=0.9, betas=(0.8, 0.9), eps=1e-6)
    matrices, rest = halves(theirs)
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.9, eps=1e-7, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)
    for step in range(6):
        train(ours, optimizer, range(step, step + 1))
        adamw.zero_grad()
        train(theirs, muon, range(step, step + 1))
        adamw.step()
    assert_identical(snapshot(ours), snapshot(theirs))


def test_a_resumed_run_is_the_uninterrupted_one_with_a_schedule() -> None:
    model, other = chain(), chain()
    optimizer = Muon(model.parameters(), lr=1e-2)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 20)
    for step in range(4):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    file = io.BytesIO()
    torch.save((optimizer.state_dict(), scheduler.state_dict()), file)
    file.seek(0)
    saved, schedule = torch.load(file, weights_only=True)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed = Muon(other.parameters(), lr=0.5)
    again = LambdaLR(resumed, lambda step: 1 - step / 20)
    resumed.load_state_dict(saved)
    again.load_state_dict(schedule)
    for step in range(4, 9):
        for m, o, s in ((model, optimizer, scheduler), (other, resumed, again)):
            train(m, o, range(step, step + 1))
            s.step()
    assert_identical(snapshot(model), snapshot(other))


def test_hidden_matrices_get_muon_and_nothing_else(pico_llama_dir) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico_llama_dir)
    optimizer = build_optimizer(model, "muon", lr=1e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    by_muon = {names[id(p)] for group in optimizer.param_groups if group["use_muon"] for p in group["params"]}
    assert by_muon == {n for n in names.values() if "_proj." in n}
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(names)


def test_factors_of_adapters_get_muon_and_gates_and_heads_do_not() -> None:
    model = gated_model()
    optimizer = build_optimizer(model, "muon", lr=1e-2)
    assert {group["name"]: group["use_muon"] for group in optimizer.param_groups} == {
        "lora_A": True, "lora_B": True, "gates": False, "heads": False, "heads_no_decay": False,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_its_memory_is_announced(dtype: torch.dtype) -> None:
    model = chain(dtype)
    optimizer = Muon(model.parameters())
    expected = expected_memory(model, optimizer).state
    loss_of(model, 0, dtype).backward()
    optimizer.step()
    assert expected == state_bytes(optimizer)


def test_groups_can_be_added_and_parameters_removed() -> None:
    model = chain()
    optimizer = Muon([model.tall.weight], lr=1e-2)
    optimizer.add_param_group({"params": model.wide.parameters(), "lr": 2e-2})
    assert [(group["use_muon"], group["lr"]) for group in optimizer.param_groups] == [
        (True, 1e-2), (True, 2e-2), (False, 2e-2),
    ]  # fmt: skip
    train(model, optimizer, 2)
    remove_parameters(optimizer, [model.wide.weight])
    before = snapshot(model)
    train(model, optimizer, range(2, 4))
    assert torch.equal(before["wide.weight"], model.wide.weight)
    assert not torch.equal(before["wide.bias"], model.wide.bias)
    assert not torch.equal(before["tall.weight"], model.tall.weight)


def test_a_grad_scaler_unscales_and_skips() -> None:
    models = [gated_model(), gated_model()]
    for model, scale in zip(models, (1.0, 1024.0), strict=True):
        optimizer = build_optimizer(model, "muon", lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        for step in range(4):
            optimizer.zero_grad()
            backward(model, step)
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.mul_(scale)
            if step == 2 and scale > 1:
                model.gates[0].grad.fill_(float("inf"))
                scaler.scale(torch.ones(()))
                before = snapshot(model)
                scaler.step(optimizer)
                scaler.update(1024.0)
                assert_identical(before, snapshot(model))
                continue
            if step == 2:
                continue
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
    assert_identical(*map(snapshot, models))


@pytest.mark.parametrize(
    ("groups", "code"),
    [
        ([{"params": [torch.ones(3)], "use_muon": True}], "not-a-matrix"),
        ([{"params": [torch.ones(3)]}], "nothing-for-muon"),
    ],
)
def test_what_muon_cannot_take_is_an_error(groups: list, code: str) -> None:
    with pytest.raises(InputError) as caught:
        Muon(groups)
    assert caught.value.code == code
