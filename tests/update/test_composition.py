"""Weights of a composition's members: true gradients, projections, layers that share a v, checks of what is saved."""

import copy

import pytest
import torch
from torch import nn

from loraloom.update.composition import CONSTRAINTS, Composition, LayerComposition, Tie, member_weights, project
from loraloom.update.simplex import project_simplex

MEMBERS = [{"name": name, "source": "here", "sha256": ""} for name in "abc"]


def composition(**values):
    return Composition(**{"members": MEMBERS, "ranks": {"x.0.q": [2, 0, 1], "x.1.q": [1, 3, 1]}} | values)


def loss(w, D, target):
    return (torch.einsum("n,noi->oi", w, D) - target).square().sum()


@pytest.mark.parametrize("present", [None, torch.tensor([True, False, True, True, True])], ids=["all", "some"])
def test_softmax_gradient_is_the_true_one(present):
    D, target = torch.randn(5, 4, 3).double(), torch.randn(4, 3).double()
    v = torch.randn(5).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: loss(member_weights(v, present, "softmax"), D, target), v)

    (grad,) = torch.autograd.grad(loss(member_weights(v, present, "softmax"), D, target), v)
    among = torch.ones(5).bool() if present is None else present
    exp = v.exp() * among
    (dense,) = torch.autograd.grad(loss(exp / exp.sum(), D, target), v, retain_graph=True)
    torch.testing.assert_close(grad, dense)
    # With the denominator detached, as in the first public implementation, it would be another direction.
    (detached,) = torch.autograd.grad(loss(exp / exp.sum().detach(), D, target), v)
    assert (grad - detached).norm() > 0.1 * grad.norm()


def test_softmax_has_no_overflow_and_leaves_absent_members_alone():
    v = torch.tensor([1e4, -1e4, 9999.0], requires_grad=True)
    w = member_weights(v, torch.tensor([True, False, True]), "softmax")
    torch.testing.assert_close(w, torch.tensor([0.73105858, 0.0, 0.26894142]))
    w[0].backward()
    assert v.grad.isfinite().all()
    assert v.grad[1] == 0


def test_projection_is_on_the_simplex_of_those_it_is_among():
    v, among = torch.tensor([0.9, 5.0, 0.3, -2.0]), torch.tensor([True, False, True, True])
    w = project(v, among)
    torch.testing.assert_close(w, torch.tensor([0.8, 0.0, 0.2, 0.0]))
    torch.testing.assert_close(project(w, among), w)
    assert project(v, None).sum() == 1


@pytest.mark.parametrize("normalize", ["present", "all"])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("total", [1, 2.5])
def test_weights_start_equal_among_those_that_add_up(constraint, normalize, total):
    part = LayerComposition(composition(constraint=constraint, normalize=normalize, total=total), "x.0.q")
    share = 1 / 2 if normalize == "present" else 1 / 3
    torch.testing.assert_close(part.gate(part.start()), torch.full((3,), share * total))


def test_the_total_of_a_scaled_softmax_trains_with_the_logits():
    D, target = torch.randn(3, 4, 3).double(), torch.randn(4, 3).double()
    v = torch.randn(4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: loss(member_weights(v, None, "scaled_softmax"), D, target), v)
    torch.testing.assert_close(member_weights(v, None, "scaled_softmax").sum(), v[-1])


def test_the_gate_repeats_each_weight_for_the_rows_of_its_member():
    part = LayerComposition(composition(constraint="free"), "x.1.q")
    v = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    gate = part.gate(v)
    assert gate.tolist() == [1, 2, 2, 2, 3]
    gate.sum().backward()
    assert v.grad.tolist() == [1, 3, 1]


@pytest.mark.parametrize("scope", ["layer", "module_type", "model"])
def test_groups_of_a_scope(scope):
    made = composition(scope=scope, ranks={f"m.{i}.{k}": [1, 1, 1] for i in (0, 11) for k in ("q", "v.q")})
    groups = {made.group(module) for module in made.ranks}
    assert len(groups) == {"layer": 4, "module_type": 2, "model": 1}[scope]


