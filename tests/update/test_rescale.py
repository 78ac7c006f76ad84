"""DoRA's own node: its output is saved in place of z, and the gradient is right whatever becomes of the output."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from loraloom.update.linear import adapted_linear
from loraloom.update.terms import Term
from loraloom.update.update import Update, row_norm

TOKENS, IN, OUT, R = 300, 24, 32, 4  # more tokens than torch's own operations serve


def layer(dtype=torch.float64, bias=False):
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    term = Term(leaf(R, IN), leaf(OUT, R), scaling=2.0)
    return leaf(TOKENS, IN), leaf(OUT, IN), term, leaf(OUT), leaf(OUT) if bias else None


def expected(x, W, term, m, bias, after):
    weight = W + Update([term]).delta()
    y = F.linear(x, (m / weight.detach().norm(dim=1))[:, None] * weight, bias)
    return after(y)


def run(x, W, term, m, bias, after, through="weight"):
    norm = row_norm(W.detach(), term.scaling * term.A.detach(), term.B.detach())
    base = {"W": W} if through == "weight" else {"base_out": F.linear(x, W, bias)}
    return after(adapted_linear(x, term, bias=bias, magnitude=m, norm=norm, **base))


AFTER = {
    "nothing": lambda y: y,
    "relu in place": lambda y: F.relu(y * 1.0) if y.is_leaf else F.relu(y, inplace=True),
    "scaled in place": lambda y: y.mul_(3.0),
    "overwritten": lambda y: y.mul_(0.0).add_(1.0) + y.sum() * 0,
}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("through", ["weight", "base output"])
@pytest.mark.parametrize("zeros", [0, 3])
def test_gradients(after, bias, through, zeros):
    x, W, term, m, b = layer(bias=bias)
    with torch.no_grad():
        m[:zeros] = 0
    wanted = [t for t in (x, W, term.A, term.B, m, b) if t is not None]
    y, value = (f(x, W, term, m, b, AFTER[after]) for f in (lambda *a: run(*a, through), expected))
    torch.testing.assert_close(y, value)
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    gradients = [torch.autograd.grad((t * weight).sum(), wanted) for t in (y, value)]
    for gradient, exact in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, exact)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("after", ["nothing", "scaled in place"])
def test_second_derivatives(bias, after):
    """Through the saved output, and through z computed again where the output has been changed."""
    x, W, term, m, b = layer(bias=bias)
    with torch.no_grad():
        m.clamp_(min=0.5)  # so that y tells z
    wanted = [t for t in (x, W, term.A, term.B, m, b) if t is not None]
    results = []
    for f in (run, expected):
        y = f(x, W, term, m, b, AFTER[after]).square().sum()
        first = torch.autograd.grad(y, wanted, create_graph=True)
        results.append(torch.autograd.grad(sum((i + 1) * t.square().sum() for i, t in enumerate(first)), wanted))
    for gradient, exact in zip(*results, strict=True):
        torch.testing.assert_close(gradient, exact)


@pytest.mark.parametrize("changed", ["m", "A"])
def test_a_parameter_changed_before_backward_is_an_error(changed):
    x, W, term, m, _ = layer()
    y = run(x, W, term, m, None, AFTER["scaled in place"])
    with torch.no_grad():
        (m if changed == "m" else term.A).mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def saved_by(x, W, term, m, b):
    W.requires_grad_(False)
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = run(x, W, term, m, b, AFTER["nothing"])
    return y, {t.data_ptr() for t in saved if t.shape == (TOKENS, OUT)}


@pytest.mark.parametrize("bias", [False, True])
def test_the_output_is_what_is_saved(bias):
    x, W, term, m, b = layer(torch.float32, bias=bias)
    y, saved = saved_by(x, W, term, m.detach().fill_(1.0).requires_grad_(), b)
    assert saved == {y.data_ptr()}


@pytest.mark.parametrize("ratio", [1.0, 15.0, 17.0, 1e6, float("inf")])
def test_the_gradient_of_m_beside_a_large_bias(ratio):
    """(y - b) / m has lost digits where b is many m: there z is saved. float32 against float64."""
    x, W, term, m, b = layer(torch.float32, bias=True)
    with torch.no_grad():
        m.fill_(1.0)
        m[3] = 1 / ratio
        b.clamp_(-1, 1)[3] = 1.0
    y, saved = saved_by(x, W, term, m, b)
    assert (saved == {y.data_ptr()}) == (ratio <= 16)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((y * weight).sum(), m)
    x64, W64, m64, b64 = (t.detach().double().requires_grad_() for t in (x, W, m, b))
    term64 = Term(term.A.detach().double(), term.B.detach().double(), scaling=term.scaling)
    (exact,) = torch.autograd.grad(
        (expected(x64, W64, term64, m64, b64, AFTER["nothing"]) * weight.double()).sum(), m64
    )
    # z is a sum of IN + R products; y - b is off by up to 16 units of z besides.
    units = (IN + R + 16) * torch.finfo(torch.float32).eps
    size = (x64.norm() * weight.double().norm(dim=0)).detach()
    assert ((gradient.double() - exact).abs() <= units * size).all()


def test_bfloat16_output_is_as_near_as_its_rounding():
    x, W, term, m, _ = layer(torch.float32)
    x, W = (t.detach().bfloat16() for t in (x, W))
    y = run(x.requires_grad_(), W, term, m, None, AFTER["nothing"])
    exact = expected(
        *(t.double() for t in (x, W)),
        Term(term.A.double(), term.B.double(), scaling=2.0),
        m.double(),
        None,
        AFTER["nothing"],
    )
    # The product that makes z, its sum with the update, and the scaling each round once.
    assert ((y.double() - exact).norm() / exact.norm()).item() < 3 * 2.0**-9
    y.sum().backward()
    assert x.grad.dtype is torch.bfloat16
