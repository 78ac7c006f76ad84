"""Several training sets as one: by their shares, without rows that are tested or validated on."""

import json
import shutil

import pytest
from datasets import ClassLabel, Dataset, Features, Value

from loraloom.training.config import DataSection
from loraloom.training.data import load_data
from loraloom.training.load import load_config
from loraloom.training.mixing import joined

from .support import assert_error


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mix_of(tmp_path, sizes, shares, **keys):
    """Sets of so many rows, whose texts say which set they are of; the first is `data.path`."""
    paths = []
    for i, size in enumerate(sizes):
        own = [{"text": f"set {i} row {n}", "label": ["no", "yes"][n % 2]} for n in range(size)]
        paths.append(write(tmp_path / f"{i}.jsonl", own))
    section = DataSection(path=paths[0], mix=dict(zip(paths[1:], shares, strict=True)), **keys)
    return load_data(section, "text-classification"), paths


def set_of(text):
    return int(text.split()[1])


@pytest.mark.parametrize("until", ["first", "all"])
@pytest.mark.parametrize("limit", [None, 400])
@pytest.mark.parametrize(("sizes", "shares"), [((4000, 4000), (0.3,)), ((3000, 500, 900), (0.2, 0.35))])
def test_sets_are_mixed_by_their_shares(tmp_path, sizes, shares, until, limit):
    """A count of n draws with share p has the standard deviation sqrt(n p (1 - p)); four of them are allowed."""
    data, paths = mix_of(tmp_path, sizes, shares, mix_until=until, max_train=limit)
    found = data.train["text"][:]
    assert limit is None or len(found) == limit
    assert data.sources == {path: sum(set_of(text) == i for text in found) for i, path in enumerate(paths)}
    for path, share in zip(paths, (1 - sum(shares), *shares), strict=True):
        if limit and until == "all":
            break  # a row that came three times is kept three times or not at all
        assert abs(data.sources[path] - len(found) * share) < 4 * (len(found) * share * (1 - share)) ** 0.5
    if until == "first":
        assert len(set(found)) == len(found)
    elif not limit:
        assert len(set(found)) == sum(sizes) - len(data.test) - len(data.validation)


def test_a_mixed_set_has_no_part_in_test_and_validation(tmp_path):
    """Also not where it holds rows of `data.path`: those that are tested or validated on are left out."""
    plain, _ = mix_of(tmp_path, (2000,), ())
    data, (path, _) = mix_of(tmp_path, (2000, 2000), (0.5,))
    assert data.test[:] == plain.test[:]
    assert data.validation[:] == plain.validation[:]
    copy = str(shutil.copy(path, tmp_path / "copy.jsonl"))
    again = load_data(DataSection(path=path, mix={copy: 0.5}, mix_until="all"), "text-classification")
    assert again.test[:] == plain.test[:]
    assert {*again.test["text"], *again.validation["text"]}.isdisjoint(again.train["text"])
    assert set(again.train["text"]) == set(plain.train["text"])


def test_mixing_is_a_function_of_the_rows(tmp_path):
    one, _ = mix_of(tmp_path, (300, 400), (0.4,))
    other, _ = mix_of(tmp_path, (300, 400), (0.4,))
    assert one.train[:] == other.train[:]


def test_labels_of_a_mix_are_those_of_all_sets(tmp_path):
    paths = [write(tmp_path / f"{w}.jsonl", [{"text": f"{w} {i}", "label": w} for i in range(80)]) for w in ("b", "a")]
    data = load_data(DataSection(path=paths[0], mix={paths[1]: 0.5}), "text-classification")
    assert data.label_names == ["a", "b"]
    for row in data.train:
        assert row["text"].split()[0] == data.label_names[row["label"]]
    assert set(data.train["label"]) == {0, 1}


@pytest.mark.parametrize(
    "other", [[{"words": "x", "tag": 1}], [{"text": ["a"], "label": "no"}] * 3], ids=["names", "types"]
)
def test_a_set_that_does_not_fit_the_mix_is_named(tmp_path, other):
    rows = write(tmp_path / "rows.jsonl", [{"text": f"text {i}", "label": ["no", "yes"][i % 2]} for i in range(40)])
    path = write(tmp_path / "other.jsonl", other)
    section = DataSection(path=rows, mix={path: 0.5})
    assert_error("other-columns", "other.jsonl", lambda: load_data(section, "text-classification"))


@pytest.mark.parametrize("names", [["cat", "dog"], None])
def test_numbers_of_other_classes_are_not_taken_for_ours(names):
    """In a folder of images or a set of the hub a label is a number: 0 is a cat here and a bird there."""

    def rows(names, labels):
        label = Value("string") if names is None else ClassLabel(names=names)
        return Dataset.from_dict({"label": labels}, features=Features({"label": label}))

    first, same = rows(names, ["cat", "dog"]), rows(names, ["dog"])
    assert joined(first, {"same": same, "words": rows(None, ["dog"])}).num_rows == 4
    for other in (["bird", "dog"], ["dog", "cat"], ["cat", "dog", "eel"]):
        assert_error("other-classes", "dog", lambda other=other: joined(first, {"other": rows(other, ["dog"])}))


@pytest.mark.parametrize(
    ("keys", "code"),
    [
        ("{mix: {a.jsonl: 0.5, b.jsonl: 0.5}}", "mix-shares"),
        ("{mix: {a.jsonl: -0.1}}", "mix-shares"),
        ("{mix_until: all}", "no-meaning"),
    ],
)
def test_shares_that_leave_nothing_are_refused(tmp_path, keys, code):
    path = tmp_path / "RUN.yaml"
    path.write_text(f"data: {keys}")
    assert_error(code, "data.mix", lambda: load_config(path))
