"""Covariances by linear response, against closed forms and against tilting the posterior by hand."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import exact
from toys import gaussian, local_model, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.runtime import seed_of
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.optimize.deterministic.curvature import entries, hessian
from pyro_vi_kit.optimize.deterministic.parametrisation import Dense, Diagonal, Gaussian
from pyro_vi_kit.optimize.deterministic.search import matched_normals
from pyro_vi_kit.posterior.corrections import linear_response

QUIET = Progress("", enabled=False)
DRAWS = 512


def fitted(model, guide="mean_field", **options):
    return vi.fit(model, guide=guide, seed=0, progress=False, **options)


def covariance(posterior):
    """Unconstrained covariance of a full_rank posterior, `[D, D]`."""
    return posterior.approximation.guide.families["latent"]().covariance_matrix.detach()


# -- Gaussian posteriors: exact ---------------------------------------------------------------


@pytest.mark.parametrize("guide", ["mean_field", "full_rank"])
def test_a_gaussian_posterior_has_its_own_covariance(guide):
    model, mean, expected = gaussian(6)
    posterior = fitted(model, guide)
    with torch.no_grad():  # as callers may have it
        corrected = posterior.linear_response()
    torch.testing.assert_close(covariance(corrected), expected, rtol=1e-9, atol=1e-9)
    table = posterior.linear_response_summary()
    np.testing.assert_allclose(table["sd"], expected.diagonal().sqrt(), rtol=1e-6)
    np.testing.assert_allclose(table["mean"], mean, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("correlation", [-0.9, 0.5, 0.99, 0.9999])
def test_any_correlation(correlation):
    expected = torch.tensor([[1.0, correlation], [correlation, 1.0]], dtype=torch.float64)

    def model():
        pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), expected))

    posterior = fitted(vi.Model(model))
    table = posterior.linear_response_summary(draws=64)
    np.testing.assert_allclose(table["sd"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(table["sd_q"], math.sqrt(1 - correlation**2), rtol=1e-4)


def test_a_conjugate_regression_on_both_scales_of_its_coefficients():
    """A linear deterministic site is exact too: its covariance with everything is."""
    generator = torch.Generator().manual_seed(3)
    X = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    X[:, 2] = X[:, 1] + 0.1 * X[:, 2]
    y = X.sum(-1) + torch.randn(40, generator=generator, dtype=torch.float64)

    def model(X, y):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(3), 2.0).to_event(1))
        pyro.deterministic("both", beta[..., 1] + beta[..., 2])
        pyro.sample("y", dist.Normal(X @ beta, 1.0).to_event(1), obs=y)

    _, expected, _ = exact(X, y, prior_sd=2.0, noise_sd=1.0)
    posterior = fitted(vi.Model(model, X, y))
    table = posterior.linear_response_summary()
    np.testing.assert_allclose(table["sd"].iloc[:3], expected.diagonal().sqrt(), rtol=1e-6)
    both = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    assert table.loc["both", "sd"] == pytest.approx(math.sqrt(both @ expected @ both), rel=1e-6)
    assert (table["sd_q"].iloc[1:3] < 0.2 * table["sd"].iloc[1:3]).all()


def test_a_gaussian_behind_transforms_is_exact_as_a_gaussian():
    """Correlated log-normals: the returned posterior is theirs, sds on the constrained scale too."""
    expected = torch.tensor([[0.2, 0.15], [0.15, 0.2]], dtype=torch.float64)

    def model():
        normal = dist.MultivariateNormal(torch.zeros(2), expected)
        exp = dist.transforms.ExpTransform()
        pyro.sample(
            "x", dist.TransformedDistribution(normal, dist.transforms.IndependentTransform(exp, 1))
        )

    corrected = fitted(vi.Model(model)).linear_response()
    torch.testing.assert_close(covariance(corrected), expected, rtol=1e-6, atol=1e-8)
    x = corrected.sample(40_000, seed=0)["x"]
    sd = math.sqrt((math.exp(0.2) - 1.0) * math.exp(0.2))
    # The s.e. of an sd is about sqrt((kurtosis - 1) / 4 S) of it; kurtosis is 6.0 here.
    np.testing.assert_allclose(x.std(0), sd, rtol=4 * math.sqrt(5.0 / 160_000))


# -- the definition ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mean_field", "full_rank"])
def test_it_is_the_derivative_of_means_by_a_tilt(kind):
    """Fitting log p + t g on the same draws and differentiating E_q[g] in t, by differences."""
    model = two_scales_model()
    posterior = fitted(model, kind)
    response = linear_response.respond(posterior.approximation, posterior.record, draws=DRAWS)
    shape, density = response.shape, posterior.density
    noise = matched_normals(DRAWS, density.dim, seed_of(0, "response"))
    dim = density.dim
    for i in (0, dim - 1):
        # E_q of an unconstrained value is its mean: the tilt is t z_i.
        means = [tilted(density, shape, noise, i, t) for t in (1e-3, -1e-3)]
        slope = (means[0] - means[1]) / 2e-3
        tril = response.gaussian.scale_tril
        torch.testing.assert_close(slope, (tril @ tril.T)[i], rtol=1e-4, atol=1e-6)


def tilted(density, shape, noise, i, t):
    """Means `[D]` of the family's best for log p + t z_i on this noise, by Newton's method."""
    x = shape.start().clone()
    curvature = hessian(density, shape, noise, QUIET)
    for _ in range(30):
        z = shape.reparameterise(x, noise)
        log_p, gradient = density.log_prob_and_grad(z)
        gradient[:, i] += t
        slope = shape.loss(x, noise, log_p + t * z[:, i], gradient)[1]
        x = x - torch.linalg.solve(curvature, slope)
        if float(slope.abs().max()) < 1e-12:
            break
    return shape.gaussian(x).loc


@pytest.mark.parametrize("kind", [Diagonal, Dense])
def test_the_hessian_is_that_of_the_loss(kind):
    density = Density(two_scales_model())
    dim = density.dim
    generator = torch.Generator().manual_seed(2)
    factor = 0.2 * torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    factor = factor.tril(-1) + torch.eye(dim, dtype=torch.float64) * 0.3
    if kind is Diagonal:
        factor = factor.diagonal().diag()
    shape = kind(Gaussian(torch.zeros(dim, dtype=torch.float64), factor))
    noise = matched_normals(32, dim, 1)

    def slope(x):
        return shape.loss(x, noise, *density.log_prob_and_grad(shape.reparameterise(x, noise)))[1]

    step = 1e-5 * torch.eye(len(shape.curvature), dtype=torch.float64)
    expected = torch.stack([(slope(s) - slope(-s)) / 2e-5 for s in step])
    if kind is Diagonal:
        shape = Diagonal(shape.frame, factor.diagonal())
    found = hessian(density, shape, noise, QUIET)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert len(entries(shape)[0]) == len(found) - dim


def test_where_autograd_has_no_second_derivative():
    class Once(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(z):
            return -(z**2)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, gradient):
            (z,) = ctx.saved_tensors
            return (-2.0 * gradient.detach() * z.detach()).detach()

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("more", Once.apply(z))

    # Precision 1 + 2. Autograd says 1, without a word.
    table = fitted(vi.Model(model)).linear_response_summary(draws=64)
    assert table.loc["z", "sd"] == pytest.approx(3**-0.5, rel=1e-6)


def test_constrained_values_against_their_own_derivatives():
    """J of E_q[exp z] by hand, for one log-normal: dE/dm = E, dE/ds = s^2 E."""
    x = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)

    def model(x):
        rate = pyro.sample("rate", dist.Gamma(3.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    posterior = fitted(vi.Model(model, x))
    response = linear_response.respond(posterior.approximation, posterior.record)
    scale = float(response.shape.frame.scale_tril)
    mean = math.exp(float(response.shape.frame.loc) + scale**2 / 2)
    # In units of the fit: mean moves by `scale`, log sd by one.
    jacobian = torch.tensor([mean * scale, mean * scale**2], dtype=torch.float64)
    expected = math.sqrt(jacobian @ response.inverse @ jacobian)
    table = posterior.linear_response_summary()
    # E[g score] over matched draws: a score's noise is sqrt(2 / S) of g's nonlinear part, scale^2 of it.
    assert table.loc["rate", "sd"] == pytest.approx(expected, rel=4 * scale * math.sqrt(2 / 16384))
    # The posterior is Gamma(10, 4): the correction is right to a percent where q's sd is not asked.
    assert table.loc["rate", "sd"] == pytest.approx(math.sqrt(10) / 4, rel=0.02)


# -- what it can be used for ------------------------------------------------------------------


def test_a_corrected_posterior_goes_on_like_any(tmp_path):
    model = two_scales_model()
    corrected = fitted(model).linear_response(seed=3)
    assert corrected.guide == "full_rank"
    assert corrected.status.converged
    assert "linear response of mean_field" in repr(corrected)
    assert corrected.attrs(0)["correction"] == "linear response of mean_field"
    path = corrected.save(tmp_path / "corrected.nc", draws=10)
    loaded = vi.load(path, model)
    assert loaded.record.correction == corrected.record.correction
    torch.testing.assert_close(covariance(loaded), covariance(corrected), rtol=0, atol=0)
    for name, draws in corrected.sample(5, seed=1).items():
        np.testing.assert_array_equal(loaded.sample(5, seed=1)[name], draws)
    assert vi.fit(model, resume=loaded, progress=False).record.correction == ""


def test_it_makes_a_correlated_mean_field_fit_usable():
    posterior = fitted(gaussian(6)[0])
    assert posterior.linear_response().verdict.level == "good"


def test_the_same_seed_gives_the_same_numbers():
    posterior = fitted(two_scales_model())
    first, again = (covariance(posterior.linear_response(draws=DRAWS, seed=1)) for _ in range(2))
    torch.testing.assert_close(first, again, rtol=0, atol=0)


def test_single_precision_is_enough():
    model, _, expected = gaussian(4)
    corrected = fitted(model, dtype=torch.float32).linear_response()
    found = covariance(corrected)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"guide": "delta"}, "guide 'delta'"),
        ({"guide": "low_rank"}, "guide 'low_rank'"),
        ({"guide": "affine_coupling", "steps": 1}, "guide 'affine_coupling'"),
        ({"guide": "mean_field", "objective": "iwae", "steps": 1}, "objective 'iwae'"),
    ],
)
def test_fits_that_have_none(options, complaint):
    posterior = vi.fit(gaussian(2)[0], seed=0, progress=False, **options)
    with pytest.raises(OptionError, match=complaint):
        posterior.linear_response()


def test_latents_row_by_row_have_none():
    posterior = vi.fit(local_model(), guide="amortized", seed=0, steps=1, progress=False)
    with pytest.raises(OptionError, match=r"row by row.*without batch_size"):
        posterior.linear_response_summary()


def test_a_corrected_posterior_is_not_corrected_again():
    corrected = fitted(gaussian(2)[0]).linear_response()
    with pytest.raises(OptionError, match="corrected already"):
        corrected.linear_response()


@pytest.mark.parametrize("draws", [63, 65, 0, True, 2.5])
def test_numbers_of_draws_that_cannot_work(draws):
    with pytest.raises(OptionError, match=r"even number of at least 64|integer of at least 1"):
        fitted(gaussian(2)[0]).linear_response(draws=draws)


def test_too_many_dimensions_name_a_remedy(monkeypatch):
    monkeypatch.setitem(linear_response.MAX_DIM, "full_rank", 3)
    with pytest.raises(OptionError, match=r"at most 3 .* has 4: fit guide='mean_field'"):
        fitted(gaussian(4)[0], "full_rank").linear_response()


def test_a_direction_without_an_optimum_is_named():
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    posterior = fitted(vi.Model(model))
    curvature = torch.eye(6, dtype=torch.float64)
    curvature[2, 2] = -0.1
    shape = linear_response._framed(posterior.approximation)
    with pytest.raises(OptionError, match=r"site 'b', number 1 .*no optimum"):
        linear_response._inverse(curvature, shape, posterior.density)
