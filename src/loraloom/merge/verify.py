"""Whether a merged model is the base model with its adapters: both answer the same prompts, in a process of their own.

One model is in memory at a time, in float32, so that what differs is the weights and not the arithmetic. The process
is the only part of the merge that builds models; run by hand it is ``python -m loraloom.merge.verify JSON``.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraloom.errors import InputError, RunFailedError

SENTENCES = (
    "The capital of France is",
    "Water boils at a temperature of",
    "She opened the old wooden box and found",
    "def fibonacci(n):",
    "The three most important causes of the war were",
    "Dear Sir or Madam, I am writing to complain about",
    "In a right triangle the square of the hypotenuse",
    "Translate into German: good morning, how are you?",
    "The film was a disappointment because",
    "To make bread you need flour, water, salt and",
    "Once upon a time there was a king who",
    "The patient was given two tablets a day and",
    "SELECT name, price FROM products WHERE",
    "On Monday the bank raised its interest rates to",
    "The quick brown fox jumps over",
    "Question: how many legs does a spider have? Answer:",
)
_TOKENS = 32  # of a prompt, at most
LOGITS, TOP1 = 0.1, 0.95  # what is let through, see check_verification
_ROUNDING = 1e-4


def check_verifiable(adapters: Sequence[str | Path], weights: Sequence[float] | None, base: str | Path) -> None:
    """Raises InputError where PEFT has no model that the merged one could be compared with. Loads no model."""
    from loraloom.adapter.open import open_stored
    from loraloom.io.checkpoint import locate, read_json

    config = locate(base) / "config.json"
    if not config.is_file() or not read_json(config).get("architectures"):
        raise InputError(
            f"{base} has no config.json that names its architectures: merge without --verify", code="no-architecture"
        )
    opened = [open_stored(adapter) for adapter in adapters]
    if len({adapter.kind for adapter in opened}) > 1:
        raise InputError(
            "PEFT cannot load adapters of different types at once to compare with: merge without --verify",
            code="cannot-verify",
        )
    weighted = any(weight != 1 for weight in weights or [])
    for adapter in opened:
        whole = any("base_layer" not in name for name in adapter.others)
        scaled = any(
            {"magnitude", "bias", "member_bias"} & module.tensors.keys() for module in adapter.modules.values()
        )
        if (weighted and (whole or scaled)) or (len(opened) > 1 and whole):
            raise InputError(
                f"PEFT has no model with a weighted sum of {adapter.path}, which is more than a low-rank update, to "
                "compare with: merge without --verify",
                code="cannot-verify",
            )


def verify_merge(
    out: str | Path,
    base: str | Path,
    adapters: Sequence[str | Path],
    prompts: int,
    weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Compares a merged model with the base model and its adapters in PEFT, on short texts, or on random tokens
    where the model has no tokenizer.

    Args:
        out: folder of the merged model.
        base, adapters, weights: what it was merged from.
        prompts: how many.

    Returns:
        ``prompts``, ``positions`` (outputs compared), ``input`` ("text" or "random tokens"), ``max_logit_difference``,
        ``adapter_effect`` (the largest difference that the adapters make to the base model's logits),
        ``largest_logit``,
        ``top1_agreement`` (share of positions), ``seconds``.

    Raises:
        RunFailedError: a model could not be loaded or run.
    """
    request = {
        "out": str(out),
        "base": str(base),
        "adapters": [str(adapter) for adapter in adapters],
        "weights": list(weights or [1.0] * len(adapters)),
        "prompts": prompts,
    }
    command = [sys.executable, "-m", "loraloom.merge.verify", json.dumps(request)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    if outcome.returncode:
        reason = (outcome.stderr.strip().splitlines() or [f"exit status {outcome.returncode}"])[-1]
        raise RunFailedError(f"{out} is merged, but verifying it failed: {reason}", code="not-verified")
    return json.loads(outcome.stdout.splitlines()[-1])


def check_verification(verification: dict[str, Any], logits: float = LOGITS, top1: float = TOP1) -> None:
    """Raises where a merged model is not the base model with its adapters.

    Args:
        verification: of :func:`verify_merge`.
        logits: largest difference of a logit that is let through, as a share of the adapters' effect.
        top1: smallest share of positions with the same top choice.

    Raises:
        RunFailedError: one of them is not kept ("not-verified").
    """
    difference, effect = verification["max_logit_difference"], verification["adapter_effect"]
    # Whatever the adapters do, float32 rounds the logits themselves.
    allowed = max(logits * effect, _ROUNDING * verification["largest_logit"])
    if difference <= allowed and verification["top1_agreement"] >= top1:
        return
    raise RunFailedError(
        f"the merged model is not the base with the adapter: logits differ by up to {difference:.3g} where the adapter "
        f"changes them by {effect:.3g} (at most {allowed:.3g} is let through), and the top choice is the same at "
        f"{verification['top1_agreement']:.1%} of positions (at least {top1:.1%}): merge with --dtype float32, and if "
        "that does not help look at the base (is it the one that the adapter was trained on?); the folder was kept",
        code="not-verified",
    )


def _compare(request: dict[str, Any]) -> dict[str, Any]:
    import gc

    import transformers

    started = time.monotonic()
    config = transformers.AutoConfig.from_pretrained(request["out"])
    architecture = getattr(transformers, config.architectures[0])
    merged = architecture.from_pretrained(request["out"], dtype="float32")
    inputs, kind = _inputs(request["out"], merged, request["prompts"])
    ours = _outputs(merged, inputs)
    del merged
    gc.collect()
    model = _with_adapters(architecture, config, request)
    theirs = _outputs(model, inputs)
    with model.disable_adapter():
        without = _outputs(model, inputs)
    difference, effect = (_largest_difference(theirs, other) for other in (ours, without))
    same = [a.argmax(-1) == b.argmax(-1) for a, b in zip(ours, theirs, strict=True)]
    positions = sum(part.numel() for part in same)
    return {
        "prompts": len(inputs),
        "positions": positions,
        "input": kind,
        "max_logit_difference": difference,
        "adapter_effect": effect,
        "largest_logit": max(output.abs().max().item() for output in theirs),
        "top1_agreement": sum(part.sum().item() for part in same) / positions,
        "seconds": round(time.monotonic() - started, 1),
    }


def _with_adapters(architecture: Any, merged: Any, request: dict[str, Any]) -> Any:
    """The base model with all adapters active in PEFT."""
    import peft
    import transformers

    config = transformers.AutoConfig.from_pretrained(request["base"])
    config.num_labels = merged.num_labels
    model = architecture.from_pretrained(request["base"], config=config, dtype="float32")
    size = merged.get_text_config().vocab_size
    if model.get_input_embeddings().num_embeddings != size:
        model.resize_token_embeddings(size)
    names = [f"adapter{i}" for i in range(len(request["adapters"]))]
    peft_model: Any = peft.PeftModel.from_pretrained(model, request["adapters"][0], adapter_name=names[0])
    for name, path in zip(names[1:], request["adapters"][1:], strict=True):
        peft_model.load_adapter(path, adapter_name=name)
    if len(names) > 1:
        peft_model.base_model.set_adapter(names)
    module: Any
    for module in peft_model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) and hasattr(module, "scaling"):
            for name, weight in zip(names, request["weights"], strict=True):
                if name in module.scaling:
                    module.scaling[name] *= weight
    return peft_model


