"""Model cards: README.md beside saved weights, with what someone needs who finds the folder a year later.

The exact command and configuration, versions, a hash of the data, what was measured, and where the weights can be
served. The header is the hub's metadata (huggingface_hub's ModelCardData).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from loraloom.io.files import write_text_atomically

FILE = "README.md"
SERVED = ("CAUSAL_LM", None)  # tasks that language model servers take an adapter for; None: the adapter does not say
# PEFT's task -> transformers' Auto class.
AUTO_OF_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
# Ending of an architecture's name -> transformers' Auto class.
AUTO_OF_ENDING = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForImageClassification": "AutoModelForImageClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
}
_WRITES = (
    'inputs = processor("A text", return_tensors="pt")\n'
    "print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))"
)
_LABELS = "print(model.config.id2label[logits.argmax().item()])"
# Auto class -> Python that asks `model` something, with a `processor`, and prints the answer.
ANSWERS = {
    "AutoModelForCausalLM": _WRITES,
    "AutoModelForSeq2SeqLM": _WRITES,
    "AutoModelForSequenceClassification": (
        'logits = model(**processor("A text.", return_tensors="pt")).logits  # of a pair: processor(text, other, ...)\n'
        f"{_LABELS}"
    ),
    "AutoModelForTokenClassification": (
        'inputs = processor("Some words".split(), is_split_into_words=True, return_tensors="pt")\n'
        "print([model.config.id2label[i] for i in model(**inputs).logits[0].argmax(-1).tolist()])  # a tag per token"
    ),
    "AutoModelForQuestionAnswering": (
        'inputs = processor("Which color?", "The sky is blue.", return_tensors="pt")\n'
        "output = model(**inputs)\n"
        "start, end = output.start_logits.argmax(), output.end_logits.argmax()\n"
        'print(processor.decode(inputs["input_ids"][0, start : end + 1]))'
    ),
    "AutoModelForImageClassification": (
        "from PIL import Image\n\n"
        'logits = model(**processor(Image.open("image.png").convert("RGB"), return_tensors="pt")).logits\n'
        f"{_LABELS}"
    ),
    "AutoModelForMaskedLM": (
        'inputs = processor(f"A {processor.mask_token}.", return_tensors="pt")\n'
        'place = inputs["input_ids"][0].tolist().index(processor.mask_token_id)\n'
        "print(processor.decode(model(**inputs).logits[0, place].argmax()))"
    ),
    "AutoModel": (
        'output = model(**processor("A text.", return_tensors="pt")).last_hidden_state\n'
        "print(output.shape)  # (texts, tokens, width)"
    ),
}


@dataclass(frozen=True)
class Card:
    """What a card says; what is empty is left out."""

    title: str
    summary: str
    """A paragraph: what the folder holds."""
    base_model: str | None = None
    """Folder or hub repository of the base model."""
    library: str = "peft"
    """Which library loads the weights: the hub's `library_name`."""
    tags: Sequence[str] = ()
    usage: str = ""
    """Python that loads it."""
    command: str = ""
    """The command that made it."""
    metrics: Sequence[Sequence[str]] = ()
    """Rows of a table; the first has the headings."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What else was measured: sizes, errors, the hash of the data."""
    serving: Sequence[Sequence[str]] = ()
    """Rows of a table: program, whether it serves the weights, and why not or how."""
    serve: Sequence[str] = ()
    """Commands that serve it."""
    configuration: str = ""
    """YAML, whole."""
    versions: Mapping[str, str] = field(default_factory=dict)


