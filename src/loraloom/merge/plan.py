"""Which adapter changes which tensor of a base checkpoint, settled before anything is written.

Every tensor of every adapter is given a place, or the plan is an error that lists those without one.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from loraloom.adapter.base import base_keys, check_floating, stored_transposed
from loraloom.adapter.experts import ExpertPlaces
from loraloom.adapter.stored import PREFIX, StoredAdapter
from loraloom.errors import InputError
from loraloom.io.checkpoint import Checkpoint
from loraloom.merge.config import CLASSIFIERS, Resized, merged_config, vocabulary_size
from loraloom.merge.edits import Edit, Target
from loraloom.merge.tied import VocabularyTable, vocabulary_table

_VOCABULARY = re.compile(r"(^|\.)(lm_head|embed_out|embed_tokens|wte|word_embeddings)\.(weight|bias)$")
_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass
class Plan:
    """What :func:`plan_merge` settles.

    Attributes:
        files: for each file of the base its tensors in order, new ones at the end of the last file.
        config: the merged model's config.json; the base's own where nothing in it changes.
        added: the names of the new ones.
        vocabulary_changed: an adapter brings an embedding with another number of tokens.
        notes: what a user should know, one sentence each.
    """

    files: dict[Path, list[Target]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)
    vocabulary_changed: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def targets(self) -> list[Target]:
        return [target for targets in self.files.values() for target in targets]


def plan_merge(
    adapters: Sequence[StoredAdapter],
    weights: Sequence[float],
    base: Checkpoint,
    config: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Plan:
    """Finds a place for every tensor of the adapters.

    Args:
        adapters: at least one.
        weights: of the adapters in the sum, as many.
        base: the weights of the base model.
        config: its config.json, {} when there is none.
        dtype: for every floating-point weight of the result; None keeps each as it is.

    Raises:
        InputError: an adapter that is not understood, or tensors that have no place in the base (all are named).
    """
    classifier = any(adapter.config.get("task_type") in CLASSIFIERS for adapter in adapters)
    edits = _Edits(base, config, None if classifier else vocabulary_table(base, config))
    for adapter, weight in zip(adapters, weights, strict=True):
        edits.add(adapter, weight)
    plan = Plan()
    if edits.table is not None:
        _share_or_untie(edits, edits.table, plan)
    _check_shapes(edits)
    _targets(edits, plan, dtype)
    plan.config, plan.vocabulary_changed = merged_config(config, dtype, edits.untied, _resized(edits))
    if plan.vocabulary_changed:
        _check_vocabulary(plan, vocabulary_size(config))
    return plan


def _check_vocabulary(plan: Plan, old: int | None) -> None:
    """A resized embedding needs a resized head, which PEFT saves only of some models."""
    new = vocabulary_size(plan.config)
    left = [target.name for target in plan.targets if _VOCABULARY.search(target.name) and target.shape[:1] == (old,)]
    if left and new != old:
        raise InputError(
            f"the adapter resizes the vocabulary from {old} to {new} and does not hold {_listed(left)} of that size: "
            'train with modules_to_save=["embed_tokens", "lm_head"], or merge with PEFT\'s merge_and_unload',
            code="vocabulary",
        )


class _Edits:
    """The edits of each tensor, by its name in the merged model before any renaming."""

    def __init__(self, base: Checkpoint, config: Mapping[str, Any], table: VocabularyTable | None) -> None:
        self.base, self.config, self.table = base, config, table
        self.places = ExpertPlaces(base, config)
        self.of: dict[str, list[Edit]] = {}
        self.sources: dict[str, str] = {}  # of tensors that the base stores under another name: an untied head
        self.prefix = ""  # what the base's names lack in front
        self.untied = False

    def add(self, adapter: StoredAdapter, weight: float) -> None:
        own: dict[str, Edit] = {}
        homeless: list[str] = []

        def edit(key: str, **parts: Any) -> None:
            own[key] = replace(own.get(key, Edit(adapter, weight)), **parts)

        for name, module, kind in _replacements(adapter):
            key = base_keys([module], self.base, kind)[module] or self._not_stored(adapter, module, kind)
            if key is None:
                homeless.append(name)
            elif name.endswith(_TOKENS):
                edit(key, tokens=(_token_indices(adapter, name, module), name))
            else:
                edit(key, replacement=name)
        experts = {name: expert for name, module in adapter.modules.items() if (expert := module.expert) is not None}
        for name, expert in experts.items():
            places = self.places.of(expert, adapter.modules[name].shape) if self.places.keys(expert) else []
            if not places:
                homeless.append(name)
            for place in places:
                if place.index is None:
                    edit(place.key, module=name, transposed=place.transposed, span=(place.start, place.stop))
                else:
                    known = own[place.key].experts if place.key in own else {}
                    edit(place.key, transposed=place.transposed, experts=known | {place.index: name})
        for module, found in base_keys((m for m in adapter.modules if m not in experts), self.base).items():
            key = found or self._not_stored(adapter, module, "weight")
            if key is None:
                homeless.append(module)
                continue
            if key in self.base:
                check_floating(module, self.base.dtype(key))
            shape, update = self.shape_of(key, own.get(key)), adapter.modules[module].shape
            transposed = stored_transposed(module, update, shape, dict(self.config), adapter.config)
            if key in own and own[key].module is not None:
                raise InputError(
                    f"{adapter.path}: {own[key].module} and {module} are both {key} of the base", code="duplicate"
                )
            edit(key, module=module, transposed=transposed)
            if found is not None and f"{module}.weight".endswith(f".{found}"):
                self.prefix = f"{module}.weight".removesuffix(found)
        biased = [name for name, m in adapter.modules.items() if {"bias", "member_bias"} & m.tensors.keys()]
        for module, key in base_keys(biased, self.base, "bias").items():
            if key is None:
                homeless.append(f"{module} (its bias)")
            else:
                edit(key, bias=module)
        if homeless:
            raise InputError(
                f"{adapter.path}: {len(homeless)} of its tensors or modules have no place in {self.base.path}: "
                f"{_listed(homeless)}; is it the model that the adapter was trained on?",
                code="unresolved",
            )
        for key, made in own.items():
            self.of.setdefault(key, []).append(made)

    def shape_of(self, key: str, edit: Edit | None = None) -> tuple[int, ...]:
        """The tensor's shape, once the edit has replaced it."""
        if edit is not None and edit.replacement is not None:
            return edit.adapter.checkpoint.shape(edit.replacement)
        if self.table is not None and key == self.table.head and key not in self.base:
            return self.base.shape(self.table.embedding)
        return self.base.shape(key)

    def _not_stored(self, adapter: StoredAdapter, module: str, kind: str) -> str | None:
        """The name of a tensor that the base lacks and may have: a tied head, or what modules_to_save names."""
        name = f"{module}.{kind}"
        saved = any(f".{part}." in f".{name}" for part in adapter.config.get("modules_to_save") or [])
        tied = self.table is not None and name == self.table.head
        return name if tied or (saved and name in _names(adapter)) else None


