"""RUN.yaml as dataclasses: seven sections, every key with a default, the text under a field is its help.

Importing this file imports no torch, so a mistake in RUN.yaml is reported in a fraction of a second.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from loraloom.optim.section import optimizer_section

Task = Literal[
    "text-classification",
    "multi-label",
    "text-regression",
    "token-classification",
    "seq2seq-lm",
    "causal-lm",
    "preference",
    "image-classification",
    "vision-language",
]
Format = Literal["auto", "chat", "prompt-completion", "text", "sharegpt", "alpaca"]
Method = Literal["lora", "moslora", "dora", "weightlora", "weightlora+", "composition", "full", "probe"]
Number = int | float

# What differs from the defaults of TrainingArguments and SFTConfig; anything here can be set in RUN.yaml again.
TRAINING_DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "learning_rate": 2e-4,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": 32,
    "warmup_steps": 0.06,  # of all steps
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 10,
    "report_to": "none",
    "seed": 42,
    "bf16": False,  # SFTConfig's default is True, also on a CPU
}


@dataclass
class ModelSection:
    name: str = "builtin:minilm"
    """Hub id, local directory, or a model that comes as a package: `builtin:minilm`, the 22M-parameter encoder of the
    extra `quickstart`, or `builtin:smollm2`, SmolLM2-135M-Instruct, of the extra `quickstart-llm`."""
    task: Task = "text-classification"
    """`text-classification` (single texts, or pairs with data.text_pair_column), `multi-label`, `text-regression`,
    `token-classification` and `image-classification` put a head on an encoder; `seq2seq-lm` writes a text from a text;
    `causal-lm` is supervised fine-tuning (TRL's SFTTrainer), and so is `vision-language`, on texts with images;
    `preference` is DPO (TRL's DPOTrainer)."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Precision of the frozen base weights; adapters are float32 in any case. `auto`: as the checkpoint stores them."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Load the base in 4 bits (NF4, nested) or 8 bits with bitsandbytes, of the extra `quant`."""


@dataclass
class DataSection:
    path: str = "stdlib-docstrings"
    """Local .jsonl, .json, .csv, .tsv, .txt or .parquet file, hub data set, folder of images in a folder per label, or
    built in: `stdlib-docstrings` (text and label), and the same as `stdlib-questions` (prompt and completion)."""
    test_path: str | None = None
    """File with the test set. Default: the data set's own test split (or its validation split, where the test labels
    are hidden or missing), else `test_fraction` of `path`."""
    validation_path: str | None = None
    """File with the validation set, which evaluations while training and the choice of the best model use; the test
    set is for the end. Default: the data set's own, else `validation_fraction` of the training rows."""
    subset: str | None = None
    """Configuration of a hub data set, where it has several."""
    test_fraction: Number = 0.1
    """Share of `path` that becomes the test set where there is no other; chosen by a hash of the row, so stable."""
    validation_fraction: Number = 0.1
    """Share of the training rows that becomes the validation set where there is no other, chosen by the same hash.
    0: none, and no evaluation while training."""
    mix: dict[str, Number] = field(default_factory=dict)
    """Further sets to train on: path to its share of the training rows; `path` has the rest. They have the same
    columns. Test and validation rows are those of `path`; rows that are equal to one of them are left out."""
    mix_until: Literal["first", "all"] = "first"
    """mix: `first`: draw until one of the sets has no more rows, so that no row comes twice; `all`: until every row
    has come, shorter sets begin anew."""
    text_column: str | None = None
    """Column with the text (token-classification: with the words; image tasks: with the image or images). Default:
    `text`, or the only column of strings apart from the label."""
    text_pair_column: str | None = None
    """Column with the second text of a pair, such as the hypothesis to a premise in `text_column`."""
    label_column: str | None = None
    """Column with the label: an integer or string; a list of them (multi-label, token-classification); or a number
    (text-regression). Default: `label` or `labels`, or the usual name of the task: `score`, `tags`, `ner_tags`."""
    target_column: str | None = None
    """seq2seq-lm: column with the text to write. Default: `target`, `summary`, `completion` or `highlights`."""
    format: Format = "auto"
    """causal-lm: how a row is read. `auto`: chat (`messages`), else `prompt` and `completion`, else `sharegpt`
    (`conversations`), else `alpaca` (`instruction`, `input`, `output`), else `text`."""
    max_train: int | None = None
    """Use at most this many training rows, chosen by hash."""
    max_test: int | None = None
    """Use at most this many test rows, chosen by hash."""
    max_length: int | None = None
    """Tokens after which a text is cut. Default: 256, or all that the model has positions for."""
    max_target_length: int = 128
    """seq2seq-lm: tokens after which a target is cut, and the longest text that an evaluation writes."""
    retention: str | None = None
    """A second set, of what must not be forgotten: as `path`. It is measured before and after training, by the loss
    (causal-lm) or by a linear probe on the encoder, fitted before training (text-classification)."""
    max_retention: int | None = None
    """Use at most this many rows of it, chosen by hash."""


@dataclass
class MethodSection:
    name: Method = "lora"
    """`lora`, `moslora`, `dora`, `weightlora` (find the adapters that matter, drop the rest), `weightlora+` (and widen
    those), `composition` (trained adapters as one; see `loraloom compose`); or `full` (train every weight) and `probe`
    (train the classification head alone)."""
    r: int = 16
    """Rank of every adapter."""
    lora_alpha: Number = 32
    """The adapters' product is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora."""
    lora_dropout: Number = 0.0
    """Dropout on the adapters' input while training; 0.05 to 0.1 helps on a few thousand rows."""
    target_modules: str | list[str] | None = "all-linear"
    """Names of the modules to adapt, a regular expression, or `all-linear`."""
    exclude_modules: str | list[str] | None = None
    """Names, or a regular expression, of modules to leave out."""
    layers_to_transform: int | list[int] | None = None
    """Adapt only the layers with these numbers."""
    layers_pattern: str | list[str] | None = None
    """Name of the list of layers in the model, where it is not a usual one."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks that differ from r: module name or regular expression to rank."""
    alpha_pattern: dict[str, Number] = field(default_factory=dict)
    """Alphas that differ from lora_alpha: module name or regular expression to alpha."""
    modules_to_save: list[str] | None = None
    """Further modules to train in full and to save; a classification head always is one."""
    bias: Literal["none", "all", "loom_only"] = "none"
    """Which biases train."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r); for ranks of 64 and more."""
    use_dora: bool | None = None
    """Train magnitude and direction apart (DoRA). Default: what `name` says."""
    use_mixer: Literal["orthogonal", "kaiming", False] | None = None
    """An r x r matrix between A and B (MoSLoRA), and how it starts. Default: what `name` says."""
    use_gate: bool | None = None
    """One trained scalar per adapted module (WeightLoRA's gate). Default: what `name` says."""
    init_lora_weights: Literal["gaussian", "orthogonal", "pissa", "olora"] | bool = True
    """How A and B start; true: A kaiming-uniform and B zero, so that training starts from the base model."""
    fan_in_fan_out: bool = False
    """The base stores its weights (in, out); found by itself for transformers' Conv1D."""
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    """Rows of the embedding to train."""
    allow_unmatched: bool = False
    """A name in target_modules or in a pattern that matches nothing is a warning, not an error."""
    keep: Number | None = None
    """weightlora: how many adapters to keep, or below 1 the share of them. Default: 0.5."""
    constraint: Literal["k_sparse", "simplex", "sparse_simplex"] | None = None
    """weightlora: the set that the gates are projected onto: at most `keep` of them (`k_sparse`); non-negative ones
    with the sum `radius` (`simplex`, which decides how many stay); or both. Default: k_sparse."""
    by: Literal["signed", "magnitude"] | None = None
    """weightlora, k_sparse: keep the largest gates (`signed`), or the largest in absolute value (`magnitude`), so that
    an adapter may be subtracted. Default: signed."""
    radius: Number | None = None
    """weightlora, simplex and sparse_simplex: the sum of the gates. Default: 1.0."""
    warmup_steps: Number | None = None
    """weightlora: steps in which all adapters train, before the first selection; below 1: of the run. Default: 0.05.
    (training.warmup_steps is the learning rate's.)"""
    select_every: int | None = None
    """weightlora: steps from one selection to the next; a dropped adapter has them to come back. Default: 1."""
    select_until: Number | None = None
    """weightlora: the step after which the dropped adapters leave the model; below 1: of the run. Default: 0.3."""
    reentry: bool | None = None
    """weightlora: whether a dropped adapter may come back until then. Default: true."""
    expand_times: int | None = None
    """weightlora+: how often half of the kept adapters go, and the others double their rank. Default: 2."""
    expand_every: int | None = None
    """weightlora+: steps before each of these expansions. Default: 10."""
    expand_parameters: int | None = None
    """weightlora+: instead, raise all kept adapters once to the largest common rank with at most this many weights."""


@dataclass
class CompositionSection:
    """Trained adapters as one (WLoRA); read by `loraloom compose`, which is `train` with method.name `composition`."""

    members: dict[str, str] = field(default_factory=dict)
    """Name to folder or hub id of each adapter: PEFT LoRA or LOOM ones, trained on the same base model."""
    weights: Literal["learned", "uniform"] | dict[str, Number] = "learned"
    """`learned`: train one logit per adapter, starting from equal weights; `uniform`: 1/N each, not trained; or
    the weights themselves, name to number, not trained."""
    scope: Literal["layer", "module_type", "model"] = "layer"
    """What shares learned weights: nothing (each adapted module has its own), modules of one name, or all."""
    constraint: Literal["softmax", "scaled_softmax", "simplex", "free"] = "scaled_softmax"
    """learned: positive weights (`softmax`), the same with a trained sum (`scaled_softmax`), non-negative ones
    (`simplex`), or any (`free`)."""
    total: Number | None = None
    """The sum of a module's weights: always with `softmax` and `simplex`, at the start with the others. Default: 1 for
    `uniform`, else 3, or less where fewer members adapt a module."""
    normalize: Literal["present", "all"] = "present"
    """Which members' weights have sum 1 in a module: those that adapt it (`present`), or all of them."""


if TYPE_CHECKING:

    @dataclass
    class OptimizerSection:
        """The options of all optimizers; their keys are those of `loraloom.optim.options`."""

        name: str | None = None

        def __init__(self, **keys: Any) -> None: ...
        def __getattr__(self, key: str) -> Any: ...
else:
    OptimizerSection = optimizer_section()


@dataclass
class OutputSection:
    dir: str = "loraloom-run"
    """Folder for the weights, metrics.json, resolved.yaml, weightlora's selection.json, and checkpoints/."""
    overwrite: bool = False
    """Replace a finished run in this folder; otherwise that is an error."""


@dataclass
class RunConfig:
    """One training run."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    method: MethodSection = field(default_factory=MethodSection)
    composition: CompositionSection = field(default_factory=CompositionSection)
    optimizer: OptimizerSection = field(default_factory=OptimizerSection)
    training: dict[str, Any] = field(default_factory=lambda: dict(TRAINING_DEFAULTS))
    """Any key of TrainingArguments, of SFTConfig (causal-lm, vision-language), DPOConfig (preference) or
    Seq2SeqTrainingArguments (seq2seq-lm); and those of TRAINING_KEYS."""
    output: OutputSection = field(default_factory=OutputSection)


# Section -> its dataclass; `training` is the one whose keys belong to another library.
SECTIONS: dict[str, type] = {
    "model": ModelSection,
    "data": DataSection,
    "method": MethodSection,
    "composition": CompositionSection,
    "optimizer": OptimizerSection,
    "output": OutputSection,
}
# Keys of `training` that are loraloom's own.
TRAINING_KEYS: dict[str, str] = {
    "metrics": "Metrics to report; the first one is what the run is judged by. Default: those of the task.",
    "class_weights": "`balanced` (n / (classes * rows of the class)), or label to weight: factors of the loss.",
}
CLASSIFICATION = ("text-classification", "image-classification")
TASKS_WITH_HEAD = (*CLASSIFICATION, "multi-label", "text-regression", "token-classification")
# Keys of `data` that only some tasks read.
DATA_KEYS: dict[str, tuple[str, ...]] = {
    "text_pair_column": ("text-classification", "multi-label", "text-regression"),
    "target_column": ("seq2seq-lm",),
    "max_target_length": ("seq2seq-lm",),
    "format": ("causal-lm",),
    "retention": ("text-classification", "causal-lm"),
}
METHODS_WITHOUT_ADAPTER = ("full", "probe")
COMPOSITION: Method = "composition"
METHODS_WITH_SELECTION = ("weightlora", "weightlora+")
SELECTION_KEYS = ("keep", "constraint", "by", "radius", "warmup_steps", "select_every", "select_until", "reentry")
EXPANSION_KEYS = ("expand_times", "expand_every", "expand_parameters")
# Keys of TrainingArguments that only an optimizer of transformers reads, and whose place is `optimizer` otherwise.
OPTIMIZER_KEYS_OF_TRAINING = {
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": "optimizer.eps",
    "optim_args": "training.optim with it",
    "optim_target_modules": "training.optim with it",
}
