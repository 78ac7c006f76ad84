"""Training runs: RUN.yaml, data, the run itself and what it reports."""
