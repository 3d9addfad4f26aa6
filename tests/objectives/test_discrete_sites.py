"""Gradients at discrete sites against exhaustive enumeration: score function, VIMCO, relaxation."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from discrete_toys import Y, by_index, by_weights, exact_bound, groups
from toys import perturb

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.contracts import Batch
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.objectives import Annealed, Elbo, Iwae
from pyro_vi_kit.objectives.estimators import chosen, obstacle, surrogate

pytestmark = pytest.mark.usefixtures("float64")


def discrete_guide(model=by_index, discrete="score"):
    guide = guides.make("mean_field", vi.Model(model, Y), discrete=discrete)
    return perturb(guide, size=0.7)


def gradient(guide, objective, estimator, updates=None):
    _, loss = surrogate(
        guide,
        objective,
        objective.particles,
        Batch(updates=updates),
        share=objective.multi_sample,
        estimator=estimator,
    )
    return flat_gradient(guide, -loss)


def flat_gradient(guide, value):
    of = list(guide.parameters())
    parts = torch.autograd.grad(value, of, allow_unused=True, materialize_grads=True)
    return torch.cat([part.reshape(-1) for part in parts])


def mean_and_error(guide, objective, estimator, repeats):
    torch.manual_seed(0)
    found = torch.stack([gradient(guide, objective, estimator) for _ in range(repeats)])
    return found.mean(0), found.std(0) / repeats**0.5


@pytest.mark.parametrize(
    ("objective", "estimator"),
    [
        (Elbo(40), "pathwise"),
        (Elbo(40), "dreg"),
        (Elbo(40), "score"),
        (Iwae(2), "pathwise"),
        (Iwae(2), "dreg"),
    ],
)
def test_the_mean_gradient_is_that_of_the_enumerated_bound(objective, estimator):
    """Eleven numbers, each within 3 standard errors of its exact value (3.5 for the largest: 0.5 %)."""
    guide = discrete_guide()
    exact = flat_gradient(guide, exact_bound(guide, 2 if objective.multi_sample else 1))
    mean, error = mean_and_error(
        guide, objective, estimator, 500 if objective.multi_sample else 250
    )
    scores = (mean - exact).abs() / error
    assert float(scores.max()) < 3.5
    assert float((scores**2).mean()) < 2.2  # chi-square with 11 degrees: above it with 1 %
    # And the error is small enough to tell: a fifth of the gradient's length.
    assert float(error.norm()) < 0.2 * float(exact.norm())


def test_the_bound_of_drawn_states_is_the_enumerated_one():
    guide = discrete_guide()
    torch.manual_seed(0)
    with torch.no_grad():
        log_w = guide.log_weights(20_000).joint()
        exact = float(exact_bound(guide))
    assert abs(float(log_w.mean()) - exact) < 3 * float(log_w.std()) / 20_000**0.5


def relaxed_gradient(temperature, straight_through=False):
    option = guides.Relaxed(temperature, first=None, straight_through=straight_through)
    guide = discrete_guide(by_weights, option)
    mean, error = mean_and_error(guide, Elbo(40_000), "pathwise", 6)
    exact = flat_gradient(guide, exact_bound(guide))
    return float((mean - exact).norm()), float(error.norm())


def test_the_bias_of_relaxed_draws_falls_with_their_temperature():
    biases, errors = zip(*(relaxed_gradient(t) for t in (1.0, 0.3, 0.1)), strict=True)
    # Found 0.67, 0.18 and 0.06 with errors of 0.003, 0.008 and 0.015, of a gradient of length 5.3.
    assert biases[0] - 3 * errors[0] > 2 * biases[1] + 6 * errors[1]
    assert biases[1] - 3 * errors[1] > biases[2] + 3 * errors[2]


def test_straight_through_draws_are_discrete():
    guide = discrete_guide(by_weights, guides.Relaxed(0.5, straight_through=True))
    torch.manual_seed(0)
    drawn = guide.draw(50, relaxed=True)
    values = drawn.z["z"]
    assert values.requires_grad
    torch.testing.assert_close(values, values.round(), atol=1e-12, rtol=0)
    assert not drawn.scored


def test_the_temperature_falls_geometrically():
    option = guides.Relaxed(0.1, first=1.0, steps=100)
    at = [float(option.at(torch.tensor(float(n)))) for n in (0, 50, 100, 500)]
    assert at == pytest.approx([1.0, 10**-0.5, 0.1, 0.1])
    assert option.at(None) == 0.1


def test_draws_outside_of_training_are_discrete():
    guide = discrete_guide(by_weights, "relaxed")
    with torch.no_grad():
        drawn = guide.draw(200)
    assert bool(((drawn.z["z"] == 0) | (drawn.z["z"] == 1)).all())
    log_q = guide.families["local"].table.rows.log_softmax(-1)
    torch.testing.assert_close(drawn.local["datum"], (drawn.z["z"] * log_q).sum(-1))


# -- rows that depend on each other -----------------------------------------------------------


def grouped():
    return vi.Model(groups, torch.cat([Y, Y + 0.3]), torch.tensor([0, 1, 2, 0, 1, 2]))


def test_where_states_act_outside_their_plate_the_signal_is_the_joint_one():
    """By differences of the exact ELBO: 27 states of three groups, and Gauss-Hermite over m."""
    guide = perturb(guides.make("mean_field", grouped(), discrete="score"), size=0.5)
    assert not guide.rows_apart()
    q_m = guide.families["global"]()
    log_q = guide.families["local"].table.rows.log_softmax(-1)
    states = torch.cartesian_prod(*[torch.arange(3)] * 3)
    one = torch.nn.functional.one_hot(states, 3).double()
    nodes, weights = map(torch.as_tensor, np.polynomial.hermite_e.hermegauss(12))
    exact = torch.zeros(())
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        m = (q_m.mean + q_m.stddev * node).expand(27, 1)
        log_p = guide.density.terms({"m": m[:, 0], "z": one}).total()
        q = (one * log_q).sum((-2, -1))
        exact = exact + weight * (q.exp() * (log_p - q - q_m.log_prob(m))).sum()
    mean, error = mean_and_error(guide, Elbo(40), "dreg", 250)
    scores = (mean - flat_gradient(guide, exact)).abs() / error
    assert float(scores.max()) < 3.5  # of eleven numbers: 0.5 %


def test_they_have_no_bound_per_datum():
    with pytest.raises(OptionError, match=r"no bound per datum.*objective='elbo'"):
        vi.fit(grouped(), guides.MeanField(discrete="score"), "iwae")


# -- what is defined --------------------------------------------------------------------------


def test_which_estimator_is_taken():
    scored, relaxed = discrete_guide(), discrete_guide(by_weights, "relaxed")
    assert chosen(scored, Elbo()) == chosen(relaxed, Elbo()) == "dreg"
    assert chosen(scored, Iwae()) == "dreg"
    assert chosen(relaxed, Iwae()) == "pathwise"
    assert chosen(scored, Annealed()) == "dreg"
    assert "discrete='score'" in str(obstacle(relaxed, Elbo(), "score"))
    assert "particles=2" in str(obstacle(scored, Elbo(1), "dreg"))
    assert "estimator='pathwise'" in str(obstacle(relaxed, Iwae(), "dreg"))


def test_relaxed_draws_are_refused_where_no_estimator_is_left():
    def rows_only(y):
        with pyro.plate("datum", len(y)) as index:
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("y", dist.Normal(2 * z, 1.0), obs=y[index])

    with pytest.raises(OptionError, match="discrete='score'"):
        vi.fit(vi.Model(rows_only, Y), guides.MeanField(discrete="relaxed"), "forward_kl")