def _names(adapter: StoredAdapter) -> set[str]:
    return {f"{module}.{kind}" for _, module, kind in _replacements(adapter)}


def _replacements(adapter: StoredAdapter) -> list[tuple[str, str, str]]:
    """(tensor, module, kind) of what is no part of a low-rank update: "model.embed_tokens", "weight"."""
    found = []
    for name in adapter.others:
        if name.endswith(_TOKENS):
            found.append((name, name.removesuffix(_TOKENS).removeprefix(PREFIX), "weight"))
        else:
            module, _, kind = name.removeprefix(PREFIX).rpartition(".")
            found.append((name, module.removesuffix(".base_layer").removesuffix(".token_adapter"), kind))
    return found


def _token_indices(adapter: StoredAdapter, name: str, module: str) -> tuple[int, ...]:
    """The rows that trained tokens replace, from the configuration."""
    given = adapter.config.get("trainable_token_indices") or []
    if isinstance(given, dict):
        given = next((rows for key, rows in given.items() if f".{module}".endswith(f".{key}")), [])
    if len(given) != adapter.checkpoint.shape(name)[0]:
        raise InputError(
            f"{adapter.path}: {name} has {adapter.checkpoint.shape(name)[0]} rows, "
            f"trainable_token_indices names {len(given)} for {module}: save the adapter again",
            code="shape",
        )
    return tuple(given)


