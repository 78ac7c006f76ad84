"""The one entry point: names, options, and the hook for transformers' Trainer."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from loraloom.optim import OPTIMIZERS, KSparse, WeightAdam, build_optimizer, trainer_optimizer

from .support import backward, gated_model, snapshot


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")  # bitsandbytes; it then does not page
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "galore"])  # it is for whole weights
def test_every_optimizer_takes_the_groups_and_trains(name: str) -> None:
    model = gated_model()
    optimizer = build_optimizer(model, name, lr=1e-2, lora_plus_ratio=2.0, gate_lr=0.3, head_lr=3e-3, eps=1e-6)
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups} == {
        "lora_A": (1e-2, 1e-2),
        "lora_B": (2e-2, 1e-2),
        "gates": (0.3, 0.0),
        "heads": (3e-3, 1e-2),
        "heads_no_decay": (3e-3, 0.0),
    }
    assert all(group["eps"] == 1e-6 for group in optimizer.param_groups)
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


def test_an_option_of_another_optimizer_is_an_error() -> None:
    message = r"optimizer 'adamw' can't honour constraint=KSparse\(k=2.*these can: weight_adam"
    with pytest.raises(ValueError, match=message):
        build_optimizer(gated_model(), lr=1e-3, constraint=KSparse(2))
    with pytest.raises(ValueError, match=message):
        trainer_optimizer(lr=1e-3, constraint=KSparse(2))
    with pytest.raises(
        ValueError, match="optimizer 'adamw_8bit' can't honour fused=True; these can: adamw, weight_adam"
    ):
        build_optimizer(gated_model(), "adamw_8bit", lr=1e-3, fused=True)


def test_unknown_names_are_errors_with_the_nearest_one() -> None:
    with pytest.raises(ValueError, match="optimizer 'adam_w' is unknown; use one of adamw, weight_adam"):
        build_optimizer(gated_model(), "adam_w", lr=1e-3)
    with pytest.raises(ValueError, match=r"option lora_plus_ration=16 is unknown.*did you mean lora_plus_ratio\?"):
        trainer_optimizer(lr=1e-3, lora_plus_ration=16)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(
        ModuleNotFoundError, match=r"needs bitsandbytes; install it with: pip install 'loraloom\[quant\]'"
    ):
        build_optimizer(gated_model(), "adamw_8bit", lr=1e-3)


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
    code = "import sys, loraloom.optim; sys.exit(bool({'peft', 'transformers', 'bitsandbytes'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
