"""Intruders of a matrix against full SVDs in float64, and their mitigation against the dense formula."""

import json

import pytest
import torch

from loraloom.intruders.find import analyse_matrix
from loraloom.intruders.reduce import mitigate_matrix
from loraloom.intruders.solvers.basis import BasisCache, fingerprint, left_basis
from loraloom.intruders.solvers.matrix import RELATIVE_ZERO, TiledMatrix
from loraloom.intruders.solvers.measure import decide
from tests.intruders.support import SHAPES, adapted, base, cosines, mitigated, orthonormal, update

KINDS = ["flat", "decaying", "low rank"]
EVERY = pytest.mark.parametrize(("scope", "scale"), [("top", 0.75), ("all", 0.75), ("all", 0.0), ("top", 1.0)])


def case(shape, kind, strength=1.5, dora=False):
    W = base(*shape, kind)
    A, B = update(W, strength=strength)
    m = torch.linalg.vector_norm(W, dim=1) * (0.7 + 0.6 * torch.rand(len(W))) if dora else None
    return W, A, B, m


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [0.05, 1.0, 2.0])
@pytest.mark.parametrize("with_base", [False, True])
def test_verdicts_are_those_of_a_full_svd(shape, kind, strength, with_base):
    for dora in (False, True):
        W, A, B, m = case(shape, kind, strength, dora)
        expected = cosines(W, adapted(W, A, B, m))
        left = left_basis(W) if with_base else None
        clear = (expected - 0.5).abs() > 1e-3
        found = analyse_matrix(W, A, B, m, left)
        verdict = torch.zeros(10, dtype=torch.bool)
        verdict[found.intruders] = True
        assert torch.equal(verdict[clear], (expected < 0.5)[clear])
        reported = torch.tensor(found.cosines)
        if found.exact:
            torch.testing.assert_close(reported.double(), expected, rtol=0, atol=2e-3)
        else:
            assert (reported[verdict] >= expected[verdict] - 1e-3).all()
            assert (reported[~verdict] <= expected[~verdict] + 1e-3).all()


def test_the_cases_have_intruders_and_others():
    counts = [
        int((cosines(W, adapted(W, A, B)) < 0.5).sum())
        for W, A, B, _ in (case(SHAPES[0], "flat", strength) for strength in (0.05, 1.0, 2.0))
    ]
    assert counts[0] == 0
    assert 0 < counts[1] < 10
    assert 0 < counts[2] < 10


def test_most_is_decided_without_a_decomposition():
    W, A, B, _ = case((600, 600), "flat", 2.0)
    U = torch.linalg.svd(adapted(W, A, B)).U[:, :10].float()
    decision = decide(W, U, 0.5, torch.zeros(10))
    assert decision.decided.sum() >= 5
    assert not analyse_matrix(W, A[:4], B[:, :4], top_k=3).exact


def test_a_direction_outside_of_the_column_space_is_an_intruder():
    W, A, B, _ = case((420, 300), "flat")
    outside = torch.linalg.qr(torch.cat([W.double(), torch.randn(420, 8, dtype=torch.float64)], 1)).Q[:, 300:]
    B = (outside * 3).float()
    A = orthonormal(300, 8).T.float()
    found = analyse_matrix(W, A, B, top_k=8)
    assert found.intruders == list(range(8))
    assert max(analyse_matrix(W, A, B, base_left=left_basis(W), top_k=8).cosines) < 0.1


def test_a_weight_of_zero_makes_every_direction_an_intruder():
    A, B = update(base(300, 300), r=4)
    found = analyse_matrix(torch.zeros(300, 300), A, B)
    assert found.intruders == [0, 1, 2, 3]
    assert found.relative_norm is None


def test_nothing_added_is_no_intruder():
    W = base(300, 300)
    found = analyse_matrix(W, torch.zeros(4, 300), torch.zeros(300, 4))
    assert found.intruders == []
    assert found.relative_norm == found.effective_rank == found.stable_rank == 0


@pytest.mark.parametrize("dora", [False, True])
def test_numbers_of_the_report(dora):
    W, A, B, m = case((40, 30), "flat", dora=dora)
    found = analyse_matrix(W, A, B, m, name="layer")
    changed = adapted(W, A, B, m)
    assert found.shape == (40, 30)
    assert found.rank == 8
    assert found.relative_norm == pytest.approx(float((changed - W.double()).norm() / W.double().norm()), rel=1e-4)
    assert found.singular_values == pytest.approx(torch.linalg.svdvals(changed)[:10].tolist(), rel=1e-4)
    S = torch.linalg.svdvals(B.double() @ A.double())
    p = S[:8] / S[:8].sum()
    assert found.effective_rank == pytest.approx(float((-(p * p.log()).sum()).exp()), rel=1e-4)
    assert json.loads(json.dumps(found.to_dict()))["name"] == "layer"


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@EVERY
def test_mitigation_at_exact_rank_is_the_formula(shape, dora, scope, scale):
    W, A, B, m = case(shape, "flat", dora=dora)
    expected, count = mitigated(W, adapted(W, A, B, m), scale, scope)
    assert count > 0
    found = analyse_matrix(W, A, B, m)
    result = mitigate_matrix(W, A, B, found, scale=scale, scope=scope, magnitude=m)
    changed = adapted(W, result.A, result.B, result.magnitude)
    assert float((changed - expected).norm() / (expected - W).norm()) < 1e-4
    assert result.error == 0
    assert len(result.A) == 8 + (count if scale != 1 else 0)


