"""DoRA on few tokens, whose norm comes from the same product as its output."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from loraloom.update import linear
from loraloom.update.linear import adapted_linear
from loraloom.update.one_pass import OnePass
from loraloom.update.terms import Term
from loraloom.update.update import Update, row_norm_of

TOKENS, IN, OUT, R, SCALING = 3, 4, 6, 2, 1.7


def layer(dtype, bias):
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    term = Term(leaf(R, IN), leaf(OUT, R), scaling=SCALING)
    return leaf(TOKENS, IN), leaf(OUT, IN), term, leaf(OUT), leaf(OUT) if bias else None


def one_pass(x, W, term, m, bias, given=None):
    def norm(W_A):
        if given is not None:
            given.append(W_A.clone())
        return row_norm_of(W.detach(), [Term(*(t.detach() for t in term[:2]), scaling=SCALING)], None, W_A)

    return OnePass.apply(x, term.A, term.B, term.scaling, W, bias, m, norm)


def dense(x, W, term, m, bias):
    weight = W + Update([term]).delta()
    return F.linear(x, (m / weight.detach().norm(dim=1))[:, None] * weight, bias)


@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_those_of_the_dense_weight(bias):
    given = []
    x, W, term, m, b = layer(torch.float64, bias)
    wanted = [t for t in (x, W, term.A, term.B, m, b) if t is not None]
    y, expected = one_pass(x, W, term, m, b, given), dense(x, W, term, m, b)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(given[0], (W @ term.A.T).detach())
    for gradient, exact in zip(*(torch.autograd.grad(t.square().sum(), wanted) for t in (y, expected)), strict=True):
        torch.testing.assert_close(gradient, exact)


def test_a_norm_that_is_known_changes_nothing_but_rounding_and_saves_the_same():
    x, W, term, m, b = layer(torch.float32, True)
    norm = row_norm_of(W.detach(), [Term(*(t.detach() for t in term[:2]), scaling=SCALING)])
    saved, outputs = [], []
    for given in (norm, lambda W_A: norm):
        shapes = []
        with saved_tensors_hooks(lambda t, shapes=shapes: shapes.append((t.shape, t.dtype)) or t, lambda t: t):
            outputs.append(OnePass.apply(x, term.A, term.B, SCALING, W, b, m, given))
        saved.append(shapes)
    assert saved[0] == saved[1]
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("wanted", ["x", "A", "B", "W", "m", "bias"])
def test_each_gradient_when_only_that_one_is_asked_for(wanted):
    x, W, term, m, b = layer(torch.float64, True)
    leaves = {"x": x, "A": term.A, "B": term.B, "W": W, "m": m, "bias": b}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    gradients = [torch.autograd.grad(f(x, W, term, m, b).square().sum(), leaves[wanted])[0] for f in (one_pass, dense)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("bias", [False, True])
def test_second_derivatives(bias):
    # The norm is a constant to the first derivative, so it has to be one to the second.
    x, W, term, m, b = layer(torch.float64, bias)
    norm = (W + Update([term]).delta()).norm(dim=1).detach()
    parts = [t for t in (x, W, term.A, term.B, m, b) if t is not None]

    def run(*_):
        return OnePass.apply(x, term.A, term.B, term.scaling, W, b, m, lambda _: norm).square()

    assert torch.autograd.gradgradcheck(run, parts)


def test_two_backward_passes_give_the_same_gradients():
    x, W, term, m, b = layer(torch.float64, True)
    y = one_pass(x, W, term, m, b).sum()
    first, second = (torch.autograd.grad(y, (x, term.A, term.B, m), retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["float32", "float64", "norm known", "inference", "many tokens"])
def test_where_it_is_used(case, monkeypatch):
    used = []
    monkeypatch.setattr(linear.OnePass, "apply", lambda *args: used.append(1) or torch.zeros(len(args[0]), OUT))
    x, W, term, m, b = layer(torch.float64 if case == "float64" else torch.float32, True)
    x = x.repeat(200, 1) if case == "many tokens" else x
    norm = torch.ones_like(m)
    with torch.inference_mode(case == "inference"):
        y = adapted_linear(
            x, term, W=W, bias=b, magnitude=m, norm=norm.detach() if case == "norm known" else lambda W_A: norm
        )
    assert y.shape == (len(x), OUT)
    assert bool(used) == (case in ("float32", "norm known"))


def test_no_tokens():
    x, W, term, m, b = layer(torch.float32, True)
    y = adapted_linear(x[:0, None], term, W=W, bias=b, magnitude=m, norm=lambda W_A: torch.ones_like(m).detach())
    assert y.shape == (0, 1, OUT)
    y.sum().backward()
    assert (m.grad == 0).all()


def test_the_output_may_be_changed_in_place():
    x, W, term, m, b = layer(torch.float32, True)
    y, expected = (F.relu(f(x, W, term, m, b), inplace=True) for f in (one_pass, dense))
    gradients = [torch.autograd.grad(t.sum(), (x, m)) for t in (y, expected)]
    for gradient, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, exact)
