"""The verbs: each consumes an adapter of any kind, and compares what comes out with the reference.

A verb returns what it did: "exact" (compared), "approximate" (its stated error compared), or `Part` of the adapter with
the warning that said so. What it refuses it raises.
"""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.consumption import ours
from tests.consumption.kinds import APPROXIMATE, EXACT, SERVERS, Kind, Part
from tests.consumption.references import (
    EPSILON,
    SCALE,
    TOP_K,
    Reference,
    load_base,
    loaded_weights,
    logits,
    served,
)

# Weights are float32: each is off by 6e-8 of itself, and RMSNorm, rotary embeddings and softmax are float32 in
# transformers whatever the dtype. Two layers amplify that by less than 200; an adapter changes logits by all of them.
TOLERANCE = 1e-5
# Singular vectors turn by rounding over the relative gap of the singular values, a few percent here.
TOLERANCE_OF_VECTORS = 1e-4


@dataclass
class Case:
    """An adapter on disk, what it should compute, and an empty folder for the verb."""

    kind: Kind
    base: Path
    folder: Path
    reference: Reference | None  # None for broken ones
    out: Path

    @cached_property
    def truth(self) -> Reference:
        assert self.reference is not None, "a broken adapter was taken"
        return self.reference

    def live(self) -> PeftModel:
        """The adapter in a model, named "default"."""
        return PeftModel.from_pretrained(load_base(self.base), self.folder).eval()


class FindingError(ValueError):
    """What `inspect` found wrong, as the error that another verb would raise."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def near(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> str:
    scale = float(expected.abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)
    return EXACT


def forward(case: Case) -> str:
    return near(logits(case.live()), case.truth.logits)


def merged(case: Case) -> str:
    model: Any = case.live()
    return near(logits(model.merge_and_unload()), case.truth.logits)


def speed_up(case: Case) -> str:
    """PEFT's layers, computed by ours."""
    model = case.live()
    ours.speed_up(model)
    return near(logits(model), case.truth.logits)


def from_lora(case: Case) -> str:
    """A LoRA of PEFT's in our layers."""
    config = ours.LoomConfig.from_lora(LoraConfig.from_pretrained(case.folder))
    model = get_peft_model(load_base(case.base), config)
    tensors = load_file(case.folder / "adapter_model.safetensors")
    own = {
        key.replace(".lora_embedding_A", ".loom_lora_A.weight")
        .replace(".lora_embedding_B", ".loom_lora_B.weight")
        .replace(".lora_magnitude_vector", ".loom_lora_magnitude_vector.weight")
        .replace(".lora_", ".loom_lora_"): value
        for key, value in tensors.items()
    }
    state = get_peft_model_state_dict(model)  # has the starts that are subtracted, which PEFT keeps in the base weight
    assert own.keys() <= state.keys()
    set_peft_model_state_dict(model, state | own)
    return near(logits(model), case.truth.logits)


def inspect(case: Case) -> str:
    report = ours.inspect_adapter(case.folder, case.base)
    json.dumps(report.to_dict(), allow_nan=False)
    for error in report.errors:
        raise FindingError(error.message, error.code)
    refusal = next((f for f in report.findings if f.code == "altered-base"), None)
    if refusal is not None and case.reference is None:
        raise FindingError(refusal.message, refusal.code)
    found = {layer.module: layer for layer in report.layers}
    assert set(found) <= set(case.truth.weights)
    for module, weight in case.truth.weights.items():
        if module not in found:  # of two tied layers
            assert case.kind.base == "tied"
            continue
        dW = weight.after - weight.before
        relative = found[module].relative_norm
        if refusal is None or relative is not None:
            assert math.isclose(relative, dW.norm() / weight.before.norm(), rel_tol=TOLERANCE), module
        if "magnitude" not in found[module].parts:
            assert math.isclose(found[module].norm, dW.norm(), rel_tol=TOLERANCE), module
            S = torch.linalg.svdvals(dW)
            assert math.isclose(found[module].stable_rank, (S.square().sum() / S[0] ** 2), rel_tol=TOLERANCE), module
    if refusal is not None:
        raise FindingError(refusal.message, refusal.code)
    return EXACT


