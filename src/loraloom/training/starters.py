"""RUN.yaml to start from, one for each task: what `loraloom init` writes. Imports no torch."""

from loraloom.training.config import Task

# Task -> (model.name, lines of `data`, an example of a row, lines of `training`).
_STARTERS: dict[Task, tuple[str, list[str], str, list[str]]] = {
    "text-classification": (
        "builtin:minilm",
        [
            "max_length: 128",
            "# text_column: premise          # pairs: name both columns",
            "# text_pair_column: hypothesis",
        ],
        '{"text": "A fine film.", "label": "good"}',
        ["learning_rate: 1.0e-3", "# metrics: [accuracy, macro_f1, matthews_correlation]", "# class_weights: balanced"],
    ),
    "multi-label": (
        "builtin:minilm",
        ["max_length: 128"],
        '{"text": "Late, and broken.", "labels": ["delivery", "quality"]}',
        ["learning_rate: 1.0e-3"],
    ),
    "text-regression": (
        "builtin:minilm",
        ["max_length: 128", "# text_column: premise", "# text_pair_column: hypothesis"],
        '{"text": "A fine film.", "score": 4.5}',
        ["learning_rate: 1.0e-3"],
    ),
    "token-classification": (
        "builtin:minilm",
        ["max_length: 128"],
        '{"tokens": ["Ada", "was", "in", "Paris"], "tags": ["B-PER", "O", "O", "B-LOC"]}',
        ["learning_rate: 1.0e-3"],
    ),
    "seq2seq-lm": (
        "google/flan-t5-small",
        ["max_length: 512", "max_target_length: 64"],
        '{"text": "A long text ...", "summary": "A short one."}',
        ["learning_rate: 1.0e-3", "# metrics: [rougeL, exact_match, bleu]"],
    ),
    "causal-lm": (
        "Qwen/Qwen2.5-0.5B-Instruct",
        ["max_length: 1024", "# format: sharegpt              # or alpaca; default: what the columns say"],
        '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
        ["learning_rate: 2.0e-4", "gradient_accumulation_steps: 4", "# packing: true"],
    ),
    "preference": (
        "Qwen/Qwen2.5-0.5B-Instruct",
        ["max_length: 1024"],
        '{"prompt": "...", "chosen": "the better answer", "rejected": "the worse one"}',
        ["learning_rate: 5.0e-6", "gradient_accumulation_steps: 4", "# beta: 0.1"],
    ),
    "image-classification": (
        "google/vit-base-patch16-224-in21k",
        [],
        "images/train/cat/1.png, images/train/dog/2.png, images/test/cat/3.png: a folder for each label",
        ["learning_rate: 1.0e-3"],
    ),
    "vision-language": (
        "HuggingFaceTB/SmolVLM-256M-Instruct",
        [],
        '{"image": "cat.png", "prompt": "What is this?", "completion": "A cat."}; or messages',
        ["learning_rate: 2.0e-4", "gradient_accumulation_steps: 4"],
    ),
}


def starter(task: Task) -> str:
    """A commented RUN.yaml of the task."""
    model, data, row, training = _STARTERS[task]
    path = "images" if task == "image-classification" else "rows.jsonl"
    lines = [
        "# loraloom train RUN.yaml      every key has a default: loraloom train --help",
        f"# A row of the data: {row}",
        "model:",
        f"  name: {model:<28}# hub id, or a local folder",
        f"  task: {task}",
        "  # quantization: nf4            # QLoRA; with the extra `quant`",
        "data:",
        f"  path: {path:<28}# or .csv, .tsv, .parquet, or a hub data set",
        "  # test_path: test.jsonl         # default: its own test split, or a tenth of the rows",
        "  # validation_fraction: 0.1      # evaluations while training use it, not the test set",
        *(f"  {line}" for line in data),
        "method:",
        "  name: lora                     # or moslora, dora, weightlora, weightlora+, full",
        "  r: 16",
        "  lora_alpha: 32",
        "training:                        # any key of the task's training arguments",
        "  num_train_epochs: 3",
        "  per_device_train_batch_size: 16",
        *(f"  {line}" for line in training),
        "output:",
        "  dir: my-run",
    ]
    return "\n".join(lines) + "\n"
