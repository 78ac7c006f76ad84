"""Parameter groups: which rate and which decay each trainable parameter gets, for any torch optimizer.

| group          | parameters                                          | learning rate        | decay |
|----------------|-----------------------------------------------------|----------------------|-------|
| lora_A         | A and the mixer                                     | lr                   | yes   |
| lora_B         | B                                                   | lr x lora_plus_ratio | yes   |
| gates          | the scalar of each WeightLoRA layer                 | gate_lr              | no    |
| logits         | the logits of a composition                         | logit_lr             | no    |
| heads          | matrices of modules_to_save                         | head_lr              | yes   |
| heads_no_decay | their biases and norms                              | head_lr              | no    |
| base           | other trained matrices                              | lr                   | yes   |
| no_decay       | DoRA magnitudes, other biases and norms             | lr                   | no    |

Two rates for A and B are LoRA+ (Hayou et al., arXiv 2402.12354): B starts at zero and needs larger steps than A. The
groups read parameter names only, so plain PEFT models are grouped as well. For an nn.Embedding target A is the lookup
table, (r, num_embeddings); it takes A's rate like any other A.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from loraloom.errors import InputError
from loraloom.optim.options import GroupOptions
from loraloom.text import text_table
from loraloom.update.parts import PARTS

# The first component of the dotted name that is listed here decides; PEFT's names and ours.
_GROUP_OF_KEY = {key: part.group for part in PARTS for key in part.keys if part.group} | {"modules_to_save": "heads"}
_WITHOUT_DECAY = {"lora_A": "no_decay", "lora_B": "no_decay", "base": "no_decay", "heads": "heads_no_decay"}
_ORDER = ("lora_A", "lora_B", "gates", "logits", "heads", "heads_no_decay", "base", "no_decay")


def build_param_groups(
    model: nn.Module,
    lr: float,
    *,
    weight_decay: float = GroupOptions.weight_decay,
    lora_plus_ratio: float = GroupOptions.lora_plus_ratio,
    gate_lr: float | None = GroupOptions.gate_lr,
    head_lr: float | None = GroupOptions.head_lr,
    logit_lr: float = GroupOptions.logit_lr,
) -> list[dict[str, Any]]:
    """Put every trainable parameter of the model into exactly one group.

    Args:
        model: a PEFT model, or any module.
        lr: the rate of A, mixers, magnitudes and everything that has no rate of its own.
        lora_plus_ratio: rate of B over rate of A. LoRA+ suggests 16; 1 is plain LoRA. It should come with a smaller lr.
        gate_lr: rate of the gates. If None their group sets no rate, and the optimizer's own default holds: lr, or in
            `WeightAdam`, whose gates move by plain SGD, 5.0.
        head_lr: rate of modules_to_save; default lr. Worth raising for a freshly initialised classifier.
        logit_lr: rate of composition logits. At a LoRA's rate Adam would barely move them.
        weight_decay: decay of matrices (two axes or more); vectors, gates and logits never decay.

    Returns:
        Non-empty groups in the order of the table above, each with the keys params, name, weight_decay, is_gate and
        (see gate_lr) lr.

    Raises:
        InputError: nothing is trainable, or a rate was given for which the model trains no parameter.
    """
    members: dict[str, list[nn.Parameter]] = {name: [] for name in _ORDER}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members[_group_of(name, parameter)].append(parameter)
    if not any(members.values()):
        raise InputError(
            "the model has no trainable parameter; add an adapter, or load it with is_trainable=True",
            code="nothing-to-train",
        )
    if lora_plus_ratio != 1.0:
        _require(members["lora_B"], f"lora_plus_ratio={lora_plus_ratio}", "B matrix")
    if gate_lr is not None:
        _require(members["gates"], f"gate_lr={gate_lr}", "gate")
    if head_lr is not None:
        _require(members["heads"] + members["heads_no_decay"], f"head_lr={head_lr}", "module in modules_to_save")
    if logit_lr != GroupOptions.logit_lr:
        _require(members["logits"], f"logit_lr={logit_lr}", "composition logit")

    head_rate = lr if head_lr is None else head_lr
    rates = {
        "lora_B": lr * lora_plus_ratio,
        "gates": gate_lr,
        "logits": logit_lr,
        "heads": head_rate,
        "heads_no_decay": head_rate,
    }
    groups = []
    for name in filter(members.get, _ORDER):
        decay = weight_decay if name in ("lora_A", "lora_B", "heads", "base") else 0.0
        group = {"params": members[name], "name": name, "weight_decay": decay, "is_gate": name == "gates"}
        if (rate := rates.get(name, lr)) is not None:
            group["lr"] = rate
        groups.append(group)
    return groups


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
    return _WITHOUT_DECAY.get(group, group) if parameter.ndim < 2 else group


def _require(members: list[nn.Parameter], option: str, what: str) -> None:
    if not members:
        raise InputError(f"{option} was given, but the model trains no {what}; leave it out", code="nothing-for-rate")
