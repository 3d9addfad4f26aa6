"""A likelihood that is a pyro.factor in the data plate is one of rows, as an observed site is."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.model.log_density import Density

Y = torch.randn(12, generator=torch.Generator().manual_seed(3)) + 0.5


def log_normal(y, loc):
    return -0.5 * (y - loc) ** 2 - 0.5 * math.log(2 * math.pi)


def by_factor(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)) as i:
        pyro.factor("y", log_normal(y[i], m))


def by_site(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)) as i:
        pyro.sample("y", dist.Normal(m, 1.0), obs=y[i])


def local_factor(y):
    with pyro.plate("datum", len(y)) as i:
        z = pyro.sample("z", dist.Normal(torch.zeros(len(i)), 1.0))
        pyro.factor("y", log_normal(y[i], z))


def mixture_factor(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)) as i:
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.factor("y", log_normal(y[i], m + k))


def mixture_site(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)) as i:
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(m + k, 1.0), obs=y[i])


def test_minibatches_find_the_plate():
    posterior = vi.fit(vi.Model(by_factor, Y), "full_rank", batch_size=4, steps=1500, seed=0)
    precision = 1 + len(Y)
    mean = float(Y.sum()) / precision
    # A tenth of a posterior sd is what a short stochastic fit is allowed.
    draws = posterior.sample(4000, seed=0)["m"]
    assert abs(draws.mean() - mean) < 0.1 * precision**-0.5
    assert abs(draws.std() - precision**-0.5) < 0.1 * precision**-0.5


def test_a_bound_for_each_datum():
    """With tables a multi-sample bound is taken row by row, and reaches the evidence, N(y; 0, 2)."""
    posterior = vi.fit(
        vi.Model(local_factor, Y), "mean_field", "iwae", batch_size=4, steps=600, seed=0
    )
    evidence = float((-0.25 * Y**2 - 0.5 * math.log(4 * math.pi)).sum())
    assert evidence - 0.2 < posterior.bound < evidence + 0.05


@pytest.mark.parametrize(("factor", "site"), [(by_factor, by_site), (mixture_factor, mixture_site)])
def test_loo_takes_its_terms(factor, site):
    one, other = (vi.fit(vi.Model(fn, Y), "full_rank", seed=0) for fn in (factor, site))
    found, expected = one.loo(seed=0), other.loo(seed=0)
    assert float(found.elpd_loo) == pytest.approx(float(expected.elpd_loo), abs=1e-6)
    assert float(found.se) == pytest.approx(float(expected.se), abs=1e-6)
    np.testing.assert_allclose(
        one.to_arviz().log_likelihood["y"].values,
        other.to_arviz().log_likelihood["y"].values,
        atol=1e-8,
    )


def test_a_factor_beside_what_is_observed_is_left_out_only_when_named():
    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)
            pyro.factor("f", log_normal(y, m))

    posterior = vi.fit(vi.Model(model, Y), "full_rank", seed=0)
    assert list(posterior.to_arviz().log_likelihood.data_vars) == ["y"]
    # The two say the same of a row.
    alone = float(posterior.loo(sites="y", seed=0).elpd_loo)
    assert float(posterior.loo(seed=0).elpd_loo) == alone
    assert float(posterior.loo(sites="f", seed=0).elpd_loo) == pytest.approx(alone, abs=1e-8)


def test_a_factor_outside_of_plates_is_no_row():
    def model(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.factor("f", log_normal(y, m).sum())

    assert not Density(vi.Model(model, Y)).structure.likelihood
    with pytest.raises(OptionError, match=r"told apart only in a pyro\.plate"):
        vi.fit(vi.Model(model, Y), "full_rank", seed=0).loo()
    with pytest.raises(OptionError, match="needs a data plate"):
        vi.fit(vi.Model(model, Y), batch_size=2, seed=0)
