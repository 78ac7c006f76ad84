"""Which tensor of a checkpoint is the vocabulary's embedding, and whether the output head is the same tensor."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from loraloom.io.checkpoint import Checkpoint

_HEAD = re.compile(r"(ForCausalLM|LMHeadModel)$")
_NO_HEAD = re.compile(r"(Model|For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice)$")


class VocabularyTable(NamedTuple):
    """An embedding that is the output head as well.

    Attributes:
        embedding: name of its tensor in the checkpoint.
        head: the name of the head's own tensor, stored or not; None when this kind of model has a head of another
            name that is not known here.
    """

    embedding: str
    head: str | None


def vocabulary_table(base: Checkpoint, config: Mapping[str, Any]) -> VocabularyTable | None:
    """The embedding that the base model ties to its output head, or None for a model without a tied head.

    Args:
        base: the base checkpoint.
        config: its config.json; ``architectures``, ``tie_word_embeddings`` and ``vocab_size`` decide.
    """
    text = config.get("text_config") or {}
    size = config.get("vocab_size") or text.get("vocab_size")
    architecture = (config.get("architectures") or [""])[0]
    with_head = bool(_HEAD.search(architecture))
    if not architecture or size is None or (not with_head and _NO_HEAD.search(architecture)):
        return None
    heads = [key for key in base if key.endswith("lm_head.weight")]
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    if tied is False or (tied is None and heads):
        return None
    tables = [key for key in base if key not in heads and len(shape := base.shape(key)) == 2 and shape[0] == size]
    if len(tables) != 1:
        return None
    head = heads[0] if heads else "lm_head.weight"
    return VocabularyTable(tables[0], head if with_head else None)
