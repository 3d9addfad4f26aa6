"""Latents row by row: models, and what is measured of them."""

from __future__ import annotations

import gc
import math
import resource
import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import RenyiELBO
from torch import Tensor

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.runtime import RandomStream, one_thread
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Elbo, Iwae
from pyro_vi_kit.optimize.engines import Batches, CapturedEngine


def regression(x: Tensor, y: Tensor, there: Tensor) -> None:
    """Rows of a regression in groups, padded to a rectangle: a group is a datum."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfNormal(2.0))
    sd = pyro.sample("sd", dist.HalfNormal(2.0))
    with pyro.plate("group", len(y)) as i:
        intercept = pyro.sample("intercept", dist.Normal(mu, tau))
        mean = intercept.unsqueeze(-1) + slope * x[i]
        pyro.sample("y", dist.Normal(mean, sd).mask(there[i]).to_event(1), obs=y[i])


def grouped(groups: int, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, outputs and which of them are there, `[groups, most rows of a group]`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    member = torch.randint(groups, (rows,), generator=generator)
    member[:groups] = torch.arange(groups)
    x, intercepts = normal(rows), 1.0 + 0.5 * normal(groups)
    y = intercepts[member] + 0.7 * x + 0.8 * normal(rows)
    padded = torch.zeros(3, groups, int(torch.bincount(member).max()), dtype=torch.float64)
    for group in range(groups):
        mine = member == group
        count = int(mine.sum())
        padded[:, group, :count] = torch.stack([x[mine], y[mine], torch.ones(count)])
    return padded[0], padded[1], padded[2] > 0


def agreement(groups: int, rows: int, batch: int, seed: int, tol: float | None) -> dict[str, Any]:
    """A mean-field fit in minibatches of groups beside one of the full data."""
    model = vi.Model(regression, *grouped(groups, rows, 1))
    whole = vi.fit(model, "mean_field", seed=seed)
    part = vi.fit(model, "mean_field", batch_size=batch, tol=tol, seed=seed)
    means, sds = [], []
    exact = moments(whole)
    for name, (mean, sd) in moments(part).items():
        means.append(float(((mean - exact[name][0]) / exact[name][1]).abs().max()))
        sds.append(float((sd / exact[name][1] - 1.0).abs().max()))
    return {
        "full_seconds": whole.seconds,
        "seconds": part.seconds,
        "steps": len(part.losses),
        "mean_error_sd": max(means),
        "sd_error": max(sds),
        "status": part.status.reason,
    }


def moments(posterior: vi.Posterior) -> dict[str, tuple[Tensor, Tensor]]:
    """Unconstrained means and sds of q by site."""
    guide: Any = posterior.approximation.guide  # type: ignore[attr-defined]
    found = {}
    for block in guide.blocks:
        q = guide.families[block.name](None if block.plate is None else guide.rows(block))
        means, sds = (block.unpack(part.detach()[None]) for part in (q.mean, q.stddev))
        found |= {name: (means[name].flatten(), sds[name].flatten()) for name in means}
    return found


def normals(y: Tensor) -> None:
    """A latent for every datum, and a common mean."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)) as i:
        z = pyro.sample("z", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])


def steps(latents: int, batch: int, seconds: float) -> dict[str, Any]:
    """Microseconds of a captured step, and the memory of a guide that stores each latent's numbers."""
    y = torch.randn(latents, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    density = Density(vi.Model(normals, y))
    plate = density.structure.plates["datum"]
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with RandomStream(0):
        guide = guides.per_datum(guides.specify("mean_field"), density, [plate])
    batches = Batches({plate: min(batch, latents)})
    engine = CapturedEngine(guide, Elbo(1), seed=0, batches=batches, estimator="dreg")
    with one_thread():
        engine.run(64, 0.01)
        times, began = [], time.perf_counter()
        while time.perf_counter() - began < seconds:
            started = time.perf_counter()
            engine.run(64, 0.01)
            times.append((time.perf_counter() - started) / 64)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    held = sum(part.numel() * part.element_size() for part in engine.tables[0].state)
    return {
        "microseconds": 1e6 * sorted(times)[len(times) // 2],
        "engine": engine.name,
        "bytes_a_latent": held / latents,
        "grown_mib": grown / 2**20,
    }


def bounds(rows: int, batch: int, particles: int, repeats: int) -> dict[str, Any]:
    """The subsampled importance-weighted bound, ours and stock Pyro's, of a model of known evidence."""
    y = 1.4 * torch.randn(rows, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def model(y: Tensor, size: int | None = None) -> None:
        with pyro.plate("datum", len(y), subsample_size=size) as i:
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])

    def prior(y: Tensor, size: int | None = None) -> None:
        with pyro.plate("datum", len(y), subsample_size=size):
            pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))

    evidence = float((-0.25 * y**2 - 0.5 * math.log(4.0 * math.pi)).sum())
    density = Density(vi.Model(model, y))
    plate = density.structure.plates["datum"]
    guide: Any = guides.per_datum(guides.specify("mean_field"), density, [plate])
    guide.families["local"].table.rows.data.zero_()  # the prior
    engine = CapturedEngine(guide, Iwae(particles), seed=0, batches=Batches({plate: batch}))
    ours = engine.run(repeats, 0.0).bounds
    with RandomStream(2), pyro.get_param_store().scope():
        loss = RenyiELBO(
            alpha=0, num_particles=particles, vectorize_particles=True, max_plate_nesting=1
        )
        stock = torch.tensor([-loss.loss(model, prior, y, batch) for _ in range(repeats)])
    return {
        "evidence": evidence,
        "ours": float(ours.mean()),
        "ours_se": float(ours.std()) / math.sqrt(repeats),
        "stock": float(stock.mean()),
        "stock_se": float(stock.std()) / math.sqrt(repeats),
    }
