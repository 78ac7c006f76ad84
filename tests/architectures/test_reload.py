"""What PEFT writes into a saved configuration is loaded again, whatever options made the names; see AUDIT T1."""

import pytest
from peft import LoraConfig

from loraloom import LoomConfig
from tests.architectures.table import ROWS
from tests.architectures.walk import OK, walk

LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {
    "all-linear but some": {"target_modules": "all-linear", "exclude_modules": ["o_proj", "up_proj"]},
    "all-linear but an expression": {"target_modules": "all-linear", "exclude_modules": r".*\.layers\.0\..*"},
    "a list but some": {"target_modules": LLAMA_LINEARS, "exclude_modules": r".*mlp.*(gate|up)_proj"},
    "a linear in full": {"target_modules": "all-linear", "modules_to_save": ["o_proj"]},
    "one layer": {"target_modules": "all-linear", "layers_to_transform": [1]},
    "patterns": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 9}},
    "an expression": {"target_modules": r".*\.1\..*_proj"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_all_routes_load_what_was_saved(options):
    """Ours may be refused at injection (a typed name that means nothing), but what was made must load."""
    row = ROWS["llama"]
    options = {"task_type": "CAUSAL_LM", "r": 2, "init_lora_weights": False, **options}
    ours = walk(row, lambda: LoomConfig(**options), "loom_")
    theirs = walk(row, lambda: LoraConfig(**options), "lora_")
    assert {step for step, result in theirs.items() if result == OK} <= {s for s, r in ours.items() if r == OK}
