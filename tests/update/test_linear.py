"""The pure maths: gradients by hand against finite differences, folding, the factored norm, recomputed dropout."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from loraloom.update import node
from loraloom.update.linear import adapted_linear
from loraloom.update.node import AdaptedLinear
from loraloom.update.rescale import Rescaled, rescale
from loraloom.update.terms import Term, fold, scale, stack
from loraloom.update.update import Update, row_norm
from tests.tuner.support import assert_near

TOKENS, IN, OUT, R = 5, 4, 6, 3
COMBINATIONS = list(itertools.product([False, True], repeat=4))
COMBINATION_IDS = [
    "+".join(n for n, on in zip(("mixer", "gate", "dora", "bias"), c, strict=True) if on) or "lora"
    for c in COMBINATIONS
]
every_combination = pytest.mark.parametrize(("mixer", "gate", "dora", "bias"), COMBINATIONS, ids=COMBINATION_IDS)


class CountLaunches(TorchDispatchMode):
    """Counts the operations that give a tensor and no view."""

    launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.launches += torch.is_tensor(result) and not func.is_view
        return result


def tensors(mixer, gate, dora, bias, dtype=torch.float64, rank=R, sizes=(TOKENS, IN, OUT)):
    """x, W and the adapter's parts, all leaves that want gradients (norm excepted)."""
    tokens, inputs, outputs = sizes
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    W, term = (
        leaf(outputs, inputs),
        Term(
            leaf(rank, inputs), leaf(outputs, rank), leaf(rank, rank) if mixer else None, leaf(1) if gate else None, 1.7
        ),
    )
    norm = (W + Update([term]).delta()).norm(dim=1).detach() if dora else None
    return leaf(tokens, inputs), W, term, leaf(outputs) if dora else None, norm, leaf(outputs) if bias else None


def reference(x, W, term, magnitude, norm, bias):
    """Plain differentiable operations on the dense weight."""
    A = term.A if term.M is None else term.M @ term.A
    weight = W + term.scaling * (1 if term.gate is None else term.gate) * (term.B @ A)
    if magnitude is not None:
        weight = (magnitude / norm).unsqueeze(1) * weight
    return F.linear(x, weight, bias)


def ours(x, W, term, magnitude, norm, bias, through="weight", dropout=0.0):
    base = {"W": W} if "weight" in through else {"base_out": F.linear(x, W, bias)}
    if "node" in through:  # whatever adapted_linear would choose for these dtypes
        A, B, M, gate, scaling = term
        parts = x, A, B, M, gate, scaling, dropout
        W, base_out = base.get("W"), base.get("base_out")
        if magnitude is None:
            return AdaptedLinear.apply(*parts, base_out, W, None if W is None else bias)
        if base_out is not None and bias is not None:
            base_out = base_out - bias
        z = AdaptedLinear.apply(*parts, base_out, W, None)
        return Rescaled.apply(z, magnitude, norm, bias, W is not None)
    return adapted_linear(x, term, bias=bias, magnitude=magnitude, norm=norm, dropout=dropout, **base)


both_ways = pytest.mark.parametrize("through", ["weight", "base output"])
all_ways = pytest.mark.parametrize("through", ["weight", "base output", "weight, node", "base output, node"])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@all_ways
@every_combination
def test_gradcheck_in_float64(mixer, gate, dora, bias, through, dropout):
    # Each entry of each tensor costs two evaluations: the fewest sizes that all differ.
    x, W, term, magnitude, norm, offset = tensors(mixer, gate, dora, bias, rank=2, sizes=(3, 4, 5))
    parts = [t for t in (x, W, term.A, term.B, term.M, term.gate, magnitude, offset) if t is not None]

    def run(*_):
        torch.manual_seed(5)  # the same mask in every evaluation
        return ours(x, W, term, magnitude, norm, offset, through, dropout=dropout)

    assert torch.autograd.gradcheck(run, parts)


