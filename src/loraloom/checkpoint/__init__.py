"""Tools over checkpoints on disk. They read safetensors tensor by tensor, build no model and import no PEFT."""
