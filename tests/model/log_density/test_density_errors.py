"""A model that cannot be used is refused with the site's name and the remedy."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from hand import density_of
from torch import nn

from pyro_vi_kit.core.errors import ModelError

Y = torch.tensor([0.3, -1.2, 0.8])


def latent(name="m"):
    return pyro.sample(name, dist.Normal(0.0, 1.0))


def observe(loc, obs=Y):
    with pyro.plate("datum", len(obs)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=obs)


def no_latents():
    observe(0.0)


def nothing_at_all():
    return None


def discrete():
    k = pyro.sample("k", dist.Poisson(0.5))
    observe(latent() + k)


def discrete_event():
    k = pyro.sample("k", dist.Bernoulli(torch.ones(3) / 2).to_event(1))
    observe(latent() + k)


def discrete_without_a_plate():
    k = pyro.sample("k", dist.Bernoulli(torch.ones(3) / 2))
    observe(latent() + k)


def discrete_only():
    observe(pyro.sample("k", dist.Bernoulli(0.5)))


def discrete_branch():
    k = pyro.sample("k", dist.Bernoulli(0.5))
    observe(latent() + (1.0 if k else 0.0))


def discrete_aggregated(keepdim=True):
    with pyro.plate("row", 3):
        k = pyro.sample("k", dist.Bernoulli(0.5))
    total = k.sum(-1, keepdim=keepdim)
    observe(latent() + total)


def discrete_aggregated_away():
    discrete_aggregated(keepdim=False)


def discrete_support():
    k = pyro.sample("k", dist.Bernoulli(0.5))
    observe(pyro.sample("u", dist.Uniform(0.0, 1.0 + k)))


def discrete_mean():
    with pyro.plate("row", 3):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(latent() + k - k.mean(), 1.0), obs=Y)


def discrete_scales():
    k = pyro.sample("k", dist.Bernoulli(0.5))
    m = latent()
    with pyro.poutine.scale(scale=0.5):
        observe(m + k)


def discrete_across_plates():
    m = latent()
    rows, columns = pyro.plate("row", 2, dim=-2), pyro.plate("column", 3, dim=-1)
    with rows:
        r = pyro.sample("r", dist.Bernoulli(0.3))
    with columns:
        c = pyro.sample("c", dist.Bernoulli(0.3))
    with rows, columns:
        pyro.sample("y", dist.Normal(m + r * c, 1.0), obs=Y.expand(2, 3))


def missing_data():
    observe(latent(), torch.tensor([0.1, float("nan"), float("nan")]))


def impossible_data():
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("datum", 3):
        pyro.sample("y", dist.Exponential(1 / s), obs=Y)


def raises():
    latent()
    raise KeyError("lookup")


def changing_sites():
    m = latent()
    if m > 0:
        latent("extra")
    observe(m)


def changing_shapes():
    m = latent()
    n = 2 if m > 0 else 3
    x = pyro.sample("x", dist.Normal(torch.zeros(n), 1.0).to_event(1))
    observe(m + x.sum())


def randomness():
    m = latent()
    observe(m + torch.randn(3))


def dropout():
    layer = pyro.module("layer", nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.5)))
    observe(latent() + layer(torch.ones(1)))


def randomness_of_a_deterministic():
    m = latent()
    pyro.deterministic("noise", torch.randn(2))
    observe(m)


def duplicate():
    latent()
    latent()


def wrong_plate():
    m = latent()
    with pyro.plate("datum", 4):
        pyro.sample("y", dist.Normal(m, 1.0), obs=Y)
    pyro.sample("w", dist.Normal(torch.zeros(3), torch.ones(4)), obs=Y)


def no_bijector():
    observe(pyro.sample("w", dist.ProjectedNormal(torch.ones(2))).sum())


def numpy_on_a_latent():
    m = latent()
    observe(torch.as_tensor(m.detach().numpy()) * torch.ones(3))


def detached():
    observe(latent().detach())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (no_latents, "no latent sites"),
        (nothing_at_all, "no latent sites"),
        (discrete, "discrete latent site.*k.*cannot be enumerated: truncate"),
        (discrete_event, "k, whose values cannot be enumerated.*pyro.plate"),
        (discrete_without_a_plate, "k have batch dims that no plate made.*into a pyro.plate"),
        (discrete_only, "every latent site .* is discrete.*infer_discrete"),
        (discrete_branch, "raised RuntimeError .*site.*k hold all their values.*no Python if"),
        (discrete_aggregated, "'y' mixes rows of plate 'row'"),
        (discrete_aggregated_away, "Shape mismatch.*where the discrete .*k hold all"),
        (discrete_support, "support of latent 'u' depends on discrete latents"),
        (discrete_mean, "gives other log densities where the discrete .*k hold all"),
        (discrete_scales, "'k' and 'y' depend on the same .*scaled differently"),
        (discrete_across_plates, "behind y depend on each other across the plates column, row"),
        (missing_data, "'y' hold 2 NaN, in row.*: drop the rows"),
        (impossible_data, r"'y' hold 1 value.*outside the support of its Exponential"),
        (raises, "the model raised KeyError: 'lookup'"),
        (changing_sites, "changes with its latents.*extra.*: write the choice as a mixture"),
        (changing_shapes, r"'x' has shape .* in one run and .* in the next"),
        (randomness, "not deterministic, site 'y'"),
        (dropout, r"not deterministic, site 'y'.*module.eval\(\)"),
        (randomness_of_a_deterministic, "not deterministic, site 'noise'"),
        (duplicate, "two sites are named 'm'"),
        (wrong_plate, "the model raised"),
        (no_bijector, "'w'.*Sphere.*ProjectedNormalReparam"),
        (numpy_on_a_latent, "gradient of the log density.*NumPy"),
        (detached, "gradient of the log density.*detach"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_it_is_refused(model, message):
    rng = torch.get_rng_state()
    with pytest.raises(ModelError, match=message):
        density_of(model)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_default_dtype() is torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nonsense": 1.0}, "no latent site named 'nonsense'; latents: m, s, u, p"),
        ({"y": 1.0}, "no latent site named 'y'"),
        ({"s": -1.0}, "'s' is not inside its support"),
        ({"s": 0.0}, "'s' is not inside its support"),
        ({"m": float("nan")}, "'m' is not inside its support"),
        ({"u": 1.5}, "'u' is not inside its support"),
        ({"p": [0.5, 0.9, 0.1]}, "'p' is not inside its support"),
        ({"m": [1.0, 2.0]}, r"'m' has shape \(\); the value given for it has \(2,\)"),
    ],
)
def test_values_that_cannot_be_unconstrained(values, message):
    def model():
        m = latent()
        s = pyro.sample("s", dist.HalfNormal(1.0))
        u = pyro.sample("u", dist.Beta(1.0, 1.0))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        observe(m * s + u + p)

    with pytest.raises(ModelError, match=message):
        density_of(model).unconstrain(values)
