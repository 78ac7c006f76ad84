"""Which weights of a model are projected, the table that says so, and GaLore through `build_optimizer` and Trainer."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from loraloom.errors import InputError
from loraloom.optim import GaLore, build_optimizer, build_param_groups, format_galore, project_groups, trainer_optimizer

from ..support import assert_identical, snapshot


class Encoder(nn.Module):
    """An embedding, tied to the output, a linear layer, a norm, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(40, 16), nn.Linear(16, 40, bias=False)
        self.lm_head.weight = self.embed.weight
        self.dense, self.norm, self.conv = nn.Linear(16, 24), nn.LayerNorm(24), nn.Conv1d(24, 16, 3, padding=1)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.dense(self.embed(tokens)))
        return self.lm_head(self.conv(hidden.mT).mT)


def groups_of(model: nn.Module, target_modules=None, rank_pattern=None) -> dict[str, set[str]]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = project_groups(model, build_param_groups(model, 1e-2), target_modules, rank_pattern)
    assert all(("rank" in group) == (group["name"] != "projected") for group in groups)
    return {group["name"]: {names[id(p)] for p in group["params"]} for group in groups}


def test_linear_layers_are_projected_and_nothing_else() -> None:
    assert groups_of(Encoder()) == {
        "projected": {"dense.weight"},
        "base": {"embed.weight", "conv.weight"},
        "no_decay": {"dense.bias", "norm.weight", "norm.bias", "conv.bias"},
    }


def test_patterns_choose_other_modules_and_a_typo_is_an_error() -> None:
    assert groups_of(Encoder(), ["emb*"])["projected"] == {"embed.weight"}
    with pytest.raises(InputError) as caught:
        groups_of(Encoder(), "dens")
    assert caught.value.code == "unmatched-pattern"
    assert "embed, lm_head, dense" in str(caught.value)


def test_the_table_names_every_parameter_once() -> None:
    model = Encoder()
    optimizer = GaLore(model, lr=1e-2, rank=4)
    assert format_galore(optimizer) == "\n".join(
        [
            "shape        treatment      tensors  parameters  state bytes",
            "24 x 16      right, rank 4        1         384        1,028",
            "40 x 16      not projected        1         640        5,124",
            "16 x 24 x 3  not projected        1       1,152        9,220",
            "24           not projected        3          72          588",
            "16           not projected        1          16          132",
            "total                             7       2,264       16,092",
        ]
    )


@pytest.mark.parametrize("layerwise", [False, True])
def test_the_trainer_builds_it_and_resumes_bit_for_bit(tmp_path, pico_llama_dir, layerwise: bool) -> None:
    data = [{"input_ids": row, "labels": row} for row in torch.randint(5, 40, (12, 8)).tolist()]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to="none",
        use_cpu=True, save_steps=2, logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip

    def trainer() -> Trainer:
        options = {"rank": 4, "update_gap": 3, "inner": "adamw", "betas": (0.8, 0.9), "weight_decay": 0.1}
        hook = trainer_optimizer("galore", lr=1e-2, layerwise=layerwise, **options)
        model = AutoModelForCausalLM.from_pretrained(pico_llama_dir)
        return Trainer(model, arguments, train_dataset=data, optimizer_cls_and_kwargs=hook)

    first = trainer()
    before = snapshot(first.model)
    first.train()
    optimizer = first.optimizer.optimizer
    assert isinstance(optimizer, GaLore)
    assert len(optimizer.projected) == 14  # seven linear layers in each of two blocks
    assert {group["name"]: (group["rank"], group["weight_decay"]) for group in optimizer.param_groups} == {
        "projected": (4, 0.1), "base": (None, 0.1), "no_decay": (None, 0.0),
    }  # fmt: skip
    assert all(not torch.equal(before[name], p) for name, p in first.model.named_parameters())
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_identical(snapshot(resumed.model), snapshot(first.model))


def test_inner_optimizers_have_names() -> None:
    optimizer = build_optimizer(Encoder(), "galore", lr=1e-2, rank=4, inner="sgd", momentum=0.9)
    assert type(optimizer.inner) is torch.optim.SGD
    assert optimizer.param_groups[0]["momentum"] == 0.9
    with pytest.raises(InputError) as caught:
        trainer_optimizer("galore", lr=1e-2, inner="adam")
    assert caught.value.code == "unknown-optimizer"
    assert type(GaLore(Encoder(), "sgd", 1e-2, rank=4).inner) is torch.optim.SGD


def test_modules_have_their_own_ranks() -> None:
    model = Encoder()
    patterns = {"target_modules": ["embed", "dense"], "rank_pattern": {"den*": 6, "dense": 5}}
    optimizer = build_optimizer(model, "galore", lr=1e-2, rank=4, **patterns)
    assert {slot.weight.shape: slot.rank for slot in optimizer.projected.values()} == {(40, 16): 4, (24, 16): 5}
    assert [group["name"] for group in optimizer.param_groups] == [
        "projected", "projected (rank 5)", "base", "no_decay",
    ]  # fmt: skip
    assert [slot.rank for slot in GaLore(model, rank=4, **patterns).projected.values()] == [4, 5]
    with pytest.raises(InputError) as caught:
        groups_of(model, None, {"embed": 2})  # it is not projected
    assert caught.value.code == "unmatched-pattern"