class Copies(nn.Module):
    def __init__(self, v):
        super().__init__()
        self.weight = nn.Parameter(v.clone())


def test_every_copy_of_a_tied_v_gets_the_gradient_of_a_single_v():
    v, coefficients = torch.randn(4), torch.randn(3, 4)
    factors = [Copies(v) for _ in range(3)]
    tie, single = Tie(factors), v.clone().requires_grad_()
    for _ in range(2):  # the graph behind the tie serves every step
        (single.softmax(0) * coefficients).sum().mul(2).backward()
        for _ in range(2):
            sum((tie(f.weight).softmax(0) * c).sum() for f, c in zip(factors, coefficients, strict=True)).backward()
        for factor in factors:
            torch.testing.assert_close(factor.weight.grad, single.grad)
            assert torch.equal(factor.weight.grad, factors[0].weight.grad)
    factors[0].weight = nn.Parameter(v.clone())  # as PEFT does when it casts
    factors[1].weight.grad = None
    tie(factors[0].weight).sum().backward()
    assert torch.equal(factors[0].weight.grad, torch.ones(4))
    assert torch.equal(factors[1].weight.grad, torch.ones(4))


def test_a_copy_of_tied_layers_is_tied_among_itself():
    factors = nn.ModuleList([Copies(torch.zeros(2)) for _ in range(2)])
    factors.tie = Tie(list(factors))
    factors.tie(factors[0].weight).sum().backward()
    other = copy.deepcopy(factors)
    other.zero_grad()
    other.tie(other[0].weight).sum().backward()
    assert torch.equal(other[1].weight.grad, torch.ones(2))
    assert torch.equal(factors[1].weight.grad, torch.ones(2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scope": "head"}, "scope='head'.*layer, module_type, model"),
        ({"constraint": "sigmoid"}, "constraint='sigmoid'"),
        ({"normalize": "none"}, "normalize='none'"),
        ({"members": MEMBERS[:2]}, "ranks for 3 members, but there are 2"),
        ({"members": [*MEMBERS[:2], MEMBERS[0]]}, "a name of its own"),
        ({"members": []}, "a name of its own"),
        ({"total": 0}, "total=0"),
        ({"total": float("inf")}, "total=inf"),
        ({"total": "2"}, "total='2'"),
        ({"ranks": {"q": [0, 0, 0]}}, "not all 0"),
        ({"ranks": {"q": [1, -1, 0]}}, "integers >= 0"),
        ({"biased": ["v"]}, "biased modules"),
    ],
)
def test_what_does_not_fit_together_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        composition(**changes)


def test_from_dict_refuses_unknown_and_missing_keys():
    with pytest.raises(ValueError, match="'wings'"):
        Composition.from_dict({"members": MEMBERS, "ranks": {}, "wings": 2})
    with pytest.raises(ValueError, match="ranks is missing"):
        Composition.from_dict({"members": MEMBERS})


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_weights_never_wait_for_the_device_and_compile(constraint):
    """Tensors on the meta device have no values to wait for; a break in the graph would be an error."""
    layer = LayerComposition(composition(constraint=constraint), "x.0.q")
    layer.gate(nn.Parameter(layer.start().to("meta")))
    layer = LayerComposition(composition(constraint=constraint), "x.0.q")
    v = nn.Parameter(layer.start() + torch.tensor([0.5, 0.1, -0.2, 0.3])[: len(layer.start())])

    def run():
        return layer.gate(v).square().sum()

    values = []
    for f in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        loss = f()
        values.append((loss.detach(), *torch.autograd.grad(loss, v)))
    torch.testing.assert_close(values[1], values[0])


@pytest.mark.parametrize("seed", range(5))
def test_projection_among_some_is_that_of_these_alone(seed):
    generator = torch.Generator().manual_seed(seed)
    v = 3 * torch.randn(9, generator=generator)
    among = torch.rand(9, generator=generator) < 0.5
    among[seed] = True
    projected = project(v, among)
    torch.testing.assert_close(projected[among], project_simplex(v[among]))
    assert not projected[~among].any()
