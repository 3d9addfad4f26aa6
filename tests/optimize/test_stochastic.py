"""Stochastic steps: they stop by themselves at the optimum, keep the best, and say why they end."""

import math
import time
from itertools import count

import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import gaussian

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Elbo, Iwae
from pyro_vi_kit.optimize.engines import EagerEngine, Window
from pyro_vi_kit.optimize.result import Budget
from pyro_vi_kit.optimize.stochastic import stochastic
from pyro_vi_kit.optimize.stochastic.stochastic import Schedule

pytestmark = pytest.mark.usefixtures("float64")


def run(engine, budget=None, **schedule):
    return stochastic.fit(
        engine,
        Schedule(**schedule),
        budget=budget or Budget(),
        progress=Progress("", enabled=False),
    )


class Quadratic:
    """An engine whose bound is -(x - 1)^2 / 2, with noise on its gradient and its looks."""

    name = "toy"
    particles = 3

    def __init__(self, start=0.0, noise=0.0):
        self.x = torch.tensor([start])
        self.skipped = 0
        self.rates = []
        self._generator = torch.Generator().manual_seed(0)
        self._noise = noise

    def run(self, steps, rate):
        bounds, mean = [], 0.0
        for made in range(steps):
            bounds.append(self.step(rate))
            mean = mean + (self.x - mean) / (made + 1)
        return Window(torch.tensor(bounds), {"x": mean})

    def step(self, rate):
        self.rates.append(rate)
        noise = self._noise * torch.randn(1, generator=self._generator)
        self.x = self.x + rate * (1 - self.x + noise)
        return float(-0.5 * (self.x - 1) ** 2)

    def parameters(self):
        return {"x": self.x}

    def evaluate(self, replicates):
        common = torch.randn(replicates, generator=torch.Generator().manual_seed(1))
        return -0.5 * (self.x - 1) ** 2 + self._noise * common


# -- the schedule, on an engine without a model -----------------------------------------------


def test_it_stops_at_the_optimum_by_itself():
    engine = Quadratic(noise=0.3)
    outcome, bound = run(engine, rate=0.1, window=50, replicates=8)
    assert outcome.status.converged
    assert outcome.status.reason == "converged"
    # The stated meaning: nats still to gain, with their error, and the bound with its own.
    assert "Smaller steps would gain about" in outcome.status.advice
    assert outcome.status.advice.count("s.e.") == 2
    # The stationary sd of x at rate r is 0.3 sqrt(r / 2) = 0.07 and averaging cuts it further.
    assert abs(float(engine.x) - 1) < 0.1
    assert bound == pytest.approx(float(engine.evaluate(8).mean()))
    assert outcome.method == "stochastic"
    assert outcome.evaluations == 3 * len(outcome.losses) == 3 * len(engine.rates)
    rates = sorted(set(engine.rates), reverse=True)
    assert 2 <= len(rates) <= 4
    assert rates == pytest.approx([0.1 * 0.3**i for i in range(len(rates))])
    assert engine.rates == sorted(engine.rates, reverse=True)


def test_the_end_of_the_steps_is_told_as_budget():
    outcome, _ = run(Quadratic(start=100.0), rate=1e-4, window=10, max_steps=40, replicates=4)
    assert outcome.status.reason == "budget"
    assert not outcome.status.converged
    assert "number of steps ran out" in outcome.status.advice
    assert "more steps=" in outcome.status.advice
    assert len(outcome.losses) == 40


def test_the_end_of_the_time_is_told_as_budget():
    engine = Quadratic(start=100.0)
    engine.step = lambda rate: time.sleep(0.005) or -1.0
    started = time.monotonic()
    outcome, _ = run(engine, budget=Budget.of_seconds(0.1), window=1000, replicates=4)
    assert outcome.status.reason == "budget"
    assert "The budget ran out" in outcome.status.advice
    # One step more than the budget, and a busy machine's leeway.
    assert 0.1 <= time.monotonic() - started < 1.0
    assert 1 <= len(outcome.losses) <= 21


def test_no_time_at_all_still_gives_one_step_and_a_finite_guide():
    engine = Quadratic()
    outcome, bound = run(engine, budget=Budget.of_seconds(-1), replicates=4)
    assert outcome.status.reason == "budget"
    assert len(outcome.losses) == 1
    assert math.isfinite(bound)


