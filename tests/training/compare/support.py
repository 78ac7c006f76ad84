"""Runs that need no training: a process that writes what a real run would have written."""

import json

from loraloom.training.compare.runs import LOG, RESOLVED, RESULT
from loraloom.training.load import dump_config


def metrics(config, **changes):
    """What metrics.json holds; the accuracy is best at a rate of 1e-3 and has the seed's own offset."""
    rate, seed = config.training["learning_rate"], config.training["seed"]
    accuracy = 0.8 - abs(rate - 1e-3) * 100 + 0.01 * seed + {"moslora": 0.05, "dora": -0.05}.get(config.method.name, 0)
    return {
        "method": config.method.name,
        "after": {"loss": 1 - accuracy, "accuracy": accuracy, "macro_f1": accuracy},
        "trainable_parameters": 100 * config.method.r,
        "peak_memory_bytes": 2**20 + seed,
        "tokens_per_second": 10.0 + seed,
        "wall_time_seconds": 2.0,
    } | changes


class FakeProcess:
    """Ends at the second poll, with `code`; until then it can be stopped."""

    def __init__(self, code, at_end, deaf=False):
        self.code, self.at_end, self.deaf = code, at_end, deaf
        self.polls, self.signals, self.returncode = 0, [], None

    def poll(self):
        self.polls += 1
        if self.returncode is None and self.polls == 2:
            self.at_end()
            self.returncode = self.code
        return self.returncode

    def terminate(self):
        self.signals.append("terminate")
        if not self.deaf:
            self.returncode = -15

    def kill(self):
        self.signals.append("kill")
        self.returncode = -9

    def wait(self, timeout=None):
        return self.returncode


class Launcher:
    """Starts fake runs and remembers them; `behaviour(config)` gives an exit code, the log, and metrics' changes."""

    def __init__(self, behaviour=lambda config: (0, "", {})):
        self.behaviour = behaviour
        self.started, self.processes, self.environments = [], [], []
        self.most_at_a_time = 0

    def __call__(self, run, environment):
        code, log, changes = self.behaviour(run.config)

        def write():
            (run.folder / LOG).write_text(log)
            (run.folder / RESOLVED).write_text(dump_config(run.config))
            if code == 0:
                (run.folder / RESULT).write_text(json.dumps(metrics(run.config, **changes)))

        run.folder.mkdir(parents=True, exist_ok=True)
        self.started.append(run)
        self.environments.append(environment)
        self.processes.append(FakeProcess(code, write))
        self.most_at_a_time = max(self.most_at_a_time, sum(p.returncode is None for p in self.processes))
        return self.processes[-1]
