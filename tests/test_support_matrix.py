"""docs/support_matrix.md, cell by cell: what it says works is run, what it says is refused is tried."""

import ast
import re
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraloom import LoomConfig
from tests.tuner.support import ALL_PARTS, TOLERANCE, Toy, nf4_linear, randomise

PAGE = (Path(__file__).parents[1] / "docs" / "support_matrix.md").read_text(encoding="utf-8")
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MERGE_TOLERANCE = TOLERANCE | {torch.float16: 3e-3}
PARTS = {
    "A, B": {},
    "mixer": {"use_mixer": "orthogonal"},
    "gate": {"use_gate": True},
    "magnitude": {"use_dora": True},
    "all": ALL_PARTS,
}
# Layer -> (the layer, an input). Quantised linears have the least sizes that bitsandbytes packs.
LAYERS = {
    "`nn.Linear`": lambda _: (nn.Linear(6, 10), torch.randn(2, 5, 6)),
    "`Conv1D` of transformers": lambda _: (Conv1D(10, 6), torch.randn(2, 5, 6)),
    "`nn.Embedding`": lambda _: (nn.Embedding(7, 10), torch.randint(0, 7, (2, 5))),
    "`nn.Conv1d`": lambda _: (nn.Conv1d(3, 4, 3), torch.randn(2, 3, 6)),
    "`nn.Conv2d`": lambda _: (nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)),
    "`nn.Conv2d` with groups": lambda _: (nn.Conv2d(4, 6, 3, groups=2), torch.randn(2, 4, 6, 6)),
    "`nn.Conv3d`": lambda _: (nn.Conv3d(3, 4, 3), torch.randn(2, 3, 4, 4, 4)),
    "`Linear4bit`, NF4": lambda dtype: (nf4_linear(64, 32, dtype), torch.randn(3, 64)),
    "`Linear4bit`, nested NF4": lambda dtype: (nf4_linear(64, 32, dtype, nested=True), torch.randn(3, 64)),
    "`Linear8bitLt`": lambda _: (int8_linear(), torch.randn(3, 64)),
}


