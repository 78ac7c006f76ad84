"""The house has floors: a package imports from its own floor or from one below, and nothing goes round in a circle.

The imports are read from the source with `ast`, those inside of functions too: a lazy import is an arrow all the same.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import loraloom

ROOT = Path(loraloom.__file__).parent
# From the ground up. A single file of the package's root stands on the floor that has its name.
FLOORS = [
    {"", "errors", "text", "patterns", "annotations", "progress", "provenance"},
    {"update"},
    {"tuner", "optim", "io", "card"},
    {"adapter"},
    {"export", "ranks", "combine", "shrink", "extract", "merge", "intruders", "composition", "selection"},
    {"training", "report"},
    {"cli"},
]
FLOOR = {package: i for i, floor in enumerate(FLOORS) for package in floor}
# Arrows that still go up, with what has to move.
KNOWN_UP: dict[tuple[str, str], str] = {}
# Modules that import each other, types included. This one is of types alone: two helpers take the optimizer itself.
KNOWN_CIRCLES: set[tuple[str, ...]] = set()
# Files of more than 350 lines, with the reason.
LONG_FILES = {
    "tests/architectures/table.py": "a table",
    "tests/composition/test_compose.py": "one compose, each route to it against the same sum; to be split by route",
    "tests/export/test_export.py": "one export, each target against the same logits; to be split by target",
    "tests/optim/test_weight_adam.py": "one optimizer and its constraints; to be split, the constraints apart",
    "tests/selection/test_selection.py": "one schedule, phase by phase; to be split by phase",
    "tests/tuner/test_dora_norm.py": "one cache, each way that it could go stale; to be split, the edits apart",
}


def _modules() -> dict[str, ast.Module]:
    """Name within the package ("tuner.layer", "" for its root) -> syntax tree."""
    trees = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def _imports(tree: ast.Module, modules: dict[str, ast.Module]) -> Iterator[tuple[str, str | None]]:
    """(module of ours, imported name or None) of every import in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "loraloom":
                    yield alias.name.partition(".")[2], None
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not used here"
            if node.module is not None and node.module.partition(".")[0] == "loraloom":
                source = node.module.partition(".")[2]
                for alias in node.names:
                    inner = f"{source}.{alias.name}".lstrip(".")
                    yield (inner, None) if inner in modules else (source, alias.name)


MODULES = _modules()
ARROWS = {name: {target for target, _ in _imports(tree, MODULES)} - {name} for name, tree in MODULES.items()}


def package_of(module: str) -> str:
    return module.partition(".")[0]


BETWEEN = sorted({(package_of(a), package_of(b)) for a, targets in ARROWS.items() for b in targets} - {("", "")})
BETWEEN = [arrow for arrow in BETWEEN if arrow[0] != arrow[1]]


def circles(graph: dict[str, set[str]]) -> set[tuple[str, ...]]:
    """The groups of nodes that can all reach each other."""
    reach: dict[str, set[str]] = {}
    for start in graph:
        reach[start], ahead = set(), [start]
        while ahead:
            new = graph.get(ahead.pop(), set()) - reach[start]
            reach[start] |= new
            ahead += new
    groups = (tuple(sorted(b for b in reach[a] if a in reach.get(b, set()))) for a in graph)
    return {group for group in groups if group}


def test_every_package_has_a_floor():
    assert {package_of(module) for module in MODULES} <= FLOOR.keys()


def test_no_module_imports_itself_through_others():
    assert circles(ARROWS) == KNOWN_CIRCLES


def test_no_package_imports_itself_through_others():
    packages: dict[str, set[str]] = {}
    for a, b in BETWEEN:
        if (a, b) not in KNOWN_UP:
            packages.setdefault(a, set()).add(b)
    assert not circles(packages)


@pytest.mark.parametrize(
    "arrow",
    [
        pytest.param(a, marks=[pytest.mark.xfail(strict=True, reason=KNOWN_UP[a])] if a in KNOWN_UP else [])
        for a in BETWEEN
    ],
    ids=" -> ".join,
)
def test_no_arrow_goes_up(arrow):
    importer, imported = arrow
    where = [
        a for a, targets in ARROWS.items() if package_of(a) == importer for b in targets if package_of(b) == imported
    ]
    assert FLOOR[imported] <= FLOOR[importer], where


def test_known_arrows_exist():
    assert set(KNOWN_UP) <= set(BETWEEN)


def test_no_private_name_crosses_a_package():
    private = [
        f"{name}: {source}.{imported or ''}"
        for name, tree in MODULES.items()
        for source, imported in _imports(tree, MODULES)
        if package_of(source) != package_of(name)
        and any(part.startswith("_") and not part.startswith("__") for part in [*source.split("."), imported or ""])
    ]
    assert not private


def test_long_files_have_a_reason():
    """Of the package and of its tests."""
    long = {
        f"{name}{path.relative_to(folder)}"
        for name, folder in (("src/loraloom/", ROOT), ("tests/", Path(__file__).parent))
        for path in folder.rglob("*.py")
        if len(path.read_text(encoding="utf-8").splitlines()) > 350
    }
    assert long <= LONG_FILES.keys()


def test_no_test_imports_from_a_test():
    """What two tests share stands in a file of its own: support.py, models.py, processes.py."""
    names = {
        f"{path.name}: {node.module}"
        for path in Path(__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").rpartition(".")[2].startswith(("test_", "conftest"))
    }
    assert not names
