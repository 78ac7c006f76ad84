"""GaLore against galore-torch, against the published equations, and against the inner optimizer alone."""

import pytest
import torch
from galore_torch import GaLoreAdamW
from torch import Tensor, nn

from loraloom.optim import APOLLO, Fira, GaLore
from loraloom.optim.galore.bases import random_bases, sides_of

from .support import chain, loss_of, matrices_and_vectors, train


@pytest.mark.parametrize("side", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_trajectory_of_galore_torch(side: str, weight_decay: float) -> None:
    """50 steps with galore-torch 1.0, over five refreshes.

    Its quirks: the epsilon is added before Adam's bias correction (hence 1e-12 here, where the order shows nothing);
    the whole parameter list is refreshed in one step; its project_back guesses the side of "std" and "reverse_std"
    from the compact shape; the projector is cast to the gradient's dtype, and is a pickled object in the state. "full"
    is left out: after an SVD the compact gradient is diagonal but for rounding, which Adam with a small epsilon blows
    up to whole steps; it is checked in float64 against the equations below.
    """
    ours, theirs = chain(), chain()
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-12, "weight_decay": weight_decay}
    galore = {"rank": 4, "update_gap": 10, "scale": 0.5}
    mine = GaLore(matrices_and_vectors(ours), **options, **galore, side=side, refresh="svd", stagger=False)
    groups = matrices_and_vectors(theirs, rank=4, update_proj_gap=10, scale=0.5, proj_type=side)
    reference = GaLoreAdamW(groups, **options, no_deprecation_warning=True)
    for step in range(50):
        train(ours, mine, range(step, step + 1))
        train(theirs, reference, range(step, step + 1))
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-5, msg=lambda m, n=name, s=step: f"step {s}, {n}: {m}")


class TheirAdam(torch.optim.Optimizer):
    """Adam with galore-torch's epsilon: beside sqrt(v) before the bias correction, not after it."""

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state, (b1, b2) = self.state[p], group["betas"]
                t = state["step"] = state.get("step", 0) + 1
                state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * p.grad
                state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * p.grad**2
                scale = group["lr"] * (1 - b2**t) ** 0.5 / (1 - b1**t)
                p.sub_(scale * state["m"] / (state["v"].sqrt() + group["eps"]))


def test_the_distance_to_galore_torch_is_where_epsilon_stands() -> None:
    """With its own epsilon, 1e-6: apart with ours, together if the inner optimizer adds it where galore-torch does."""
    options = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6}
    galore = {"rank": 4, "update_gap": 10, "scale": 0.5, "refresh": "svd", "stagger": False}
    theirs = chain()
    groups = matrices_and_vectors(theirs, rank=4, update_proj_gap=10, scale=0.5, proj_type="std")
    train(theirs, GaLoreAdamW(groups, **options, no_deprecation_warning=True), 50)
    distances = []
    for inner in (torch.optim.AdamW, TheirAdam):
        ours = chain()
        train(ours, GaLore(matrices_and_vectors(ours), inner, **options, **galore), 50)
        pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
        distances.append(max(float((p - q).detach().abs().max()) for p, q in pairs))
    assert distances[1] < 1e-5
    assert distances[0] > 50 * distances[1]


def published_bases(G: Tensor, rank: int, side: str) -> tuple[Tensor | None, Tensor | None]:
    U, _, Vh = torch.linalg.svd(G)
    short_is_right = G.shape[0] >= G.shape[1]
    left = side in ("left", "full") or side == ("reverse_std" if short_is_right else "std")
    right = side in ("right", "full") or side == ("std" if short_is_right else "reverse_std")
    return (U[:, :rank] if left else None, Vh[:rank].T if right else None)


