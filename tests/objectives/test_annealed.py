"""The annealed ELBO: schedules from their first power to 1, captured as they are, not cut short."""

import functools
import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import local_model, perturb, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.contracts import Batch
from pyro_vi_kit.core.errors import OptionError, UnknownNameError
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import SCHEDULES, Annealed, evaluate
from pyro_vi_kit.objectives.elbo import Elbo
from pyro_vi_kit.optimize.deterministic import fixed_draws
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian
from pyro_vi_kit.optimize.deterministic.search import Search
from pyro_vi_kit.optimize.engines import CapturedEngine, EagerEngine

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_rises_from_its_first_power_to_one_and_stays(name):
    objective = Annealed(schedule=name, first=0.1, steps=40)
    powers = [float(objective.power(torch.tensor(float(step)))) for step in range(61)]
    assert powers[0] == pytest.approx(0.1, abs=1e-12)
    assert all(a < b for a, b in pairwise(powers[:41]))
    assert powers[40:] == pytest.approx([1.0] * 21, abs=1e-12)


def test_it_is_the_joint_density_that_is_tempered():
    guide = perturb(guides.make("full_rank", two_scales_model()))
    objective = Annealed(schedule="linear", first=0.2, steps=10)
    draw = guide.draw(3)
    log_p = guide.weigh(draw).shared + draw.shared
    found = objective.weights(guide, draw, Batch(updates=torch.tensor(5.0))).shared
    torch.testing.assert_close(found, 0.6 * log_p - draw.shared)
    assert torch.equal(objective.weights(guide, draw).shared, guide.weigh(draw).shared)


def test_local_latents_are_tempered_row_by_row():
    guide = perturb(guides.make("amortized", local_model(n=4), hidden=4))
    objective = Annealed(schedule="linear", first=0.2, steps=10)
    draw = guide.draw(3)
    found = evaluate(objective, objective.weights(guide, draw, Batch(updates=torch.tensor(5.0))))
    log_q = draw.local["datum"].sum(-1).mean()
    expected = 0.6 * (evaluate(Elbo(), guide.weigh(draw)) + log_q) - log_q
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("estimator", ["dreg", "score"])
def test_a_recorded_step_has_the_temperature_of_its_own_number(estimator):
    """Seven steps of a schedule of five: a temperature that was recorded would show at the second."""
    runs = []
    for engine in (EagerEngine, CapturedEngine):
        guide = perturb(guides.make("full_rank", Density(two_scales_model())))
        objective = Annealed(3, first=0.01, steps=5)
        made = engine(guide, objective, seed=5, estimator=estimator)
        runs.append(made.run(7, 0.02).bounds)
        assert made.name == ("eager" if engine is EagerEngine else "captured"), made
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-9, atol=1e-9)


def test_it_ends_at_the_elbo_and_not_before_its_schedule():
    model = two_scales_model()
    found = vi.fit(model, "full_rank", Annealed(16, steps=300), seed=0)
    expected = vi.fit(model, "full_rank", "elbo", seed=0)
    assert found.status.converged
    assert len(found.losses) >= 300
    assert found.bound == found.elbo
    slack = 0.03 + 4 * math.hypot(found.elbo_se, expected.elbo_se)
    assert found.elbo == pytest.approx(expected.elbo, abs=slack)


def test_going_on_does_not_begin_again():
    first = vi.fit(two_scales_model(), "mean_field", Annealed(4, steps=50), steps=100, seed=0)
    second = vi.fit(two_scales_model(), resume=first, steps=100)
    assert second.record.objective.name == "elbo"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 500}, "ends before"),
        ({"epochs": 3}, "leave epochs= out"),
        ({"optimizer": functools.partial(torch.optim.Adam, lr=0.01)}, "leave optimizer= out"),
        ({"engine": "pyro"}, "no loss in stock Pyro"),
        ({"method": "lbfgs"}, "method='lbfgs' needs"),
    ],
)
def test_what_would_cut_the_schedule_is_refused(options, words):
    with pytest.raises(OptionError, match=words):
        vi.fit(two_scales_model(), "mean_field", "annealed", **options)


def test_options_are_checked():
    with pytest.raises(UnknownNameError, match="linear"):
        Annealed(schedule="liner")
    with pytest.raises(OptionError, match=r"first must be in \(0, 1\]"):
        Annealed(first=0.0)
    with pytest.raises(OptionError, match="steps must be a positive integer"):
        Annealed(steps=0)


def two_modes():
    """Two equal modes on a diagonal, 5 sds from the middle; log evidence 0."""
    modes = dist.Normal(torch.tensor([[2.5, 2.5], [-2.5, -2.5]]), 0.5).to_event(1)
    return pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(2)), modes))


def test_it_starts_from_a_gaussian_of_the_flattened_target():
    """The best Gaussian of the target itself sits on one mode, with sd 0.5 about (2.5, 2.5)."""
    density = Density(vi.Model(two_modes))
    found = fixed_draws.prefit(Search(density, 0), None)
    assert float(found.best.loc.abs().min()) > 2.0
    power = 0.02
    wide = Gaussian(found.best.loc, found.best.scale_tril / power**0.5)
    flat = fixed_draws.prefit(Search(density, 0, power=power), wide).best
    # At this temperature each mode has sd 3.5, and its neighbour is 7 away: one hump about the middle.
    assert float(flat.loc.abs().max()) < 1.0
    assert float(flat.scale_tril.diagonal().min()) > 2.5


@pytest.mark.slow
def test_an_annealed_flow_has_both_modes_where_a_plain_one_has_one():
    guide = guides.AffineCoupling(layers=2, hidden=(8,))
    plain = vi.fit(vi.Model(two_modes), guide, seed=0)
    annealed = vi.fit(vi.Model(two_modes), guide, Annealed(256, steps=1000), seed=0, steps=2000)
    share = float((annealed.sample(4000, seed=0)["x"].sum(-1) > 0).mean())
    one_sided = float((plain.sample(4000, seed=0)["x"].sum(-1) > 0).mean())
    assert one_sided in (0.0, 1.0)
    # Standard error of a share of 4,000 draws: 0.008. What is left is the fit's own unevenness.
    assert share == pytest.approx(0.5, abs=0.15)
    assert annealed.elbo > plain.elbo + 0.3
