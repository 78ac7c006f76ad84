"""What short runs of transformers' Trainer have in common: arguments, and rows of tokens."""

import torch

STEPS, HALF = 6, 3
SENTENCES = [f"the {a} {b} {c} ." for a in ("red", "green", "blue") for b in ("cat", "dog") for c in ("runs", "sleeps")]
ARGUMENTS = {
    "max_steps": STEPS,
    "save_steps": HALF,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 3,
    "dataloader_pin_memory": False,
}


def tokens() -> list[dict[str, torch.Tensor]]:
    """24 rows of 8 tokens, which are their own labels."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(10, 60, (24, 8), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]
