"""An adapter with smaller ranks."""
