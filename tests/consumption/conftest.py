"""The adapters and their references, each made once per session, when first asked for."""

import warnings
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.consumption.consumers import Case
from tests.consumption.kinds import ALL_KINDS
from tests.consumption.references import Reference, load_base, make_base


@pytest.fixture(scope="session")
def case_of(tmp_path_factory: pytest.TempPathFactory):
    """Kind's name, folder for the verb -> `Case`."""
    root = tmp_path_factory.mktemp("consumption")

    @cache
    def base_of(name: str) -> Path:
        make_base(name, root / "bases" / name)
        return root / "bases" / name

    @cache
    def made(name: str) -> tuple[Path, Reference | None]:
        kind, folder = ALL_KINDS[name], root / name / "adapter"
        base = base_of(kind.base)
        model = load_base(base)
        torch.manual_seed(1)
        model.name_or_path = model.config._name_or_path = str(base)
        kind.build(model, root / name).save_pretrained(folder)
        if kind.edit is not None:
            kind.edit(folder)
        return folder, None if kind.code or kind.disk_only else Reference(base, folder, kind.per_weight)

    def case(name: str, out: Path) -> Case:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder, reference = made(name)
        kind = ALL_KINDS[name]
        return Case(kind, base_of(kind.base), folder, reference, out)

    return case
