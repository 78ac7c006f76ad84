"""The maths of an adapter: pure functions on tensors. Imports torch and nothing else of this package."""