def test_a_scale_of_one_gives_the_same_factors():
    W, A, B, m = case((320, 320), "flat", dora=True)
    found = analyse_matrix(W, A, B, m)
    for rank in ("exact", "keep", 8, 20):
        result = mitigate_matrix(W, A, B, found, scale=1, scope="all", rank=rank, magnitude=m)
        assert torch.equal(result.A, A)
        assert torch.equal(result.B, B)
        assert torch.equal(result.magnitude, m)
        assert result.error == 0


@pytest.mark.parametrize("rank", ["keep", 3, 100])
def test_a_limited_rank_is_the_best_approximation_and_reports_its_error(rank):
    W, A, B, _ = case((320, 320), "flat")
    found = analyse_matrix(W, A, B)
    result = mitigate_matrix(W, A, B, found, scale=0.5, scope="all", rank=rank)
    delta = mitigated(W, adapted(W, A, B), 0.5, "all")[0] - W.double()
    U, S, Vh = torch.linalg.svd(delta)
    k = {"keep": 8, 100: 8 + len(found.intruders)}.get(rank, rank)
    assert len(result.A) == k
    best = U[:, :k] * S[:k] @ Vh[:k]
    product = result.B.double() @ result.A.double()
    assert float((product - best).norm() / best.norm()) < 1e-3
    assert result.error == pytest.approx(float((product - delta).norm() / delta.norm()), abs=1e-4)


def test_no_more_rows_than_a_matrix_of_the_shape_can_use():
    W = base(12, 9)
    A, B = update(W, r=8, strength=3)
    found = analyse_matrix(W, A, B)
    result = mitigate_matrix(W, A, B, found, scale=0, scope="all")
    assert len(found.intruders) > 1
    assert len(result.A) == 9
    assert result.error < 1e-6


def test_inputs_are_not_changed():
    W, A, B, m = case((320, 300), "flat", dora=True)
    before = [x.clone() for x in (W, A, B, m)]
    found = analyse_matrix(W, A, B, m)
    mitigate_matrix(W, A, B, found, scale=0.5, scope="all", rank="keep", magnitude=m)
    assert all(torch.equal(x, y) for x, y in zip(before, (W, A, B, m), strict=True))


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"scale": -0.1}, "scale=-0.1"), ({"scope": "first"}, "'first'"), ({"rank": 0}, "rank=0"), ({"rank": "r"}, "'r'")],
)
def test_a_wrong_option_is_named(bad, message):
    W, A, B, _ = case((20, 20), "flat")
    found = analyse_matrix(W, A, B)
    with pytest.raises(ValueError, match=message):
        mitigate_matrix(W, A, B, found, **bad)


@pytest.mark.parametrize("bad", [{"top_k": 0}, {"epsilon": 1.0}, {"epsilon": 0.0}])
def test_a_wrong_question_is_named(bad):
    W, A, B, _ = case((20, 20), "flat")
    with pytest.raises(ValueError, match=next(iter(bad))):
        analyse_matrix(W, A, B, **bad)


@pytest.mark.parametrize("shape", [(50, 50), (40, 60), (60, 40)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_basis_is_that_of_the_svd(shape, kind):
    W = base(*shape, kind)
    U, S, _ = torch.linalg.svd(W.double(), full_matrices=False)
    left, values = left_basis(W)
    rank = int((RELATIVE_ZERO * S[0] < S).sum())
    assert left.shape == (shape[0], rank)
    torch.testing.assert_close(values, S[:rank], rtol=1e-6, atol=0)
    torch.testing.assert_close((left.double().T @ U[:, :rank]).abs(), torch.eye(rank).double(), rtol=0, atol=1e-5)


def test_a_tiled_weight_is_analysed_as_the_tensor_is(monkeypatch):
    monkeypatch.setattr("loraloom.intruders.solvers.matrix.TILE_ROWS", 100)
    W, A, B, m = case((420, 300), "flat", dora=True)
    tiled = TiledMatrix((420, 300), lambda start, stop: W[start:stop], W.device)
    found, expected = analyse_matrix(tiled, A, B, m), analyse_matrix(W, A, B, m)
    assert found.intruders == expected.intruders
    assert found.relative_norm == pytest.approx(expected.relative_norm, rel=1e-5)
    assert fingerprint(tiled) == fingerprint(W)
    torch.testing.assert_close(left_basis(tiled).U.abs(), left_basis(W).U.abs(), rtol=0, atol=1e-4)


def test_a_cache_computes_each_basis_once(tmp_path, monkeypatch):
    calls = []

    def counting(W):
        calls.append(W.shape)
        return left_basis(W)

    monkeypatch.setattr("loraloom.intruders.solvers.basis.left_basis", counting)
    W, V = base(20, 30), base(30, 20)
    cache = BasisCache(tmp_path / "bases")
    assert cache(W) is cache(W.clone())
    assert all(map(torch.equal, BasisCache(tmp_path / "bases")(W), cache(W)))
    cache(V)
    assert calls == [(20, 30), (30, 20)]
    W[0, 0] += 1e-3
    cache(W)
    assert len(calls) == 3
    assert len(list((tmp_path / "bases").iterdir())) == 3