def test_the_best_average_is_what_stays():
    """The bound falls after the first window: what was best is kept."""
    engine = Quadratic(start=0.9)
    drift = count()

    def worse(rate):
        engine.x = engine.x + (0.002 if next(drift) < 50 else 0.1)
        return 0.0

    engine.step = worse
    outcome, bound = run(engine, window=50, replicates=4, max_steps=200)
    # The average over the first window, 0.902 ... 1.0; the rest is far away.
    assert float(engine.x) == pytest.approx(0.951)
    assert bound == pytest.approx(-0.5 * 0.049**2)
    assert outcome.status.reason == "budget"


def test_a_worse_window_starts_again_from_the_best():
    engine = Quadratic(start=1.0)
    starts = []

    def wander(rate):
        starts.append(float(engine.x))
        engine.x = engine.x + 1.0
        return 0.0

    engine.step = wander
    run(engine, window=5, replicates=4, max_steps=60)
    # Four windows without a gain, then back to the best, the start.
    assert starts[0] == starts[20] == 1.0
    assert float(engine.x) == 1.0


def test_windows_are_whole_epochs():
    engine = Quadratic(start=10.0)
    looks, evaluate = [], engine.evaluate
    engine.evaluate = lambda replicates: looks.append(len(engine.rates)) or evaluate(replicates)
    run(engine, rate=1e-4, window=20, epoch=14, replicates=4, max_steps=1400)
    # Of 20 steps at least, and later of a quarter of those made.
    assert looks[:4] == [0, 28, 56, 84]
    assert all(at % 14 == 0 for at in looks)
    assert looks[-1] - looks[-2] > 28


def test_an_interrupt_keeps_the_best():
    engine = Quadratic(start=0.0)
    step, steps = engine.step, count()

    def interrupted(rate):
        if next(steps) == 130:
            raise KeyboardInterrupt
        return step(rate)

    engine.step = interrupted
    outcome, bound = run(engine, rate=0.05, window=50, replicates=4)
    assert outcome.status.reason == "interrupted"
    assert not outcome.status.converged
    assert "best parameters so far were kept" in outcome.status.advice
    # Of the run of steps that was interrupted nothing is told.
    assert 100 <= len(outcome.losses) <= 130
    assert bound > -0.5
    assert bound == pytest.approx(float(engine.evaluate(4).mean()))


def test_slow_progress_is_given_time_in_proportion():
    """Far away and without noise each window gains little of the whole; it must not stop early."""
    engine = Quadratic(start=-30.0)
    outcome, bound = run(engine, rate=0.003, window=20, replicates=4, tolerance=0.01)
    assert outcome.status.converged
    assert bound > -0.05


def test_the_tolerance_is_absolute_unless_it_is_asked_to_follow_the_size():
    class Large(Quadratic):
        def evaluate(self, replicates):
            return super().evaluate(replicates) - 1e6

    fine, coarse = Large(start=-3.0), Large(start=-3.0)
    run(fine, rate=0.003, window=20, replicates=4, tolerance=0.01)
    run(coarse, rate=0.003, window=20, replicates=4, tolerance=0.01, relative=1e-4)
    assert abs(float(fine.x) - 1) < 0.3
    assert len(coarse.rates) < len(fine.rates)


def test_even_weights_at_the_start_end_the_fit_after_one_look():
    engine = Quadratic(start=1.0)
    outcome, bound = run(engine, replicates=16, tight=True)
    assert outcome.status.converged
    assert "even to within" in outcome.status.advice
    assert engine.rates == outcome.losses == []
    assert bound == 0.0
    # Uneven ones do not: half their variance, times the particles of a replicate, is a nat and more.
    assert run(Quadratic(start=1.0, noise=1.0), replicates=64, tight=True)[0].losses


def test_gains_that_go_on_at_the_smallest_rate_are_no_convergence():
    """A nat is gained whenever the rate falls, and none in between."""
    engine = Quadratic()

    def step(rate):
        engine.rates.append(rate)
        engine.x = torch.tensor([float(len(set(engine.rates)))])
        return 0.0

    def evaluate(replicates):
        return engine.x.repeat(replicates)

    engine.step, engine.evaluate = step, evaluate
    outcome, bound = run(engine, window=5, replicates=4)
    assert outcome.status.reason == "not converged"
    assert bound == 6.0
    assert "0.43 nats" in outcome.status.advice


