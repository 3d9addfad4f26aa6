"""A regression of any size: our steps, our fits, and the same steps by hand."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.lib.clock import pace
from pyro_vi_kit import guides, objectives
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.fitting import fit
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.optimize import engines

RATE = 0.005


def logistic(X: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(X.new_zeros(X.shape[-1]), 1.0).to_event(1))
    with pyro.plate("row", len(X)):
        pyro.sample("y", dist.Bernoulli(logits=X @ beta), obs=y)


def linear(X: Tensor, y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(X.new_zeros(X.shape[-1]), 1.0).to_event(1))
    with pyro.plate("row", len(X)):
        pyro.sample("y", dist.Normal(X @ beta, 1.0), obs=y)


def run(
    kind: str,
    guide: str,
    family: str,
    rows: int,
    columns: int,
    particles: int,
    seconds: float,
) -> dict[str, float]:
    """Milliseconds of a step or a fit, and the memory it took.

    Args:
        kind: ``ours``: a step of the captured engine; ``by_hand``: the same step without the
            package; ``fit``: all of `vi.fit`.
        guide: Of a fit; steps are mean field.
        family: ``logistic`` or ``linear``.
        rows: N.
        columns: D.
        particles: K of a step.
        seconds: How long to make steps.
    """
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    X, y = _data(family, rows, columns)
    model = Model(logistic if family == "logistic" else linear, X, y)
    # What is done once in a process is neither time nor memory of this size.
    _warm_up()
    before = _peak()
    if kind == "fit":
        started = time.perf_counter()
        posterior = fit.fit(model, guide=guide, seed=0, progress=False)
        found = {
            "ms": 1000 * (time.perf_counter() - started),
            "evaluations": float(posterior.evaluations),
            "converged": float(posterior.status.converged),
        }
    else:
        set_up = (
            (lambda: _ours(model, particles))
            if kind == "ours"
            else (lambda: _by_hand(X, y, family, particles))
        )
        found = {"ms": pace(set_up, seconds=seconds, stretch=50)["late"] / 1000}
    return found | {"peak_mib": max(_peak() - before, 0.0)}


def _ours(model: Model, particles: int) -> Callable[[int], object]:
    density = Density(model)
    with RandomStream(0):
        trained = guides.specify("mean_field").build(density)
    engine = engines.CapturedEngine(trained, objectives.Elbo(particles=particles), seed=0)
    return lambda steps: engine.run(steps, RATE)


def _by_hand(X: Tensor, y: Tensor, family: str, particles: int) -> Callable[[int], object]:
    loc = torch.zeros(X.shape[-1], requires_grad=True)
    log_scale = torch.full((X.shape[-1],), math.log(0.1), requires_grad=True)
    optimizer = torch.optim.Adam([loc, log_scale], lr=RATE, fused=True)

    def advance(steps: int) -> None:
        for _ in range(steps):
            noise = torch.randn(particles, X.shape[-1])
            beta = loc + log_scale.exp() * noise
            mean = beta @ X.T
            if family == "logistic":
                rows = y * mean - torch.nn.functional.softplus(mean)
            else:
                rows = -0.5 * (y - mean) ** 2 - 0.5 * math.log(2 * math.pi)
            log_p = rows.sum(-1) - 0.5 * (beta**2).sum(-1)
            log_q = (-0.5 * noise**2 - log_scale).sum(-1)
            optimizer.zero_grad()
            (log_q - log_p).mean().backward()
            optimizer.step()

    return advance


def _data(family: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(rows, columns, generator=generator)
    mean = X @ (torch.randn(columns, generator=generator) / columns**0.5)
    if family == "linear":
        return X, mean + torch.randn(rows, generator=generator)
    return X, torch.bernoulli(mean.sigmoid(), generator=generator)


def _warm_up() -> None:
    X, y = _data("linear", 10, 2)
    _by_hand(X, y, "linear", 2)(2)
    fit.fit(Model(linear, X, y), guide="mean_field", seed=0, progress=False)


def _peak() -> float:
    """The most memory that this process has held, MiB; macOS counts in bytes, Linux in KiB."""
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
