"""The table of learned weights, and the penalties."""

import pytest
import torch

from loraloom import compose
from loraloom.composition import format_weights, learned_weights, penalty
from loraloom.errors import InputError
from loraloom.optim import build_optimizer
from tests.composition.support import LOGITS, MEMBERS, PAPER, WEIGHTS, base, ids
from tests.refusals import coded


def test_the_table_has_a_line_per_layer_and_a_dash_for_an_absent_member(members):
    learned = learned_weights(compose(base(), members, WEIGHTS))
    lines = [line.split() for line in format_weights(learned).splitlines()]
    assert lines[0] == ["layer", *MEMBERS]
    assert ["plain", "0.700", "-", "1.500"] in lines
    assert lines[-1] == ["mean", "0.700", "-0.400", "1.500"]
    assert len(lines) == 7
    assert learned.to_dict()["layers"]["embed"] == {"squad": pytest.approx(0.7)}


def test_penalties_are_means_over_layers(members):
    model = compose(base(), members, WEIGHTS)
    layers = [torch.tensor(list(w.values())).double() for w in learned_weights(model).layers.values()]
    expected = {
        "l1": [w.abs().mean() for w in layers],
        "l2": [(w * w).sum() for w in layers],
        "entropy": [-(p * p.log()).sum() for p in (w.abs() / w.abs().sum() for w in layers)],
    }
    for kind, values in expected.items():
        assert penalty(model, **{kind: 3.0}).item() == pytest.approx(3 * (sum(values) / len(values)).item(), rel=1e-5)


@pytest.mark.parametrize("scope", ["layer", "model"])
@pytest.mark.parametrize(("entropy", "low"), [(1.0, True), (-1.0, False)])
def test_entropy_draws_weights_towards_one_member_or_all(members, entropy, low, scope):
    model = compose(base(), members, scope=scope, **PAPER)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if LOGITS in name:
                parameter.copy_(torch.tensor([0.5, 0.0, -0.5]))
    optimizer = build_optimizer(model, lr=1e-3)
    before = learned_weights(model).layers["plain"]["squad"]
    for _ in range(20):
        optimizer.zero_grad()
        penalty(model, entropy=entropy).backward()
        optimizer.step()
    assert (learned_weights(model).layers["plain"]["squad"] > before) == low


def test_a_weight_of_zero_has_a_finite_gradient(members):
    model = compose(base(), members, constraint="free")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    penalty(model, l1=1.0, l2=1.0, entropy=1.0).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_logits_have_their_own_rate_and_no_decay(members):
    model = compose(base(), members, modules_to_save=["mix"])
    groups = {group["name"]: group for group in build_optimizer(model, lr=1e-4).param_groups}
    assert groups["logits"]["lr"] == 5e-2
    assert groups["logits"]["weight_decay"] == 0
    assert len(groups["logits"]["params"]) == 5
    assert {"heads", "heads_no_decay", "logits"} == groups.keys()
    model(ids()).sum().backward()


def test_an_unknown_name_is_an_error(members):
    model = compose(base(), members)
    with pytest.raises(InputError, check=coded("no-adapter", "compostion", "composition")):
        learned_weights(model, "compostion")
    with pytest.raises(InputError, check=coded("no-adapter")):
        penalty(base())
