"""Which programs serve an adapter, why not, and what to run. The facts are in serving.yaml, with date and sources."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from loraloom.adapter.peft_features import changed_base
from loraloom.adapter.protocol import Adapter
from loraloom.adapter.stored import PREFIX, read_adapter

_WAYS = {
    "export": "`export`, exact",
    "lossy": "`merge`, exact; `export --base`, with an error",
    "merge": "`merge`",
    "save": "save it again from PEFT",
}


@dataclass(frozen=True)
class Verdict:
    """What one program does with an adapter.

    Attributes:
        server: its name.
        effect: "ok", "rejected" (an error), "wrong" (loads, and computes something else) or "varies" (by version).
        reasons: why, one sentence part per feature that is not served.
        run: the command that serves the adapter, or the one that makes an adapter or a model that is served.
    """

    server: str
    effect: str
    reasons: list[str]
    run: str


@cache
def serving_data() -> Mapping[str, Any]:
    """serving.yaml: ``ways_out``, ``features`` and ``servers``."""
    return yaml.safe_load((Path(__file__).parent / "serving.yaml").read_text(encoding="utf-8"))


def features(adapter: Adapter) -> dict[str, str]:
    """The features that the rules of serving.yaml are about -> what the adapter has of it, for a message."""
    config = adapter.config
    found: dict[str, str] = {}
    if adapter.kind != "LORA":
        found["loom"] = f"peft_type is {adapter.kind}"
    if config.get("use_rslora"):
        found["use_rslora"] = "use_rslora is true"
    modules = adapter.modules.values()
    ranks = {module.rank for module in modules}
    if ranks - {config.get("r")}:
        found["rank_pattern"] = f"ranks are {', '.join(map(str, sorted(ranks)))}, r is {config.get('r')}"
    if config.get("alpha_pattern"):
        found["alpha_pattern"] = f"alpha_pattern has {len(config['alpha_pattern'])} entries"
    if any("magnitude" in module.shapes() for module in modules):
        found["use_dora"] = "has DoRA magnitudes"
    if any({"bias", "member_bias"} & module.shapes().keys() for module in modules):
        found["lora_bias"] = "adds to biases"
    for module in modules:
        if module.expert is not None:
            found.setdefault("experts", f"adapts the experts of {module.expert.parameter}")
        elif module.kernel:
            found.setdefault("convolution", f"{module.name} is a convolution")
        elif module.embedding:
            feature = "tied_embedding" if config.get("ensure_weight_tying") else "embedding"
            found.setdefault(feature, f"{module.name} is an embedding")
        elif module.name.rpartition(".")[2] == "lm_head":
            found.setdefault("head", f"adapts {module.name}")
    if missing := missing_siblings(adapter.modules):
        found["siblings"] = f"lacks {next(iter(missing))}"
    if kind := _in_some_layers(adapter):
        found["uneven"] = f"adapts {kind} in some layers only"
    copies = copies_of_base(adapter)
    for key in [key for key in adapter.others if key not in copies]:
        beside = key.endswith(".base_layer.weight") and getattr(adapter, "base", None) is None
        kind = "base_table" if beside else kind_of_other(adapter, key)
        found.setdefault(kind, f"holds {key.removeprefix('base_model.model.')}")
    if changed_base(config):
        found["altered_base"] = f"init_lora_weights is {config.get('init_lora_weights')!r}"
    return found


_LAYER = re.compile(r"(.*?\.)(\d+)(\..*)")


def _in_some_layers(adapter: Adapter) -> str | None:
    """A module that layers up to the last adapted one lack; where all have it, layers after that may lack it still."""
    layers: dict[str, set[int]] = {}
    for name in adapter.modules:
        if match := _LAYER.fullmatch(name):
            layers.setdefault(f"{match[1]}*{match[3]}", set()).add(int(match[2]))
    last = max((max(indices) for indices in layers.values()), default=0)
    return next((kind for kind, indices in layers.items() if len(indices) <= last), None)


# SGLang stacks projections: a module that is adapted needs another one adapted beside it.
_NEEDS = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


def missing_siblings(modules: Iterable[str]) -> dict[str, str]:
    """Modules that SGLang needs factors of, zeros for instance -> the adapted module that asks for them."""
    present, missing = set(modules), {}
    waiting = list(present)
    while waiting:
        module = waiting.pop()
        place, dot, name = module.rpartition(".")
        sibling = f"{place}{dot}{_NEEDS[name]}" if name in _NEEDS else module
        if sibling not in present:
            present.add(sibling)
            missing[sibling] = module
            waiting.append(sibling)
    return dict(sorted(missing.items()))


def copies_of_base(adapter: Adapter) -> list[str]:
    """Tables of the base that PEFT saves beside the update of an embedding or a head, and that have not changed.

    None without the base model: then they may have been resized or trained.
    """
    base = getattr(adapter, "base", None)
    if base is None:
        return []
    ending, found = ".base_layer.weight", []
    for key, tensor in ((k, adapter.checkpoint.tensor(k)) for k in adapter.others if k.endswith(ending)):  # type: ignore[attr-defined]
        own = base.keys.get(key.removesuffix(ending).removeprefix(PREFIX))
        if own is not None and base.checkpoint.shape(own) == tensor.shape:
            table = base.checkpoint.tensor(own)
            if torch.equal(table, tensor.to(table.dtype)):
                found.append(key)
    return found


def kind_of_other(adapter: Adapter, key: str) -> str:
    """Which feature a tensor that is no part of an update belongs to: "bias", "tokens" or "modules_to_save"."""
    if "trainable_tokens_" in key or key.endswith(".base_layer.weight"):
        return "tokens"
    if adapter.config.get("bias", "none") != "none" and key.endswith(".bias"):
        saved = adapter.config.get("modules_to_save") or []
        return "modules_to_save" if any(f".{name}." in f".{key}" for name in saved) else "bias"
    return "modules_to_save"


def allowed_rank(server: str, rank: int) -> int | None:
    """The smallest rank that the server is configured for and that holds `rank`; None where it is too large."""
    ranks = serving_data()["servers"][server].get("ranks")
    return rank if ranks is None else next((allowed for allowed in ranks if allowed >= rank), None)


def serving_table(adapter: Adapter, base: str | None = None) -> list[Verdict]:
    """One verdict per program.

    Args:
        adapter: the adapter.
        base: the base model, for the commands; None takes the name in the adapter's configuration.
    """
    data, found = serving_data(), {"format": "is in PEFT's format"} | features(adapter)
    # A server reads the configuration, also where no tensor goes with it; an export drops these.
    said = {name: f"{name} is {adapter.config.get(name)!r}" for name in ("bias", "modules_to_save")}
    said = {name: text for name, text in said.items() if adapter.config.get(name) not in (None, [], "none")}
    ways = {feature: data["ways_out"][feature] if feature in found else "export" for feature in said | found}
    found = said | found
    rank = max((module.rank for module in adapter.modules.values()), default=1)
    base = base or adapter.config.get("base_model_name_or_path") or "BASE"
    verdicts = []
    for name, server in data["servers"].items():
        rules = {feature: server["rules"][feature] for feature in found if feature in server["rules"]}
        rules = {feature: rule for feature, rule in rules.items() if rule["effect"] != "ok"}
        reasons = [f"{found[feature]}: {rule['why']}" for feature, rule in rules.items()]
        effects = {rule["effect"] for rule in rules.values()}
        max_rank = allowed_rank(name, rank)
        if max_rank is None:
            reasons.append(f"rank {rank} is above {server['ranks'][-1]}, the largest allowed")
            effects.add("rejected")
        effect = next((e for e in ("rejected", "wrong", "varies") if e in effects), "ok")
        if effect == "ok":
            run = server["run"].format(adapter=adapter.where, base=base, rank=max_rank)
        else:
            run = _way_out({ways[feature] for feature in rules}, adapter, server, base, max_rank is None)
        verdicts.append(Verdict(server["name"], effect, reasons, run))
    return verdicts


def serving_rows(folder: Path, name: str | Path | None = None) -> list[list[str]]:
    """The serving table of a saved adapter, as rows with headings.

    Args:
        folder: where it is now.
        name: where it will be, for the commands; None: there.
    """
    rows = [["program", "", "why, or how"]]
    for verdict in serving_table(read_adapter(folder)):
        how = "; ".join(verdict.reasons) or verdict.run.replace(str(folder), str(name or folder))
        rows.append([verdict.server, verdict.effect, how])
    return rows


def serving_markdown() -> str:
    """The rules as a table in Markdown: a row per feature, a column per program, then the sources."""
    data = serving_data()
    servers = data["servers"].values()
    rows = [
        ["the adapter has", *(server["name"] for server in servers), "way out"],
        ["---"] * (len(servers) + 2),
    ]
    for feature, what in data["features"].items():
        if feature == "rank":
            cells = ["any" if "ranks" not in s else f"up to {s['ranks'][-1]}" for s in servers]
        else:
            rules = [server["rules"].get(feature, {"effect": "ok"}) for server in servers]
            cells = [f"**{r['effect']}**: {r['why']} ({r['how']})" if "why" in r else r["effect"] for r in rules]
        rows.append([what, *cells, _WAYS[data["ways_out"][feature]]])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    sources = "\n".join(
        f"- {server['name']} {server['version']}, {server['date']}: {'; '.join(server['sources'])}"
        for server in servers
    )
    return f"{table}\n\nRun or read, as each cell says:\n\n{sources}"


def _way_out(ways: set[str], adapter: Adapter, server: Mapping, base: str, too_large: bool) -> str:
    merge = f"loraloom merge {adapter.where} --base {base} --out MERGED"
    export = f"loraloom export {adapter.where} --to {server['target']} --out EXPORTED"
    if "save" in ways:
        return 'model.save_pretrained(DIR, path_initial_model_for_weight_conversion="DIR at the start of training")'
    if "merge" in ways:
        return merge
    if "lossy" in ways:
        return merge
    return f"{export} --rank {server['ranks'][-1]} --allow-lossy" if too_large else export
