"""The command line: fast help without torch, one-line errors with the fix, documented exit codes, Ctrl-C."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from loraloom import __version__
from loraloom.cli.main import VERBS, main
from loraloom.cli.train import split_overrides
from loraloom.errors import InputError
from tests.refusals import coded

HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "accelerate", "numpy", "tyro", "rich"}


def loraloom(*arguments, **options):
    command = [sys.executable, "-m", "loraloom.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


@pytest.fixture
def colours(tmp_path):
    rows = [{"text": f"{c} {w}", "label": c} for c in ("red", "blue") for w in ("dog", "cat", "apple", "file") * 4]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def run_yaml(pico_bert_dir, colours, tmp_path):
    """A classification run of 8 steps."""
    path = tmp_path / "RUN.yaml"
    content = {
        "model": {"name": str(pico_bert_dir)},
        "data": {"path": str(colours), "test_path": str(colours), "validation_fraction": 0},
        "method": {"name": "moslora", "r": 4},
        "training": {"num_train_epochs": 2, "per_device_train_batch_size": 8, "use_cpu": True},
        "output": {"dir": str(tmp_path / "run")},
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], []])
def test_help_and_version_import_nothing_heavy(arguments):
    program = (
        "import sys; from loraloom.cli.main import main; code = main(sys.argv[1:]);"
        f"print('HEAVY', sorted({HEAVY!r} & sys.modules.keys())); sys.exit(code)"
    )
    outcome = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert outcome.returncode == (0 if arguments else 2)
    assert outcome.stdout.endswith("HEAVY []\n")
    assert (__version__ if arguments == ["--version"] else "usage: loraloom") in outcome.stdout


def test_help_takes_a_quarter_of_a_second_at_most():
    """Processor time of the best of five, so that other work on the machine does not count."""
    taken = []
    for _ in range(5):
        before = os.times()
        assert loraloom("--help").returncode == 0
        after = os.times()
        taken.append(after.children_user - before.children_user + after.children_system - before.children_system)
    assert min(taken) <= 0.25


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_imports_no_torch(verb):
    program = (
        "import sys; from loraloom.cli.main import main\n"
        f"try: main(['{verb}', '--help'])\n"
        "except SystemExit as stop: pass\n"
        "print('torch' in sys.modules, 0)"
    )
    outcome = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert outcome.stdout.endswith("False 0\n"), outcome.stderr
    assert f"usage: loraloom {verb}" in outcome.stdout


def test_help_of_train_is_a_screen_and_a_screen_per_section(capsys):
    texts = {}
    for words in ([], ["method"], ["training"]):
        assert main(["train", "--help", *words]) == 0
        texts[" ".join(words)] = capsys.readouterr().out
    assert len(texts[""].splitlines()) < 60
    assert "--method." not in texts[""]
    assert "loraloom train --help method" in texts[""]
    method = " ".join(texts["method"].split())
    for part in ("--method.lora_alpha", "(default: 32)", "weightlora+"):
        assert part in method
    assert "--data.path" not in method
    assert "matthews_correlation" in texts["training"]
    assert main(["train", "--help-all"]) == 0
    everything = capsys.readouterr().out
    assert all(f"--{part}" in everything for part in ("data.path", "optimizer.lora_plus_ratio", "training.seed"))
    assert main(["train", "--help", "metod"]) == 2
    assert "did you mean 'method'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "unknown verb 'trian'; did you mean 'train'?"),
        (["train"], "train needs a RUN.yaml"),
        (["train", "--resum"], "unknown option '--resum'; did you mean '--resume'?"),
        (["train", "missing.yaml"], "missing.yaml: no such file"),
        (["train", "--method.name", "lorra"], "method.name: 'lorra' is not 'lora' or"),
        (["train", "--method.name"], "--method.name has no value"),
        (["train", "--methd.name", "lora"], "did you mean 'method'?"),
        (["train", "--data.path", "none.jsonl"], "data.path 'none.jsonl': no such file"),
        (["compose"], "compose needs a RUN.yaml"),
        (["compose", "--method.name", "dora"], "compose needs method.name 'composition', not 'dora': remove it"),
        (["compose", "--composition.scope", "modle"], "composition.scope: 'modle' is not 'layer' or"),
        (["evaluate"], "evaluate needs the folder of a finished run"),
        (["evaluate", "nowhere"], "nowhere holds no finished run"),
    ],
)
def test_wrong_input_is_one_line_and_code_2(capsys, arguments, expected):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("loraloom: ")
    assert err.count("\n") == 1
    assert expected in err


def test_debug_shows_the_traceback(capsys):
    assert main(["train", "missing.yaml", "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "InputError" in err


def test_an_unexpected_error_is_one_line_and_code_1(capsys, monkeypatch):
    def fail(arguments):
        raise KeyError("something\nodd")

    monkeypatch.setattr("loraloom.cli.train.main", fail)
    assert main(["train"]) == 1
    err = capsys.readouterr().err
    assert "KeyError" in err
    assert "--debug" in err
    assert err.count("\n") == 1


def test_split_overrides():
    words = ["RUN.yaml", "--method.r", "4", "--resume", "--data.path=a=b", "--training.max_steps", "-1"]
    overrides = [("method.r", "4"), ("data.path", "a=b"), ("training.max_steps", "-1")]
    assert split_overrides(words) == (["RUN.yaml", "--resume"], overrides)
    with pytest.raises(InputError, check=coded("option-value", "--data.path")):
        split_overrides(["--data.path"])


@pytest.fixture
def in_process(monkeypatch):
    """Leave the libraries of the test process as they are."""
    monkeypatch.setattr("loraloom.cli.train.quiet_libraries", lambda: None)


def test_evaluate_in_a_fresh_process_gives_the_numbers_of_train(run_yaml, tmp_path, capfd, in_process):
    """And JSON is alone on stdout."""
    assert main(["train", str(run_yaml), "--json", "--method.name", "dora", "--training.learning_rate", "1e-2"]) == 0
    out, err = capfd.readouterr()
    result = json.loads(out)
    assert (result["method"], result["steps"]) == ("dora", 8)
    assert "macro f1" in err
    evaluated = loraloom("evaluate", tmp_path / "run", "--json", "--quiet")
    assert json.loads(evaluated.stdout) == result["after"]
    assert evaluated.stderr == ""


def test_weightlora_shows_the_kept_adapters_and_reports_them(run_yaml, tmp_path, capsys, in_process):
    options = ["--method.name", "weightlora", "--method.keep", "3", "--method.select_until", "4"]
    options += ["--optimizer.gate_lr", "2.0", "--report", str(tmp_path / "report")]
    assert main(["train", str(run_yaml), *options]) == 0
    out = capsys.readouterr().out
    assert "3 of 13 adapters kept: rank and gate" in out
    assert "gates " in out  # in the table of parameter groups
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    for adapter in result["adapters"].values():
        assert adapter is None or f"{adapter['r']} {adapter['gate']:.2f}" in out
    assert out.rstrip().endswith(f"Report: {tmp_path / 'report' / 'report.html'}")
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["command"] == shlex.join(["loraloom", "train", str(run_yaml), *options])
    assert {"Loss", "Gates", "Gates over time"} <= {section["title"] for section in report["sections"]}


def test_compose_shows_the_learned_weights(run_yaml, pico_bert_dir, tmp_path, capsys, in_process):
    """Members are runs of other methods; only what RUN.yaml of `train` does not have is given."""
    members = {name: str(tmp_path / name) for name in ("lora", "moslora")}
    for name, folder in members.items():
        assert main(["train", str(run_yaml), "--quiet", "--method.name", name, "--output.dir", folder]) == 0
    raw = yaml.safe_load(run_yaml.read_text())
    del raw["method"]
    run_yaml.write_text(yaml.safe_dump({**raw, "composition": {"members": members}}))
    assert main(["compose", str(run_yaml)]) == 0
    out = capsys.readouterr().out
    assert "weights of the members" in out
    assert "logits " in out  # in the table of parameter groups
    result = json.loads((tmp_path / "run" / "metrics.json").read_text())
    learned = result["composition"]["weights"].values()
    for name in members:
        assert f"{sum(of_module[name] for of_module in learned) / len(learned):.3f}" in out
    assert result["composition"]["portable"] in out


def test_a_failed_run_is_one_line_and_code_1(run_yaml, capsys, in_process):
    assert main(["train", str(run_yaml), "--quiet", "--training.learning_rate", "0"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("loraloom: no adapter weight has changed")


def test_ctrl_c_saves_and_the_printed_command_resumes(run_yaml, tmp_path, capsys, in_process):
    """A real SIGINT to a real process, once the first checkpoint shows that it trains."""
    long = ["--training.num_train_epochs", "500", "--training.save_strategy", "steps", "--training.save_steps", "5"]
    command = [sys.executable, "-m", "loraloom.cli.main", "train", str(run_yaml), *long]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run").glob("checkpoints/checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, out + err
    assert err.count("\n") == 1
    step = int(err.split("stopped after step ")[1].split()[0])
    assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{step}").is_dir()
    again = err.split("go on with: ")[1].split()
    assert again == ["loraloom", "train", str(run_yaml), *long, "--resume"]
    assert main([*again[1:], "--training.num_train_epochs", "2", "--training.max_steps", str(step + 3)]) == 0
    assert "Resuming with other training.num_train_epochs, training.max_steps than before" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == step + 3
