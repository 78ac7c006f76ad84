"""bfloat16 activations times float32 factors, split into parts: against float64, by the way an accelerator takes.

The products of bfloat16 matrices into float32 are made here by multiplying their copies in float32, which is exact.
"""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from loraloom.update import split
from loraloom.update.linear import adapted_linear
from loraloom.update.node import LinearMap
from loraloom.update.terms import Term

TOKENS, IN, OUT, R = 300, 256, 192, 8
UNIT = 2.0**-9  # of rounding to bfloat16, relative


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    def product(a, b, alpha=1.0):
        assert a.dtype is b.dtype is torch.bfloat16
        return alpha * (a.float() @ b.float())

    monkeypatch.setattr(split, "product", product)
    monkeypatch.setattr(split, "supported", lambda device, dtype: dtype is torch.bfloat16)


def layer(scaling, rank=R):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator).to(dtype)

    x, W, g = (normal(*shape, dtype=torch.bfloat16) for shape in ((TOKENS, IN), (OUT, IN), (TOKENS, OUT)))
    A, B = normal(rank, IN), normal(OUT, rank)
    return x.requires_grad_(), W, g, Term(A.requires_grad_(), B.requires_grad_(), scaling=scaling)


def error(value, exact):
    return ((value.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.7])
def test_the_update_in_two_parts_per_factor(scaling):
    """Two parts hold 16 bits: the terms left out are 2^-17 of A, of B and of h each."""
    x, _, _, term = layer(scaling)
    h = split.split_hidden(split.product(x.detach(), split.split_rows(term.A.detach()).t()), R)
    update = scaling * (h.double() @ split.split_columns(term.B.detach()).double().t())
    exact = scaling * (x.double() @ term.A.double().t() @ term.B.double().t()).detach()
    assert error(update, exact) < 3 * 2.0**-17
    plain = scaling * (x @ term.A.bfloat16().t() @ term.B.bfloat16().t())
    assert error(plain.double(), exact) > 100 * error(update, exact)


@pytest.mark.parametrize("through", ["weight", "map", "base output"])
@pytest.mark.parametrize("scaling", [1.0, 0.7])
@pytest.mark.parametrize("rank", [R, 64])
def test_output_and_gradients(scaling, through, rank):
    """The output is rounded once; gradients have the rounding of one bfloat16 number per factor."""
    x, W, g, term = layer(scaling, rank)
    weight = {"weight": W, "map": LinearMap(lambda x: x @ W.t(), lambda: W)}.get(through)
    base_out = None if weight is not None else x.detach() @ W.t()
    before = None if base_out is None else base_out.clone()
    y = adapted_linear(x, term, W=weight, base_out=base_out)
    gradients = torch.autograd.grad(y, [x, term.A, term.B], g)
    assert base_out is None or torch.equal(base_out, before)

    x64, A64, B64 = (t.detach().double().requires_grad_() for t in (x, term.A, term.B))
    z = x64.detach() @ W.double().t() if weight is None else x64 @ W.double().t()
    exact = z + scaling * (x64 @ A64.t() @ B64.t())
    expected = torch.autograd.grad(exact, [x64, A64, B64], g.double())
    # z is rounded by the product that makes it, and the sum once more.
    assert error(y, exact.detach()) < 2 * UNIT
    for gradient, value in zip(gradients, expected, strict=True):
        assert error(gradient, value) < 2 * UNIT
        assert gradient.shape == value.shape
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("wanted", ["x", "A", "B"])
def test_each_gradient_alone(wanted):
    x, W, g, term = layer(2.0)
    leaves = {"x": x, "A": term.A, "B": term.B}
    (together,) = torch.autograd.grad(adapted_linear(x, term, W=W), leaves[wanted], g)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == wanted)
    (alone,) = torch.autograd.grad(adapted_linear(x, term, W=W), leaves[wanted], g)
    assert torch.equal(alone, together)


def test_the_parts_are_kept_only_where_they_are_small():
    for rank, kept in ((R, True), (128, False)):
        x, W, _, term = layer(1.0, rank)
        saved = []
        with saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            adapted_linear(x, term, W=W)
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
        known = {t.data_ptr() for t in (x, W, term.A, term.B)}
        own = sum(size for pointer, size in sizes.items() if pointer not in known)
        hidden, parts = 2 * TOKENS * 4 * rank, 2 * rank * (3 * IN + 4 * OUT)
        assert own == hidden + (parts if kept else 0)
        assert kept == (parts <= x.nbytes)
