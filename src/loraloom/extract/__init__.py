"""A LoRA out of two checkpoints."""
