"""NumPyro's SVI with its own autoguides, Adam at 0.01 and one particle, steps in one compiled loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import numpyro
from jax import random
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from benchmarks.lib.references import Reference
from benchmarks.peers.numpyro_models import Arguments, model_and_arguments

GUIDES = {"mean_field": AutoNormal, "full_rank": AutoMultivariateNormal}


def set_up(name: str, guide: str) -> tuple[SVI, Any, Arguments]:
    """The SVI, its guide and the model's arguments."""
    jax.config.update("jax_enable_x64", True)
    model, arguments = model_and_arguments(name, Reference(name).data)
    autoguide = GUIDES[guide](model)
    return SVI(model, autoguide, numpyro.optim.Adam(0.01), Trace_ELBO()), autoguide, arguments


def start(svi: SVI, seed: int, arguments: Arguments) -> Any:
    """The first state, compiled: step by step, as `SVI.run` makes it, takes four times as long."""
    return jax.jit(svi.init)(random.PRNGKey(seed), *arguments)


def stepper(svi: SVI, arguments: Arguments) -> Callable[[Any, int], Any]:
    """Make so many steps from a state; compiled once, at the first call."""

    @jax.jit
    def run(state: Any, count: Any) -> Any:
        def body(_: Any, state: Any) -> Any:
            return svi.update(state, *arguments)[0]

        return jax.lax.fori_loop(0, count, body, state)

    return lambda state, count: jax.block_until_ready(run(state, count))


def gaussian(svi: SVI, autoguide: Any, state: Any, block: Any) -> Any:
    """Mean `[D]` and Cholesky factor `[D, D]`, as torch tensors, in the order of one of our blocks."""
    import torch

    params = {key: np.array(value) for key, value in svi.get_params(state).items()}
    names = [site.name for site in block.sites]
    if isinstance(autoguide, AutoNormal):
        loc, scale = (
            np.concatenate([params[f"{name}_auto_{part}"].reshape(-1) for name in names])
            for part in ("loc", "scale")
        )
        return torch.tensor(loc), torch.tensor(scale).diag()
    # NumPyro flattens a dict of sites, which goes by their names in alphabetical order.
    sizes = {site.name: site.unconstrained_shape.numel() for site in block.sites}
    places, start = {}, 0
    for name in sorted(sizes):
        places[name] = np.arange(start, start + sizes[name])
        start += sizes[name]
    index = np.concatenate([places[name] for name in names])
    tril = params["auto_scale_tril"][index]
    covariance = torch.tensor(tril @ tril.T)
    return torch.tensor(params["auto_loc"][index]), torch.linalg.cholesky(covariance)


def race(name: str, guide: str, seed: int, target: float, cap: float) -> dict[str, Any]:
    """Seconds until the ELBO is within the target for the first time, compilation included."""
    from benchmarks.lib import race as races
    from benchmarks.lib.oracle import Oracle
    from pyro_vi_kit.model.log_density import Density

    oracle = Oracle(Density(Reference(name).module().MODEL))
    # What JAX and NumPyro do once in a process; compiling this model is on the clock.
    _toy(GUIDES[guide])
    started = time.perf_counter()
    svi, autoguide, arguments = set_up(name, guide)
    state = start(svi, seed, arguments)
    run = stepper(svi, arguments)
    state = run(state, 1)
    once = time.perf_counter() - started

    def advance(count: int) -> None:
        nonlocal state
        state = run(state, count)

    return races.run(
        advance,
        lambda: gaussian(svi, autoguide, state, oracle.density.block),
        oracle,
        target,
        cap=cap,
        least=100,
        head_start=once,
    )


def cold(name: str, guide: str, seed: int, steps: int) -> int:
    """So many steps and nothing else; whoever calls it times the process."""
    svi, _, arguments = set_up(name, guide)
    state = start(svi, seed, arguments)
    stepper(svi, arguments)(state, steps)
    return steps


def log_joint(name: str) -> Callable[[dict[str, Any]], float]:
    """The log joint at unconstrained values by site, with the Jacobian, nats."""
    from numpyro.infer.util import potential_energy

    jax.config.update("jax_enable_x64", True)
    model, arguments = model_and_arguments(name, Reference(name).data)
    potential = jax.jit(lambda values: potential_energy(model, arguments, {}, values))
    return lambda values: -float(potential(values))


def _toy(kind: Any) -> None:
    def model() -> None:
        numpyro.sample("x", numpyro.distributions.Normal(0.0, 1.0))
        numpyro.sample("y", numpyro.distributions.HalfNormal(1.0))

    svi = SVI(model, kind(model), numpyro.optim.Adam(0.01), Trace_ELBO())
    stepper(svi, ())(start(svi, 0, ()), 3)
