"""Mean field by supports: its parts against torch's own distributions, closed forms and quadrature."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from test_contract import STRUCTURES, same_draw
from toys import load, local_model, perturb, traced_log_weight, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.guides.supports.gamma_draws import LOG_NOISE, log_gamma_draws
from pyro_vi_kit.guides.supports.site_parts import StickDirichlets
from pyro_vi_kit.guides.supports.von_mises_draws import NOISE, von_mises_draws
from pyro_vi_kit.model.log_density import Density

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")

SUPPORT = guides.MeanField(families="support", init_scale=0.5)
# Kolmogorov and Smirnov: 1.95 / sqrt(n) is exceeded once in a thousand.
KOLMOGOROV = 1.95

POSTERIORS = {
    "gamma": dist.Gamma(2.5, 3.0),
    "small gamma": dist.Gamma(0.4, 1.0),
    "beta": dist.Beta(2.0, 5.0),
    "dirichlet": dist.Dirichlet(torch.tensor([2.0, 0.7, 4.0], dtype=torch.float64)),
    "von_mises": dist.VonMises(3.0, 2.5),
    "normal": dist.Normal(1.0, 0.3),
}
each_posterior = pytest.mark.parametrize("name", POSTERIORS)


def prior_alone(fn):
    def model():
        pyro.sample("z", fn)

    return vi.Model(model)


def everything():
    """One site of each family, in a plate, in vectors, moved and scaled."""
    pyro.sample("real", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("row", 2):
        rate = pyro.sample("rate", dist.Gamma(2.0, 3.0))
        pyro.sample("shares", dist.Dirichlet(torch.tensor([2.0, 1.5, 4.0])))
        pyro.sample("y", dist.Poisson(rate), obs=torch.tensor([3.0, 0.0]))
    pyro.sample("angle", dist.VonMises(1.0, 3.0))
    pyro.sample("chance", dist.Beta(2.0, 5.0))
    pyro.sample("above", dist.Pareto(2.0, 3.0))
    pyro.sample("between", dist.Uniform(-1.0, 3.0))


def family_for(model, **options):
    density = Density(model)
    spec = guides.MeanField(families="support", **options)
    return spec.build(density).families["latent"]


# -- noise to draws ---------------------------------------------------------------------------


def distance_to(cdf, value):
    ranks = cdf(value).sort().values
    return float((ranks - torch.linspace(0, 1, len(value))).abs().max())


def drawn(draws, parameter, numbers, seed):
    """20,000 draws, and the derivative of each in its own copy of the parameter."""
    noise = torch.randn(20_000, numbers, generator=torch.Generator().manual_seed(seed))
    copies = torch.full((20_000,), parameter, requires_grad=True)
    value = draws(copies, noise)
    (slopes,) = torch.autograd.grad(value.sum(), copies)
    return value.detach(), slopes


@pytest.mark.parametrize("shape", [0.01, 0.3, 1.0, 40.0])
def test_log_gamma_draws(shape):
    """Their mean, digamma, its derivative, trigamma, and their distribution where torch knows it."""
    value, slopes = drawn(log_gamma_draws, shape, LOG_NOISE, 1)
    a = torch.tensor(shape)
    # Four standard errors of 20,000 draws.
    for found, expected in ((value, torch.digamma(a)), (slopes, torch.polygamma(1, a))):
        assert abs(float(found.mean() - expected)) < 4 * float(found.std()) / math.sqrt(20_000)
    if shape > 0.1:  # below, variates underflow
        cdf = torch.distributions.Gamma(shape, 1.0).cdf
        assert distance_to(cdf, value.exp()) < KOLMOGOROV / math.sqrt(20_000)


def test_the_slope_of_log_gamma_draws_is_smooth_where_its_formula_changes():
    """Either side of a variate of 1e-10, and against torch's derivative."""
    from pyro_vi_kit.guides.supports.gamma_draws import _log_slope

    at = torch.tensor([-23.1, -22.9])
    shape = torch.full((2,), 0.3)
    found = _log_slope(shape, at)
    torch.testing.assert_close(found, torch._standard_gamma_grad(shape, at.exp()) / at.exp())


