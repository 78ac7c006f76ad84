"""The names of the files in a run's folder."""

RESOLVED, RESULT, CHECKPOINTS, LOCK = "resolved.yaml", "metrics.json", "checkpoints", ".lock"
STATE = "trainer_state.json"  # transformers' name of it; holds everything that was logged
