"""An adapter as a plain LoRA."""