@pytest.mark.parametrize("concentration", [0.05, 0.5, 3.0, 500.0])
def test_von_mises_draws(concentration):
    """Their distribution, by quadrature, and the derivative of their resultant A(kappa)."""
    value, slopes = drawn(von_mises_draws, concentration, NOISE, 2)
    grid = torch.linspace(-math.pi, math.pi, 20_001)
    density = (concentration * (grid.cos() - 1.0)).exp()
    cdf = torch.cumulative_trapezoid(density, grid)
    cdf = torch.cat([torch.zeros(1), cdf]) / cdf[-1]
    place = ((value + math.pi) / (grid[1] - grid[0])).long().clamp(0, 19_999)
    # The grid is 3e-4 wide: 0.007 of the sd at a concentration of 500, 0.003 of the distribution.
    distance = distance_to(lambda _: cdf[place], value)
    assert distance < KOLMOGOROV / math.sqrt(20_000) + 0.003
    kappa = torch.tensor(concentration, requires_grad=True)
    resultant = torch.special.i1e(kappa) / torch.special.i0e(kappa)
    (expected,) = torch.autograd.grad(resultant, kappa)
    found = -value.sin() * slopes
    # Four standard errors of 20,000 draws.
    assert abs(float(found.mean() - expected)) < 4 * float(found.std()) / math.sqrt(20_000)


# -- densities --------------------------------------------------------------------------------


@each_posterior
def test_its_density_is_the_constrained_one_with_the_jacobian(name):
    """Started from a Gaussian, then against torch's density of the constrained value."""
    model = prior_alone(POSTERIORS[name])
    guide = perturb(guides.make(SUPPORT, model), size=0.3)
    family, site = guide.families["latent"], guide.density.latents[0]
    u = torch.randn(7, guide.density.dim, generator=torch.Generator().manual_seed(0))
    x = site.transform(u if site.event_shape else u[:, 0])
    jacobian = site.transform.log_abs_det_jacobian(u if site.event_shape else u[:, 0], x)
    (part,) = family().parts
    loc, log_spread = family.numbers()
    c = (-2 * log_spread).exp()
    if name.endswith("gamma"):
        expected = dist.Gamma(c, c / loc.exp()).log_prob(x)
    elif name == "beta":
        expected = dist.Beta(c * loc.sigmoid(), c * (-loc).sigmoid()).log_prob(x)
    elif name == "dirichlet":
        expected = dist.Dirichlet(c * site.transform(loc)).log_prob(x)
    elif name == "von_mises":
        expected = dist.VonMises(loc, c).log_prob(x)
    else:
        expected = dist.Normal(loc, log_spread.exp()).log_prob(x)
    torch.testing.assert_close(
        family().log_prob(u), (expected + jacobian).detach(), check_dtype=False
    )
    assert isinstance(part, StickDirichlets) == (name in ("beta", "dirichlet"))


@each_posterior
def test_its_density_integrates_to_one_and_its_draws_follow_it(name):
    """Quadrature on a grid from -40 to 40: tails fall like exp(0.4 u) or faster, 1e-6 there."""
    family = perturb(guides.make(SUPPORT, prior_alone(POSTERIORS[name])), size=0.3).families[
        "latent"
    ]
    dim = len(family.loc)
    steps, width = (8001, 40.0) if dim == 1 else (801, 20.0)
    axis = torch.linspace(-width, width, steps)
    points = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    with torch.no_grad():
        q = family()
        weights = q.log_prob(points).exp() * (2 * width / (steps - 1)) ** dim
        assert float(weights.sum()) == pytest.approx(1.0, abs=1e-4)
        mean, second = weights @ points, weights @ points**2
        pyro.set_rng_seed(0)
        draws = q.rsample((20_000,))
    # Four standard errors of 20,000 draws, at a fixed seed, of at most four numbers.
    for power, expected in ((1, mean), (2, second)):
        found = draws**power
        assert bool(((found.mean(0) - expected).abs() < 4 * found.std(0) / 20_000**0.5).all())
    if name != "von_mises":
        torch.testing.assert_close(q.mean, mean, rtol=0, atol=1e-3)
        torch.testing.assert_close(q.variance, second - mean**2, rtol=0, atol=1e-3)
    else:
        with pytest.raises(NotImplementedError, match="no moments in closed form"):
            _ = q.mean


