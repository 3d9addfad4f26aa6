"""Objectives are the stock losses of Pyro, and the formulas of the papers."""

import itertools
import math

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import RenyiELBO
from scipy.special import logsumexp
from torch import nn
from toys import (
    local_and_global_model,
    local_evidence,
    local_model,
    perturb,
    traced_log_weight,
    two_scales_model,
)

from pyro_vi_kit import guides, objectives
from pyro_vi_kit.core.errors import OptionError, UnknownNameError
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import REGISTRY, Elbo, Iwae, LogWeights, Objective, Renyi, evaluate

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")

ALPHAS = (0.0, 0.5, 1.0, 2.0, -1.0, -math.inf)
# Of the package's own, in `by_hand`.
FORMULAS = (
    "elbo",
    "elbo_analytic",
    "iwae",
    "renyi",
    "forward_kl",
    "chi_square",
    "tail_adaptive",
    "beta",
    "annealed",
)
NEED_SEVERAL = ("forward_kl", "chi_square", "tail_adaptive")


def configured(particles):
    """Every objective of the registry, and Rényi's at each order."""
    names = [name for name in REGISTRY if particles > 1 or name not in NEED_SEVERAL]
    made = [objectives.make(name, particles=particles) for name in names]
    return made + [Renyi(alpha=alpha, particles=particles) for alpha in ALPHAS]


def has_stock_loss(objective):
    try:
        objective.stock_loss()
    except OptionError:
        return False
    return True


EACH = [objective for particles in (1, 5) for objective in configured(particles)]
STOCK = [objective for objective in EACH if has_stock_loss(objective)]
each_objective = pytest.mark.parametrize("objective", EACH, ids=repr)
each_stock = pytest.mark.parametrize("objective", STOCK, ids=repr)