def render_card(card: Card) -> str:
    """The card as Markdown with the hub's header."""
    data = ModelCardData(
        base_model=card.base_model if card.base_model and _on_the_hub(card.base_model) else None,
        library_name=card.library,
        tags=["loraloom", *card.tags],
    )
    parts = [f"---\n{data.to_yaml()}\n---", f"# {card.title}", card.summary]
    if card.base_model:
        parts.append(f"Base model: `{named(card.base_model)}`")
    for heading, text in (
        ("Use", _fenced("python", card.usage)),
        ("Results", table(card.metrics)),
        ("Measured", "\n".join(f"- {name}: {value}" for name, value in card.facts.items())),
        ("Serving", "\n\n".join(filter(None, (_fenced("bash", "\n".join(card.serve)), table(card.serving))))),
        ("How it was made", _fenced("bash", card.command)),
        ("Configuration", _fenced("yaml", card.configuration)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in card.versions.items())),
    ):
        if text:
            parts += [f"## {heading}", text]
    return "\n\n".join(parts) + "\n"


def write_card(card: Card, folder: Path) -> Path:
    """Writes the card as README.md of the folder, over one that is there."""
    path = folder / FILE
    write_text_atomically(path, render_card(card))
    return path


def model_usage(config: Mapping[str, Any]) -> str:
    """Python that loads a whole model from its own folder and prints an answer.

    Args:
        config: its config.json; {} gives AutoModel.
    """
    auto = auto_class(config)
    processor = "AutoImageProcessor" if auto == "AutoModelForImageClassification" else "AutoTokenizer"
    return "\n".join(
        [
            f"from transformers import {', '.join(sorted((auto, processor)))}",
            "",
            'folder = "."  # this folder, or its name on the hub',
            f"model = {auto}.from_pretrained(folder)",
            f"processor = {processor}.from_pretrained(folder)",
            ANSWERS[auto],
        ]
    )


def adapter_usage(config: Mapping[str, Any], labels: int | None = None) -> str:
    """Python that loads an adapter from its own folder onto its base, and prints an answer.

    Args:
        config: its adapter_config.json.
        labels: outputs of a head that the adapter brings.
    """
    auto = AUTO_OF_TASK.get(str(config.get("task_type")), "AutoModel")
    base = named(config.get("base_model_name_or_path") or "BASE")
    options = "" if labels is None else f", num_labels={labels}"
    loom = [] if config.get("peft_type") == "LORA" else ["import loraloom  # registers the adapter's type with PEFT"]
    return "\n".join(
        [
            *loom,
            "from peft import PeftModel",
            f"from transformers import {', '.join(sorted((auto, 'AutoTokenizer')))}",
            "",
            'folder = "."  # this folder, or its name on the hub',
            f'base = "{base}"',
            f"model = {auto}.from_pretrained(base{options})",
            "model = PeftModel.from_pretrained(model, folder).eval()",
            "processor = AutoTokenizer.from_pretrained(base)",
            ANSWERS[auto],
        ]
    )


def head_outputs(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Outputs of a classifier's head among saved tensors; None without one.

    Args:
        shapes: of tensors that are no part of an update, by name.
    """
    heads = [shape[0] for name, shape in shapes.items() if re.search(r"\b(classifier|score)\b.*\.weight$", name)]
    return min(heads, default=None)  # a head may have layers of its own, wider than its output


def auto_class(config: Mapping[str, Any]) -> str:
    """transformers' Auto class for a model, by the name of its architecture."""
    name = (config.get("architectures") or [""])[0]
    if name.endswith("ForConditionalGeneration") and config.get("is_encoder_decoder"):
        return "AutoModelForSeq2SeqLM"
    return next((auto for ending, auto in AUTO_OF_ENDING.items() if name.endswith(ending)), "AutoModel")


def named(model: str) -> str:
    """A model as others can read it: a local folder by its last part, which need not be theirs."""
    return model if _on_the_hub(model) or not Path(model).is_absolute() else Path(model).name


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first row has the headings; "" for no rows."""
    if not rows:
        return ""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _fenced(language: str, text: str) -> str:
    if not text:
        return ""
    longest = max(map(len, re.findall("`{3,}", text)), default=2)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _on_the_hub(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not Path(name).exists()
