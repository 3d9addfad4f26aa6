"""Steps in torch: our engines, stock Pyro's `SVI.step`, and a loop written by hand; eight schools."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor, nn

from benchmarks.lib.clock import pace
from benchmarks.peers.schools import LAYERS, SIGMA, WIDTH, Y
from models.eight_schools import eight_schools
from pyro_vi_kit import guides, objectives
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.optimize import engines

# Learning rate of all: what a step costs does not depend on it.
RATE = 0.005


def ours(
    engine: str,
    guide: str,
    objective: str,
    particles: int,
    seconds: float,
    seed: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Steps of one of our engines, `Engine.run` in stretches of 100 as a fit makes them."""
    torch.set_num_threads(1)
    kinds = {
        "eager": engines.EagerEngine,
        "captured": engines.CapturedEngine,
        "compiled": functools.partial(engines.CapturedEngine, compiled=True),
    }
    ran: list[engines.CapturedEngine | engines.EagerEngine] = []

    def set_up() -> Callable[[int], object]:
        density = Density(_model(), device=device)
        with RandomStream(seed):
            trained = guides.specify(guide).build(density)
        running = kinds[engine](trained, _objective(objective, particles), seed=seed)
        ran.append(running)
        return lambda steps: running.run(steps, RATE)

    found = pace(set_up, seconds=seconds, stretch=100)
    return found | {"became": ran[0].name, "note": getattr(ran[0], "note", "")}


def stock(
    guide: str,
    objective: str,
    particles: int,
    vectorize: bool,
    seconds: float,
    seed: int,
    device: str = "cpu",
) -> dict[str, Any]:
    """Stock `SVI.step`: the same flow, or AutoNormal, with the objective's own Pyro loss."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(device)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)

    def set_up() -> Callable[[int], object]:
        model = _model()
        trained: Any = (
            AutoNormal(eight_schools) if guide == "mean_field" else guides.make(guide, model)
        )
        loss = _objective(objective, particles).stock_loss(vectorize=vectorize)
        svi = SVI(eight_schools, trained, Adam({"lr": RATE}), loss)

        def advance(steps: int) -> None:
            for _ in range(steps):
                svi.step(*model.args)

        return advance

    return pace(set_up, seconds=seconds, stretch=100)


def by_hand(
    guide: str, objective: str, particles: int, seconds: float, seed: int, device: str = "cpu"
) -> dict[str, Any]:
    """A loop as one would write it for this model alone: vectorised, autograd, fused Adam."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(device)
    torch.manual_seed(seed)

    def set_up() -> Callable[[int], object]:
        q: Any = MeanField() if guide == "mean_field" else Coupling()
        sigma, y = torch.tensor(SIGMA), torch.tensor(Y)
        optimizer = torch.optim.Adam(q.parameters(), lr=RATE, fused=True)

        def advance(steps: int) -> None:
            for _ in range(steps):
                z, log_q = q(particles)
                log_w = log_density(z, sigma, y) - log_q
                bound = log_w.mean()
                if objective == "iwae":
                    bound = log_w.logsumexp(0) - math.log(particles)
                optimizer.zero_grad()
                (-bound).backward()
                optimizer.step()
            if device != "cpu":
                torch.cuda.synchronize(device)

        return advance

    return pace(set_up, seconds=seconds, stretch=100)


def log_density(z: Tensor, sigma: Tensor, y: Tensor) -> Tensor:
    """Eight schools, non-centred, in unconstrained space: z `[K, 10]` is mu, log tau, theta_trans."""
    mu, log_tau, theta_trans = z[:, 0], z[:, 1], z[:, 2:]
    tau = log_tau.exp()
    theta = mu[:, None] + tau[:, None] * theta_trans
    half_log_two_pi = 0.5 * math.log(2 * math.pi)
    prior = -0.5 * (mu / 5) ** 2 - math.log(5) - half_log_two_pi
    prior = prior + math.log(2 / (math.pi * 5)) - torch.log1p((tau / 5) ** 2) + log_tau
    trans = (-0.5 * theta_trans**2 - half_log_two_pi).sum(-1)
    likelihood = (-0.5 * ((y - theta) / sigma) ** 2 - sigma.log() - half_log_two_pi).sum(-1)
    return prior + trans + likelihood


class MeanField(nn.Module):
    """Independent normals."""

    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(10))
        self.log_scale = nn.Parameter(torch.full((10,), math.log(0.1)))

    def forward(self, particles: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(particles, 10)
        log_q = (-0.5 * noise**2 - 0.5 * math.log(2 * math.pi) - self.log_scale).sum(-1)
        return self.loc + self.log_scale.exp() * noise, log_q


class Coupling(nn.Module):
    """`affine_coupling` with its defaults: tanh layers whose halves change roles, a triangular map."""

    def __init__(self, dim: int = 10) -> None:
        super().__init__()
        self.split = dim // 2
        moved = dim - self.split
        self.networks = nn.ModuleList(
            nn.Sequential(nn.Linear(self.split, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2 * moved))
            for _ in range(LAYERS)
        )
        self.orders = [torch.randperm(dim) for _ in range(LAYERS // 2)]
        self.loc = nn.Parameter(torch.zeros(dim))
        self.log_diagonal = nn.Parameter(torch.full((dim,), math.log(0.1)))
        self.lower = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, particles: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(particles, len(self.loc))
        log_q = (-0.5 * x**2 - 0.5 * math.log(2 * math.pi)).sum(-1)
        for i, network in enumerate(self.networks):
            given, moved = x[:, : self.split], x[:, self.split :]
            raw, shift = network(given).chunk(2, -1)
            log_scale = 2.0 * raw.tanh()
            x = torch.cat([shift + log_scale.exp() * moved, given], -1)
            if i % 2:
                x = x[:, self.orders[i // 2]]
            log_q = log_q - log_scale.sum(-1)
        tril = self.lower.tril(-1) + self.log_diagonal.exp().diag()
        return self.loc + x @ tril.T, log_q - self.log_diagonal.sum()


def _model() -> Model:
    with_floats = (torch.tensor(SIGMA, dtype=torch.float64), torch.tensor(Y, dtype=torch.float64))
    return Model(eight_schools, *with_floats)


def _objective(name: str, particles: int) -> Any:
    kinds = {"elbo": objectives.Elbo, "iwae": objectives.Iwae}
    return kinds[name](particles=particles)
