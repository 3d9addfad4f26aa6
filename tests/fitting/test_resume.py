"""Going on from an earlier fit: in memory, from a file, and after an interrupt."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import gaussian, local_model, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import ModelError, OptionError
from pyro_vi_kit.objectives import Elbo, Iwae
from pyro_vi_kit.optimize.engines import EagerEngine

SMALL = guides.AffineCoupling(layers=2, hidden=(8,))


@pytest.fixture(scope="module")
def model():
    return two_scales_model()


@pytest.fixture(scope="module")
def first(model):
    return vi.fit(model, SMALL, steps=60, engine="eager", seed=0)


def parameters(posterior):
    return {k: v.clone() for k, v in posterior.approximation.guide.state_dict().items()}


def same(one, other):
    return all(torch.equal(one[name], value) for name, value in other.items())


# -- what is kept and what is added up --------------------------------------------------------


def test_it_goes_on_from_the_parameters_and_adds_up_what_was_spent(model, first):
    assert first.status.reason == "budget"
    assert len(first.losses) == 60
    before = parameters(first)
    second = vi.fit(model, resume=first, steps=50, engine="eager")
    assert same(before, parameters(first))
    assert second.guide == "affine_coupling"
    assert second.spec == SMALL
    assert second.method == "stochastic"
    assert len(second.losses) == 110
    assert np.array_equal(second.losses[:60], first.losses)
    assert second.evaluations == first.evaluations + 50 * 64
    assert second.seconds > first.seconds
    # On common noise it is no worse than what it started from.
    gains = _log_weights(second) - _log_weights(first)
    assert float(gains.mean()) > -3 * float(gains.std()) / math.sqrt(len(gains))


def _log_weights(posterior):
    torch.manual_seed(4)
    with torch.no_grad():
        return posterior.approximation.guide.log_weights(2000).joint()


def test_the_noise_is_not_that_of_the_earlier_fit(model, first):
    again = vi.fit(model, resume=first, steps=20, engine="eager")
    same_seed = vi.fit(model, resume=first, steps=20, engine="eager", seed=again.record.seed)
    assert again.record.seed != first.record.seed
    assert np.array_equal(again.losses, same_seed.losses)


def test_a_saved_fit_goes_on_as_the_one_in_memory(model, first, tmp_path):
    path = first.save(tmp_path / "first.nc", draws=10)
    from_file = vi.fit(model, resume=path, steps=30, engine="eager")
    in_memory = vi.fit(model, resume=first, steps=30, engine="eager")
    assert np.array_equal(from_file.losses, in_memory.losses)
    assert same(parameters(from_file), parameters(in_memory))
    # And what went on can be saved and can go on again.
    again = from_file.save(tmp_path / "second.nc", draws=10)
    assert len(vi.fit(model, resume=str(again), steps=10, engine="eager").losses) == 100


def test_what_is_given_counts_more_than_what_is_kept(model, first):
    other = vi.fit(
        model,
        "affine_coupling",
        Iwae(5),
        resume=first,
        steps=20,
        engine="eager",
        estimator="pathwise",
    )
    assert other.record.objective == Iwae(5)
    assert other.record.estimator == "pathwise"
    assert first.record.estimator == "dreg"
    third = vi.fit(model, resume=other, steps=20, engine="eager")
    assert third.record.objective == Iwae(5)
    assert third.record.estimator == "pathwise"


def test_a_gaussian_by_lbfgs_goes_on_too():
    model, mean, _ = gaussian(3)
    first = vi.fit(model, "full_rank", seed=0)
    second = vi.fit(model, resume=first)
    assert second.method == first.method
    assert second.status.converged
    assert second.evaluations > first.evaluations
    found = second.approximation.guide.families["latent"]().mean
    torch.testing.assert_close(found.detach(), mean, rtol=0, atol=1e-3)


# -- an interrupt -----------------------------------------------------------------------------


def test_an_interrupted_fit_lands_where_the_other_one_does(monkeypatch):
    """Evidence 0 and an exact family: both are within a tolerance or two of it."""
    model, mean, covariance = gaussian(2)
    options = {"method": "stochastic", "init": "origin", "engine": "eager", "seed": 0}
    through = vi.fit(model, "full_rank", **options)
    run, runs = EagerEngine.run, itertools.count()

    def interrupted(self, steps, rate):
        if next(runs) == 8:
            raise KeyboardInterrupt
        return run(self, steps, rate)

    monkeypatch.setattr(EagerEngine, "run", interrupted)
    broken = vi.fit(model, "full_rank", **options)
    assert broken.status.reason == "interrupted"
    assert 0 < len(broken.losses) < len(through.losses)
    assert broken.elbo < through.elbo - 0.1
    mended = vi.fit(model, resume=broken, engine="eager")
    assert mended.status.converged
    assert through.status.converged
    for posterior in (through, mended):
        assert -0.05 < posterior.elbo <= 3 * posterior.elbo_se + 1e-9
    # A KL of 0.05 moves a mean by at most 0.32 sd.
    found = mended.approximation.guide.families["latent"]().mean.detach()
    assert bool(((found - mean).abs() < 0.32 * covariance.diagonal().sqrt()).all())


# -- learned parameters, minibatches, guides of the user's ------------------------------------


def test_learned_parameters_and_minibatches_go_on():
    def learning(y):
        sd = pyro.param("sd", torch.tensor(0.2), constraint=dist.constraints.positive)
        with pyro.plate("datum", len(y)) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, sd), obs=y[index])

    model = vi.Model(learning, torch.tensor([0.5, -1.0, 2.0, 0.1]))
    first = vi.fit(model, "amortized", batch_size=2, steps=40, engine="eager", seed=0)
    second = vi.fit(model, resume=first, steps=40, engine="eager")
    assert first.record.batch_size == second.record.batch_size == 2
    start, middle, end = 0.2, float(first.parameters["sd"]), float(second.parameters["sd"])
    assert start < middle < end


def normal_guide(y):
    loc = pyro.param("loc", torch.tensor(0.0))
    pyro.sample("m", dist.Normal(loc, 0.5))


def location(posterior):
    return float(posterior.approximation.state["params"]["loc"].detach())


def one_mean(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def test_a_pyro_guide_goes_on(tmp_path):
    model = vi.Model(one_mean, torch.tensor([2.0, 3.0, 2.5]))
    first = vi.fit(model, normal_guide, Elbo(2), steps=20, seed=0)
    loc = location(first)
    second = vi.fit(model, resume=first, steps=20)
    assert location(first) == loc
    assert location(second) > loc > 0
    assert second.engine == "pyro"
    path = first.save(tmp_path / "pyro.nc", draws=5)
    from_file = vi.fit(model, normal_guide, resume=path, steps=20)
    assert np.array_equal(from_file.losses, second.losses)
    with pytest.raises(OptionError, match="guide of the earlier fit, normal_guide"):
        vi.fit(model, lambda y: None, resume=first)


# -- what does not fit ------------------------------------------------------------------------


def test_another_guide_is_refused(model, first):
    with pytest.raises(OptionError, match=r"AffineCoupling\(layers=2.*not with guide='full_rank'"):
        vi.fit(model, "full_rank", resume=first)
    with pytest.raises(OptionError, match="leave guide= out"):
        vi.fit(model, guides.AffineCoupling(layers=4), resume=first)
    assert vi.fit(model, SMALL, resume=first, steps=5, engine="eager").spec == SMALL


@pytest.mark.parametrize("other", [two_scales_model(dim=2), gaussian(3)[0], local_model()])
def test_another_model_is_refused(first, other, tmp_path):
    with pytest.raises(ModelError, match=r"latents beta\(3,\), .*it was fitted to"):
        vi.fit(other, resume=first)
    path = first.save(tmp_path / "first.nc", draws=5)
    with pytest.raises(ModelError, match=r"latents beta\(3,\)"):
        vi.fit(other, resume=path)


def test_other_learned_parameters_are_refused():
    def learning(y, name):
        sd = pyro.param(name, torch.tensor(1.0), constraint=dist.constraints.positive)
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, sd), obs=y)

    y = torch.tensor(0.5)
    first = vi.fit(vi.Model(learning, y, "a"), "mean_field", steps=5, engine="eager", seed=0)
    with pytest.raises(ModelError, match=r"learned parameters a\(\); this model has b\(\)"):
        vi.fit(vi.Model(learning, y, "b"), resume=first)


def test_a_start_does_not_go_with_it(model, first):
    with pytest.raises(OptionError, match="init= does not go with resume="):
        vi.fit(model, resume=first, init="origin")


@pytest.mark.parametrize("wrong", [3, {"a": 1}, torch.zeros(2)])
def test_what_is_no_posterior_is_refused(model, wrong):
    with pytest.raises(OptionError, match="resume= takes a posterior, or the path"):
        vi.fit(model, resume=wrong)
