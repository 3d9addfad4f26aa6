"""Gradient estimators: the formula by hand, the right mean, and no variance at the optimum."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from toys import (
    gaussian,
    guide_for,
    local_and_global_model,
    local_model,
    perturb,
    two_scales_model,
)

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.contracts import Batch
from pyro_vi_kit.guides import REGISTRY
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Elbo, Iwae, Renyi, evaluate
from pyro_vi_kit.objectives.estimators import obstacle, surrogate

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")

SPREAD = [name for name in REGISTRY if name != "delta"]
OBJECTIVES = [Elbo(3), Iwae(3), Renyi(0.5, 3), Renyi(2.0, 3), Renyi(-0.5, 3)]
each_spread = pytest.mark.parametrize("name", SPREAD)
each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)


def gradient(guide, objective, estimator, *, params=None, index=None, of=None):
    """The estimate of one draw of the noise, as one vector: of the bound, so upwards."""
    local = any(block.plate for block in guide.blocks)
    _, loss = surrogate(
        guide,
        objective,
        objective.particles,
        Batch(index or {}, params=params),
        share=local and objective.multi_sample,
        estimator=estimator,
    )
    of = list(guide.parameters()) if of is None else of
    parts = torch.autograd.grad(-loss, of, allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


def small_guide(name):
    made = guide_for(name, Density(gaussian(2)[0]), Density(local_model(n=2)))
    return perturb(made, size=0.3)


# -- the formula ------------------------------------------------------------------------------


def by_hand(guide, objective, seed):
    """Tucker et al. (2019), particle by particle: Jacobians of draws, gradients of log weights."""
    parameters = dict(guide.named_parameters())
    block = guide.blocks[0]
    torch.manual_seed(seed)
    draw = guide.draw(objective.particles)
    flat = draw.flat[block.name]
    frozen = flat.detach().requires_grad_()
    rest = frozen.shape[1:-1]
    context = None if block.plate is None else guide.context(block)
    log_q = guide.families[block.name](context).log_prob(frozen)
    if block.plate is None:
        log_w = guide.density.log_prob(frozen) - log_q
    else:
        terms = guide.density.terms(block.unpack(frozen))
        log_w = terms.local[block.plate.name] - log_q
    (slopes,) = torch.autograd.grad(log_w.sum(), frozen)
    alpha = objective.order
    shares = torch.softmax((1 - alpha) * log_w.detach(), 0)
    total = torch.zeros(sum(p.numel() for p in parameters.values()))
    for k in range(objective.particles):
        for row in [()] if not rest else [(i,) for i in range(rest[0])]:
            at = (k, *row)
            weight = shares[at] * (alpha + (1 - alpha) * shares[at])
            parts = torch.autograd.grad(
                flat[at] @ slopes[at],
                list(parameters.values()),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            total += weight * torch.cat([part.reshape(-1) for part in parts])
    return total


@each_objective
@each_spread
def test_it_is_the_formula_of_the_paper(name, objective):
    guide = small_guide(name)
    expected = by_hand(guide, objective, seed=1)
    torch.manual_seed(1)
    found = gradient(guide, objective, "dreg")
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@each_objective
@each_spread
def test_the_bound_is_the_same_and_pathwise_is_its_gradient(name, objective):
    guide = small_guide(name)
    share = objective.multi_sample and any(block.plate for block in guide.blocks)
    bounds = []
    for estimator in ("pathwise", "dreg"):
        torch.manual_seed(2)
        bound, _ = surrogate(guide, objective, 3, share=share, estimator=estimator)
        assert not bound.requires_grad
        bounds.append(bound)
    torch.manual_seed(2)
    expected = evaluate(objective, guide.log_weights(3, share=share))
    torch.testing.assert_close(torch.stack(bounds), expected.detach().expand(2))
    direct = torch.autograd.grad(expected, list(guide.parameters()), materialize_grads=True)
    torch.manual_seed(2)
    found = gradient(guide, objective, "pathwise")
    torch.testing.assert_close(found, torch.cat([part.reshape(-1) for part in direct]))


# -- the mean ---------------------------------------------------------------------------------


def assert_same_mean(guide, objective, draws, **options):
    """Both estimators on the same noise: their difference has mean zero, at 4 s.e. per direction.

    Every parameter at once on 3 random directions, so that few comparisons are made.
    """
    torch.manual_seed(5)
    differences = torch.stack(
        [_difference(guide, objective, seed, options) for seed in range(draws)]
    )
    directions = torch.randn(differences.shape[1], 3)
    along = differences @ directions
    assert float(along.abs().max()) > 1e-9
    assert bool((along.mean(0).abs() < 4 * along.std(0) / math.sqrt(draws)).all())


def _difference(guide, objective, seed, options):
    parts = []
    for estimator in ("pathwise", "dreg"):
        torch.manual_seed(seed)
        parts.append(gradient(guide, objective, estimator, **options))
    return parts[0] - parts[1]


@pytest.mark.parametrize("objective", [Elbo(2), Iwae(2), Renyi(0.5, 2)], ids=repr)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "affine_coupling")) for n in SPREAD]
)
def test_both_estimators_have_the_same_mean(name, objective):
    assert_same_mean(small_guide(name), objective, draws=200)


@pytest.mark.parametrize("objective", [Iwae(3), Renyi(2.0, 3)], ids=repr)
def test_they_have_with_a_global_latent_and_minibatches(objective):
    guide = perturb(guides.make("amortized", local_and_global_model(), hidden=4), size=0.3)
    index = {"datum": torch.tensor([0, 3])}
    assert_same_mean(guide, objective, draws=200, index=index)


def test_the_mean_is_that_of_the_closed_form():
    """ELBO of N(m, s^2) to N(0, 1) is -(s^2 + m^2) / 2 + log s: slopes -m and 1 - s^2 in log s."""
    model = vi.Model(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    guide = guides.make("mean_field", model, init_scale=0.5)
    family = guide.families["latent"]
    family.loc.data.fill_(0.8)
    torch.manual_seed(0)
    objective = Elbo(4000)
    found = gradient(guide, objective, "dreg", of=[family.loc, family.log_scale])
    # Per draw the slopes are (1/s^2 - 1) s e - m and that times s e: variances below 3.
    assert torch.allclose(found, torch.tensor([-0.8, 0.75]), atol=4 * math.sqrt(3 / 4000))


@pytest.mark.parametrize("objective", [Elbo(3), Iwae(3), Renyi(0.5, 3)], ids=repr)
def test_the_models_own_parameters_keep_the_ordinary_gradient(objective):
    """They do not enter log q: draw by draw it is the pathwise one."""
    torch.manual_seed(0)
    network = nn.Linear(1, 1)

    def model(y):
        net = pyro.module("net", network)
        with pyro.plate("datum", len(y)) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(net(z[..., None])[..., 0], 0.7), obs=y[index])

    guide = perturb(guides.make("amortized", vi.Model(model, torch.tensor([0.5, -1.0, 2.0]))))
    params = {n: v.clone().requires_grad_() for n, v in guide.density.params.items()}
    found = []
    for estimator in ("pathwise", "dreg"):
        torch.manual_seed(1)
        own = list(params.values())
        found.append(gradient(guide, objective, estimator, params=params, of=own))
    assert float(found[0].abs().min()) > 1e-6
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-12)


def test_an_encoder_is_run_once_so_that_dropout_is_one_mask():
    encoder = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    guide = guides.make("amortized", local_model(n=4), encoder=encoder)
    calls = []
    guide.families["local"].source.encoder.register_forward_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    gradient(guide, Iwae(3), "dreg")
    assert len(calls) == 1


# -- the variance -----------------------------------------------------------------------------


def at_the_optimum(name):
    """A guide that equals its target, which has the correlations that the guide can have."""
    if name == "mean_field":
        scales = torch.tensor([0.3, 2.0, 1.1])
        model = vi.Model(lambda: pyro.sample("z", dist.Normal(1.0, scales).to_event(1)))
        mean, tril = torch.ones(3), scales.diag()
    else:
        model, mean, covariance = gaussian(3)
        tril = torch.linalg.cholesky(covariance)
    guide = guides.make(name, model)
    guide.families["latent"].start_from(mean, tril)
    return guide


@pytest.mark.parametrize("objective", [Elbo(4), Iwae(4), Renyi(0.5, 4)], ids=repr)
@pytest.mark.parametrize("name", ["mean_field", "full_rank", "affine_coupling"])
def test_where_q_is_the_posterior_the_gradient_has_no_variance(name, objective):
    guide = at_the_optimum(name)
    torch.manual_seed(0)
    pathwise = torch.stack([gradient(guide, objective, "pathwise") for _ in range(20)])
    dreg = torch.stack([gradient(guide, objective, "dreg") for _ in range(20)])
    assert float(pathwise.var(0).sum()) > 0.1
    assert float(dreg.square().sum()) < 1e-20 * float(pathwise.square().sum())


def signal_to_noise(guide, objective, estimator, draws=400):
    torch.manual_seed(0)
    found = torch.stack([gradient(guide, objective, estimator) for _ in range(draws)])
    return float(found.mean(0).norm() / found.std(0).norm())


def test_with_more_particles_the_signal_of_dreg_does_not_drown():
    """Rainforth et al. (2018): pathwise falls as 1 / sqrt(K), dreg grows as sqrt(K)."""
    model = vi.Model(lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)))
    # Wider than its target, so that the weights have every moment.
    guide = perturb(guides.make("mean_field", model, init_scale=1.4), size=0.1)
    few, many = (
        {e: signal_to_noise(guide, Iwae(k), e) for e in ("pathwise", "dreg")} for k in (4, 64)
    )
    # Sixteen times the particles, in the limit a factor of 1/4 and of 4; 400 draws know each to
    # some 10 %.
    assert many["pathwise"] < 0.6 * few["pathwise"]
    assert many["dreg"] > 1.5 * few["dreg"]


# -- where it is defined ----------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTRY)
def test_a_point_has_no_density_to_reparameterise(name):
    made = guide_for(name, Density(two_scales_model()), Density(local_model()))
    assert (obstacle(made, Elbo(2), "dreg") is None) == (name != "delta")


def test_vr_max_has_no_doubly_reparameterised_gradient():
    reason = obstacle(small_guide("mean_field"), Renyi(-math.inf, 2), "dreg")
    assert reason is not None
    assert "estimator='pathwise' or estimator='score'" in reason
