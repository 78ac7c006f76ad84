"""The one entry point: names, options, and the hook for transformers' Trainer."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from loraloom.errors import InputError
from loraloom.optim import OPTIMIZERS, KSparse, WeightAdam, build_optimizer, trainer_optimizer
from loraloom.optim.options import ProjectionOptions

from .support import backward, gated_model, snapshot

# The others project whole weights.
ADAPTER_OPTIMIZERS = [n for n, choice in OPTIMIZERS.items() if not issubclass(choice.options, ProjectionOptions)]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")  # bitsandbytes; it then does not page
@pytest.mark.parametrize("name", ADAPTER_OPTIMIZERS)
def test_every_optimizer_takes_the_groups_and_trains(name: str) -> None:
    model = gated_model()
    eps = {"eps": 1e-6} if "eps" in OPTIMIZERS[name].honors else {}
    rates = {"lora_plus_ratio": 2.0, "gate_lr": 0.3, "head_lr": 3e-3}
    optimizer = build_optimizer(model, name, lr=1e-2, **rates, **eps)
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        "lora_A": (1e-2, 1e-2),
        "lora_B": (2e-2, 1e-2),
        "gates": (0.3, 0.0),
        "heads": (3e-3, 1e-2),
        "heads_no_decay": (3e-3, 0.0),
    }
    if eps:
        assert all(group["eps"] == 1e-6 for group in optimizer.param_groups if not group.get("use_muon"))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(float(backward(model, 0)))
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_weight_adam_takes_its_constraint_and_its_gate_rate() -> None:
    optimizer = build_optimizer(gated_model(), "weight_adam", lr=1e-3, constraint=KSparse(2))
    assert isinstance(optimizer, WeightAdam)
    assert optimizer.constraint == KSparse(2)
    assert {group["name"]: group["lr"] for group in optimizer.param_groups}["gates"] == 5.0


def test_8bit_keeps_embeddings_in_32_bits() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(512, 16), nn.Linear(16, 512))
    optimizer = build_optimizer(model, "adamw_8bit", lr=1e-3)
    model(torch.arange(8)).square().mean().backward()
    optimizer.step()
    assert optimizer.state[model[0].weight]["state1"].dtype == torch.float32
    assert optimizer.state[model[1].weight]["state1"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("name", "options", "code", "named"),
    [
        ("adamw", {"constraint": KSparse(2)}, "not-honored", "weight_adam"),
        ("adamw_8bit", {"fused": True}, "not-honored", "adamw, weight_adam"),
        ("adamw", {"rank": 4}, "not-honored", "galore, fira, apollo"),
        ("fira", {"layerwise": True}, "not-honored", "galore"),
        ("apollo", {"refresh": "svd"}, "not-honored", "galore, fira"),
        ("galore", {"gate_momentum": 0.5}, "not-honored", "weight_adam"),
        ("galore", {"momentum": 0.9}, "not-honored", "inner='sgd'"),
        ("galore", {"inner": "sgd", "betas": (0.9, 0.99)}, "not-honored", "inner='adamw', inner='adamw_8bit'"),
        ("galore", {"inner": "adafactor", "eps": 1e-6}, "not-honored", "inner='adamw', inner='adamw_8bit'"),
        ("galore", {"inner": "adam"}, "unknown-optimizer", "adamw, sgd, adafactor, adamw_8bit"),
        ("adam_w", {}, "unknown-optimizer", "did you mean 'adamw'"),
        ("adamw", {"lora_plus_ration": 16}, "unknown-option", "did you mean 'lora_plus_ratio'"),
    ],
)
def test_what_an_optimizer_would_not_honor_is_an_error(name: str, options: dict, code: str, named: str) -> None:
    with pytest.raises(InputError) as caught:
        trainer_optimizer(name, lr=1e-3, **options)
    assert caught.value.code == code
    assert named in str(caught.value)
    with pytest.raises(InputError):
        build_optimizer(gated_model(), name, lr=1e-3, **options)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(InputError) as caught:
        build_optimizer(gated_model(), "adamw_8bit", lr=1e-3)
    assert caught.value.code == "missing-package"


def test_the_trainer_builds_and_schedules_it(tmp_path) -> None:
    from transformers import Trainer, TrainingArguments

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = gated_model()

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.inner(x) - labels).square().mean()}

    model = WithLoss()
    data = [{"x": torch.randn(6), "labels": torch.randn(3)} for _ in range(16)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=4, report_to="none", use_cpu=True, save_steps=2,
        learning_rate=0.9, logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip

    def trainer(model: nn.Module) -> Trainer:
        hook = trainer_optimizer("weight_adam", lr=1e-2, gate_lr=0.3, lora_plus_ratio=2.0, constraint=KSparse(2))
        return Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=hook)

    first = trainer(model)
    first.train()
    optimizer = first.optimizer.optimizer
    assert isinstance(optimizer, WeightAdam)
    assert {group["name"]: group["initial_lr"] for group in optimizer.param_groups} == {
        "lora_A": 1e-2, "lora_B": 2e-2, "gates": 0.3, "heads": 1e-2, "heads_no_decay": 1e-2,
    }  # fmt: skip
    assert all(group["lr"] == 0.0 for group in optimizer.param_groups)  # the linear schedule has run out
    assert sum(bool(gate != 0) for gate in model.inner.gates) == 2

    resumed = WithLoss()
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after, expected = snapshot(resumed), snapshot(model)
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_importing_the_optimizers_imports_neither_peft_nor_transformers() -> None:
    loaded = "{'peft', 'transformers', 'bitsandbytes'} & sys.modules.keys()"
    code = f"import sys, loraloom.optim.build, loraloom.optim.memory; sys.exit(bool({loaded}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_checking_options_imports_no_torch() -> None:
    code = "import sys, loraloom.optim.section as s; s.optimizer_section(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