@all_ways
@every_combination
def test_outputs_and_gradients_are_those_of_the_dense_weight(mixer, gate, dora, bias, through):
    x, W, term, magnitude, norm, offset = tensors(mixer, gate, dora, bias)
    parts = [t for t in (x, W, term.A, term.B, term.M, term.gate, magnitude, offset) if t is not None]
    expected = reference(x, W, term, magnitude, norm, offset)
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weight).sum(), parts)
    output = ours(x, W, term, magnitude, norm, offset, through)
    grads = torch.autograd.grad((output * weight).sum(), parts)
    assert_near(output, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_near(grad, expected_grad)


@all_ways
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("wanted", ["x", "W", "bias", "A", "B", "M", "gate", "magnitude"])
def test_each_gradient_is_right_when_only_that_one_is_asked_for(wanted, dora, through):
    x, W, term, magnitude, norm, bias = tensors(True, True, dora, True)
    leaves = {"x": x, "W": W, "bias": bias, "magnitude": magnitude} | {
        n: getattr(term, n) for n in ("A", "B", "M", "gate")
    }
    if leaves[wanted] is None:
        wanted = "x"
    for tensor in filter(torch.is_tensor, leaves.values()):
        tensor.requires_grad_(tensor is leaves[wanted])
    output, expected = ours(x, W, term, magnitude, norm, bias, through), reference(x, W, term, magnitude, norm, bias)
    (grad,) = torch.autograd.grad(output.square().sum(), leaves[wanted])
    (expected_grad,) = torch.autograd.grad(expected.square().sum(), leaves[wanted])
    assert_near(grad, expected_grad)


@both_ways
@every_combination
def test_dropout_in_backward_uses_the_mask_of_the_forward(mixer, gate, dora, bias, through):
    """The mask is drawn again in backward. Seen from outside: the output is linear in the mask, so it can be solved
    for, and the gradients must be those of the dense formula with that very mask."""
    x, W, term, magnitude, norm, offset = tensors(mixer, gate, dora, bias, rank=IN)
    p = 0.5
    output = ours(x, W, term, magnitude, norm, offset, through, dropout=p)
    with torch.no_grad():
        z = output if magnitude is None else rescale(output, norm / magnitude, offset)
        low_rank = z - F.linear(x, W, offset)
        dropped = low_rank @ torch.linalg.pinv(Update([term]).delta()).T  # the low-rank path's input, IN <= rank, OUT
        mask = (dropped / x).round(decimals=6)
    assert set(mask.unique().tolist()) == {0.0, 2.0}

    A = term.A if term.M is None else term.M @ term.A
    g = term.scaling * (1 if term.gate is None else term.gate)
    expected = F.linear(x, W, offset) + g * F.linear(F.linear(x * mask, A), term.B)
    if magnitude is not None:
        expected = rescale(expected, magnitude / norm, offset)
    assert_near(output, expected)
    parts = [t for t in (x, W, term.A, term.B, term.M, term.gate, magnitude, offset) if t is not None]
    weight = torch.randn_like(expected)
    for grad, expected_grad in zip(
        torch.autograd.grad((output * weight).sum(), parts),
        torch.autograd.grad((expected * weight).sum(), parts),
        strict=True,
    ):
        assert_near(grad, expected_grad)


def test_dropout_is_determined_by_the_seed_and_differs_between_calls():
    x, W, term, *_ = tensors(False, False, False, False)

    def run():
        return ours(x, W, term, None, None, None, dropout=0.5)

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)


def test_dropout_keeps_the_expectation():
    x, W, term, *_ = tensors(False, False, False, False)
    with torch.no_grad():
        many = ours(x.repeat(20000, 1), W, term, None, None, None, dropout=0.3).reshape(20000, TOKENS, OUT)
        mean, deviation = many.mean(0), many.std(0)
        assert ((mean - reference(x, W, term, None, None, None)).abs() < 5 * deviation / 20000**0.5).all()


@both_ways
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_blocks_of_rows_change_nothing_but_rounding(dora, dropout, through, monkeypatch):
    """With a bf16 input the work goes through blocks of rows; the same rows in one block must agree."""
    x, W, term, magnitude, norm, _ = tensors(True, True, dora, False, torch.float32)
    x = x.detach().to(torch.bfloat16).requires_grad_()
    W = W.detach().to(torch.bfloat16)
    parts = [t for t in (x, term.A, term.B, term.M, term.gate, magnitude) if t is not None]

    def run():
        torch.manual_seed(2)
        output = ours(x, W, term, magnitude, norm, None, through, dropout=dropout)
        return output, *torch.autograd.grad(output.float().square().sum(), parts)

    whole = run()
    monkeypatch.setattr(node, "_BLOCK_ROWS", 2)
    for blocked, value in zip(run(), whole, strict=True):
        assert_near(blocked, value, torch.bfloat16 if value.dtype == torch.bfloat16 else torch.float32, factor=3)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@all_ways
@every_combination
def test_second_derivatives(mixer, gate, dora, bias, through, dropout):
    x, W, term, magnitude, norm, offset = tensors(mixer, gate, dora, bias, rank=2, sizes=(2, 3, 4))
    parts = [t for t in (x, W, term.A, term.B, term.M, term.gate, magnitude, offset) if t is not None]

    def run(*_):
        torch.manual_seed(5)
        return ours(x, W, term, magnitude, norm, offset, through, dropout=dropout).square()

    assert torch.autograd.gradgradcheck(run, parts)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_the_gradient_that_can_be_differentiated_is_the_same(dora, monkeypatch):
    """bf16 input, and dropout that is drawn in blocks."""
    monkeypatch.setattr(node, "_BLOCK_ROWS", 2)
    x, W, term, magnitude, norm, _ = tensors(True, True, dora, False, torch.float32)
    x, W = (t.detach().to(torch.bfloat16).requires_grad_() for t in (x, W))
    parts = [t for t in (x, term.A, term.B, term.M, term.gate, magnitude) if t is not None]

    def run(create_graph):
        torch.manual_seed(2)
        output = ours(x, W, term, magnitude, norm, None, dropout=0.5)
        return torch.autograd.grad(output.float().square().sum(), parts, create_graph=create_graph)

    for twice, once in zip(run(True), run(False), strict=True):
        assert_near(twice, once, torch.bfloat16)
        assert once.abs().sum() > 0


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_nothing_of_the_inputs_size_is_saved_in_another_dtype(dora):
    """bf16 base and input, float32 adapters: x is saved as it is, and beside it only h, and z for DoRA."""
    tokens, width, rank = 32, 64, 4
    x = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
    W = torch.randn(width, width, dtype=torch.bfloat16)
    term = Term(torch.randn(rank, width, requires_grad=True), torch.randn(width, rank, requires_grad=True))
    magnitude, norm = (torch.ones(width, requires_grad=True), torch.ones(width)) if dora else (None, None)
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(x, W, term, magnitude, norm, None)
    own = {
        t.data_ptr(): t
        for t in saved
        if t.data_ptr() not in {x.data_ptr(), W.data_ptr()} and t.numel() >= tokens * rank
    }
    own = [t for t in own.values() if t.shape not in {term.A.shape, term.B.shape, term.B.T.shape}]
    expected = [(tokens, rank)] + ([(tokens, width)] if dora else [])
    assert sorted(tuple(t.shape) for t in own) == sorted(expected)
    assert all(t.dtype == torch.bfloat16 for t in own if t.shape == (tokens, width))


