"""Where Pyro's validation raises, the density is zero, and fits and samplers say so."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.model.gradients import Gradients
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.validation.nuts import SamplerWarning

N = 4
COUNTS = torch.tensor([0.0, 1.0, 3.0, 2.0])
BINARY = torch.tensor([0.0, 1.0, 1.0, 1.0])
POSITIVE = torch.tensor([0.4, 1.0, 2.5, 0.7])
UNIT = torch.tensor([0.4, 0.1, 0.8, 0.7])
HOT = torch.tensor([0, 1, 2, 1])
SIMPLEX = torch.tensor([0.2, 0.3, 0.5])


def pair(k):
    """Three numbers of which the first may be negative."""
    return torch.stack([k + 0.5, k * 0 + 0.3, k * 0 + 0.2])


def weights(k):
    return torch.stack([0.3 + 0.5 * k, 0.7 - 0.5 * k])


def shifted(k):
    return dist.TransformedDistribution(
        dist.Exponential(1.0), dist.transforms.AffineTransform(0.2 + k, 1.0)
    )


# Distributions with an argument, or a support, that follows a latent k ~ Normal(0, 1) beyond bounds.
LEAVING = {
    "Gamma": (lambda k: dist.Gamma(1 + k, 1.0), POSITIVE),
    "Gamma rate": (lambda k: dist.Gamma(2.0, 1 + k), POSITIVE),
    "Beta": (lambda k: dist.Beta(1 + k, 1.5), UNIT),
    "Dirichlet": (lambda k: dist.Dirichlet(pair(k)), SIMPLEX.expand(N, 3)),
    "Bernoulli": (lambda k: dist.Bernoulli(0.5 + 0.4 * k), BINARY),
    "Binomial": (lambda k: dist.Binomial(5, 0.5 + 0.4 * k), COUNTS),
    "Categorical": (lambda k: dist.Categorical(pair(k)), HOT),
    "Poisson": (lambda k: dist.Poisson(1 + k), 0 * COUNTS),
    "Geometric": (lambda k: dist.Geometric(0.5 + 0.4 * k), COUNTS),
    "NegativeBinomial": (lambda k: dist.NegativeBinomial(1 + k, torch.tensor(0.4)), COUNTS),
    "Exponential": (lambda k: dist.Exponential(1 + k), POSITIVE),
    "StudentT": (lambda k: dist.StudentT(2 + k, 0.0, 1.0), POSITIVE),
    "VonMises": (lambda k: dist.VonMises(0.0, 1 + k), UNIT),
    "InverseGamma": (lambda k: dist.InverseGamma(1 + k, 1.0), POSITIVE),
    "GammaPoisson": (lambda k: dist.GammaPoisson(1 + k, 1.0), COUNTS),
    "ZeroInflatedPoisson": (
        lambda k: dist.ZeroInflatedPoisson(torch.tensor(2.0), gate=0.5 + 0.4 * k),
        COUNTS,
    ),
    "Normal": (lambda k: dist.Normal(0.0, 1 + k), POSITIVE),
    "mixture": (
        lambda k: dist.MixtureSameFamily(dist.Categorical(torch.ones(3)), dist.Gamma(pair(k), 1.0)),
        POSITIVE,
    ),
    "mixture weights": (
        lambda k: dist.MixtureSameFamily(
            dist.Categorical(weights(k)), dist.Normal(torch.tensor([0.0, 1.0]), 1.0)
        ),
        POSITIVE,
    ),
    "Uniform support": (lambda k: dist.Uniform(-4.0, 2.0 + k), 0.5 * POSITIVE),
    "Pareto support": (lambda k: dist.Pareto(torch.exp(k) / 3, 1.0), POSITIVE),
    "shift": (shifted, POSITIVE),
}


def model_of(name):
    make, data = LEAVING[name]

    def model():
        k = pyro.sample("k", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", N):
            pyro.sample("y", make(k), obs=data)

    return model


def by_pyro(model, k):
    """The log joint of plain Pyro under validation, -inf where it raises."""
    fixed = poutine.condition(model, data={"k": torch.tensor(k)})
    try:
        with pyro.validation_enabled(True):
            return float(poutine.trace(fixed).get_trace().log_prob_sum())
    except ValueError:
        return -math.inf


@pytest.mark.parametrize("name", LEAVING)
def test_the_density_is_zero_exactly_where_pyro_refuses(name):
    model = model_of(name)
    points = [-3.1, -1.7, -0.9, -0.3, 0.2, 0.8, 1.9, 3.2]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        expected = torch.tensor([by_pyro(model, k) for k in points])
    finally:
        torch.set_default_dtype(before)
    assert expected.isinf().any()
    assert expected.isfinite().any()
    density = Density(vi.Model(model))
    assert list(density.leaving) == ["y"]
    z = torch.tensor(points, dtype=torch.float64).unsqueeze(-1)
    found = density.log_prob(z)
    # Data are float32, plain Pyro's constants among them.
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-6)
    loop = torch.cat([density.log_prob(z[i : i + 1]) for i in range(len(z))])
    assert torch.allclose(found, loop, rtol=1e-12)
    captured = Gradients(density, patience=0)
    assert torch.allclose(captured(z)[0].nan_to_num(-math.inf, neginf=-math.inf), found, rtol=1e-12)
    shares = {site for (site, _), where in density.outside({"k": z[:, 0]}).items() if where.any()}
    assert shares == {"y"}


@pytest.mark.parametrize("rows", [False, True])
def test_a_factor_is_zero_where_its_distribution_is_not_defined(rows):
    def model():
        k = pyro.sample("k", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", N):
            pyro.sample("x", dist.Normal(k, 1.0), obs=POSITIVE)
            if rows:
                pyro.factor("y", dist.Gamma(1 + k, 1.0).log_prob(POSITIVE))
        if not rows:
            pyro.factor("y", dist.Gamma(1 + k, 1.0).log_prob(POSITIVE).sum())

    density = Density(vi.Model(model))
    assert density.leaving == {"y": "'concentration' of its Gamma is not above 0"}
    z = torch.tensor([[-2.3], [-0.4]], dtype=torch.float64)
    outside, inside = density.log_prob(z)
    assert outside == -math.inf
    assert float(inside) == pytest.approx(by_pyro(model, -0.4), rel=1e-5)


def inside_all_along():
    s = pyro.sample("s", dist.HalfCauchy(1.0))
    p = pyro.sample("p", dist.Beta(0.5, 0.5))
    theta = pyro.sample("theta", dist.Dirichlet(torch.full((3,), 0.1)))
    corr = pyro.sample("corr", dist.LKJCholesky(3, 1.0))
    m = pyro.sample("m", dist.Normal(0.0, s))
    end = pyro.sample("end", dist.Uniform(0.0, 1.0 + s))
    with pyro.plate("datum", N):
        pyro.sample("a", dist.Normal(m, s * s), obs=POSITIVE)
        # Sums and complements of probabilities, which rounding puts a little beyond their bounds.
        pyro.sample("b", dist.Bernoulli((p + (1 - p)) - 0.3 * p - 0.7 * p + p * 0.999), obs=BINARY)
        pyro.sample("c", dist.Categorical(theta / theta.sum()), obs=HOT)
        pyro.sample("d", dist.Gamma(1 - p, torch.exp(m)), obs=POSITIVE)
        pyro.sample("e", dist.Poisson(torch.exp(m)), obs=COUNTS)
        pyro.sample("f", dist.Gumbel(m, s), obs=POSITIVE)
        pyro.sample("g", dist.LogNormal(m, end + 1e-3), obs=POSITIVE)
        scales = dist.MultivariateNormal(torch.zeros(3), scale_tril=(s + 0.1) * corr)
        pyro.sample("h", scales, obs=SIMPLEX.expand(N, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_stays_inside_but_for_rounding_is_not_refused(dtype):
    density = Density(vi.Model(inside_all_along), dtype=dtype)
    assert density.leaving == {}
    z = 2.0 * torch.randn(200, density.dim, generator=torch.Generator().manual_seed(0))
    z = z.to(dtype)
    assert torch.equal(density.log_prob(z), density.strict().log_prob(z))


def gamma(y, validate_args=None):
    k = pyro.sample("k", dist.Normal(0.0, 5.0))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Gamma(1 + k, 1.0, validate_args=validate_args), obs=y)


def exact():
    """Mean and sd of k by quadrature."""
    k = torch.linspace(-0.999999, 15.0, 400_001, dtype=torch.float64)
    y = POSITIVE.double()
    log_p = dist.Normal(0.0, 5.0).log_prob(k)
    log_p = log_p + (k[:, None] * y.log() - y - torch.lgamma(1 + k[:, None])).sum(-1)
    p = (log_p - log_p.max()).exp()
    mean = (p * k).sum() / p.sum()
    return float(mean), float(((p * (k - mean) ** 2).sum() / p.sum()).sqrt())


def test_a_fit_stays_where_the_model_is_defined_and_says_what_is_not():
    mean, sd = exact()
    posterior = vi.fit(vi.Model(gamma, POSITIVE), "full_rank", seed=0)
    assert (posterior.sample(4000, seed=1)["k"] > -1).mean() > 0.99
    draws = posterior.resample(4000, seed=2)["k"]
    assert draws.min() > -1
    # Weighted draws are worth over half of independent ones: 4 standard errors.
    assert draws.mean() == pytest.approx(mean, abs=4 * sd / 2000**0.5)
    assert draws.std() == pytest.approx(sd, rel=4 / 4000**0.5)
    outside = (posterior.log_weights(4000, seed=1) == -np.inf).mean()
    if outside:
        assert posterior.elbo == -np.inf
        assert "'concentration' of its Gamma is not above 0" in str(posterior.verdict)


def test_nuts_stays_where_the_model_is_defined():
    mean, sd = exact()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SamplerWarning)  # trajectories that meet the wall diverge
        tree = vi.nuts(vi.Model(gamma, POSITIVE), chains=2, draws=1000, seed=0, progress=False)
    draws = tree.posterior["k"].to_numpy()
    assert draws.min() > -1
    # Effective draws are some 500.
    assert draws.mean() == pytest.approx(mean, abs=4 * sd / 500**0.5)


def test_draws_outside_are_found_also_where_nobody_looked_before():
    posterior = vi.fit(vi.Model(gamma, POSITIVE), "mean_field", seed=0)
    density = posterior.density
    # As if no point had shown it: the weights of draws do not rely on that.
    density._runner.guarded = frozenset()
    density.leaving.clear()
    with torch.no_grad():
        for parameter in posterior.approximation.guide.parameters():
            parameter.copy_(
                torch.full_like(parameter, -4.0) if parameter.numel() == 1 else parameter
            )
    log_w = posterior.log_weights(500, seed=0)
    draws = posterior.sample(500, seed=0)["k"]
    assert np.array_equal(log_w == -np.inf, draws < -1)


@pytest.mark.parametrize("place", [-0.7, 0.0])
def test_a_guide_of_the_users_is_held_to_the_same(place):
    def guide(y):
        pyro.sample("k", dist.Normal(torch.tensor(place), 0.15))

    posterior = vi.fit(vi.Model(gamma, POSITIVE), guide, steps=1, seed=0)
    draws = posterior.sample(1000, seed=3)["k"]
    assert np.array_equal(posterior.log_weights(1000, seed=3) == -np.inf, draws < -1)
    # At -0.7 a draw in 44 is outside.
    told = "% of the draws (site 'y': 'concentration' of its Gamma is not above 0"
    assert (told in str(posterior.verdict)) == (place < 0)
    assert (posterior.elbo == -np.inf) == (place < 0)


def test_validate_args_false_is_taken_at_its_word():
    density = Density(vi.Model(gamma, POSITIVE, False))
    assert density.leaving == {}
    assert density.strict().log_prob(torch.tensor([[-2.5]], dtype=torch.float64)).isfinite()


def test_the_remedy_works():
    def softplus(y):
        k = pyro.sample("k", dist.Normal(0.0, 5.0))
        with pyro.plate("datum", len(y)):
            pyro.sample("y", dist.Gamma(torch.nn.functional.softplus(k), 1.0), obs=y)

    assert Density(vi.Model(softplus, POSITIVE)).leaving == {}
    posterior = vi.fit(vi.Model(softplus, POSITIVE), "full_rank", seed=0)
    assert np.isfinite(posterior.log_weights(2000, seed=0)).all()


def probabilities(y):
    p = pyro.sample("p", dist.Normal(0.5, 0.02))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


def test_a_model_that_is_not_defined_near_the_origin_says_where_to_start():
    with pytest.raises(ModelError, match=r"'probs' of a Bernoulli .*a dict of site values"):
        vi.fit(vi.Model(probabilities, BINARY), "full_rank", seed=0)
    posterior = vi.fit(vi.Model(probabilities, BINARY), "full_rank", seed=0, init={"p": 0.5})
    assert posterior.status.converged
    # The prior is as good as all there is: its precision is 2,500, that of the data 16.
    assert posterior.summary().loc["p", "sd"] == pytest.approx(2516**-0.5, rel=0.06)


def test_the_check_names_it():
    report = vi.check(vi.Model(gamma, POSITIVE), verbose=False)
    found = next(check for check in report.checks if check.name == "log density")
    assert (found.outcome, report.ok) == ("note", True)
    assert "y ('concentration' of its Gamma is not above 0)" in found.message


class Silent(dist.TorchDistribution):
    """A unit normal of the user's own, that says nothing of its arguments or its support."""

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def sample(self, sample_shape=()):
        return self.loc + torch.randn(*sample_shape, *self.loc.shape)

    def log_prob(self, value):
        return -0.5 * (value - self.loc) ** 2 - 0.5 * math.log(2 * math.pi)

    def expand(self, batch_shape, _instance=None):
        return Silent(self.loc.expand(batch_shape))


def test_a_distribution_that_says_nothing_of_itself_is_observed():
    """Pyro runs it: the ELBO of a Gaussian guide is the evidence, y ~ N(0, 1 + I)."""
    y = torch.tensor([0.3, 1.2, -0.4, 2.0])

    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", Silent(x.expand(len(y))), obs=y)

    known = vi.Model(model, y)
    assert vi.check(known, verbose=False).ok
    fitted = vi.fit(known, "full_rank", seed=0)
    evidence = dist.MultivariateNormal(torch.zeros(4), 1.0 + torch.eye(4)).log_prob(y)
    assert fitted.elbo == pytest.approx(evidence.item(), abs=1e-3)
    assert "y" in str(fitted.check_predictive())