# -- gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gamma", "beta", "dirichlet", "von_mises"])
def test_gradients_of_expectations_against_closed_forms(name):
    """E[log x], E[log x_k] and E[cos(angle)], in every parameter, by 400 means of 100 draws."""
    guide = perturb(guides.make(SUPPORT, prior_alone(POSTERIORS[name])), size=0.3)
    family, site = guide.families["latent"], guide.density.latents[0]
    parameters = [family.loc, family.log_scale]

    def value(u):
        x = site.transform(u if site.event_shape else u[..., 0])
        return x.cos() if name == "von_mises" else x.log().sum(-1) if site.event_shape else x.log()

    def exact():
        loc, log_spread = family.numbers()
        c = (-2 * log_spread).exp()
        if name == "gamma":
            return (torch.digamma(c) - c.log() + loc).sum()
        if name == "von_mises":
            return (torch.special.i1e(c) / torch.special.i0e(c) * loc.cos()).sum()
        mean = loc.sigmoid() if name == "beta" else site.transform(loc)
        return (torch.digamma(c * mean) - torch.digamma(c)).sum()

    pyro.set_rng_seed(3)
    found = []
    for _ in range(400):
        mean = value(family().rsample((100,))).mean()
        found.append(torch.cat(torch.autograd.grad(mean, parameters)))
    found = torch.stack(found)
    expected = torch.cat(torch.autograd.grad(exact(), parameters))
    # Four standard errors of 400 means, at a fixed seed, of two or three numbers.
    bound = 4 * found.std(0) / 20.0 + 1e-9  # a shift of log x has no noise at all
    assert bool(((found.mean(0) - expected).abs() < bound).all())


def exactly(family, name):
    """Make a one-site family its posterior."""
    from pyro_vi_kit.guides.gaussian.factors import _numbers

    (place,) = family.places
    family.become(place, *(x.to(family.loc) for x in _numbers(place, POSTERIORS[name])))


@each_posterior
def test_stick_the_landing_has_no_variance_at_the_posterior(name):
    """And log weights are even: log p = log q at every draw."""
    guide = guides.make(SUPPORT, prior_alone(POSTERIORS[name]))
    exactly(guide.families["latent"], name)
    pyro.set_rng_seed(0)
    draw = guide.draw(64, detached=True)
    log_w = guide.weigh(draw).joint()
    torch.testing.assert_close(log_w.detach(), torch.zeros(64), rtol=0, atol=1e-5)
    found = torch.autograd.grad(log_w.sum(), list(guide.parameters()))
    # Bijectors clip their sigmoids, and round a share of one minus a small number.
    assert all(float(g.abs().max()) < 1e-5 for g in found)


# -- the start --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [0.5, 2.0, 50.0])
def test_the_gamma_is_found_of_which_a_gaussian_is_the_best_approximation(shape):
    """KL(N(m, s^2) || log Gamma(a, 1)) is least at s^2 = 1 / a, m = log a - 1 / (2 a)."""
    family = family_for(prior_alone(dist.Gamma(shape, 1.0)))
    loc = torch.tensor([math.log(shape) - 0.5 / shape])
    family.start_from(loc, torch.tensor([[shape**-0.5]]))
    (part,) = family().parts
    torch.testing.assert_close(part.shape.detach(), torch.tensor([shape]))
    torch.testing.assert_close(part.log_mean.detach(), torch.tensor([shape]).log())


def test_a_narrow_gaussian_is_kept_by_every_family():
    """Far from any bound all families are close to normal: the Gaussian's mean and sd are kept."""
    density = Density(vi.Model(everything))
    family = SUPPORT.build(density).families["latent"]
    dim = len(family.loc)
    loc = torch.linspace(-0.5, 0.5, dim)
    family.start_from(loc, 0.02 * torch.eye(dim))
    pyro.set_rng_seed(0)
    draws = family().sample((20_000,))
    torch.testing.assert_close(draws.mean(0), loc, rtol=0, atol=0.002)
    # A simplex has one spread for its numbers, whatever theirs are.
    shares = torch.tensor([label == "shares" for label, _ in density.block.labels()])
    ratio = draws.std(0) / 0.02
    torch.testing.assert_close(ratio[~shares], torch.ones(int((~shares).sum())), rtol=0, atol=0.03)
    assert 0.7 < float(ratio[shares].min()) < float(ratio[shares].max()) < 1.4


# -- conjugate models -------------------------------------------------------------------------


