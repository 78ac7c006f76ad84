"""Servers' own LoRA loaders, run on the CPU without the server: one module each, with what it needs stubbed."""
