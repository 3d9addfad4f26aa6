"""The parts that single families are made of, against closed forms and naive versions."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Gamma
from toys import gaussian, perturb

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.guides.flows.spline import (
    BOUND,
    numbers,
    pull,
    slope_of_log_slope,
    spline,
    unspline,
)
from pyro_vi_kit.guides.gaussian.structured import Layout
from pyro_vi_kit.guides.supports.gamma_draws import NOISE, gamma_draws

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")


# -- student_t --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [1.0, 1.5, 6.0, 60.0])
def test_gamma_draws_are_gamma_draws(shape):
    """Mean and variance, both the shape, and the derivative of the mean in the shape, which is 1."""
    generator = torch.Generator().manual_seed(0)
    a = torch.tensor(shape, requires_grad=True)
    draws = gamma_draws(a, torch.randn(40_000, NOISE, generator=generator))
    value = draws.detach()
    assert bool((value > 0).all())
    # Four standard errors of 40,000 draws; the variance's is by the fourth moment 3 a^2 + 6 a.
    n = math.sqrt(40_000)
    assert abs(float(value.mean()) - shape) < 4 * math.sqrt(shape) / n
    assert abs(float(value.var()) - shape) < 4 * math.sqrt(2 * shape**2 + 6 * shape) / n
    ranks = Gamma(shape, 1.0).cdf(value).sort().values
    # Kolmogorov and Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand.
    assert float((ranks - torch.linspace(0, 1, 40_000)).abs().max()) < 1.95 / n
    slopes = torch._standard_gamma_grad(torch.full_like(value, shape), value)
    (slope,) = torch.autograd.grad(draws.mean(), a)
    torch.testing.assert_close(slope, slopes.mean())
    assert abs(float(slope) - 1.0) < 4 * float(slopes.std()) / n


def test_a_t_has_the_density_of_pyros():
    guide = perturb(guides.make("student_t", gaussian(3)[0], df=5.0))
    family = guide.families["latent"]
    loc, tril = family.affine.moments()
    points = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    expected = dist.MultivariateStudentT(torch.tensor(5.0), loc, tril).log_prob(points)
    torch.testing.assert_close(family().log_prob(points), expected)
    assert "log_excess" not in dict(family.named_parameters())


def test_a_t_takes_on_the_covariance_of_a_gaussian():
    _, mean, covariance = gaussian(3)
    family = guides.make("student_t", gaussian(3)[0]).families["latent"]
    family.start_from(mean, torch.linalg.cholesky(covariance))
    torch.testing.assert_close(family().variance, covariance.diagonal())
    torch.testing.assert_close(family().mean, mean)


@pytest.mark.parametrize("df", [2.0, 0, -1.0, math.nan, "3", True])
def test_bad_degrees_of_freedom(df):
    with pytest.raises(OptionError, match="student_t: df must be"):
        guides.specify("student_t", df=df)


# -- structured -------------------------------------------------------------------------------

BLOCKS = [("m", "r"), ("t",)]


def linked(y):
    """Everything Gaussian and correlated: m, t `[2]`, r and the lone s."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    t = pyro.sample("t", dist.Normal(m, 1.0).expand([2]).to_event(1))
    s = pyro.sample("s", dist.Normal(m + t.sum(), 1.0))
    r = pyro.sample("r", dist.Normal(s - m, 0.5))
    pyro.sample("y", dist.Normal(r + t, 0.7).to_event(1), obs=y)


def linked_model():
    return vi.Model(linked, torch.tensor([1.0, -0.5]))


def exact_precision(density):
    z = torch.zeros(density.dim)
    return -torch.func.hessian(lambda p: density.log_prob(p[None])[0])(z)


@pytest.mark.parametrize("between", ["independent", "first", "linear"])
def test_a_structured_fit_falls_short_by_what_its_blocks_leave_out(between):
    """KL in closed form: given the root, independent blocks have the precision's diagonal blocks."""
    spec = guides.Structured(blocks=BLOCKS, between=between)
    posterior = vi.fit(linked_model(), spec, seed=0, tol=1e-4)
    assert posterior.method == "lbfgs"
    precision = exact_precision(posterior.density)
    # m, t, t, s, r in the flat vector.
    root, rest = {
        "independent": ([], [[0, 4], [1, 2], [3]]),
        "first": ([0, 4], [[1, 2], [3]]),
        "linear": ([0, 1, 2, 3, 4], []),
    }[between]
    free = [i for block in rest for i in block]
    kl = sum(0.5 * float(precision[b][:, b].logdet()) for b in rest)
    kl -= 0.5 * float(precision[free][:, free].logdet()) if free else 0.0
    evidence = vi.fit(linked_model(), "full_rank", seed=0, tol=1e-4).elbo
    # 4,000 draws.
    assert abs(evidence - kl - posterior.elbo) < 4 * posterior.elbo_se + 1e-3
    assert len(root) + len(free) == 5