def table(heading: str) -> list[dict[str, str]]:
    """The rows of the table under a heading of the page, by column name."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


LAYER_ROWS, INIT_ROWS, REFUSED_ROWS = table("Layers and parts"), table("Starts"), table("Refused")


def int8_linear() -> nn.Module:
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=0.0)
    layer.load_state_dict(nn.Linear(64, 32).state_dict())
    return layer.to("cpu")


def toy(layer: str, dtype: torch.dtype) -> tuple[Toy, torch.Tensor]:
    """The layer as a model, in train mode (in eval mode bitsandbytes may repack it), and an input."""
    module, x = LAYERS[layer](dtype)
    base = Toy(module)
    if "bit" in layer:
        setattr(base, "is_loaded_in_8bit" if "8bit" in layer else "is_loaded_in_4bit", True)
    else:
        base = base.to(dtype)
    return base.train(), x.to(dtype) if x.is_floating_point() else x


def config(**kwargs) -> LoomConfig:
    return LoomConfig(**{"r": 2, "lora_alpha": 4, "target_modules": ["target"]} | kwargs)


def test_the_tables_name_what_the_test_knows():
    """A row or a column that is lost or misspelt would pass unnoticed otherwise."""
    assert {row["layer"] for row in LAYER_ROWS} == set(LAYERS)
    assert set(LAYER_ROWS[0]) == {"layer", *PARTS, "base dtypes", "merge", "dropout"}
    assert {row["what"] for row in REFUSED_ROWS} == set(REFUSED)
    assert {dtype for row in LAYER_ROWS for dtype in row["base dtypes"].split()} == set(DTYPES)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("row", LAYER_ROWS, ids=lambda row: row["layer"])
@pytest.mark.parametrize("part", PARTS)
def test_a_part_on_a_layer(part, row):
    assert row[part] == "yes"
    for name in row["base dtypes"].split():
        dtype = DTYPES[name]
        base, x = toy(row["layer"], dtype)
        model = get_peft_model(base, config(**PARTS[part]))
        randomise(model)
        output = model.train()(x)
        assert output.dtype == dtype
        output.float().square().mean().backward()
        for parameter in (p for p in model.parameters() if p.requires_grad):
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().sum() > 0
        check_merge(model.eval(), x, row["merge"], dtype)


@torch.no_grad()
def check_merge(model: nn.Module, x: torch.Tensor, merge: str, dtype: torch.dtype) -> None:
    """Merging gives the forward up to the tolerance that the page states, unmerging gives every bit back."""
    layer = model.get_base_model().target.get_base_layer()
    stored, expected = layer.weight.detach().clone(), model(x)
    model.merge_adapter()
    assert not torch.equal(layer.weight, stored)
    error = ((model(x) - expected).abs().max() / expected.abs().max()).item()
    if merge == "rounds once":
        assert error <= MERGE_TOLERANCE[dtype]
    else:
        assert merge == "quantises anew"
        assert MERGE_TOLERANCE[torch.float32] < error <= 0.25
    model.unmerge_adapter()
    assert torch.equal(layer.weight, stored)
    assert torch.equal(model(x), expected)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("row", LAYER_ROWS, ids=lambda row: row["layer"])
def test_dropout_on_a_layer(row):
    base, x = toy(row["layer"], torch.float32)
    model = get_peft_model(base, config(lora_dropout=0.5, **ALL_PARTS))
    randomise(model)
    with torch.no_grad():
        same = torch.equal(model.train()(x), model.eval()(x))
    assert {"yes": not same, "no effect": same}[row["dropout"]]


@pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("row", INIT_ROWS, ids=lambda row: row["init_lora_weights"])
def test_a_start_on_a_layer(row, layer):
    base, x = toy(layer, torch.float32)
    kind = ast.literal_eval(row["init_lora_weights"].strip("`"))
    with torch.no_grad():
        expected, stored = base(x), base.target.weight.detach().clone()
        model = get_peft_model(base, config(init_lora_weights=kind, **ALL_PARTS)).train()
        change = ((model(x) - expected).abs().max() / expected.abs().max()).item()
    tensors = {name.split(".")[-3] for name in model.state_dict() if ".loom_" in name}
    assert torch.equal(model.get_base_model().target.get_base_layer().weight, stored)
    assert {"yes": change < 1e-5, "no": change > 1e-2}[row["starts at the base model"]]
    assert {"yes": "loom_anchor_A" in tensors, "no": "loom_anchor_A" not in tensors}[row["frozen anchor"]]
    M = model.get_base_model().target.loom_mixer["default"].weight
    assert {"I": torch.equal(M, torch.eye(2)), "`use_mixer`": not torch.equal(M, torch.eye(2))}[row["mixer starts as"]]


def adapt(layer: nn.Module, **kwargs) -> nn.Module:
    return get_peft_model(Toy(layer), config(**kwargs))


def mixed_batch_in_training() -> None:
    model = adapt(nn.Linear(4, 4)).train()
    model(torch.randn(2, 4), adapter_names=["default", "__base__"])


def merged_mixed_batch() -> None:
    model = adapt(nn.Linear(4, 4)).eval()
    model.merge_adapter()
    model(torch.randn(2, 4), adapter_names=["default", "__base__"])


REFUSED = {
    "an embedding with `max_norm`": lambda: adapt(nn.Embedding(4, 4, max_norm=1.0)),
    "`nn.ConvTranspose2d`, and every layer not in the first table": lambda: adapt(nn.ConvTranspose2d(4, 4, 3)),
    "a magnitude on bare parameters (`target_parameters`)": lambda: get_peft_model(
        Toy(nn.Linear(4, 4)), config(target_modules=[], target_parameters=["target.weight"], use_dora=True)
    ),
    '`init_lora_weights="orthogonal"` with an odd rank': lambda: config(r=3, init_lora_weights="orthogonal"),
    '`"pissa"`, `"olora"` with r above the smaller side': lambda: adapt(
        nn.Linear(4, 2), r=3, init_lora_weights="pissa"
    ),
    "`adapter_names` in train mode": mixed_batch_in_training,
    "merged layers with `adapter_names`": merged_mixed_batch,
}


@pytest.mark.parametrize("row", REFUSED_ROWS, ids=lambda row: row["what"])
def test_what_is_refused_says_so(row):
    with pytest.raises(Exception, match=re.escape(row["the error says"])) as raised:
        REFUSED[row["what"]]()
    assert type(raised.value).__name__ == row["type"].strip("`")
