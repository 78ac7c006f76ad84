"""Base checkpoints with quantised weights, read as the floating-point weights that they stand for."""
