"""Every kind of adapter through the servers' own loaders: as it was trained, and as `loraloom export` writes it.

    pip download --no-deps -d WHEELS vllm==0.33.0 sglang==0.5.23
    pip download --no-deps --no-binary llama-cpp-python -d WHEELS llama-cpp-python==0.3.36
    python -m scripts.servers WHEELS [KIND ...]

unpacks what the loaders need (nothing is installed, nothing compiled), runs them on the CPU in processes of their own,
and adds what they would add to the weights of a two-layer Llama. The logits are compared with PEFT's, in float64.
transformers' load_adapter and PEFT run as they are installed. The tables go into docs/serving.md. Adapters, references
and bases are those of tests/consumption.
"""

import json
import subprocess
import sys
import tarfile
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from loraloom.adapter.base import BaseWeights
from loraloom.adapter.serving import Verdict, serving_data, serving_table
from loraloom.adapter.stored import read_adapter
from loraloom.errors import InputError
from loraloom.export.export import export_adapter
from tests.consumption.builders import ATTENTION, lora
from tests.consumption.kinds import ALL_KINDS, Kind
from tests.consumption.references import Reference, load_base, logits, make_base

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"
MARKS = ("<!-- made by scripts/servers.py -->", "<!-- end -->")
TOLERANCE = 1e-5  # of the largest logit; the loaders compute in float32
LOADERS = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llamacpp"}
KINDS = ["lora", "rslora", "patterns", "rslora_patterns", "dora", "pissa", "lora_bias", "bias_all", "modules_to_save"]
KINDS += ["tokens", "embedding", "head", "target_parameters", "loom_mixer", "loom_gate", "loom_rslora", "loom_dora"]
KINDS += ["loom_all", "loom_pissa", "loom_pruned", "loom_pruned_all", "loom_expanded", "loom_embedding", "loom_head"]
KINDS += ["loom_composition_softmax", "loom_composition_free"]
# Siblings that servers stack, one without the other: what WeightLoRA leaves, in all its shapes.
SOME = {
    "q, k": ["q_proj", "k_proj"],
    "q, v": ["q_proj", "v_proj"],
    "k alone": ["k_proj"],
    "v alone": ["v_proj"],
    "gate alone": ["gate_proj"],
    "up alone": ["up_proj"],
    "uneven": r".*(0\.self_attn\.(k|o)|1\.self_attn\.q|0\.mlp\.up|1\.mlp\.down)_proj",
}
ROWS: list[Kind] = [ALL_KINDS[name] for name in KINDS]
ROWS += [Kind(name, lora(target_modules=modules)) for name, modules in SOME.items()]
ROWS += [Kind("ranks", lora(rank_pattern={"q_proj": 2})), Kind("alphas", lora(alpha_pattern={"q_proj": 9}))]
ROWS += [Kind("attention, r 3", lora(target_modules=ATTENTION, r=3))]


def unpack(wheels: Path) -> None:
    """What the loaders read of the archives, which have to be of the versions in serving.yaml."""
    for name, pattern in {
        "vllm": "vllm-*.whl",
        "sglang": "sglang-*.whl",
        "llamacpp": "llama_cpp_python-*.tar.gz",
    }.items():
        version = str(serving_data()["servers"][name]["version"]).split()[-1]
        if not any(f"-{version}" in archive.name for archive in wheels.glob(pattern)):
            raise SystemExit(f"{wheels} has no {pattern} of version {version}: download it as the docstring says")
    for archive in wheels.glob("*.whl"):
        name = archive.name.partition("-")[0]
        if name in ("vllm", "sglang") and not (wheels / name).is_dir():
            with zipfile.ZipFile(archive) as file:
                wanted = [m for m in file.namelist() if m.startswith((f"{name}/lora/", f"{name}/srt/lora/"))]
                file.extractall(wheels / name, [m for m in wanted if m.endswith(".py")])
    for archive in wheels.glob("llama_cpp_python-*.tar.gz"):
        if (wheels / "llamacpp").is_dir():
            continue
        with tarfile.open(archive) as file:
            for member in file.getmembers():
                _, _, inner = member.name.partition("/vendor/llama.cpp/")
                if inner.startswith(("conversion/", "convert_", "gguf-py/")):
                    member.name = inner
                    file.extract(member, wheels / "llamacpp", filter="data")


