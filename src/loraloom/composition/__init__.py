"""Composition (WLoRA, 2402.15414): many pre-trained adapters as one, by weights that are learned, equal or given."""

from loraloom.composition.compose import compose
from loraloom.composition.learned import LearnedWeights, format_weights, learned_weights, penalty
from loraloom.composition.to_lora import LoraReport, to_lora

__all__ = ["LearnedWeights", "LoraReport", "compose", "format_weights", "learned_weights", "penalty", "to_lora"]
