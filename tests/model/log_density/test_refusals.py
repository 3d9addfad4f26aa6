"""What a model or its data can do wrong is said with the site or the argument, and the remedy works."""

import itertools
import random
import time
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.model.log_density import Density

Y = torch.tensor([0.4, -0.2, 1.3, 0.6])


def refusal(model, *args):
    with pytest.raises(ModelError) as refused:
        Density(vi.Model(model, *args))
    return refused.value


def latent():
    return pyro.sample("m", dist.Normal(0.0, 1.0))


class Bare(pyro.distributions.distribution.Distribution):
    """A distribution as Pyro asks for it, without a shape."""

    def __init__(self, loc):
        self.loc = loc

    def sample(self, *args, **kwargs):
        return self.loc + torch.randn(())

    def log_prob(self, x, *args, **kwargs):
        return -0.5 * (x - self.loc) ** 2


class Shaped(dist.TorchDistribution):
    """The same, derived as the refusal says."""

    arg_constraints: ClassVar[dict] = {}
    support = constraints.real

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, torch.Size())

    def log_prob(self, value):
        return -0.5 * (value - self.loc) ** 2


def bare():
    pyro.sample("y", Bare(latent()), obs=Y[0])


def shaped():
    pyro.sample("y", Shaped(latent()), obs=Y[0])


def as_a_factor():
    pyro.factor("y", Bare(latent()).log_prob(Y[0]).sum())


def test_a_distribution_without_a_shape():
    said = str(refusal(bare))
    assert "site 'y', Bare" in said
    assert "TorchDistribution" in said
    assert "pyro.factor('y'" in said
    assert not vi.check(vi.Model(bare), verbose=False).ok
    z = torch.tensor([[0.3], [-1.0]], dtype=torch.float64)
    expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) - 0.5 * (Y[0].double() - z[:, 0]) ** 2
    for remedy in (shaped, as_a_factor):
        assert torch.allclose(Density(vi.Model(remedy)).log_prob(z), expected)


@pytest.mark.parametrize("data", [2.0, 1, [0.3, 0.5], np.array([0.3, 0.5]), np.float64(2.0)])
def test_data_that_are_no_tensor(data):
    def model(y):
        pyro.sample("y", dist.Normal(latent(), 1.0), obs=y)

    said = str(refusal(model, data))
    assert f"site 'y' are of type {type(data).__name__}" in said
    assert "torch.as_tensor" in said
    assert not vi.check(vi.Model(model, data), verbose=False).ok
    assert Density(vi.Model(model, torch.as_tensor(data))).dim == 1


counter = itertools.count()


def counted():
    return 0.01 * next(counter)


@pytest.mark.parametrize(
    "draw",
    [random.random, np.random.default_rng(0).normal, lambda: time.perf_counter() % 1.0, counted],
)
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_a_model_that_is_not_deterministic(draw, size):
    def model():
        loc = latent() + size * float(draw())
        with pyro.plate("datum", len(Y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=Y)

    said = str(refusal(model))
    assert "not deterministic, site 'y'" in said
    assert "as an argument" in said
    report = vi.check(vi.Model(model), verbose=False)
    assert [c.name for c in report.checks if c.outcome == "fail"] == ["randomness"]


def regression(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def logistic(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("datum", len(y)):
        # Unlike a location, NaN logits pass the validation of some distributions.
        pyro.factor("y", torch.nn.functional.logsigmoid(x @ w))


def test_arguments_are_named_with_their_rows():
    x = torch.tensor([[1.0, 2.0], [torch.nan, 1.0], [1.0, 1.0], [3.0, torch.inf]])
    for model in (regression, logistic):
        assert "argument 'x' holds 2 NaN or infinite value(s), in row(s) 1, 3" in str(
            refusal(model, x, Y)
        )
    said = refusal(regression, torch.ones(4, 2, dtype=torch.long), Y)
    assert "argument 'x' holds whole numbers (torch.int64): pass x.float()" in str(said)
    assert isinstance(said.__cause__, RuntimeError)
    said = refusal(regression, np.ones((4, 2)), Y)
    assert "argument 'x' is a NumPy array" in str(said)
    assert "torch.as_tensor(x)" in str(said)
    for good in (torch.ones(4, 2, dtype=torch.long).float(), torch.as_tensor(np.ones((4, 2)))):
        assert Density(vi.Model(regression, good, Y)).dim == 2


def spread(covariance):
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.MultivariateNormal(m, covariance), obs=torch.ones(2))


def test_a_singular_covariance():
    said = str(refusal(spread, torch.ones(2, 2)))
    assert "'covariance_matrix' of a MultivariateNormal (after site 'm')" in said
    assert "1e-6 * torch.eye" in said
    assert "tensor(" not in said
    assert Density(vi.Model(spread, torch.ones(2, 2) + 1e-6 * torch.eye(2))).dim == 2


def test_a_model_that_raises_says_where():
    def model():
        latent()
        raise ZeroDivisionError("boom")

    said = refusal(model)
    assert str(said) == "the model raised ZeroDivisionError: boom (after site 'm')"
    assert isinstance(said.__cause__, ZeroDivisionError)


def standardised(y):
    m = pyro.sample("m", dist.Normal(y.mean(), y.var().sqrt()))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def test_a_scale_made_of_constant_data():
    said = str(refusal(standardised, torch.ones(4)))
    assert "'scale' of a Normal (before its first site)" in said
    assert "all numbers of argument 'y' are one" in said


def unknown_scale(y, floor=0.0):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Normal(m, floor + s), obs=y)


@pytest.mark.parametrize("guide", ["full_rank", "low_rank"])
def test_constant_data_end_in_words(guide):
    model = vi.Model(unknown_scale, torch.full((8,), 3.0))
    report = vi.check(model, verbose=False)
    data = next(check for check in report.checks if check.name == "data")
    assert data.outcome == "note"
    assert "0.01 + s" in data.remedy
    posterior = vi.fit(model, guide, seed=0, budget=3)
    assert posterior.verdict.level == "reject"
    assert "data at site 'y' are one number again and again" in str(posterior.verdict)
    assert "0.01 + s" in str(posterior.verdict)
    assert not posterior.status.converged
    assert "nan" not in posterior.status.advice


def test_the_remedy_for_constant_data():
    posterior = vi.fit(vi.Model(unknown_scale, torch.full((8,), 3.0), 0.01), "full_rank", seed=0)
    assert posterior.status.converged
    assert np.isfinite(posterior.elbo)


@pytest.mark.parametrize("support", [constraints.real, constraints.positive])
def test_an_improper_prior_on_what_nothing_depends_on(support):
    def model():
        pyro.sample("a", dist.ImproperUniform(support, (), ()))
        pyro.sample("y", dist.Normal(latent(), 1.0), obs=Y[0])

    said = str(refusal(model))
    assert "site(s) a have an improper prior and no influence" in said
    report = vi.check(vi.Model(model), verbose=False)
    assert [c.name for c in report.checks if c.outcome == "fail"] == ["improper priors"]

    def proper():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(latent(), 1.0), obs=Y[0])

    assert Density(vi.Model(proper)).dim == 2