def gamma_poisson():
    rate = pyro.sample("z", dist.Gamma(0.5, 0.5))
    with pyro.plate("row", 3):
        pyro.sample("y", dist.Poisson(rate), obs=torch.tensor([0.0, 1.0, 0.0]))


def beta_binomial():
    p = pyro.sample("z", dist.Beta(1.0, 1.0))
    pyro.sample("y", dist.Binomial(10, p), obs=torch.tensor(0.0))


def dirichlet_multinomial():
    p = pyro.sample("z", dist.Dirichlet(torch.full((4,), 0.5)))
    pyro.sample("y", dist.Multinomial(10, p), obs=torch.tensor([5.0, 3.0, 2.0, 0.0]))


def angles():
    a = pyro.sample("z", dist.VonMises(0.0, 0.5))
    with pyro.plate("row", 3):
        pyro.sample("y", dist.VonMises(a, 2.0), obs=torch.tensor([3.0, -3.0, 2.5]))


def evidence(model):
    """By quadrature over one number, by conjugacy over a simplex."""
    if model is dirichlet_multinomial:
        prior, y = torch.full((4,), 0.5), torch.tensor([5.0, 3.0, 2.0, 0.0])
        counts = torch.lgamma(torch.tensor(11.0)) - torch.lgamma(y + 1).sum()
        ratio = torch.lgamma(prior + y).sum() - torch.lgamma(prior).sum()
        total = torch.lgamma(prior.sum()) - torch.lgamma((prior + y).sum())
        return float(counts + ratio + total)
    density = Density(vi.Model(model))
    axis = torch.linspace(-60.0, 60.0, 60_001)
    return float(torch.logsumexp(density.log_prob(axis[:, None]), 0) + math.log(0.002))


@pytest.mark.parametrize("model", [gamma_poisson, beta_binomial, dirichlet_multinomial, angles])
def test_conjugate_posteriors_are_found(model):
    """KL within 0.005 nats, half of what a fit may miss, where normals are 0.03 to 0.1 nats away."""
    log_z = evidence(model)
    ours = vi.fit(vi.Model(model), SUPPORT, seed=0)
    assert ours.status.converged
    assert abs(log_z - ours.elbo) < 0.005 + 4 * ours.elbo_se
    assert ours.verdict.level == "good"
    normal = vi.fit(vi.Model(model), "mean_field", seed=0)
    assert log_z - normal.elbo > 0.03


def test_a_posterior_across_the_ends_of_the_circle():
    """The product of von Mises densities is one, and its mean direction is near pi."""
    posterior = vi.fit(vi.Model(angles), SUPPORT, seed=0, tol=1e-4)
    (part,) = posterior.approximation.guide.families["latent"]().parts
    y = torch.tensor([3.0, -3.0, 2.5])
    vector = torch.stack([2 * y.cos().sum() + 0.5, 2 * y.sin().sum()])
    off = part.loc[0] - torch.atan2(vector[1], vector[0])
    # The shortfall of 1e-4 nats is 0.014 sds, of 0.4 radians.
    assert abs(math.remainder(float(off.detach()), 2 * math.pi)) < 0.01
    torch.testing.assert_close(part.concentration[0].detach(), vector.norm(), rtol=0.03, atol=0)


@pytest.mark.slow
def test_the_circular_model():
    """Its concentration is skewed: a Gamma comes nearer than a normal on the log scale, or as near."""
    model = load("circular").MODEL
    ours, normal = (vi.fit(model, guide, seed=0) for guide in (SUPPORT, "mean_field"))
    assert ours.elbo > normal.elbo - 0.02
    kinds = ours.approximation.guide.families["latent"].kinds
    assert kinds == {"mu": "von_mises", "slope": "normal", "concentration": "gamma"}


# -- the contract -----------------------------------------------------------------------------


def test_families_follow_supports():
    family = family_for(vi.Model(everything))
    assert family.kinds == {
        "real": "normal",
        "rate": "gamma",
        "shares": "dirichlet",
        "angle": "von_mises",
        "chance": "beta",
        "above": "gamma",
        "between": "beta",
    }
    assert family.kept == ()


