"""Ranks chosen before training, from gradients of the base model."""