def _share_or_untie(edits: _Edits, table: VocabularyTable, plan: Plan) -> None:
    """Where the output head is the embedding: what changes one of them alone gives the head a tensor of its own."""
    head, embedding = table.head, edits.of.get(table.embedding, [])
    of_head = edits.of.get(head, []) if head is not None else []
    if all(edit.adapter.config.get("ensure_weight_tying") for edit in embedding + of_head) and embedding:
        if head is not None and head in edits.base:
            edits.of[head] = list(embedding)  # stored twice
        else:
            edits.of.pop(head, None)  # type: ignore[arg-type]  # the same edits, which PEFT saves twice
        return
    shared = [_shared(edit) for edit in embedding]
    alone = [edit for edit, both in zip(embedding, shared, strict=True) if edit != both]
    if not alone and not of_head:
        if shared and head is not None and head in edits.base:
            edits.of[head] = shared  # stored twice
        return
    if head is None:
        raise InputError(
            f"{alone[0].adapter.path} changes {table.embedding}, which this model also uses as its output head, under "
            "a name that is not known here: train with ensure_weight_tying=True, or merge with PEFT's merge_and_unload",
            code="tied",
        )
    by_adapter = {id(edit.adapter): edit for edit in shared if edit.replacement or edit.tokens}
    for edit in of_head:
        both = by_adapter.get(id(edit.adapter))
        by_adapter[id(edit.adapter)] = (
            edit
            if both is None
            else replace(edit, replacement=edit.replacement or both.replacement, tokens=edit.tokens or both.tokens)
        )
    edits.of[head] = list(by_adapter.values())
    edits.untied = True
    if head not in edits.base:
        edits.sources[head] = table.embedding
        plan.notes.append(
            f"{head} was the same tensor as {table.embedding}; the adapter changes one of them alone, so it now has "
            "its own (tie_word_embeddings is false)."
        )


def _shared(edit: Edit) -> Edit:
    """The part of an embedding's edit that PEFT makes to the tensor itself, so that a tied head has it too."""
    saved = edit.replacement is not None and not edit.replacement.endswith(".base_layer.weight")
    names = edit.adapter.config.get("modules_to_save") or []
    alone = saved and any(f".{name}." in f".{edit.replacement}" for name in names)
    return replace(edit, module=None, transposed=False, replacement=None if alone else edit.replacement)


def _resized(edits: _Edits) -> list[Resized]:
    found = []
    for key, made in edits.of.items():
        source = edits.sources.get(key, key)
        old = edits.base.shape(source) if source in edits.base else None
        for edit in made:
            new = None if edit.replacement is None else edit.adapter.checkpoint.shape(edit.replacement)
            if new is not None and new != old:
                found.append(Resized(edit.adapter.path, key, old, new, edit.adapter.config.get("task_type")))
    return found


def _check_shapes(edits: _Edits) -> None:
    for key, made in edits.of.items():
        source = edits.sources.get(key, key)
        base = edits.base.shape(source) if source in edits.base else None
        shapes = {edit.adapter.checkpoint.shape(edit.replacement) for edit in made if edit.replacement is not None}
        if shapes - {base} or base == ():
            other = "brings a new tensor" if base is None else f"replaces a tensor of shape {list(base)} as a whole:"
            if len(made) > 1 or made[0].weight != 1:
                raise InputError(
                    f"{made[0].adapter.path} {other} {key}, which cannot be weighted or added to that of another "
                    "adapter: merge it alone with weight 1",
                    code="more-than-low-rank",
                )


def _targets(edits: _Edits, plan: Plan, dtype: torch.dtype | None) -> None:
    base = edits.base
    added = [key for key in edits.of if key not in base]
    prefix = edits.prefix if added else ""  # a head belongs to the model whose body has a name

    def target(key: str, source: str | None) -> Target:
        made = edits.of.get(key, [])
        replaced = next((edit for edit in made if edit.replacement is not None), None)
        stored = replaced.adapter.checkpoint.dtype(replaced.replacement) if replaced else None  # type: ignore[arg-type]
        kept = base.dtype(source) if source is not None else stored
        assert kept is not None
        cast = dtype is not None and kept.is_floating_point
        shape = edits.shape_of(source or key, replaced)
        return Target(key, dtype if cast else kept, shape, source, made)  # type: ignore[arg-type]

    plan.files = {file: [target(key, key) for key in keys] for file, keys in base.files.items()}
    for targets in plan.files.values():
        for known in targets:
            known.name = prefix + known.name
    plan.added = added
    last = list(plan.files)[-1]
    plan.files[last] += [target(key, edits.sources.get(key)) for key in added]
    new = [key for key in added if key not in edits.sources]
    if new:
        plan.notes.append(f"The base has no {_listed(new)}: added from the adapter to {last.name}.")
    if prefix:
        plan.notes.append(f"The base's tensors are now named {prefix}..., as in a model with that head.")


def _listed(names: Iterable[str], most: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