ranks = st.lists(st.integers(1, 4), min_size=1, max_size=4)


def some_terms(sizes, mixers, gates, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        Term(normal(r, IN), normal(OUT, r), normal(r, r) if mixers else None, normal(1) if gates else None, 0.5 + i)
        for i, r in enumerate(sizes)
    ]


@settings(max_examples=40, deadline=None)
@given(sizes=ranks, mixers=st.booleans(), gates=st.booleans(), seed=st.integers(0, 99))
def test_stack_fold_and_delta_are_the_sum_of_the_products(sizes, mixers, gates, seed):
    terms = some_terms(sizes, mixers, gates, seed)
    expected = sum(
        (1 if t.gate is None else t.gate) * t.scaling * (t.B @ (t.A if t.M is None else t.M @ t.A)) for t in terms
    )
    A, B = fold(terms)
    assert_near(B @ A, expected, torch.float32 if gates or len(sizes) > 1 else torch.float64)
    assert_near(Update(terms).delta(), B @ A)
    assert_near(Update([stack(terms)]).delta(), expected, torch.float32)


@settings(max_examples=40, deadline=None)
@given(sizes=ranks, size=st.sampled_from([1e-4, 1e-2, 1.0, 1e2]), seed=st.integers(0, 99))
def test_the_factored_norm_is_the_norm(sizes, size, seed):
    W = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed + 1))
    A, B = (f.float() for f in fold(some_terms(sizes, True, True, seed)))
    B = B * size
    exact = (W.double() + B.double() @ A.double()).norm(dim=1)
    assert_near(row_norm(W, A, B), exact, torch.float32, factor=10)


@pytest.mark.parametrize("gates", ["none", "some", "all"])
@pytest.mark.parametrize("scalings", [[0.5] * 6, [0.5, 2.0, 0.5, 1.0, 3.0, 0.5]], ids=["equal", "unequal"])
def test_a_sum_of_adapters_makes_no_tensor_for_each_of_them(scalings, gates):
    """Beside the two stacked factors: the stacked gates, and their product with the scalings."""
    terms = [
        Term(torch.randn(2, IN), torch.randn(OUT, 2), None, torch.ones(1) if i < open_gates else None, s)
        for i, s in enumerate(scalings)
        for open_gates in [{"none": 0, "some": 3, "all": 6}[gates]]
    ]
    stack(terms)  # constants are made once
    with CountLaunches() as counter:
        term = stack(terms)
    assert counter.launches == 2 + (gates != "none") * (1 + (len({*scalings}) > 1))
    expected = sum(t.scaling * (t.B @ t.A) for t in terms)
    torch.testing.assert_close((term.B * scale(term)) @ term.A, expected)


@both_ways
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_mask_that_is_kept_is_that_of_the_forward(through, dtype, monkeypatch):
    """As in a CUDA graph, whose replays draw from torch's own generator, in one block of rows and in several."""
    monkeypatch.setattr(node, "_capturing", lambda device: True)
    monkeypatch.setattr(node, "_BLOCK_ROWS", 2)
    x, W, term, *_ = tensors(True, True, False, False)
    x = x.detach().to(dtype).requires_grad_()
    W = W.detach().to(dtype)
    torch.manual_seed(3)
    output = ours(x, W, term, None, None, None, through, dropout=0.5)
    torch.manual_seed(3)
    kept = torch.empty(TOKENS, IN, dtype=torch.bool).bernoulli_(0.5)
    expected = F.linear(x.double(), W.double()) + term.scaling * term.gate * F.linear(
        F.linear(x.double() * kept / 0.5, term.M @ term.A), term.B
    )
    assert_near(output, expected.detach(), dtype)
    parts = [x, term.A, term.B, term.M, term.gate]
    gradients = (torch.autograd.grad(y.double().square().sum(), parts) for y in (output, expected))
    for gradient, value in zip(*gradients, strict=True):
        assert_near(gradient, value, dtype, factor=3)
