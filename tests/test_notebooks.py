"""The notebooks of examples/ run as they are, in one process, and are stored without outputs."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))


def test_each_front_door_has_one():
    assert [path.stem for path in NOTEBOOKS] == ["adapter_parts", "composition", "tools", "weightlora"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_as_it_is(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    namespace = {"__name__": "__main__"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert not cell["outputs"], "outputs age: clear them"
        exec(compile("".join(cell["source"]), str(path), "exec"), namespace)
        assert capsys.readouterr().out or "print(" not in "".join(cell["source"])
