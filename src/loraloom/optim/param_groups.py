"""Parameter groups: which rate and which decay each trainable parameter gets, for any torch optimizer.

| group          | parameters                              | learning rate        | decay |
|----------------|-----------------------------------------|----------------------|-------|
| lora_A         | A                                       | lr                   | yes   |
| mixers         | M (MoSLoRA)                             | mixer_lr             | yes   |
| lora_B         | B                                       | lr x lora_plus_ratio | yes   |
| gates          | the scalar of each WeightLoRA layer     | gate_lr              | no    |
| logits         | the logits of a composition             | logit_lr             | no    |
| magnitudes     | m (DoRA)                                | magnitude_lr         | no    |
| heads          | matrices of modules_to_save             | head_lr              | yes   |
| heads_no_decay | their biases and norms                  | head_lr              | no    |
| base           | other trained matrices                  | lr                   | yes   |
| no_decay       | other biases and norms                  | lr                   | no    |

Two rates for A and B are LoRA+ (Hayou et al., arXiv 2402.12354): B starts at zero and needs larger steps than A. The
groups read parameter names only, so plain PEFT models are grouped as well. For an nn.Embedding target A is the lookup
table, (r, num_embeddings); it takes A's rate like any other A.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from loraloom.errors import InputError
from loraloom.optim.options import GroupOptions
from loraloom.text import text_table
from loraloom.update.parts import PARTS


@dataclass(frozen=True)
class Group:
    """A row of the table above.

    Attributes:
        name: of the group.
        rate: the option of `GroupOptions` that decides its learning rate; None: lr.
        what: what it holds, one of them in words.
        decays: whether it has weight decay.
        vectors: the group of those of its parameters that have less than two axes; None: this one.
    """

    name: str
    rate: str | None
    what: str
    decays: bool
    vectors: str | None = None


GROUPS = (
    Group("lora_A", None, "A matrix", True, "no_decay"),
    Group("mixers", "mixer_lr", "mixer", True),
    Group("lora_B", "lora_plus_ratio", "B matrix", True, "no_decay"),
    Group("gates", "gate_lr", "gate", False),
    Group("logits", "logit_lr", "composition logit", False),
    Group("magnitudes", "magnitude_lr", "magnitude", False),
    Group("heads", "head_lr", "module in modules_to_save", True, "heads_no_decay"),
    Group("heads_no_decay", "head_lr", "module in modules_to_save", False),
    Group("base", None, "matrix", True, "no_decay"),
    Group("no_decay", None, "vector", False),
)
# The first component of the dotted name that is listed here decides; PEFT's names and ours.
_GROUP_OF_KEY = {key: part.group for part in PARTS for key in part.keys if part.group} | {"modules_to_save": "heads"}
_VECTORS = {group.name: group.vectors for group in GROUPS}


def build_param_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = GroupOptions.weight_decay,
    lora_plus_ratio: float = GroupOptions.lora_plus_ratio,
    gate_lr: float | None = GroupOptions.gate_lr,
    mixer_lr: float | None = GroupOptions.mixer_lr,
    magnitude_lr: float | None = GroupOptions.magnitude_lr,
    head_lr: float | None = GroupOptions.head_lr,
    logit_lr: float = GroupOptions.logit_lr,
) -> list[dict[str, Any]]:
    """Put every trainable parameter of the model into exactly one group.

    Args:
        model: a PEFT model, or any module.
        lr: the rate of A, and of everything that has no rate of its own.
        weight_decay, lora_plus_ratio, mixer_lr, magnitude_lr, head_lr, logit_lr: see `GroupOptions`.
        gate_lr: rate of the gates. If None their group sets no rate, and the optimizer's own default holds: lr, or in
            `WeightAdam`, whose gates move by plain SGD, 5.0.

    Returns:
        Non-empty groups in the order of the table above, each with the keys params, name, weight_decay, is_gate and
        (see gate_lr) lr.

    Raises:
        InputError: nothing is trainable, or a rate was given for which the model trains no parameter.
    """
    members: dict[str, list[nn.Parameter]] = {group.name: [] for group in GROUPS}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_of(name, parameter)].append(parameter)
    if not any(members.values()):
        raise InputError(
            "the model has no trainable parameter; add an adapter, or load it with is_trainable=True",
            code="nothing-to-train",
        )
    given = {
        "lora_plus_ratio": lora_plus_ratio,
        "gate_lr": gate_lr,
        "mixer_lr": mixer_lr,
        "magnitude_lr": magnitude_lr,
        "head_lr": head_lr,
        "logit_lr": logit_lr,
    }
    _check_rates(given, {group.rate for group in GROUPS if members[group.name]})
    result = []
    for group in GROUPS:
        if not members[group.name]:
            continue
        rate = lr if group.rate is None else lr * lora_plus_ratio if group.name == "lora_B" else given[group.rate]
        row = {"params": members[group.name], "name": group.name, "is_gate": group.name == "gates"}
        row["weight_decay"] = weight_decay if group.decays else 0.0
        if rate is not None or group.name != "gates":
            row["lr"] = lr if rate is None else rate
        result.append(row)
    return result


def format_param_groups(groups: Iterable[dict[str, Any]]) -> str:
    """The groups as a table of text: name, tensors, parameters, learning rate, weight decay, and a line of totals.

    Args:
        groups: the result of `build_param_groups`, or ``optimizer.param_groups``.
    """
    rows = [("group", "tensors", "parameters", "lr", "weight decay")]
    tensors = parameters = 0
    for index, group in enumerate(groups):
        count = sum(p.numel() for p in group["params"])
        tensors, parameters = tensors + len(group["params"]), parameters + count
        rate = f"{float(group['lr']):.3g}" if "lr" in group else "default"
        decay = f"{group['weight_decay']:.3g}"
        rows.append((group.get("name", f"group {index}"), str(len(group["params"])), f"{count:,}", rate, decay))
    rows.append(("total", str(tensors), f"{parameters:,}", "", ""))
    return text_table(rows)


def _group_of(name: str, parameter: nn.Parameter) -> str:
    group = next((_GROUP_OF_KEY[key] for key in name.split(".") if key in _GROUP_OF_KEY), "base")
    return _VECTORS[group] or group if parameter.ndim < 2 else group


def _check_rates(given: dict[str, float | None], used: set[str | None]) -> None:
    """Refuse a rate that no parameter of the model has."""
    for option, value in given.items():
        if value != getattr(GroupOptions, option) and option not in used:
            what = next(group.what for group in GROUPS if group.rate == option)
            raise InputError(
                f"{option}={value} was given, but the model trains no {what}; leave it out", code="nothing-for-rate"
            )
