"""The optimizers on real adapters: every combination of parts is grouped, and the gates are found."""

import itertools

import peft
import pytest
import torch
from torch import nn

from loraloom import LoomConfig
from loraloom.optim import KSparse, WeightAdam, build_optimizer, build_param_groups


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.classifier = nn.Linear(8, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.classifier(self.second(torch.tanh(self.first(x))))


def adapted(**parts) -> nn.Module:
    torch.manual_seed(0)
    options = {"r": 2, "target_modules": ["embed", "conv", "first", "second"], "modules_to_save": ["classifier"]}
    return peft.get_peft_model(Base(), LoomConfig(**options | parts))


@pytest.mark.parametrize(
    ("mixer", "gate", "dora", "init"),
    list(itertools.product([False, "orthogonal"], [False, True], [False, True], [True, "pissa"])),
)
def test_every_part_is_in_its_group(mixer, gate: bool, dora: bool, init) -> None:
    model = adapted(use_mixer=mixer, use_gate=gate, use_dora=dora, init_lora_weights=init)
    groups = build_param_groups(model, 1e-3)
    sizes = {group["name"]: len(group["params"]) for group in groups}
    expected = {"lora_A": 4, "lora_B": 4, "heads": 1, "heads_no_decay": 1}
    expected |= {"mixers": 4} if mixer else {}
    expected |= {"gates": 4} if gate else {}
    expected |= {"magnitudes": 4} if dora else {}
    assert sizes == expected
    grouped = {id(p) for group in groups for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters() if p.requires_grad}


def test_weight_adam_trains_all_parts_together_and_keeps_k_gates() -> None:
    model = adapted(use_mixer="orthogonal", use_gate=True, use_dora=True)
    optimizer = build_optimizer(model, "weight_adam", lr=1e-2, gate_lr=0.5, constraint=KSparse(2))
    assert isinstance(optimizer, WeightAdam)
    ids, y = torch.randint(0, 11, (4, 5)), torch.randn(4, 5, 3)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = (model(ids) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    gates = [p for name, p in model.named_parameters() if "gate" in name]
    assert sum(bool(gate != 0) for gate in gates) == 2
