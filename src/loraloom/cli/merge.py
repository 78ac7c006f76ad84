"""`loraloom merge ADAPTER [ADAPTER ...] --base MODEL --out DIR`"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.filesize import decimal

from loraloom.cli.options import Saving, parse, progress_on, save_report
from loraloom.errors import InputError
from loraloom.text import printable

if TYPE_CHECKING:
    from loraloom.merge.result import MergeResult


@dataclass
class Merge(Saving):
    """Merge adapters into a base model on disk, tensor by tensor, and write a model that needs neither.

    Takes PEFT's LoRA and loraloom's adapters with any of their parts. The folder appears when it is complete.
    """

    adapters: tyro.conf.Positional[tuple[str, ...]] = ()
    """The adapter's folder, or several."""
    base: str | None = None
    """Folder of the model that they were trained on."""
    out: Path | None = None
    """Folder to write."""
    weights: tuple[float, ...] = ()
    """With several adapters, the factor of each in the sum; default 1."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of all floating-point weights; default: each as in the base, bfloat16 for a dequantised one."""
    base_precision: Literal["original", "dequantised"] = "original"
    """dequantised: the base is quantised; merge into what its weights stand for."""
    verify: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Compare the logits of the merged model with those of base and adapter on N prompts (both in float32, in turn).
    Exit code 1 where they differ by more than the next two let through."""
    verify_logits: float = 0.1
    """--verify: the largest difference of a logit, as a share of what the adapter changes."""
    verify_top1: float = 0.95
    """--verify: the smallest share of positions with the same top choice."""
    overwrite: bool = False
    """Replace the folder if there is something in it."""


def main(arguments: Sequence[str]) -> None:
    """Merge, verify if asked to, and show or print what came out."""
    command: Merge = parse("merge", Merge, arguments)
    if not command.adapters or command.base is None or command.out is None:
        raise InputError("merge needs an adapter, --base MODEL and --out FOLDER", code="usage")
    console = command.console()
    with console.status("Loading PyTorch"):
        from loraloom.merge.merge import merge_checkpoint, verified
        from loraloom.merge.verify import check_verifiable, check_verification, verify_merge
    weights = command.weights or None
    typed = shlex.join(["loraloom", "merge", *arguments])
    if command.verify:
        check_verifiable(command.adapters, weights, command.base)
    with progress_on(console) as progress:
        result = merge_checkpoint(
            command.adapters,
            command.base,
            command.out,
            weights=weights,
            dtype=command.dtype,
            base_precision=command.base_precision,
            overwrite=command.overwrite,
            progress=progress,
            command=typed,
        )
    if command.verify:
        with console.status(f"Verifying on {command.verify} prompts"):
            verification = verify_merge(result.out, command.base, command.adapters, command.verify, weights)
        result = verified(result, verification, typed)
    _show(result, console)
    if command.report is not None:
        from loraloom.report.builders.adapter import merge_report

        save_report(merge_report(result, typed), command.report, console)
    if command.json:
        print(json.dumps(result.to_dict()))
    if result.verification is not None:
        check_verification(result.verification, command.verify_logits, command.verify_top1)
    command.publish(result.out, console)


def _show(result: "MergeResult", console: Console) -> None:
    lines = [
        f"{result.out}: {decimal(result.bytes)} in {result.shards} file{'s' * (result.shards > 1)}, "
        f"{len(result.modules)} tensors changed, {len(result.added)} added, {result.seconds:.1f} s"
    ]
    if result.rounding:
        lines.append(f"Rounding the weights to their dtype takes away {result.rounding:.2%} of the update.")
    lines += result.notes
    check = result.verification
    if check:
        lines.append(
            f"Verified on {check['prompts']} prompts ({check['input']}): logits differ by at most "
            f"{check['max_logit_difference']:.2g}, where the adapter changes them by up to "
            f"{check['adapter_effect']:.2g}; the top choice is the same at {check['top1_agreement']:.2%} of positions."
        )
    for line in lines:
        console.print(printable(line), highlight=False, soft_wrap=True, markup=False)
