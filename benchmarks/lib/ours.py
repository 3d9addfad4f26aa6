"""This package's side of the races: fits, timed from the call to the posterior."""

from __future__ import annotations

import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch

import pyro_vi_kit as vi
from benchmarks.lib.references import Reference


def fits(name: str, guide: str, seeds: list[int], warm: bool = True) -> list[dict[str, Any]]:
    """Time, evaluations and quality of a fit for each seed, all with defaults.

    Every fit has a model of its own, as if its file had just been loaded.

    Args:
        name: A model file of benchmarks/posteriordb.
        guide: A guide's name.
        seeds: One fit each.
        warm: Fit something else first, so that imports are not on the clock.
    """
    from benchmarks.lib.quality import elbo_of

    torch.set_num_threads(1)
    if warm:
        vi.fit(vi.Model(_toy), guide=guide, seed=0, progress=False)
    done = []
    for seed in seeds:
        model = Reference(name).module().MODEL
        started = time.perf_counter()
        posterior = vi.fit(model, guide=guide, seed=seed, progress=False)
        seconds = time.perf_counter() - started
        elbo, se = elbo_of(posterior, 100_000)
        done.append(
            {
                "seed": seed,
                "seconds": seconds,
                "evaluations": posterior.evaluations,
                "elbo": elbo,
                "elbo_se": se,
                "engine": posterior.engine,
                "method": posterior.method,
            }
        )
    return done


def cold(name: str, guide: str, seed: int) -> int:
    """One fit and nothing else; whoever calls it times the process."""
    return vi.fit(
        Reference(name).module().MODEL, guide=guide, seed=seed, progress=False
    ).evaluations


def _toy() -> None:
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    y = pyro.sample("y", dist.HalfNormal(1.0))
    pyro.sample("z", dist.Normal(x, y), obs=torch.tensor(1.0))
