"""A replayed step is the uncaptured step: same noise, same rows, same numbers."""

from __future__ import annotations

import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import gaussian, local_model, perturb, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Elbo, Iwae, Renyi
from pyro_vi_kit.optimize.engines import Batches, CapturedEngine, EagerEngine

OBJECTIVES = [Elbo(3), Iwae(3), Renyi(0.5, 3)]


def pair(name, model, objective, *, batch_size=None, **options):
    """The eager and the captured engine on equal guides."""
    made = []
    for engine in (EagerEngine, CapturedEngine):
        density = Density(model)
        guide = perturb(guides.make(name, density))
        batches = None
        if batch_size is not None:
            plates = [block.plate for block in guide.blocks if block.plate is not None]
            batches = Batches({plates[0]: batch_size})
        made.append(engine(guide, objective, seed=5, batches=batches, **options))
    return made


def assert_same_run(eager, captured, *, steps=7, rate=0.02):
    for _ in range(2):
        expected, found = eager.run(steps, rate), captured.run(steps, rate)
        torch.testing.assert_close(
            found.bounds, expected.bounds, rtol=1e-9, atol=1e-9, equal_nan=True
        )
        assert found.average.keys() == expected.average.keys()
        for name, value in expected.average.items():
            torch.testing.assert_close(found.average[name], value, rtol=1e-9, atol=1e-9)
        for name, value in eager.parameters().items():
            torch.testing.assert_close(captured.parameters()[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", ["pathwise", "dreg"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("name", [name for name in guides.names() if name != "amortized"])
def test_replayed_steps_are_the_eager_steps(name, objective, estimator):
    if name == "delta" and (objective.multi_sample or estimator == "dreg"):
        return
    eager, captured = pair(name, two_scales_model(), objective, estimator=estimator)
    assert_same_run(eager, captured)
    assert captured.name == "captured", captured.note


@pytest.mark.parametrize("objective", OBJECTIVES, ids=repr)
@pytest.mark.parametrize("local", [False, True])
def test_replayed_steps_are_the_eager_steps_of_strata(local, objective):
    guide = guides.Amortized(local="mixture") if local else guides.Mixture(3)
    model = local_model() if local else two_scales_model()
    eager, captured = pair(guide, model, objective, estimator="stratified")
    assert_same_run(eager, captured)
    assert captured.name == "captured", captured.note


def test_strata_of_minibatches_come_in_mirror_images():
    guide = guides.Amortized(local="mixture")
    engines = pair(guide, local_model(), Elbo(2), batch_size=3, estimator="stratified")
    assert_same_run(*engines)
    assert engines[1].antithetic
    assert engines[1].name == "captured", engines[1].note


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("objective", [Elbo(2), Iwae(3)], ids=repr)
def test_minibatches_are_inputs(objective, batch_size):
    eager, captured = pair("amortized", local_model(n=9), objective, batch_size=batch_size)
    assert_same_run(eager, captured)
    assert captured.name == "captured", captured.note


def test_the_models_own_parameters_are_trained():
    def model(y):
        scale = pyro.param("scale", torch.tensor(1.5), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", len(y)):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    eager, captured = pair("mean_field", vi.Model(model, torch.tensor([0.2, 1.4, 3.0])), Elbo(2))
    before = captured.params["scale"].detach().clone()
    assert_same_run(eager, captured)
    assert captured.name == "captured", captured.note
    assert not torch.equal(captured.params["scale"], before)


def test_parameters_written_between_runs_are_where_the_next_one_starts():
    eager, captured = pair("full_rank", gaussian(3)[0], Elbo(2))
    for engine in (eager, captured):
        engine.run(3, 0.05)
        with torch.no_grad():
            for parameter in engine.parameters().values():
                parameter.mul_(0.5)
    assert_same_run(eager, captured)


def test_an_optimiser_of_the_users_takes_the_same_steps():
    optimizer = functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
    eager, captured = pair("full_rank", gaussian(3)[0], Elbo(2), optimizer=optimizer)
    assert_same_run(eager, captured)
    assert captured.name == "captured", captured.note


def test_a_step_that_is_not_finite_changes_nothing():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(z < -0.6, torch.full_like(z, math.nan), z))

    made = []
    for engine in (EagerEngine, CapturedEngine):
        guide = guides.make("mean_field", Density(vi.Model(model)), init_scale=1.0)
        made.append(engine(guide, Elbo(1), seed=0))
    assert_same_run(*made, steps=12)
    assert 0 < made[1].skipped < 24
    assert made[1].skipped == made[0].skipped


def test_an_interrupt_leaves_the_parameters_of_a_finished_step(monkeypatch):
    eager, captured = pair("mean_field", gaussian(2)[0], Elbo(2))
    captured.run(1, 0.05)
    eager.run(4, 0.05)
    program, calls = captured._program, []

    def interrupted(*inputs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return program(*inputs)

    monkeypatch.setattr(captured, "_program", interrupted)
    with pytest.raises(KeyboardInterrupt):
        captured.run(100, 0.05)
    for name, value in eager.parameters().items():
        torch.testing.assert_close(captured.parameters()[name], value, rtol=1e-9, atol=1e-9)


def test_a_model_that_cannot_be_recorded_steps_uncaptured_and_says_why():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0 if mu > 0 else 2.0), obs=y)

    eager, captured = pair("mean_field", vi.Model(model, torch.tensor(0.4)), Elbo(2))
    assert_same_run(eager, captured)
    assert captured.name == "eager"
    assert "Python number" in captured.note


def test_a_fit_is_captured_unless_told_otherwise():
    model = gaussian(2)[0]
    options = dict(guide="mean_field", method="stochastic", seed=0)
    captured = vi.fit(model, **options)
    eager = vi.fit(model, engine="eager", **options)
    assert (captured.engine, eager.engine) == ("captured", "eager")
    torch.testing.assert_close(captured.losses, eager.losses, rtol=1e-9, atol=1e-9)


def test_a_posterior_says_why_its_steps_were_not_captured(tmp_path):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0 if mu > 0 else 2.0), obs=y)

    posterior = vi.fit(vi.Model(model, torch.tensor(0.4)), guide="mean_field", steps=20, seed=0)
    assert posterior.engine == "eager"
    assert "not captured: what depends on a latent" in repr(posterior)
    assert "Python number" in posterior.to_arviz().attrs["engine"]
    saved = posterior.save(tmp_path / "fit.nc")
    assert vi.load(saved, posterior.model).record.note == posterior.record.note


def test_a_users_guide_needs_pyro():
    def guide():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(OptionError, match="engine='captured'"):
        vi.fit(gaussian(1)[0], guide=guide, engine="captured")
