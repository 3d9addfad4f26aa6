"""The tail-adaptive divergence: Algorithm 1 by hand, where it ends, and where it is not defined."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_toys import Y, by_index
from pyro.infer import TraceTailAdaptive_ELBO
from toys import gaussian, local_and_global_model, local_model, perturb, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides, objectives
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.objectives import Elbo, TailAdaptive
from pyro_vi_kit.objectives.estimators import surrogate
from pyro_vi_kit.optimize.engines import CapturedEngine, EagerEngine

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")


def gradient(guide, objective, seed=0):
    """The bound, and the gradient upwards as one vector."""
    torch.manual_seed(seed)
    share = objective.multi_sample and guide.blocks[0].plate is not None
    bound, loss = surrogate(guide, objective, objective.particles, share=share, estimator="dreg")
    parts = torch.autograd.grad(-loss, [*guide.parameters()], materialize_grads=True)
    return bound, torch.cat([part.reshape(-1) for part in parts])


# -- Algorithm 1 ------------------------------------------------------------------------------


def algorithm_1(guide, objective, seed=0):
    """Draw by draw: the slope of log p / q at each, by the share of weights that are no smaller."""
    torch.manual_seed(seed)
    count = objective.particles
    flat = guide.draw(count).flat["latent"]
    at = flat.detach().requires_grad_()
    log_w = guide.density.log_prob(at) - guide.families["latent"]().log_prob(at)
    (slopes,) = torch.autograd.grad(log_w.sum(), at)
    w = log_w.tolist()
    gamma = [(sum(other >= own for other in w) / count) ** objective.beta for own in w]
    total = 0.0
    for k in range(count):
        parts = torch.autograd.grad(flat[k] @ slopes[k], [*guide.parameters()], retain_graph=True)
        flattened = torch.cat([part.reshape(-1) for part in parts])
        total = total + gamma[k] / sum(gamma) * flattened
    return total


@pytest.mark.parametrize("beta", [-1.0, -0.5, 0.0, -2])
@pytest.mark.parametrize("name", ["mean_field", "full_rank"])
def test_the_gradient_is_that_of_algorithm_1(name, beta):
    guide = perturb(guides.make(name, two_scales_model()), size=0.3)
    objective = TailAdaptive(beta, 7)
    torch.testing.assert_close(gradient(guide, objective)[1], algorithm_1(guide, objective))


def test_ranks_of_equal_weights_are_equal():
    log_w = torch.tensor([[0.0, 2.0], [0.0, -1.0], [1.0, 2.0], [-math.inf, 2.0]])
    counts = torch.tensor([[3.0, 3.0], [3.0, 4.0], [1.0, 3.0], [4.0, 3.0]])
    expected = 1.0 / counts
    found = TailAdaptive().path(log_w)
    torch.testing.assert_close(found, 4.0 * expected / expected.sum(0))


def test_with_beta_zero_it_is_the_elbo():
    guide = perturb(guides.make("full_rank", two_scales_model()), size=0.3)
    for one, other in zip(
        gradient(guide, TailAdaptive(0.0, 6)), gradient(guide, Elbo(6)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_each_datum_has_ranks_of_its_own():
    """The rows of a plate are the fits of single data: the same noise, the same numbers."""
    model = local_model(n=3)
    guide = perturb(guides.make("amortized", model, hidden=4), size=0.3)
    torch.manual_seed(0)
    draw = guide.draw(5, share=True)
    log_w = guide.weigh(draw).local["datum"]
    objective = TailAdaptive(particles=5)
    for row in range(3):
        torch.testing.assert_close(objective.path(log_w)[:, row], objective.path(log_w[:, row]))
        torch.testing.assert_close(objective.bound(log_w)[row], objective.bound(log_w[:, row]))
    assert bool(gradient(guide, objective)[1].isfinite().all())


def test_even_weights_have_no_divergence_and_uneven_ones_have():
    objective = TailAdaptive()
    log_w = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    assert bool((objective.divergence(log_w - torch.logsumexp(log_w, 0) + math.log(40)) > 0).all())
    torch.testing.assert_close(objective.bound(torch.full((9,), -3.0)), torch.tensor(-3.0))
    # Weights of 700 nats either way are no number, and the bound still is one.
    assert bool(objective.bound(500.0 * log_w).isfinite().all())
    assert float(objective.bound(torch.tensor([0.0, -math.inf]))) == -math.inf


# -- where it ends ----------------------------------------------------------------------------


def test_a_gaussian_is_its_fixed_point():
    """There all weights are even, whatever their ranks: no noise, and the fit ends at it."""
    model, mean, covariance = gaussian(3)
    posterior = vi.fit(model, "full_rank", "tail_adaptive", seed=0, init="origin")
    # The log evidence is 0; what is left is the tolerance.
    assert -0.01 < posterior.elbo < 0.01
    assert -0.01 < posterior.bound < 0.01
    guide = posterior.approximation.guide
    guide.families["latent"].start_from(mean, torch.linalg.cholesky(covariance))
    assert float(gradient(guide, TailAdaptive(particles=20))[1].abs().max()) < 1e-12


def root_of_the_field(beta, particles, draws=4000):
    """The sd of N(0, s^2) at which Algorithm 1 stands still on a t with 3 degrees, by bisection."""
    e = torch.randn(draws, particles, generator=torch.Generator().manual_seed(1))
    target, low, high = dist.StudentT(3.0), 0.8, 3.0
    while high - low > 1e-3:
        s = 0.5 * (low + high)
        z = s * e
        log_w = target.log_prob(z) - dist.Normal(0.0, s).log_prob(z)
        rank = particles - log_w.argsort(1).argsort(1)
        gamma = (rank / particles) ** beta
        slope = -4.0 * z / (3.0 + z**2) + z / s**2
        field = (gamma * e * slope).sum(1) / gamma.sum(1)
        low, high = (s, high) if float(field.mean()) > 0 else (low, s)
    return low


@pytest.mark.parametrize("beta", [-1.0, -0.5])
def test_on_a_heavy_tailed_target_it_is_wider_than_the_elbo(beta):
    model = vi.Model(lambda: pyro.sample("z", dist.StudentT(3.0, 0.0, 1.0)))
    objective = TailAdaptive(beta, 50)
    wide = vi.fit(model, "full_rank", objective, seed=0)
    narrow = vi.fit(model, "full_rank", "elbo", seed=0)
    sds = [
        float(p.approximation.guide.families["latent"]().stddev.detach()) for p in (narrow, wide)
    ]
    # The look at a fit has its own best sd, which lies within a tenth of where the steps stand still.
    assert sds[1] == pytest.approx(root_of_the_field(beta, 50), rel=0.1)
    assert sds[1] > 1.1 * sds[0]
    assert wide.bound < 0.0


# -- in a fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model"), [("full_rank", two_scales_model), ("amortized", local_model)]
)
def test_replayed_steps_are_the_eager_steps(name, model):
    engines = [
        kind(
            perturb(guides.make(name, model())), TailAdaptive(particles=5), seed=5, estimator="dreg"
        )
        for kind in (EagerEngine, CapturedEngine)
    ]
    expected, found = (engine.run(7, 0.02) for engine in engines)
    assert engines[1].name == "captured", engines[1].note
    torch.testing.assert_close(found.bounds, expected.bounds, rtol=1e-9, atol=1e-9)
    for key, value in expected.average.items():
        torch.testing.assert_close(found.average[key], value, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_a_saved_fit_keeps_its_objective(tmp_path):
    model, objective = two_scales_model(), TailAdaptive(-0.5, 8)
    posterior = vi.fit(model, "mean_field", objective, steps=20, seed=0)
    posterior.save(tmp_path / "fit.nc")
    assert vi.load(tmp_path / "fit.nc", model).record.objective == objective


def test_what_it_is_not_defined_for_is_refused():
    for estimator in ("pathwise", "score", "stratified"):
        with pytest.raises(OptionError, match="is trained by estimator='dreg'"):
            vi.fit(two_scales_model(), "mean_field", "tail_adaptive", estimator=estimator)
    with pytest.raises(OptionError, match="share one draw of the globals"):
        vi.fit(local_and_global_model(), "amortized", "tail_adaptive")
    spec = guides.MeanField(discrete="score")
    with pytest.raises(OptionError, match="use objective='forward_kl', or leave discrete= out"):
        vi.fit(vi.Model(by_index, Y), spec, "tail_adaptive")
    with pytest.raises(OptionError, match="no right loss in stock Pyro"):
        vi.fit(two_scales_model(), "mean_field", "tail_adaptive", engine="pyro")
    with pytest.raises(OptionError, match="needs a guide with spread"):
        vi.fit(two_scales_model(), "delta", "tail_adaptive")
    with pytest.raises(OptionError, match="at least 2"):
        objectives.make("tail_adaptive", particles=1)


@pytest.mark.parametrize("beta", [0.5, -math.inf, math.nan, "-1", True])
def test_beta_is_at_most_zero(beta):
    with pytest.raises(OptionError, match="beta must be a finite number of at most 0"):
        TailAdaptive(beta=beta)


def test_the_stock_loss_takes_an_order_for_ranks():
    """Why it is refused: three draws of log weights 2, 0, 1 count 2/3, 1 and 1/3 of what they should."""

    class Fixed:
        def __init__(self, log_prob):
            self.nodes = {"z": {"type": "sample", "log_prob": log_prob}}

    log_w = torch.tensor([2.0, 0.0, 1.0], requires_grad=True)
    loss = TraceTailAdaptive_ELBO(num_particles=3, vectorize_particles=True)
    with pyro.validation_enabled(False):
        _, surrogate_loss = loss._differentiable_loss_particle(Fixed(log_w), Fixed(torch.zeros(3)))
    (found,) = torch.autograd.grad(-surrogate_loss, log_w)
    ours = TailAdaptive(particles=3).path(log_w.detach()) / 3.0
    torch.testing.assert_close(ours, torch.tensor([6.0, 2.0, 3.0]) / 11.0)
    # argsort is (1, 2, 0), not the ranks (3, 1, 2).
    torch.testing.assert_close(found, torch.tensor([3.0, 2.0, 6.0]) / 11.0)