def _inputs(folder: str, model: Any, prompts: int) -> tuple[list[Any], str]:
    """Token ids (1, tokens) of each prompt, and what they are made from."""
    import torch
    import transformers

    from loraloom.merge.extra_files import has_tokenizer

    if has_tokenizer(Path(folder)):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        count = len(SENTENCES)
        texts = [
            SENTENCES[i % count] + (f" {SENTENCES[(i + i // count) % count]}" if i >= count else "")
            for i in range(prompts)
        ]
        encoded = [tokenizer(text, truncation=True, max_length=_TOKENS, return_tensors="pt") for text in texts]
        return [ids["input_ids"] for ids in encoded], "text"
    size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(size, (1, _TOKENS), generator=generator) for _ in range(prompts)], "random tokens"


def _outputs(model: Any, inputs: list[Any]) -> list[Any]:
    """The logits of each prompt, or of a model without a head its last hidden states."""
    import torch

    model.eval()
    result = []
    with torch.inference_mode():
        for ids in inputs:
            decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            output = model(input_ids=ids, **decoder)
            values = output.logits if "logits" in output else output[0]
            if not torch.isfinite(values).all():
                raise RunFailedError("a model gives NaN or infinity", code="not-finite")
            result.append(values.float())
    return result


def _largest_difference(a: list[Any], b: list[Any]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    print(json.dumps(_compare(json.loads(sys.argv[1]))))