class Published:
    """GaLore, Fira and APOLLO with Adam for one weight, written out from the papers."""

    def __init__(self, W: Tensor, lr, rank, gap, scale, side, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0) -> None:
        self.W, self.lr, self.rank, self.gap, self.scale, self.side = W.detach().clone(), lr, rank, gap, scale, side
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.t, self.m, self.v, self.bases, self.norm = 0, 0.0, 0.0, (None, None), None

    def adam(self, R: Tensor) -> Tensor:
        b1, b2 = self.betas
        self.m, self.v = b1 * self.m + (1 - b1) * R, b2 * self.v + (1 - b2) * R**2
        return self.m / (1 - b1**self.t) / ((self.v / (1 - b2**self.t)).sqrt() + self.eps)

    def down(self, G: Tensor) -> Tensor:
        L, P = self.bases
        G = G if L is None else L.T @ G
        return G if P is None else G @ P

    def back(self, N: Tensor) -> Tensor:
        L, P = self.bases
        N = N if L is None else L @ N
        return N if P is None else N @ P.T

    def limited(self, S: Tensor) -> Tensor:
        if self.norm is not None and S.norm() > 1.01 * self.norm:
            S = S * (1.01 * self.norm / S.norm())
        self.norm = S.norm()
        return S

    def step(self, G: Tensor, method: str, drawn=None) -> None:
        if method == "apollo":
            self.bases = drawn
        elif self.t % self.gap == 0:
            self.bases = published_bases(G, self.rank, self.side)
        self.t += 1
        R = self.down(G)
        N = self.adam(R)
        channel = 0 if self.bases[0] is not None else 1
        whole = method == "apollo" and self.rank == 1
        phi = N.norm() / R.norm() if whole else N.norm(dim=channel, keepdim=True) / R.norm(dim=channel, keepdim=True)
        if method == "galore":
            change = self.back(N)
        elif method == "fira":
            change = self.back(N) + self.limited(phi * (G - self.back(R)))
        else:
            change = self.limited(phi * G)
        self.W = (self.W - self.lr * self.scale * change) * (1 - self.lr * self.weight_decay)


@pytest.mark.parametrize(
    ("method", "side", "rank"),
    [
        *(("galore", side, 4) for side in ("std", "reverse_std", "left", "right", "full")),
        *(("fira", side, 4) for side in ("std", "left", "right")),
        *(("apollo", side, 4) for side in ("std", "right")),
        ("apollo", "std", 1),
    ],
)
def test_published_equations(method: str, side: str, rank: int) -> None:
    """GaLore (2403.03507), Fira (2410.01623), APOLLO and APOLLO-Mini (2412.05270), 25 steps in float64.

    Where the released code differs: Fira's subtracts scale * back(R) from the gradient and leaves the residual itself
    unscaled, so it equals its equations at scale 1 only; APOLLO's multiplies by the square root of its scale option;
    both limit the norm before Adam's bias correction.
    """
    dtype = torch.float64
    model = chain(dtype)
    options = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.99)}
    kind = {"galore": GaLore, "fira": Fira, "apollo": APOLLO}[method]
    published = {} if method == "apollo" else {"refresh": "svd", "stagger": False}
    settings = {"rank": rank, "update_gap": 8, "scale": 0.7, "side": side, **published}
    optimizer = kind(matrices_and_vectors(model), **settings, **options)
    weights = {name: p for name, p in model.named_parameters() if p.ndim == 2}
    written_out = {name: Published(p, 1e-2, rank, 8, 0.7, side, weight_decay=0.1) for name, p in weights.items()}
    for step in range(25):
        optimizer.zero_grad()
        loss_of(model, step, dtype).backward()
        gradients = {name: p.grad.clone() for name, p in weights.items()}
        optimizer.step()
        for i, (name, p) in enumerate(weights.items()):
            drawn = random_bases(p.shape, rank, sides_of(side, p.shape), i + (step // 8 << 32), p)
            written_out[name].step(gradients[name], method, drawn)
            torch.testing.assert_close(p.detach(), written_out[name].W, rtol=0, atol=2e-8)


@pytest.mark.parametrize("refresh", ["svd", "subspace"])
def test_where_the_basis_holds_the_whole_gradient_it_is_the_inner_optimizer(refresh: str) -> None:
    """Inputs of a 3-dimensional subspace give gradients of rank 3; SGD with momentum does not see the coordinates."""
    basis = torch.randn(3, 12, dtype=torch.float64)
    inputs = torch.randn(20, 9, 3, dtype=torch.float64) @ basis
    layers = [nn.Linear(12, 16, dtype=torch.float64) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
    galore = {"rank": 4, "scale": 1.0, "update_gap": 6, "refresh": refresh, "rotate_moments": True}
    ours = GaLore(layers[0].parameters(), torch.optim.SGD, **galore, **options)
    for layer, optimizer in ((layers[0], ours), (layers[1], torch.optim.SGD(layers[1].parameters(), **options))):
        for x in inputs:
            optimizer.zero_grad()
            layer(x).square().mean().backward()
            optimizer.step()
    for p, q in zip(layers[0].parameters(), layers[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