def merge(case: Case) -> str:
    ours.merge_checkpoint([case.folder], case.base, case.out)
    model, info = AutoModelForCausalLM.from_pretrained(case.out, output_loading_info=True, dtype=torch.float64)
    assert not any(info.values()), info
    return near(logits(model), case.truth.logits)


def export(target: str) -> Callable[[Case], str]:
    def run(case: Case) -> str:
        report = ours.export_adapter(case.folder, target, case.out, base=case.base, allow_lossy=True)
        if report.lossy:
            actual = case.truth.relative_error(loaded_weights(case.out, case.base))
            assert math.isclose(report.error, actual, rel_tol=1e-4), f"states an error of {report.error}: {actual}"
            assert 0 < actual < 1
            return APPROXIMATE
        if target in SERVERS:
            return near(served(case.out, case.base), case.truth.logits)
        return near(Reference(case.base, case.out).logits, case.truth.logits)

    return run


def _composed(case: Case, model: Any, member: str) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = ours.compose(model, {"one": member}, {"one": 1.0})
    found = logits(model)
    said = [str(w.message) for w in caught if "member" in str(w.message)]
    if not said:
        return near(found, case.truth.logits)
    near(found, case.truth.logits_of_updates)
    assert "\n" not in said[0]
    return Part(said[0])


def compose(case: Case) -> Any:
    return _composed(case, load_base(case.base), str(case.folder))


def compose_live(case: Case) -> Any:
    return _composed(case, case.live(), "default")


def _same_intruders(case: Case, report: Any) -> None:
    for layer in report.layers:
        weight = case.truth.weights[layer.name]
        assert list(layer.intruders) == weight.intruders.tolist(), layer.name
        near(torch.tensor(layer.singular_values).double(), torch.linalg.svdvals(weight.after)[:TOP_K])


def intruders_disk(case: Case) -> str:
    options = {"top_k": TOP_K, "epsilon": EPSILON}
    report = ours.find_stored_intruders(case.folder, case.base, **options)
    _same_intruders(case, report)
    ours.reduce_stored_intruders(case.folder, case.out, case.base, SCALE, "all", **options)
    return near(Reference(case.base, case.out).logits, case.truth.mitigated_logits, TOLERANCE_OF_VECTORS)


def intruders_memory(case: Case) -> str:
    model = case.live()
    report = ours.reduce_intruders(model, "default", "new", SCALE, "all", top_k=TOP_K, epsilon=EPSILON)
    _same_intruders(case, report)
    model.set_adapter("new")
    found = logits(model)
    if not found.isfinite().all():  # PEFT's forward divides by a row of zeros
        model.save_pretrained(case.out, selected_adapters=["new"])
        found = Reference(case.base, case.out / "new").logits
    return near(found, case.truth.mitigated_logits, TOLERANCE_OF_VECTORS)


def intruders_merged(case: Case) -> str:
    model, _ = ours.merge_with_reduced_intruders(case.live(), "default", SCALE, "all", top_k=TOP_K, epsilon=EPSILON)
    return near(logits(model), case.truth.mitigated_logits, TOLERANCE_OF_VECTORS)


def to_lora(case: Case) -> str:
    report = ours.to_lora(case.live(), "default", save_to=case.out)
    assert report.relative_error == 0
    return near(Reference(case.base, case.out).logits, case.truth.logits)


CONSUMERS: dict[str, Callable[[Case], Any]] = {
    "forward": forward,
    "merged": merged,
    "speed_up": speed_up,
    "from_lora": from_lora,
    "inspect": inspect,
    "merge": merge,
    **{f"export_{target}": export(target) for target in ("peft", *SERVERS)},
    "compose": compose,
    "compose_live": compose_live,
    "intruders_disk": intruders_disk,
    "intruders_memory": intruders_memory,
    "intruders_merged": intruders_merged,
    "to_lora": to_lora,
}
