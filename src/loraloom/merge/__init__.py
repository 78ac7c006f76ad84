"""Adapters merged into a model on disk."""
