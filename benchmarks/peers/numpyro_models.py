"""The open posteriors once more, for NumPyro: `MODELS[name](data)` gives a model and its arguments.

Each has the sites, the transforms and the density of the Pyro model of the same name, so that its
unconstrained parameters are that model's (tests/benchmarks/test_benchmarks.py holds both to the same
log joint).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import logsumexp
from numpyro.distributions import constraints

Model = Callable[..., Any]
Arguments = tuple[Any, ...]


def ark_ark(y):
    order = 5
    alpha = numpyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(order), 10.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = jnp.stack([y[order - k : len(y) - k] for k in range(1, order + 1)], -1)
    with numpyro.plate("time", len(y) - order):
        numpyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y[order:])


def dogs_dogs(y):
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(3), 100.0).to_event(1))
    n_shocked = y.cumsum(-1) - y
    n_avoided = (1 - y).cumsum(-1) - (1 - y)
    logits = beta[0] + beta[1] * n_avoided + beta[2] * n_shocked
    with numpyro.plate("dog", y.shape[0], dim=-2), numpyro.plate("trial", y.shape[1], dim=-1):
        numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def eight_schools_centered(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(sigma)):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def eight_schools_noncentered(sigma, y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(sigma)):
        theta_trans = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * theta_trans)
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def glm_poisson(year, C):
    alpha = numpyro.sample("alpha", dist.Uniform(-20.0, 20.0))
    beta1 = numpyro.sample("beta1", dist.Uniform(-10.0, 10.0))
    beta2 = numpyro.sample("beta2", dist.Uniform(-10.0, 10.0))
    beta3 = numpyro.sample("beta3", dist.Uniform(-10.0, 10.0))
    log_rate = alpha + beta1 * year + beta2 * year**2 + beta3 * year**3
    with numpyro.plate("year", len(year)):
        numpyro.sample("C", dist.Poisson(jnp.exp(log_rate)), obs=C)


def gp_regr(x, y):
    rho = numpyro.sample("rho", dist.Gamma(25.0, 4.0))
    alpha = numpyro.sample("alpha", dist.HalfNormal(2.0))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    distance = (x[:, None] - x) / rho
    covariance = alpha**2 * jnp.exp(-0.5 * distance**2) + sigma * jnp.eye(len(x))
    numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(len(x)), covariance), obs=y)


def hmm_example(y):
    theta1 = numpyro.sample("theta1", dist.Dirichlet(jnp.ones(2)))
    theta2 = numpyro.sample("theta2", dist.Dirichlet(jnp.ones(2)))
    mu_steps = numpyro.sample("mu_steps", dist.ImproperUniform(constraints.positive, (), (2,)))
    mu = numpyro.deterministic("mu", mu_steps.cumsum(-1))
    prior = dist.Normal(jnp.array([3.0, 10.0]), 1.0)
    numpyro.factor("mu_prior", prior.log_prob(mu).sum())
    emission = dist.Normal(mu, 1.0).log_prob(y[:, None])
    transition = jnp.log(jnp.stack([theta1, theta2]))

    def step(forward, observed):
        return logsumexp(forward[:, None] + transition, 0) + observed, None

    forward, _ = jax.lax.scan(step, emission[0], emission[1:])
    numpyro.factor("y", logsumexp(forward))


def kidscore_interaction(mom_hs, mom_iq, kid_score):
    beta = numpyro.sample("beta", dist.ImproperUniform(constraints.real, (), (4,)))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = beta[0] + beta[1] * mom_hs + beta[2] * mom_iq + beta[3] * mom_hs * mom_iq
    with numpyro.plate("child", len(mom_hs)):
        numpyro.sample("kid_score", dist.Normal(mean, sigma), obs=kid_score)


def low_dim_gauss_mix(y):
    mu = numpyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
    numpyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum())
    sigma = numpyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
    theta = numpyro.sample("theta", dist.Beta(5.0, 5.0))
    weights = dist.Categorical(jnp.stack([theta, 1 - theta]))
    mixture = dist.MixtureSameFamily(weights, dist.Normal(mu, sigma))
    with numpyro.plate("observation", len(y)):
        numpyro.sample("y", mixture, obs=y)


STEPS_PER_YEAR = 16


def lotka_volterra(y_init, y):
    theta = numpyro.sample("theta", dist.ImproperUniform(constraints.positive, (), (4,)))
    prior = dist.Normal(jnp.array([1.0, 0.05, 1.0, 0.05]), jnp.array([0.5, 0.05, 0.5, 0.05]))
    numpyro.factor("theta_prior", prior.log_prob(theta).sum())
    z_init = numpyro.sample("z_init", dist.LogNormal(jnp.full(2, math.log(10)), 1.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.LogNormal(jnp.full(2, -1.0), 1.0).to_event(1))
    growth = jnp.stack([theta[0], -theta[2]])
    interaction = jnp.stack([-theta[1], theta[3]])
    h = 1 / STEPS_PER_YEAR

    def velocity(log_z):
        return growth + interaction * jnp.exp(log_z)[::-1]

    def step(log_z, _):
        k1 = velocity(log_z)
        k2 = velocity(log_z + h / 2 * k1)
        k3 = velocity(log_z + h / 2 * k2)
        k4 = velocity(log_z + h * k3)
        return log_z + h / 6 * (k1 + 2 * (k2 + k3) + k4), None

    def year(log_z, _):
        after, _ = jax.lax.scan(step, log_z, None, length=STEPS_PER_YEAR)
        return after, after

    _, log_z = jax.lax.scan(year, jnp.log(z_init), None, length=len(y))
    numpyro.sample("y_init", dist.LogNormal(jnp.log(z_init), sigma).to_event(1), obs=y_init)
    numpyro.sample("y", dist.LogNormal(log_z, sigma).to_event(2), obs=y)


def blr(X, y):
    beta = numpyro.sample("beta", dist.Normal(jnp.zeros(X.shape[-1]), 10.0).to_event(1))
    sigma = numpyro.sample("sigma", dist.HalfNormal(10.0))
    with numpyro.plate("observation", len(X)):
        numpyro.sample("y", dist.Normal(X @ beta, sigma), obs=y)


# Model files of benchmarks/posteriordb: the model here, and its data's names.
MODELS: Mapping[str, tuple[Model, tuple[str, ...]]] = {
    "ark_ark": (ark_ark, ("y",)),
    "dogs_dogs": (dogs_dogs, ("y",)),
    "eight_schools_eight_schools_centered": (eight_schools_centered, ("sigma", "y")),
    "eight_schools_eight_schools_noncentered": (eight_schools_noncentered, ("sigma", "y")),
    "glm_poisson_data_glm_poisson_model": (glm_poisson, ("year", "C")),
    "gp_pois_regr_gp_regr": (gp_regr, ("x", "y")),
    "hmm_example_hmm_example": (hmm_example, ("y",)),
    "hudson_lynx_hare_lotka_volterra": (lotka_volterra, ("y_init", "y")),
    "kidiq_kidscore_interaction": (kidscore_interaction, ("mom_hs", "mom_iq", "kid_score")),
    "low_dim_gauss_mix_low_dim_gauss_mix": (low_dim_gauss_mix, ("y",)),
    "sblri_blr": (blr, ("X", "y")),
}


def model_and_arguments(name: str, data: Mapping[str, Any]) -> tuple[Model, Arguments]:
    """The model of this name and what it is called on.

    Args:
        name: A model file of benchmarks/posteriordb, without the ending.
        data: Its reference's data.

    Raises:
        KeyError: If NumPyro has no such model here.
    """
    model, wanted = MODELS[name]
    return model, tuple(jnp.asarray(data[key], dtype=float) for key in wanted)