@pytest.mark.parametrize("hole", [math.nan, -math.inf])
def test_a_bound_that_is_never_finite_diverges_and_restores_the_start(hole):
    engine = Quadratic(start=0.25)

    def bad(rate):
        engine.skipped += 1
        return math.nan

    engine.step = bad
    engine.evaluate = lambda replicates: torch.full((replicates,), hole)
    outcome, _ = run(engine, window=10, replicates=4)
    assert outcome.status.reason == "diverged"
    assert outcome.skipped == 40
    assert all(math.isnan(loss) for loss in outcome.losses)
    assert "40 steps skipped" in outcome.status.advice
    assert "vi.check(model)" in outcome.status.advice
    assert float(engine.x) == 0.25


def test_a_budget_that_ends_before_any_finite_bound_has_diverged():
    engine = Quadratic()
    engine.evaluate = lambda replicates: torch.full((replicates,), math.nan)
    outcome, _ = run(engine, budget=Budget.of_seconds(-1), replicates=4)
    assert outcome.status.reason == "diverged"
    assert "inf" not in outcome.status.advice.replace("infinite", "")


def test_a_few_skipped_steps_are_told_of_and_no_harm():
    engine = Quadratic(noise=0.1)
    step, steps = engine.step, count()

    def sometimes(rate):
        if next(steps) % 10 == 0:
            engine.skipped += 1
            return math.nan
        return step(rate)

    engine.step = sometimes
    outcome, _ = run(engine, rate=0.1, window=50, replicates=4)
    assert outcome.status.converged
    assert f"{engine.skipped} steps with a NaN gradient were skipped" in outcome.status.advice
    assert outcome.skipped == engine.skipped > 0


# -- on models --------------------------------------------------------------------------------


def gaussian_fit(name, objective, **schedule):
    model, mean, covariance = gaussian(2)
    guide = guides.make(name, Density(model), init_scale=0.5)
    outcome, bound = run(EagerEngine(guide, objective, seed=0), **schedule)
    return guide, outcome, bound, mean, covariance


def test_it_finds_a_gaussian_from_far_away():
    """The evidence is 0; the ELBO's gap is the KL, of the order of the tolerance."""
    guide, outcome, bound, mean, _ = gaussian_fit("full_rank", Elbo(32), rate=0.05, replicates=32)
    assert outcome.status.converged
    with torch.no_grad():
        log_w = guide.log_weights(20_000).joint()
    # At the optimum every log weight is 0: no noise to speak of.
    assert -0.02 < float(log_w.mean()) <= 3 * float(log_w.std()) / math.sqrt(20_000)
    assert bound == pytest.approx(float(log_w.mean()), abs=0.05)
    # A KL of 0.02 moves a mean by at most sqrt(0.04) = 0.2 sd; sds here are below 1.5.
    found = guide.families["latent"]().mean.detach()
    assert float((found - mean).abs().max()) < 0.3


def test_the_importance_weighted_bound_comes_closer_than_the_elbo():
    *_, elbo, _, _ = gaussian_fit("mean_field", Elbo(32), rate=0.05, replicates=32)
    *_, iwae, _, _ = gaussian_fit("mean_field", Iwae(32), rate=0.05, replicates=32)
    # 32 replicates of 32 weights; the noise of both is below 0.03.
    assert elbo < iwae < 0.05


def test_a_target_that_is_nan_diverges_with_advice():
    def nan():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(z.abs() > 2.0, torch.full_like(z, math.nan), z))

    # All but one draw in a million lie where it is NaN.
    guide = guides.make("mean_field", Density(vi.Model(nan)), init_scale=1e6)
    before = {key: value.clone() for key, value in guide.state_dict().items()}
    outcome, _ = run(EagerEngine(guide, Elbo(4), seed=0), window=10, replicates=4)
    assert outcome.status.reason == "diverged"
    assert outcome.skipped == len(outcome.losses) == 40
    assert all(torch.equal(before[key], value) for key, value in guide.state_dict().items())


def test_it_finds_the_posterior_of_a_model_from_the_origin_through_fit():
    model, mean, _ = gaussian(2, seed=3)
    posterior = vi.fit(model, "full_rank", method="stochastic", init="origin", seed=0, budget=30)
    assert posterior.method == "stochastic"
    assert posterior.status.converged
    # init_scale 0.1 and the first rate 0.005 bound the pace; the KL left is a tolerance or two.
    assert -0.1 < posterior.elbo <= 3 * posterior.elbo_se + 1e-9
    draws = posterior.sample(4000, seed=0)["z"]
    # A KL of 0.1 is 0.45 sd at the most; sds here are below 1.5.
    assert float(abs(draws.mean(0) - mean.numpy()).max()) < 0.75