@pytest.fixture(scope="module")
def log_w():
    return (
        torch.randn(5, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2 - 7
    )


def bound_of_traces(objective, model, guide, seed):
    pyro.set_rng_seed(seed)
    log_w = [traced_log_weight(model, guide)[0] for _ in range(objective.particles)]
    return objective.bound(torch.stack(log_w))


def gradients(guide):
    return {name: p.grad.clone() for name, p in guide.named_parameters()}


# -- against stock Pyro -----------------------------------------------------------------------


@each_stock
def test_value_and_gradient_are_those_of_the_stock_loss(objective):
    model = two_scales_model()
    guide = perturb(guides.make("full_rank", model))
    bound = bound_of_traces(objective, model, guide, seed=1)
    (-bound).backward()
    ours = gradients(guide)

    stock = objective.stock_loss()
    pyro.set_rng_seed(1)
    assert stock.loss(model.fn, guide, *model.args) == pytest.approx(-bound.item(), rel=1e-10)
    guide.zero_grad()
    pyro.set_rng_seed(1)
    loss = stock.loss_and_grads(model.fn, guide, *model.args)
    assert loss == pytest.approx(-bound.item(), rel=1e-10)
    # The same sums in another order: rounding of float64.
    torch.testing.assert_close(gradients(guide), ours, rtol=1e-8, atol=1e-8)


@each_stock
def test_the_vectorised_stock_loss_sees_the_log_weights_of_the_density(objective):
    model = two_scales_model()
    guide = perturb(guides.make("mean_field", model))
    stock = objective.stock_loss(vectorize=True)
    stock.loss(model.fn, guide, *model.args)  # guesses the plate nesting, which takes draws
    pyro.set_rng_seed(2)
    loss = stock.loss(model.fn, guide, *model.args)
    pyro.set_rng_seed(2)
    bound = evaluate(objective, guide.log_weights(objective.particles))
    assert -loss == pytest.approx(bound.item(), rel=1e-10)


@pytest.mark.parametrize("objective", [o for o in STOCK if o.multi_sample], ids=repr)
def test_with_every_site_in_one_plate_the_stock_loss_is_the_bound_per_datum(objective):
    model = local_model(n=3)
    guide = perturb(guides.make("amortized", model, hidden=4))
    pyro.set_rng_seed(3)
    stock = objective.stock_loss()
    loss = stock.loss(model.fn, guide, *model.args, **model.kwargs)
    # Fewer than 16 numbers: torch draws them one by one, so K draws of [N] are one of [K, N].
    assert objective.particles * 3 < 16
    pyro.set_rng_seed(3)
    bound = evaluate(objective, guide.log_weights(objective.particles))
    assert -loss == pytest.approx(bound.item(), rel=1e-10)


# -- formulas ---------------------------------------------------------------------------------


def f_divergence(t):
    """Mean of f at weights t of mean 1, f(1) = f'(1) = 0, f''(u) = K / #{t_j >= u} / u^2, normalised.

    ``f(t)`` is the integral of (t - u) f''(u) from 1 to t, of which each step is in closed form.
    """
    K = len(t)
    steps = np.sort(np.append(t, 1.0))
    total = 0.0
    for low, high in itertools.pairwise(steps):
        gamma = K / (t >= high).sum() if (t >= high).any() else K
        for each in t:
            inside = int(1.0 < high <= each) - int(each <= low < 1.0)
            piece = each * (1.0 / low - 1.0 / high) - np.log(high / low)
            total += inside * gamma * piece
    return total / sum(K / (t >= each).sum() for each in t)


def by_hand(objective, w):
    """The definitions of the papers, in NumPy."""
    K = len(w)
    if objective.name == "forward_kl":
        shares = np.exp(w - logsumexp(w, axis=0))
        return (shares * w).sum(0)
    if objective.name == "tail_adaptive":
        level = logsumexp(w, axis=0) - np.log(K)
        return np.array([c - f_divergence(np.exp(x - c)) for x, c in zip(w.T, level, strict=True)])
    orders = {"iwae": 0.0, "chi_square": 1.0 - getattr(objective, "n", 2.0)}
    alpha = orders.get(objective.name, getattr(objective, "alpha", 1.0))
    if alpha == 1.0:
        return w.mean(0)
    if alpha == -math.inf:
        return w.max(0)
    return (logsumexp((1 - alpha) * w, axis=0) - np.log(K)) / (1 - alpha)


@pytest.mark.parametrize("objective", [o for o in EACH if o.name in FORMULAS], ids=repr)
def test_the_formula(objective, log_w):
    w = log_w[: objective.particles]
    np.testing.assert_allclose(
        objective.bound(w).numpy(), by_hand(objective, w.numpy()), rtol=1e-12
    )


def test_order_1_is_the_elbo_and_order_0_the_importance_weighted_bound(log_w):
    torch.testing.assert_close(Renyi(alpha=1.0).bound(log_w), Elbo().bound(log_w))
    torch.testing.assert_close(Renyi(alpha=0.0).bound(log_w), Iwae().bound(log_w))
    torch.testing.assert_close(
        Renyi(alpha=1 - 1e-7).bound(log_w), Elbo().bound(log_w), rtol=0, atol=1e-5
    )


def test_the_renyi_bound_falls_as_alpha_rises(log_w):
    bounds = [
        Renyi(alpha=a).bound(log_w) for a in (-math.inf, -5.0, -1.0, 0.0, 0.3, 0.9, 1.0, 1.5, 4.0)
    ]
    assert all(bool((low < high).all()) for high, low in itertools.pairwise(bounds))


@each_objective
def test_one_particle_is_its_own_bound(objective, log_w):
    torch.testing.assert_close(objective.bound(log_w[:1]), log_w[0])


@each_objective
def test_a_constant_goes_through(objective, log_w):
    shifted = objective.bound(log_w + 1000.0)
    torch.testing.assert_close(shifted, objective.bound(log_w) + 1000.0, rtol=1e-12, atol=1e-9)


# -- per datum --------------------------------------------------------------------------------


@each_objective
def test_a_bound_per_datum_is_the_loop_over_data(objective):
    generator = torch.Generator().manual_seed(0)
    K = objective.particles
    shared = torch.randn(K, generator=generator)
    rows = {
        "a": torch.randn(K, 4, generator=generator),
        "b": torch.randn(K, 3, generator=generator),
    }
    scale = {"a": 2.5, "b": 1.0}
    expected = shared.mean()
    for plate, log_w in rows.items():
        for i in range(log_w.shape[1]):
            expected = expected + scale[plate] * objective.bound(log_w[:, i])
    torch.testing.assert_close(evaluate(objective, LogWeights(shared, rows, scale)), expected)


@each_objective
def test_without_local_latents_it_is_the_joint_bound(objective, log_w):
    weights = LogWeights(log_w[: objective.particles, 0], {}, {})
    torch.testing.assert_close(evaluate(objective, weights), objective.bound(weights.joint()))


class Prior(nn.Module):
    """An encoder that ignores the datum: q is the prior N(0, 1)."""

    def __init__(self, size):
        super().__init__()
        self.moments = nn.Parameter(torch.zeros(size))

    def forward(self, inputs):
        return self.moments.expand(len(inputs), -1)


def test_minibatches_stay_below_the_evidence_where_stock_pyro_exceeds_it():
    """N / B belongs behind the logsumexp: N = 20, B = 5, K = 64, q the prior, evidence known."""
    model = local_model(n=20)
    guide = guides.make("amortized", model, encoder=Prior(2))
    evidence = local_evidence(model.args[0])
    objective, repeats = Iwae(particles=64), 300
    pyro.set_rng_seed(0)
    with torch.no_grad():
        full = torch.stack([evaluate(objective, guide.log_weights(64)) for _ in range(repeats)])
        ours = []
        for _ in range(repeats):
            index = {"datum": torch.randperm(20)[:5]}
            weights = guide.log_weights(64, index=index, share=True)
            ours.append(evaluate(objective, weights))
    guide.batch_size = 5
    loss = RenyiELBO(alpha=0, num_particles=64, vectorize_particles=True)
    pyro.set_rng_seed(0)
    stock = [-loss.loss(model.fn, guide, *model.args, **model.kwargs) for _ in range(repeats)]

    def mean_and_se(values):
        values = torch.as_tensor(values)
        return float(values.mean()), float(values.std()) / math.sqrt(repeats)

    (at_all, full_se), (sub, sub_se), (wrong, wrong_se) = map(mean_and_se, (full, ours, stock))
    assert sub <= evidence + 3 * sub_se
    # Unbiased for the bound on all data.
    assert abs(sub - at_all) <= 3 * math.hypot(sub_se, full_se)
    assert wrong > evidence + 3 * wrong_se


def test_globals_are_shared_by_the_particles_of_a_bound_per_datum():
    """Given the globals the rows are independent; the joint expectation is then a bound."""
    guide = guides.make("amortized", local_and_global_model())
    pyro.set_rng_seed(0)
    draw = guide.draw(6, share=True)
    assert torch.equal(draw.z["m"], draw.z["m"][:1].expand(6))
    assert torch.equal(draw.shared, draw.shared[:1].expand(6))
    assert len(guide.draw(6).z["m"].unique()) == 6


def test_the_bound_per_datum_with_a_global_latent_stays_below_the_evidence():
    """y ~ N(0, 2 I + 1 1'): the evidence in closed form."""
    model = local_and_global_model()
    y = model.args[0]
    covariance = 2 * torch.eye(5) + torch.ones(5, 5)
    evidence = float(torch.distributions.MultivariateNormal(torch.zeros(5), covariance).log_prob(y))
    guide = guides.make("amortized", Density(model), encoder=Prior(2), init_scale=0.5)
    with torch.no_grad():
        pyro.set_rng_seed(0)
        values = torch.stack(
            [evaluate(Iwae(particles=200), guide.log_weights(200, share=True)) for _ in range(400)]
        )
    # The gap is KL(q(m) || p(m | y)) and the per-datum IWAE gap of order 1 / K.
    assert float(values.mean()) <= evidence + 3 * float(values.std()) / math.sqrt(400)
    assert float(values.mean()) > evidence - 5


# -- names and options ------------------------------------------------------------------------


@pytest.mark.parametrize("name", REGISTRY)
def test_a_registered_objective_keeps_the_contract(name):
    made = objectives.make(name)
    assert isinstance(made, Objective)
    assert made.name == name
    assert objectives.make(made) is made
    assert made == objectives.make(name)
    assert objectives.make(name, particles=3).particles == 3
    assert objectives.describe()[name]
    assert all(objectives.about()[name])
    assert name in objectives.names()


def test_estimators_are_listed_with_their_papers():
    about = objectives.about_estimators()
    assert ("auto", *about) == objectives.ESTIMATORS
    assert all(map(all, about.values()))
    assert {name for each in objectives.estimators_of().values() for name in each} == set(about)


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("particles", [0, -1, True, 1.5, "3"])
def test_particles_must_be_a_positive_integer(name, particles):
    with pytest.raises(OptionError, match="particles must be a positive integer"):
        objectives.make(name, particles=particles)


@pytest.mark.parametrize("alpha", [math.nan, math.inf, "0.5", None, True])
def test_alpha_must_be_a_finite_number(alpha):
    with pytest.raises(OptionError, match="alpha must be a finite number"):
        Renyi(alpha=alpha)


def test_an_unknown_name_lists_the_choices_and_the_nearest():
    with pytest.raises(
        UnknownNameError,
        match=r"Did you mean 'iwae'\?.*elbo, elbo_analytic, forward_kl, iwae, renyi",
    ):
        objectives.make("iwea")


def test_an_unknown_option_lists_the_options():
    with pytest.raises(OptionError, match="no option 'alfa'; options: alpha, particles"):
        objectives.make("renyi", alfa=0.5)


def test_options_do_not_go_beside_an_instance():
    with pytest.raises(OptionError, match="options go into the objective itself"):
        objectives.make(Elbo(), particles=3)


@pytest.mark.parametrize("wrong", [Elbo, None, 3, object()])
def test_what_is_no_objective_is_refused(wrong):
    with pytest.raises(OptionError, match="objective= takes a name"):
        objectives.make(wrong)
