"""Ranks from gradients: against dense gradients and their SVDs, and as adapters that PEFT makes of them."""

import itertools
from collections import OrderedDict

import peft
import pytest
import torch
from torch import nn

from loraloom import LoomConfig, suggest_ranks
from loraloom.errors import InputError
from loraloom.ranks.ranks import RankReport
from tests.models import gpt2, llama


def batches(count=3, vocabulary=50):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        ids = torch.randint(vocabulary, (2, 12), generator=generator)
        yield {"input_ids": ids, "labels": ids}


def dense_gradients(model, names):
    """The mean gradient of each weight, by autograd alone."""
    model.zero_grad()
    for p in model.parameters():
        p.requires_grad_(True)
    losses = [model.eval()(**batch).loss for batch in batches()]
    torch.stack(losses).mean().backward()
    return {name: model.get_submodule(name).weight.grad.double() for name in names}, sum(
        loss.item() for loss in losses
    ) / len(losses)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_energies_and_shares_are_those_of_dense_gradients(make):
    model = make()
    report = suggest_ranks(model, batches(), rank=3)
    gradients, loss = dense_gradients(model, report.ranks)
    assert report.loss == pytest.approx(loss, rel=1e-5)
    assert report.batches == 3
    for name, G in gradients.items():
        S = torch.linalg.svdvals(G)
        # Float32 rounds each of the sums at 6e-8, and singular values by as much of the largest.
        assert report.energies[name] == pytest.approx(float(S.square().sum()), rel=1e-4)
        expected = float(S[: report.ranks[name]].square().sum() / S.square().sum())
        assert report.kept[name] == pytest.approx(expected, rel=1e-4)


def test_no_other_ranks_within_the_budget_keep_more():
    """Exhaustively, on layers of one shape, where the greedy choice is optimal."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    x = torch.randn(9, 4)
    options = {"loss": lambda model, batch: model(batch).square().sum(), "target_modules": ["0", "1", "2", "3"]}
    report = suggest_ranks(model, [x], rank=1, max_rank=4, **options)
    spectra = {}
    model(x).square().sum().backward()
    for name in report.ranks:
        spectra[name] = torch.linalg.svdvals(model.get_submodule(name).weight.grad.double()).square()

    def kept(ranks):
        return sum(float(spectra[name][:rank].sum()) for name, rank in zip(report.ranks, ranks, strict=True))

    best = max(kept(ranks) for ranks in itertools.product(range(5), repeat=4) if sum(ranks) <= 4)
    assert kept(report.ranks.values()) == pytest.approx(best, rel=1e-5)
    assert report.parameters <= report.budget == 4 * 8


@pytest.mark.parametrize("config", [peft.LoraConfig, LoomConfig])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_peft_makes_these_ranks_with_one_scale(config, rank):
    model = llama()
    report = suggest_ranks(model, batches(), rank=rank)
    adapted = peft.get_peft_model(model, config(**report.config())).base_model.model
    ranks = {}
    for name, module in adapted.named_modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            ranks[name] = module.r["default"]
            assert module.scaling["default"] == 2
    assert ranks == {name: rank for name, rank in report.ranks.items() if rank}
    assert report.parameters <= report.budget
    assert max(ranks.values()) <= 4 * rank


def test_a_name_that_ends_in_another_keeps_its_own_rank():
    """`body.0` ends in `0`, so the pattern of `0` would match it as well."""
    ranks = {"body.0": 2, "0": 5, "1": 2, "2": 2}
    report = RankReport(ranks, dict.fromkeys(ranks, 1.0), dict.fromkeys(ranks, 1.0), 1, 1, 1, 1.0)
    layers = {name: nn.Linear(6, 6) for name in "012"}
    model = nn.Sequential(OrderedDict(body=nn.Sequential(nn.Linear(6, 6)), **layers))
    adapted = peft.get_peft_model(model, peft.LoraConfig(**report.config())).base_model.model
    assert {name: adapted.get_submodule(name).r["default"] for name in ranks} == ranks


def test_a_layer_without_a_gradient_is_no_target():
    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x) + 0 * self.unused(x)

    options = {"target_modules": ["used", "unused"], "loss": lambda model, x: model(x).square().sum()}
    report = suggest_ranks(Part(), [torch.randn(5, 4)], rank=2, **options)
    assert report.ranks["unused"] == 0
    assert report.config()["target_modules"] == ["used"]
    assert report.share == pytest.approx(1.0)


def test_the_model_is_as_it_was():
    model = llama(attention_dropout=0.5).train()
    model.model.embed_tokens.requires_grad_(False)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    one, two = (suggest_ranks(model, batches(), rank=2) for _ in range(2))
    assert one == two  # no dropout, no random number
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"rank": 0}, "rank"),
        ({"max_rank": -1}, "rank"),
        ({"rank": 2, "parameters": 100}, "budget"),
        ({"parameters": 3}, "budget"),
        ({"batches": []}, "no-batch"),
        ({"target_modules": ["embed_tokens"]}, "not-linear"),
        ({"loss": lambda model, batch: model(**batch).loss * torch.nan}, "not-finite"),
        ({"loss": lambda model, batch: model(**batch).loss * 0}, "zero-gradient"),
    ],
)
def test_what_cannot_be_done_is_said(options, code):
    options = {"batches": batches(1)} | options
    with pytest.raises(InputError) as caught:
        suggest_ranks(llama(), **options)
    assert caught.value.code == code
