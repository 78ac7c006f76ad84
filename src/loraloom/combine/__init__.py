"""Several adapters as one plain LoRA, without training."""