def test_a_summary_of_draws_that_are_not_finite_has_no_numbers_for_them():
    def model():
        pyro.deterministic("far", 1e4 * latent().abs().exp().exp().exp().exp().exp())

    table = vi.fit(vi.Model(model), "mean_field", seed=0).summary()
    assert np.isnan(table.loc["far", "mean"])
    assert table.loc["m", "sd"] == pytest.approx(1.0, abs=0.06)


def assigned(count):
    total = latent()
    for i in range(count):
        total = total + pyro.sample(f"z{i}", dist.Categorical(torch.ones(4)))
    pyro.sample("y", dist.Normal(total, 1.0), obs=torch.tensor(3.0))


def test_too_many_states_are_refused_before_they_are_made():
    said = str(refusal(assigned, 20))
    assert "20 discrete latent site(s) z0, z1" in said
    assert "more than 250,000 numbers at once" in said
    report = vi.check(vi.Model(assigned, 20), verbose=False)
    assert [c.name for c in report.checks if c.outcome == "fail"] == ["discrete sites"]

    def each_its_own():
        m = latent()
        with pyro.plate("datum", 20):
            z = pyro.sample("z", dist.Categorical(torch.ones(4)))
            pyro.sample("y", dist.Normal(m + z, 1.0), obs=torch.full((20,), 3.0))

    assert Density(vi.Model(each_its_own)).largest == 80


def regress(x, y=None):
    m = latent()
    with pyro.plate("datum", len(x)):
        pyro.sample("y", dist.Normal(m * x, 1.0), obs=y)


def test_a_forgotten_response_is_noted():
    data = {}
    for args in ((Y,), (Y, None), (Y, Y)):
        report = vi.check(vi.Model(regress, *args), verbose=False)
        assert report.ok
        data[len(args), args[-1] is None] = next(c for c in report.checks if c.name == "data")
    assert "argument(s) y are None" in data[1, False].message
    assert data[2, True].outcome == "note"
    assert data[2, False].outcome == "pass"


def test_a_prior_that_is_masked_out_is_noted():
    def model(mask):
        with poutine.mask(mask=mask):
            m = latent()
        pyro.sample("y", dist.Normal(m, 1.0), obs=Y[0])

    for mask, outcome in ((False, "note"), (torch.tensor(False), "note"), (True, "pass")):
        report = vi.check(vi.Model(model, mask), verbose=False)
        priors = next(check for check in report.checks if check.name == "improper priors")
        assert priors.outcome == outcome
        assert ("masked out at site(s) m" in priors.message) == (outcome == "note")


def test_rows_that_obs_mask_fills_are_no_masked_prior():
    def model():
        m = latent()
        with pyro.plate("datum", len(Y)):
            seen = torch.ones(len(Y), dtype=torch.bool)
            pyro.sample("y", dist.Normal(m, 1.0), obs=Y, obs_mask=seen)

    report = vi.check(vi.Model(model), verbose=False)
    priors = next(check for check in report.checks if check.name == "improper priors")
    assert priors.outcome == "pass"
