"""Where an adapter lives: on disk or in a model; what is in it, and who serves it."""