def run_loader(name: str, wheels: Path, jobs: list[tuple[Path, Path, Path]]) -> None:
    """Runs one loader in a process of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([[str(part) for part in job] for job in jobs], file)
        file.flush()
        command = [sys.executable, "-m", "scripts.loaders", name, str(wheels), file.name]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[1], capture_output=True)


def with_deltas(base: Path, deltas: dict[str, Tensor]) -> Tensor:
    """Logits of the base model with something added to its weights."""
    model = load_base(base, torch.float64)
    with torch.no_grad():
        for name, delta in deltas.items():
            layer = model.get_submodule(name)
            layer.weight.add_((delta.T if isinstance(layer, nn.Embedding) else delta).double())
    return logits(model)


def in_peft(base: Path, folder: Path) -> Tensor:
    return logits(PeftModel.from_pretrained(load_base(base), folder).double())


def in_transformers(base: Path, folder: Path) -> Tensor:
    model = load_base(base)
    model.load_adapter(str(folder))
    return logits(model.double())


INSTALLED: dict[str, Callable[[Path, Path], Tensor]] = {"peft": in_peft, "transformers": in_transformers}


class Case:
    """A kind of adapter on disk, its logits, and the cells of its row."""

    def __init__(self, kind: Kind, root: Path) -> None:
        self.kind, self.root = kind, root / kind.name.replace(" ", "_").replace(",", "")
        self.base = root / "bases" / kind.base
        if not self.base.is_dir():
            make_base(kind.base, self.base)
        model = load_base(self.base)
        torch.manual_seed(1)
        model.name_or_path = model.config._name_or_path = str(self.base)
        self.trained = self.root / "adapter"
        kind.build(model, self.root).save_pretrained(self.trained)
        if kind.per_weight:
            self.truth = Reference(self.base, self.trained).logits
        else:
            self.truth = in_peft(self.base, self.trained)
        self.exported: dict[str, Path | str] = {}

    def export(self, target: str) -> Path | str:
        """The exported folder, or in which words we refuse."""
        if target not in self.exported:
            try:
                export_adapter(self.trained, target, self.root / target, base=self.base, allow_lossy=True)
                self.exported[target] = self.root / target
            except InputError as error:
                self.exported[target] = str(error)
        return self.exported[target]

    def verdicts(self, folder: Path) -> dict[str, Verdict]:
        """What `loraloom inspect --base` says of each program."""
        adapter = read_adapter(folder)
        adapter.base = BaseWeights(self.base, adapter)
        return dict(zip(serving_data()["servers"], serving_table(adapter, str(self.base)), strict=True))

    def compared(self, found: Tensor, against: Tensor | None = None) -> str:
        truth = self.truth if against is None else against
        off = float((found - truth).abs().max())
        return "exact" if off <= TOLERANCE * float(truth.abs().max()) else f"off {off:.2f}"


def outcome(case: Case, name: str, folder: Path, file: Path, against: Tensor | None = None) -> str:
    """What one server makes of one folder: "exact", "off 1.23", or "refused: why"."""
    if name in INSTALLED:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return case.compared(INSTALLED[name](case.base, folder), against)
        except Exception as error:
            return f"refused: {str(error).splitlines()[0]}"
    why = file.with_suffix(".txt")
    if why.is_file():
        return f"refused: {why.read_text()}"
    return case.compared(with_deltas(case.base, load_file(file)), against)


def agrees(found: str, verdict: Verdict) -> bool:
    """Whether `inspect` says of an adapter what the server did."""
    said = {"ok": "exact", "rejected": "refused", "wrong": "off"}
    return verdict.effect == "varies" or found.startswith(said[verdict.effect])


def main(wheels: Path, only: list[str]) -> int:
    """Writes both tables, or tries some kinds; returns 1 where a cell is not as it has to be."""
    unpack(wheels)
    servers = serving_data()["servers"]
    names = [name for name in servers if name in LOADERS or name in INSTALLED]
    with tempfile.TemporaryDirectory() as scratch:
        cases = [Case(kind, Path(scratch)) for kind in ROWS if not only or kind.name in only]
        jobs: dict[str, list[tuple[Path, Path, Path]]] = {name: [] for name in LOADERS}
        for case in cases:
            for name in LOADERS:
                if case.kind.base == "llama":
                    jobs[name].append((case.trained, case.base, case.root / f"{name}.trained.safetensors"))
                    for target in (servers[name]["target"], "portable"):
                        if isinstance(folder := case.export(target), Path):
                            jobs[name].append((folder, case.base, case.root / f"{name}.{target}.safetensors"))
        for name, work in jobs.items():
            run_loader(name, wheels, work)
        trained, exported, wrong = [], [], []
        for case in cases:
            table = case.verdicts(case.trained)
            cells = {}
            for name in names:
                if name in LOADERS and case.kind.base != "llama":
                    cells[name] = ""
                    continue
                found = outcome(case, name, case.trained, case.root / f"{name}.trained.safetensors")
                cells[name] = short(found)
                loaded_here = case.kind.ours and name in INSTALLED  # this process imports loraloom
                if not loaded_here and not agrees(found, table[name]):
                    wrong.append(f"{case.kind.name} in {name}: {found}; inspect says {table[name].effect}")
            trained.append([case.kind.name, *cells.values()])
            row = []
            for name, target in [(name, servers[name]["target"]) for name in names] + [
                (name, "portable") for name in LOADERS
            ]:
                folder = case.export(target)
                if isinstance(folder, str):
                    row.append("we refuse")
                    continue
                lossy = (target != "peft" and "dora" in case.kind.name) or case.kind.name == "loom_all"
                # What an approximation is compared with is its own update.
                against = in_peft(case.base, folder) if lossy and target != "peft" else None
                found = outcome(case, name, folder, case.root / f"{name}.{target}.safetensors", against)
                if found == "exact":
                    row.append("exact*" if against is not None else found)
                elif case.verdicts(folder)[name].effect in ("rejected", "wrong"):
                    row.append("inspect refuses")
                else:
                    row.append(short(found))
                    wrong.append(f"{case.kind.name} exported to {target} in {name}: {found}")
            exported.append([case.kind.name, *row])
    heads = [f"{servers[name]['name']}" for name in names]
    if only:
        print("\n\n".join([rows(["kind", *heads], trained), "\n".join(map(str, exported))]))
    else:
        write_page(heads, trained, exported, [servers[name]["name"] for name in LOADERS])
    print("\n".join(wrong) or "every cell is exact, or refused by us before the server does")
    return int(bool(wrong))


def short(found: str) -> str:
    return "refused" if found.startswith("refused") else found


def write_page(heads: list[str], trained: list[list[str]], exported: list[list[str]], portable: list[str]) -> None:
    """Puts the tables between the marks of docs/serving.md."""
    tables = [
        "The adapter as it was trained:",
        rows(["kind", *heads], trained),
        "The same after `loraloom export` to each program, and to `portable`:",
        rows(["kind", *heads, *(f"portable in {name}" for name in portable)], exported),
        "exact: logits equal PEFT's to 1e-5 of the largest one; exact*: those of the approximation that the export "
        "reports; off: by so much; refused: an error; we refuse: the export says that it cannot be exact and what to do"
        "; inspect refuses: `loraloom inspect` says so of the exported adapter.",
    ]
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text("\n\n".join([before + MARKS[0], *tables, MARKS[1]]) + after, encoding="utf-8")


def rows(head: list[str], body: list[list[str]]) -> str:
    """A table in Markdown."""
    lines: list[Any] = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