@pytest.mark.parametrize("structure", [*STRUCTURES, everything], ids=lambda fn: fn.__name__)
def test_supports_and_plates_in_a_stock_svi(structure):
    model = vi.Model(structure)
    guide = guides.make(SUPPORT, model)
    svi = SVI(structure, guide, Adam({"lr": 0.01}), Trace_ELBO())
    pyro.set_rng_seed(0)
    assert all(math.isfinite(svi.step()) for _ in range(3))
    perturb(guide)
    expected, trace = traced_log_weight(model, guide)
    found = guide.weigh(same_draw(guide, trace)).joint()[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_vectorised_particles_see_the_same_log_weights():
    guide = perturb(guides.make(SUPPORT, vi.Model(everything)))
    loss = Trace_ELBO(num_particles=5, vectorize_particles=True)
    loss.loss(everything, guide)  # guesses the plate nesting
    pyro.set_rng_seed(1)
    stock = loss.loss(everything, guide)
    pyro.set_rng_seed(1)
    assert -stock == pytest.approx(guide.log_weights(5).joint().mean().item(), rel=1e-9)


def test_sites_that_no_family_fits_are_named():
    def model():
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        pyro.sample("root", dist.LKJCholesky(2, 1.0))
        pyro.sample("below", dist.Uniform(0.0, scale))

    posterior = vi.fit(vi.Model(model), SUPPORT, seed=0, steps=3)
    assert "No family fits the support of 'root', 'below'" in posterior.status.advice
    family = posterior.approximation.guide.families["latent"]
    assert family.kinds == {"scale": "gamma", "root": "normal", "below": "normal"}


@pytest.mark.parametrize("dim", [1, 200])
def test_one_and_two_hundred_dimensions(dim):
    guide = guides.make(SUPPORT, prior_alone(dist.Gamma(torch.ones(dim), 1.0).to_event(1)))
    guide.log_weights(3).joint().mean().backward()
    assert all(bool(p.grad.isfinite().all()) and p.grad.any() for p in guide.parameters())


def test_float32():
    torch.set_default_dtype(torch.float32)
    guide = guides.make(SUPPORT, vi.Model(everything), dtype=torch.float32)
    draw = guide.draw(4)
    assert {z.dtype for z in draw.z.values()} == {torch.float32}
    log_w = guide.log_weights(4).joint()
    assert log_w.dtype is torch.float32
    assert bool(log_w.isfinite().all())


def test_captured_steps_are_the_eager_ones():
    runs = [
        vi.fit(vi.Model(everything), SUPPORT, seed=0, steps=30, init="origin", engine=engine)
        for engine in ("eager", "captured")
    ]
    assert [run.engine for run in runs] == ["eager", "captured"]
    assert len(runs[0].losses) > 0
    assert runs[0].losses.tolist() == pytest.approx(runs[1].losses.tolist(), rel=1e-9)


def test_files_and_resume(tmp_path):
    posterior = vi.fit(vi.Model(everything), SUPPORT, seed=0, steps=20, init="origin")
    posterior.save(tmp_path / "q.nc")
    again = vi.load(tmp_path / "q.nc", vi.Model(everything))
    assert again.elbo == posterior.elbo
    assert again.approximation.guide.families["latent"].kinds["rate"] == "gamma"
    assert vi.fit(vi.Model(everything), resume=again, seed=1, steps=5).elbo > posterior.elbo - 0.5


def test_the_gaussian_mean_field_is_as_it_was():
    assert guides.MeanField() == guides.specify("mean_field", families="normal")
    guide = guides.make("mean_field", two_scales_model())
    assert type(guide.families["latent"]).__name__ == "DiagonalNormal"


def test_refusals():
    with pytest.raises(OptionError, match="families must be one of normal, support, got 'gamma'"):
        guides.specify("mean_field", families="gamma")
    with pytest.raises(
        OptionError, match="families='support' is for latents that are held for all"
    ):
        vi.fit(local_model(n=6), SUPPORT, batch_size=2)


def test_an_interval_that_is_no_circle_has_a_beta():
    """Only a periodic prior makes an angle: the gradient misses what happens across a bound."""
    family = family_for(prior_alone(dist.Uniform(-math.pi, math.pi)))
    assert family.kinds == {"z": "beta"}
    improper = dist.ImproperUniform(constraints.positive, (), ())

    def model():
        z = pyro.sample("z", improper)
        pyro.sample("y", dist.Poisson(z), obs=torch.tensor(3.0))

    assert family_for(vi.Model(model)).kinds == {"z": "gamma"}