@pytest.mark.parametrize("between", ["independent", "first", "linear"])
def test_the_nearest_member_of_a_member_is_itself(between):
    layout = Layout.of([[2, 0], [1, 4], [3]], between)
    free = layout.free()
    generator = torch.Generator().manual_seed(0)
    factor = torch.where(free, torch.randn(5, 5, generator=generator), torch.zeros(5, 5))
    factor = factor + (0.5 + torch.rand(5, generator=generator)).diag()
    rows = factor[layout.order.argsort()]
    tril = torch.linalg.cholesky(rows @ rows.T)
    torch.testing.assert_close(layout.nearest(tril), factor)


def test_without_blocks_each_site_is_one():
    guide = guides.make("structured", linked_model())
    assert guide.families["latent"].layout.sizes == (1, 2, 1, 1)
    assert guides.make("structured", linked_model(), blocks=BLOCKS).families[
        "latent"
    ].layout.order.tolist() == [0, 4, 1, 2, 3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": [("m", "t"), ("t",)]}, "name site 't' twice"),
        ({"blocks": ["m", "t"]}, "each block must be a group of site names"),
        ({"blocks": "m"}, "blocks must be groups of site names"),
        ({"blocks": [()]}, "each block must be a group"),
        ({"blocks": [(1,)]}, "each block must be a group"),
        ({"blocks": [("m", "q")]}, "'q', which is no latent of this model; it has m, t, s, r"),
        ({"between": "chain"}, "between must be one of independent, first, linear"),
    ],
)
def test_bad_blocks(options, message):
    with pytest.raises(OptionError, match=message):
        guides.make("structured", linked_model(), **options)


def test_a_structured_guide_comes_back_from_its_file(tmp_path):
    spec = guides.Structured(blocks=BLOCKS, between="first")
    posterior = vi.fit(linked_model(), spec, seed=0)
    loaded = vi.load(posterior.save(tmp_path / "fit.nc", draws=5), posterior.model)
    assert loaded.spec == spec
    assert (loaded.log_weights(5, seed=0) == posterior.log_weights(5, seed=0)).all()


# -- splines ----------------------------------------------------------------------------------


def test_a_spline_there_and_back():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(numbers(6), 3, 50, generator=generator)
    x = (3 * torch.randn(3, 50, generator=generator)).requires_grad_()
    y, _, bent = spline(x, raw)
    torch.testing.assert_close(unspline(y, raw), x, rtol=1e-9, atol=1e-9)
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(bent.slope, slope, rtol=1e-9, atol=1e-9)
    outside = x.abs() >= BOUND
    assert bool(outside.any())
    assert torch.equal(y[outside], x[outside])
    # It meets the identity with the same slope.
    edge = torch.full((3, 50), BOUND - 1e-9)
    torch.testing.assert_close(spline(edge, raw)[0], edge, rtol=0, atol=1e-8)


def test_gradients_of_a_spline_are_those_of_autograd():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(numbers(5), 2, 40, generator=generator).requires_grad_()
    x = (3 * torch.randn(2, 40, generator=generator)).requires_grad_()
    of_y, of_log_slope = torch.randn(2, 2, 40, generator=generator)
    y, place, bent = spline(x, raw)
    assert bool((x.abs() >= BOUND).any())
    log_slope = bent.slope.log()
    for weight in (of_log_slope, None):
        total = (of_y * y).sum() + (0.0 if weight is None else (weight * log_slope).sum())
        (expected,) = torch.autograd.grad(total, raw, retain_graph=True)
        found = torch.cat(pull(place, bent, of_y, weight))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    (expected,) = torch.autograd.grad(log_slope.sum(), x)
    found = slope_of_log_slope(place, bent)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_zeros_give_the_identity():
    x = torch.linspace(-6, 6, 8).reshape(2, 4)
    y, _, bent = spline(x, torch.zeros(numbers(5), 2, 4))
    torch.testing.assert_close(y, x)
    torch.testing.assert_close(bent.slope, torch.ones(2, 4), rtol=0, atol=1e-12)


# -- options of the flows ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["planar", "radial", "autoregressive", "neural_spline"])
@pytest.mark.parametrize("layers", [0, 2.5, True])
def test_a_number_of_layers(name, layers):
    with pytest.raises(OptionError, match=f"{name}: layers must be a positive integer"):
        guides.specify(name, layers=layers)


@pytest.mark.parametrize("hidden", [(), (8, 0), "wide"])
@pytest.mark.parametrize("name", ["autoregressive", "neural_spline"])
def test_widths(name, hidden):
    with pytest.raises(OptionError, match=f"{name}: hidden must be positive layer widths"):
        guides.specify(name, hidden=hidden)


@pytest.mark.parametrize("option", ["paths", "history"])
def test_numbers_of_pathfinder(option):
    with pytest.raises(OptionError, match=f"pathfinder: {option} must be a positive integer"):
        guides.specify("pathfinder", **{option: 0})


def test_more_hidden_layers_keep_the_order():
    """The Jacobian of a masked network with two hidden layers is a triangle."""
    guide = perturb(
        guides.make("autoregressive", gaussian(5)[0], hidden=(7, 3), layers=1), size=0.5
    )
    family = guide.families["latent"]
    x = torch.randn(5, generator=torch.Generator().manual_seed(0))
    jacobian = torch.autograd.functional.jacobian(lambda p: family.bend(p)[0], x).flip(0)
    assert bool((jacobian.triu(1) == 0).all())
    assert bool((jacobian.tril(-1) != 0).any())
