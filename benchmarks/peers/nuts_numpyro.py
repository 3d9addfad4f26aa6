"""NumPyro's NUTS on the models of models/."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist

from benchmarks.peers.numpyro_models import eight_schools_noncentered
from benchmarks.peers.schools import SIGMA, Y


def run(
    name: str, chains: int, tune: int, draws: int, method: str, seed: int, repeats: int
) -> list[dict[str, float]]:
    """Runs of NumPyro's NUTS, one after another: from the second on everything is compiled.

    Args:
        name: A model of models/.
        chains: Independent chains.
        tune: Warm-up draws of each.
        draws: Draws of each.
        method: ``sequential``, ``vectorized``, or ``parallel`` (a device for each chain).
        seed: Of the first run.
        repeats: How many runs.
    """
    if method == "parallel":
        numpyro.set_host_device_count(chains)
    jax.config.update("jax_enable_x64", True)
    model, arguments = _model(name)
    mcmc = numpyro.infer.MCMC(
        numpyro.infer.NUTS(model),
        num_warmup=tune,
        num_samples=draws,
        num_chains=chains,
        chain_method=method,
        progress_bar=False,
    )
    from benchmarks.peers.ess import smallest

    done = []
    for repeat in range(repeats):
        started = time.perf_counter()
        mcmc.run(jax.random.PRNGKey(seed + repeat), *arguments)
        values = {
            site: np.array(value) for site, value in mcmc.get_samples(group_by_chain=True).items()
        }
        seconds = time.perf_counter() - started
        found = smallest(values)
        row = {"seconds": seconds, "ess": found["ess"], "rhat": found["rhat"]}
        done.append(row | {"after": found["seconds"]})
    return done


def logistic_regression(X: Any, y: Any) -> None:
    """models/logistic_regression.py for NumPyro."""
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(X.shape[-1]), 1.0).to_event(1))
    intercept = numpyro.sample("intercept", dist.Normal(0.0, 5.0))
    with numpyro.plate("patient", len(X)):
        numpyro.sample("y", dist.Bernoulli(logits=intercept + X @ beta), obs=y)


def _model(name: str) -> tuple[Any, tuple[Any, ...]]:
    if name == "eight_schools":
        return eight_schools_noncentered, (jnp.array(SIGMA), jnp.array(Y))
    if name != "logistic_regression":
        raise ValueError(f"NumPyro has no {name!r} here")
    from sklearn.datasets import load_breast_cancer

    data: Any = load_breast_cancer()
    X = (data.data - data.data.mean(0)) / data.data.std(0)
    return logistic_regression, (jnp.array(X), jnp.array(1.0 - data.target))
