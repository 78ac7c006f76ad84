"""Hostile configurations: values, texts and expressions in every key, what is no JSON, indices, runs."""

import json
from collections.abc import Iterator
from pathlib import Path

from tests.hostile import values
from tests.hostile.case import ADAPTERS, INDEX, Case, case
from tests.hostile.files import read_json, set_text, write_text
from tests.hostile.originals import CONFIG


def keys(originals: Path) -> Iterator[Case]:
    """Every type of JSON in every key of adapter_config.json, of a composition and of a model's config.json."""
    known = {key for of in ADAPTERS for key in read_json(originals / of / CONFIG)} | {"unknown_key", "\x1b[31mkey"}
    of_model = {*read_json(originals / "base" / "config.json"), "quantization_config", "auto_map"}
    for of, file, names in (*((of, CONFIG, known) for of in ADAPTERS), ("base", "config.json", of_model)):
        for key in sorted(names):
            for i, value in enumerate(values.EVERYTHING):
                yield case("keys", f"{key!a}={i}", of, set_text, file, key, value)
    for key in [*read_json(originals / "composition" / CONFIG)["composition"], "unknown"]:
        for i, value in enumerate(values.EVERYTHING):
            yield case("keys", f"composition.{key}={i}", "composition", set_text, CONFIG, key, value, "composition")


def no_json(originals: Path) -> Iterator[Case]:
    for of, file in (*((of, CONFIG) for of in ADAPTERS), ("base", "config.json"), ("sharded", INDEX)):
        text = (originals / of / file).read_text()
        cuts = [text[: len(text) * part // 16] for part in range(16)]
        for i, broken in enumerate((*values.NO_JSON, *cuts)):
            yield case("no json", f"{file} {i}", of, write_text, file, broken)
        yield case("no json", f"{file} latin", of, Path.write_bytes, file, b'{"r": "\xff\xfe"}')


def index(originals: Path) -> Iterator[Case]:
    for key in ("weight_map", "metadata", "other"):
        for i, value in enumerate(values.EVERYTHING):
            yield case("index", f"{key}={i}", "sharded", set_text, INDEX, key, value)
    some = next(iter(read_json(originals / "sharded" / INDEX)["weight_map"]))
    for i, value in enumerate((*values.EVERYTHING, '"../base/model.safetensors"', '"."', f'"{INDEX}"', '"/dev/zero"')):
        yield case("index", f"shard={i}", "sharded", set_text, INDEX, some, value, "weight_map")
    for i, text in enumerate((*values.ESCAPES, *values.MARKUP, values.LONG)):
        yield case("index", f"key {i}", "sharded", _add_key, INDEX, text)


def _add_key(file: Path, key: str) -> None:
    shard = next(iter(read_json(file)["weight_map"].values()))
    set_text(file, key, f'"{shard}"', within="weight_map")


def expressions(originals: Path) -> Iterator[Case]:
    """What is matched against names: expressions that take for ever, all memory, or are none."""
    for of in ("lora", "loom"):
        for i, text in enumerate(values.EXPRESSIONS):
            for key in ("target_modules", "exclude_modules"):
                yield case("expressions", f"{key} {i}", of, set_text, CONFIG, key, json.dumps(text))
            for key in ("rank_pattern", "alpha_pattern"):
                yield case("expressions", f"{key} {i}", of, set_text, CONFIG, key, json.dumps({text: 4}))
            yield case("expressions", f"layers_pattern {i}", of, _layers, CONFIG, text)


def _layers(file: Path, text: str) -> None:
    set_text(file, "layers_to_transform", "[0, 1]")
    set_text(file, "layers_pattern", json.dumps([text]))


_NESTED = zip("abcdefgh", "bcdefghi", strict=True)
_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in _NESTED)
_YAML = ["", "[]", "a: [", "model: {name: 1}", "model: 5", "!!python/object/apply:os.system [id]", _BOMB]
_YAML += ["model: {name: '\x1b[2J'}", "model: {task: '[red]'}", "x" * 10**6, "[" * 3_000, "&a [*a]", "? [a]: b", "\x00"]
_RESULTS = ["{}", '{"label_names": 1}', '{"label_names": {"a": []}}', '{"label_names": [1]}', *values.NO_JSON]


def runs(originals: Path) -> Iterator[Case]:
    """What `predict` reads of a finished run."""
    if not (originals / "run").is_dir():
        return
    for file, texts in (("resolved.yaml", _YAML), ("metrics.json", _RESULTS), (CONFIG, values.NO_JSON)):
        for i, text in enumerate(texts):
            yield case("runs", f"{file} {i}", "run", write_text, file, text)
    for key in read_json(originals / "run" / CONFIG):
        for i, value in [*enumerate(values.EVERYTHING)][::5]:
            yield case("runs", f"{key}={i}", "run", set_text, CONFIG, key, value)
