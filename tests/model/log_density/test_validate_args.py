"""Data outside a support, where the model says that its formula is meant: validate_args=False."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import ModelError, ModelWarning
from pyro_vi_kit.model.log_density import Density

GRAY = torch.tensor([0.2, 0.9, 0.5, 0.7, 1.0])


def gray(x, validate_args=False):
    p = pyro.sample("p", dist.Beta(1.0, 1.0))
    with pyro.plate("pixel", len(x)):
        pyro.sample("x", dist.Bernoulli(p, validate_args=validate_args), obs=x)


def test_gray_pixels_are_fitted_by_bernoullis_formula():
    """p^sum(x) (1 - p)^(n - sum(x)) is the kernel of a Beta."""
    with pytest.warns(ModelWarning, match=r"site 'x' hold 4 value\(s\) outside .* Bernoulli"):
        posterior = vi.fit(vi.Model(gray, GRAY), guide="neural_spline", seed=0)
    exact = dist.Beta(1 + GRAY.sum(), 1 + (1 - GRAY).sum())
    # Resampled draws: 4,000 of them, four standard errors.
    draws = posterior.resample(4000, seed=0)["p"]
    assert abs(draws.mean() - float(exact.mean)) < 4 * float(exact.stddev) / 4000**0.5


def test_nuts_samples_the_same():
    with pytest.warns(ModelWarning):
        posterior = vi.nuts(vi.Model(gray, GRAY), chains=2, draws=500, seed=0).posterior
    exact = dist.Beta(1 + GRAY.sum(), 1 + (1 - GRAY).sum())
    # At least 200 effective draws, four standard errors.
    assert abs(float(posterior.p.mean()) - float(exact.mean)) < 4 * float(exact.stddev) / 200**0.5


def test_a_vae_on_gray_pixels():
    decoder = torch.nn.Sequential(torch.nn.Linear(2, 6), torch.nn.Sigmoid())

    def vae(x):
        pyro.module("decoder", decoder)
        with pyro.plate("image", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(decoder(z), validate_args=False).to_event(1), obs=x)

    torch.manual_seed(0)
    with pytest.warns(ModelWarning, match="validate_args=False"):
        posterior = vi.fit(vi.Model(vae, torch.rand(20, 6)), guide="amortized", steps=20, seed=0)
    assert posterior.elbo == posterior.elbo


@pytest.mark.parametrize("validate_args", [None, True])
def test_without_it_they_are_refused_and_the_remedy_is_said(validate_args):
    model = vi.Model(gray, GRAY, kwargs={"validate_args": validate_args})
    with pytest.raises(ModelError, match=r"4 value.s. outside .* validate_args=False"):
        vi.fit(model, seed=0)
    check = next(c for c in vi.check(model, verbose=False).checks if c.name == "data")
    assert check.outcome == "fail"


def test_the_check_notes_it():
    report = vi.check(vi.Model(gray, GRAY), verbose=False)
    check = next(c for c in report.checks if c.name == "data")
    assert (report.ok, check.outcome) == (True, "note")
    assert "validate_args=False" in check.message


@pytest.mark.parametrize(
    "fn",
    [
        lambda s: dist.Uniform(0.0, 1.0, validate_args=False),
        lambda s: dist.Gamma(s, 1.0, validate_args=False),
    ],
)
def test_a_density_that_is_not_finite_there_is_refused_all_the_same(fn):
    def model(x):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", fn(s), obs=x)

    with pytest.raises(ModelError, match="outside the support") as refused:
        Density(vi.Model(model, torch.tensor(-1.0)))
    assert "validate_args" not in str(refused.value)


def test_other_data_are_held_to_the_same():
    def model(x, y):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Exponential(s, validate_args=False), obs=x)
        pyro.sample("y", dist.Exponential(s), obs=y)

    with pytest.warns(ModelWarning, match="'x'"):
        density = Density(vi.Model(model, torch.tensor(-1.0), torch.tensor(1.0)))
    density.with_data([torch.tensor(-2.0), torch.tensor(1.0)])
    with pytest.raises(ModelError, match="site 'y'"):
        density.with_data([torch.tensor(1.0), torch.tensor(-2.0)])


def test_a_multinomial_of_one_trial_is_taken_as_pyro_takes_it():
    counts = torch.tensor([[3.0, 1.0, 4.0], [2.0, 0.0, 5.0]])

    def model(x):
        a = pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("time", 2):
            pyro.sample("x", dist.Multinomial(logits=a, validate_args=False), obs=x)

    with pytest.warns(ModelWarning, match="Multinomial"):
        density = Density(vi.Model(model, counts))
    z = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for point, found in zip(z, density.log_prob(z), strict=True):
        held = poutine.condition(model, data={"a": point})
        expected = poutine.trace(held).get_trace(counts.double()).log_prob_sum()
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("fn", "log_prob"),
    [
        (
            lambda a: dist.Pareto(a, 2.0),
            lambda a, y: (2 * a**2 / y**3).log() if y >= a else -torch.inf,
        ),
        (lambda a: dist.Uniform(0.0, a), lambda a, y: -a.log() if y < a else -torch.inf),
        (
            lambda a: dist.Uniform(0.0, a).expand([1]).to_event(1),
            lambda a, y: -a.log() if y < a else -torch.inf,
        ),
    ],
)
def test_a_support_that_follows_a_latent_is_empty_outside(fn, log_prob):
    """Data outside of it at one value of the latent may be inside at another."""

    def model(y):
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        d = fn(a)
        pyro.sample("y", d, obs=y.expand(d.shape()))

    y = torch.tensor(1.7, dtype=torch.float64)
    density = Density(vi.Model(model, y))
    z = torch.tensor([[-1.0], [0.0], [0.4], [0.7], [2.0]], dtype=torch.float64)
    a = z.exp()[:, 0]
    expected = torch.stack([torch.as_tensor(log_prob(v, y), dtype=torch.float64) for v in a])
    prior = dist.Normal(0.0, 1.0).log_prob(z[:, 0])
    torch.testing.assert_close(density.log_prob(z), prior + expected)


def test_checks_that_are_off_for_all_distributions_are_honoured_alike():
    """`pyro.distributions.enable_validation(False)`, as Pyro's VAE tutorial has it."""
    model = vi.Model(gray, GRAY, kwargs={"validate_args": None})
    pyro.distributions.enable_validation(False)
    try:
        with pytest.warns(ModelWarning, match=r"site 'x' hold 4 value\(s\) outside"):
            density = Density(model)
        assert vi.check(model, verbose=False).ok
    finally:
        pyro.distributions.enable_validation(True)
    z = torch.tensor([[0.3]], dtype=torch.float64)
    p = float(density.constrain(z)["p"])
    exact = float(GRAY.sum()) * math.log(p) + float((1 - GRAY).sum()) * math.log1p(-p)
    assert float(density.log_prob(z, jacobian=False)) == pytest.approx(exact, rel=1e-6)
    with pytest.raises(ModelError, match="outside the support"):
        Density(model)
