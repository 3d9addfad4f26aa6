"""Stock Pyro SVI as tutorials run it: an autoguide with defaults, Adam at 0.01, one particle."""

from __future__ import annotations

import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam  # type: ignore[attr-defined]
from torch import Tensor

from benchmarks.lib.references import Reference

GUIDES = {"mean_field": AutoNormal, "full_rank": AutoMultivariateNormal}


def set_up(name: str, guide: str, seed: int) -> tuple[SVI, Any, Any]:
    """The SVI, its guide and the `vi.Model` of a posterior, with everything in float64."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model = Reference(name).module().MODEL
    autoguide = GUIDES[guide](model.fn)
    return SVI(model.fn, autoguide, Adam({"lr": 0.01}), Trace_ELBO()), autoguide, model


def gaussian(autoguide: Any, block: Any) -> tuple[Tensor, Tensor]:
    """Mean `[D]` and Cholesky factor `[D, D]` in the order of one of our blocks."""
    with torch.no_grad():
        if isinstance(autoguide, AutoNormal):
            pairs = {site.name: autoguide._get_loc_and_scale(site.name) for site in block.sites}
            loc, scale = (
                torch.cat([pairs[site.name][i].detach().reshape(-1) for site in block.sites])
                for i in (0, 1)
            )
            return loc, scale.diag()
        order = torch.arange(autoguide.latent_dim)
        places = {site["name"]: part.reshape(-1) for site, part in autoguide._unpack_latent(order)}
        index = torch.cat([places[site.name] for site in block.sites])
        if not torch.equal(index, order):
            raise ValueError("AutoMultivariateNormal orders the latents in another way than we do")
        return autoguide.loc.detach(), autoguide.scale.detach()[:, None] * autoguide.scale_tril


def race(name: str, guide: str, seed: int, target: float, cap: float) -> dict[str, Any]:
    """Seconds until the ELBO is within the target for the first time; see `lib.race`."""
    from benchmarks.lib import race as races
    from benchmarks.lib.oracle import Oracle
    from pyro_vi_kit.model.log_density import Density

    svi, autoguide, model = set_up(name, guide, seed)
    oracle = Oracle(Density(model))
    # Imports and whatever else is done once in a process; setting the guide up is on the clock.
    _toy(GUIDES[guide])
    started = time.perf_counter()
    svi.step(*model.args, **model.kwargs)
    once = time.perf_counter() - started

    def advance(count: int) -> None:
        for _ in range(count):
            svi.step(*model.args, **model.kwargs)

    return races.run(
        advance,
        lambda: gaussian(autoguide, oracle.density.block),
        oracle,
        target,
        cap=cap,
        least=10 if once < 0.1 else 1,
        head_start=once,
    )


def cold(name: str, guide: str, seed: int, steps: int) -> int:
    """So many steps and nothing else; whoever calls it times the process."""
    svi, _, model = set_up(name, guide, seed)
    for _ in range(steps):
        svi.step(*model.args, **model.kwargs)
    return steps


def _toy(kind: Any) -> None:
    def model() -> None:
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.HalfNormal(1.0))

    svi = SVI(model, kind(model), Adam({"lr": 0.01}), Trace_ELBO())
    with pyro.get_param_store().scope():
        for _ in range(3):
            svi.step()
