"""NUTS through nutpie and through Pyro: right draws, the same groups, and honest reports."""

import _thread
import json
import sys
import threading
import time

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from conjugate import exact

import models.eight_schools
import models.gaussian_regression_2d
import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import (
    MissingDependencyError,
    ModelError,
    OptionError,
    UnknownNameError,
)
from pyro_vi_kit.core.export import datasets
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.validation.nuts import SAMPLERS, SamplerWarning, diagnose, nuts
from pyro_vi_kit.validation.nuts.target import Target

# Short runs, as most here are, are rightly complained about.
pytestmark = pytest.mark.filterwarnings("ignore::pyro_vi_kit.validation.nuts.SamplerWarning")

EIGHT = models.eight_schools.MODEL
SHORT = dict(chains=2, draws=10, tune=10, progress=False)


@pytest.fixture(params=sorted(SAMPLERS))
def sampler(request):
    return request.param


def one_mean(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


ONE_MEAN = vi.Model(one_mean, torch.tensor([0.5, -0.2, 1.4]))


def test_gaussian_posterior_is_exact(sampler):
    """Means and standard deviations lie within 4 Monte Carlo standard errors of the closed form."""
    module = models.gaussian_regression_2d
    x, y = module.MODEL.args
    X = torch.stack([torch.ones_like(x), x], -1)
    mean, covariance, _ = exact(X, y, module.PRIOR_SD, module.NOISE_SD)
    tree = nuts(module.MODEL, sampler=sampler, chains=2, draws=200, tune=100, progress=False)
    for i, name in enumerate(["intercept", "slope"]):
        draws = tree.posterior[[name]]
        sd = float(covariance[i, i].sqrt())
        # Of n independent normal draws: sd / sqrt(n) for the mean, sd / sqrt(2 n) for the sd.
        for own, ess, truth, factor in [
            (draws.mean(), az.ess(draws, method="mean"), float(mean[i]), 1.0),
            (draws.std(), az.ess(draws, method="sd"), sd, 2.0),
        ]:
            error = sd / np.sqrt(factor * float(ess[name]))
            assert abs(float(own[name]) - truth) < 4 * error


@pytest.mark.slow
def test_eight_schools_agrees_with_the_reference(posteriordb):
    path = posteriordb("eight_schools-eight_schools_noncentered") / "reference.json"
    reference = json.loads(path.read_text(encoding="utf-8"))
    tree = nuts(EIGHT, progress=False)
    report = diagnose(tree)
    assert report.max_rhat < 1.01
    assert report.converged
    assert report.divergences == int(tree.sample_stats["diverging"].sum())
    errors = az.mcse(tree.posterior)
    rows = zip(reference["parameters"], reference["mean"], reference["mcse_mean"], strict=True)
    for label, mean, mcse in rows:
        name, _, position = label.rstrip("]").partition("[")
        draws, error = tree.posterior[name], errors[name]
        if position:
            draws, error = draws[..., int(position) - 1], error[int(position) - 1]
        tolerance = 4 * np.hypot(mcse, float(error))
        assert abs(float(draws.mean()) - mean) < tolerance, label


def test_same_groups_from_both():
    trees = [nuts(EIGHT, sampler=name, **SHORT) for name in sorted(SAMPLERS)]
    assert (
        set(trees[0].groups())
        == set(trees[1].groups())
        == {
            "posterior",
            "unconstrained_posterior",
            "posterior_predictive",
            "log_likelihood",
            "prior",
            "prior_predictive",
            "observed_data",
            "constant_data",
            "sample_stats",
        }
    )
    for name in set(trees[0].groups()) - {"sample_stats"}:
        for variable, array in trees[0][name].data_vars.items():
            other = trees[1][name][variable]
            assert array.dims == other.dims
            assert array.shape == other.shape
            assert array.dtype == other.dtype
    for tree in trees:
        assert tree.posterior["theta"].dims == ("chain", "draw", "school")
        assert tree.posterior["theta"].shape == (2, 10, 8)
        assert list(tree.posterior["school"].values) == list(models.eight_schools.SCHOOLS)
        assert {"lp", "diverging", "tree_depth", "n_steps", "step_size"} <= set(tree.sample_stats)
        assert all(array.shape == (2, 10) for array in tree.sample_stats.values())
        assert {"r_hat", "ess_bulk"} <= set(az.summary(tree).columns)
    assert "energy" in trees[0].sample_stats


def test_lp_is_the_log_density(sampler):
    tree = nuts(EIGHT, sampler=sampler, **SHORT)
    density = Density(EIGHT)
    z = {
        name: torch.tensor(array.to_numpy()).flatten(0, 1)
        for name, array in tree.unconstrained_posterior.data_vars.items()
    }
    expected = density.terms(z).total().detach().numpy().reshape(2, 10)
    np.testing.assert_allclose(tree.sample_stats["lp"], expected, rtol=1e-9)


def test_same_seed_same_draws(sampler):
    runs = [
        nuts(ONE_MEAN, sampler=sampler, seed=seed, cores=cores, **SHORT).posterior["mu"].to_numpy()
        for seed, cores in [(3, 1), (3, 2), (4, 1)]
    ]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    assert not np.array_equal(runs[0][0], runs[0][1])


def test_how_it_was_done_is_on_record(sampler):
    tree = nuts(ONE_MEAN, sampler=sampler, seed=7, **SHORT)
    attrs, report = tree.attrs, diagnose(tree)
    assert attrs["sampler"] == sampler
    assert (attrs["seed"], attrs["draws"], attrs["tune"], attrs["chains"]) == (7, 10, 10, 2)
    assert attrs["seconds"] > 0
    assert attrs["evaluations"] >= 2 * (10 + 10)
    assert attrs["max_rhat"] == report.max_rhat
    assert attrs["min_ess_bulk"] == report.min_ess_bulk
    assert attrs["min_ess_tail"] == report.min_ess_tail
    assert attrs["divergences"] == report.divergences
    assert attrs["converged"] == 0
    assert attrs["warnings"] == "; ".join(report.problems)


def test_each_problem_is_a_warning():
    with pytest.warns(SamplerWarning, match="effective sample size for means"):
        nuts(ONE_MEAN, **SHORT)


def test_leaves_the_users_state_alone(sampler):
    pyro.set_rng_seed(11)
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    with pyro.get_param_store().scope(), torch.no_grad():
        pyro.param("mine", torch.tensor(1.0))
        nuts(ONE_MEAN, sampler=sampler, **SHORT)
        assert list(pyro.get_param_store().keys()) == ["mine"]
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == dtype


def test_quiet(sampler, capfd):
    nuts(ONE_MEAN, sampler=sampler, **{**SHORT, "progress": None})
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_stderr(sampler, capfd, monkeypatch):
    monkeypatch.setattr("pyro_vi_kit.core.progress._DELAY", 0.0)
    nuts(EIGHT, sampler=sampler, **{**SHORT, "draws": 60, "progress": True})
    out, err = capfd.readouterr()
    assert out == ""
    assert "NUTS, 2 chains" in err
    assert "<div" not in err


def test_flat_prior():
    """An improper prior on a mean: the posterior is N(mean of y, 1 / n)."""

    def flat(y):
        support = dist.constraints.real
        mu = pyro.sample("mu", dist.ImproperUniform(support, (), ()))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0, 4.0, 5.0])
    for sampler in SAMPLERS:
        tree = nuts(
            vi.Model(flat, y), sampler=sampler, chains=2, draws=150, tune=100, progress=False
        )
        draws = tree.posterior[["mu"]]
        assert abs(float(draws["mu"].mean()) - 3.0) < 4 * float(az.mcse(draws)["mu"])
        assert abs(float(draws["mu"].std()) / 0.5 - 1.0) < 4 / np.sqrt(
            2 * float(az.ess(draws, method="sd")["mu"])
        )
        assert "prior" not in tree.groups()


def test_learned_parameters_are_frozen(sampler):
    def learns(y):
        loc = pyro.param("loc", torch.tensor(2.0))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(loc, scale))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def joint(mu, loc, scale):
        """The log of N(mu | loc, scale) N(0 | mu, 1)."""
        return -0.5 * (((mu - loc) / scale) ** 2 + mu**2) - np.log(scale) - np.log(2 * np.pi)

    model = vi.Model(learns, torch.tensor(0.0))
    tree = nuts(model, sampler=sampler, **SHORT)
    assert tree.attrs["frozen_parameters"] == "loc, scale"
    own = joint(tree.posterior["mu"].to_numpy(), 2.0, 0.5)
    np.testing.assert_allclose(tree.sample_stats["lp"], own, rtol=1e-6)
    moved = nuts(model, sampler=sampler, params={"loc": torch.tensor(-2.0)}, **SHORT)
    other = joint(moved.posterior["mu"].to_numpy(), -2.0, 0.5)
    np.testing.assert_allclose(moved.sample_stats["lp"], other, rtol=1e-6)
    with pytest.raises(OptionError, match=r"'nope'.*loc, scale"):
        nuts(model, params={"nope": torch.tensor(1.0)}, **SHORT)


def test_divergences_are_reported(sampler):
    """A density that ends at a wall, which trajectories hit."""

    def wall(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(mu > 0.5, -torch.inf, 0.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.warns(SamplerWarning, match="transitions diverged.*target_accept"):
        tree = nuts(
            vi.Model(wall, torch.tensor(0.0)),
            sampler=sampler, chains=2, draws=50, tune=30, progress=False,
        )  # fmt: skip
    report = diagnose(tree)
    assert report.divergences == tree.attrs["divergences"] > 1
    assert not report.converged
    assert float(tree.posterior["mu"].max()) <= 0.5


def test_undefined_densities_are_divergences_and_errors_are_errors(sampler):
    def sometimes(y, error):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        if mu > 1.0 and not torch._C._functorch.is_batchedtensor(mu):
            raise error
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    class OwnError(Exception):
        pass

    singular = vi.Model(sometimes, torch.tensor(0.0), torch.linalg.LinAlgError("singular"))
    target = Target(Density(singular))
    assert np.isnan(target(np.array([1.5]))[0])
    assert target.error is None

    broken = vi.Model(sometimes, torch.tensor(0.0), OwnError("bang"))
    with pytest.raises(ModelError, match="the model raised OwnError while it was sampled: bang"):
        nuts(broken, sampler=sampler, chains=2, draws=500, tune=50, progress=False)


def test_no_starting_point(sampler):
    def impossible(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.where(mu.abs() < 100.0, -torch.inf, 0.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ModelError, match="no starting point"):
        nuts(vi.Model(impossible, torch.tensor(0.0)), sampler=sampler, **SHORT)


def test_interrupt(sampler):
    """Ctrl-C ends sampling within a second, and nothing is left running."""
    nuts(ONE_MEAN, sampler=sampler, **SHORT)  # what stays for good, as tqdm's monitor, is there
    timer = threading.Timer(1.5, _thread.interrupt_main)
    running = set(threading.enumerate())
    timer.start()
    start = time.perf_counter()
    try:
        tree = nuts(EIGHT, sampler=sampler, draws=5000, progress=False)
    except KeyboardInterrupt:
        pass  # there were no draws yet
    else:
        assert tree.attrs["interrupted"] == 1
    assert time.perf_counter() - start < 1.5 + 5.0
    timer.join()
    assert set(threading.enumerate()) <= running
    nuts(ONE_MEAN, sampler=sampler, **SHORT)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(chains=0), OptionError, "chains= must be an integer of at least 1, got 0"),
        (dict(draws=3), OptionError, "draws= must .* at least 4, got 3"),
        (dict(draws=1.5), OptionError, "draws= .* got 1.5"),
        (dict(tune=0), OptionError, "tune= .* at least 10, got 0"),
        (dict(cores=-1), OptionError, "cores= .* got -1"),
        (dict(seed=-1), OptionError, "seed= .* got -1"),
        (dict(target_accept=1.0), OptionError, "target_accept= must lie between 0 and 1"),
        (dict(sampler="nutpi"), UnknownNameError, "Did you mean 'nutpie'"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        nuts(ONE_MEAN, **options)


def test_without_nutpie(monkeypatch):
    monkeypatch.setitem(sys.modules, "nutpie", None)
    with pytest.raises(MissingDependencyError, match=r"pyro_vi_kit\[nuts\]"):
        nuts(ONE_MEAN, sampler="nutpie", **SHORT)
    with pytest.warns(SamplerWarning, match="nutpie is not installed"):
        tree = nuts(ONE_MEAN, **SHORT)
    assert tree.attrs["sampler"] == "pyro"


def test_starts_are_apart_and_finite():
    target = Target(Density(EIGHT))
    starts = np.stack([target.start(seed) for seed in range(4)])
    assert starts.shape == (4, target.density.dim)
    assert np.abs(starts).max() <= 2.0
    assert starts.std(0).min() > 0.0
    assert np.array_equal(starts[1], target.start(1))


# -- diagnose, on draws of any origin ---------------------------------------------------------


def brought(values, **stats):
    """An ArviZ object of a user's own."""
    return az.from_dict(posterior=values, sample_stats=stats or None)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_good_draws_converge():
    tree = brought({"x": noise(4, 500, 3)}, diverging=np.zeros((4, 500), bool))
    report = diagnose(tree)
    assert report.converged
    assert report.problems == ()
    assert report.divergences == 0
    np.testing.assert_allclose(report.max_rhat, az.rhat(tree)["x"].max())
    np.testing.assert_allclose(report.min_ess_bulk, az.ess(tree)["x"].min())
    np.testing.assert_allclose(report.min_ess_tail, az.ess(tree, method="tail")["x"].min())


def test_chains_apart():
    report = diagnose(brought({"x": noise(4, 500) + np.arange(4)[:, None]}))
    assert not report.converged
    assert report.divergences is None
    assert "R-hat is" in report.problems[0]
    assert " at x," in report.problems[0]


def test_few_divergences_are_named_but_tolerated():
    diverging = np.zeros((4, 500), bool)
    diverging[0, :2] = True
    tolerated = diagnose(brought({"x": noise(4, 500)}, diverging=diverging))
    assert tolerated.converged
    assert "2 of 2000 transitions diverged" in tolerated.problems[0]
    diverging[1, 0] = True
    assert not diagnose(brought({"x": noise(4, 500)}, diverging=diverging)).converged


def test_constants_do_not_count():
    """The ones and zeros of a Cholesky factor, also where rounding moves them."""
    values = noise(4, 500, 3)
    values[..., 1] = 1.0 + 1e-16 * noise(4, 500)
    values[..., 2] = 0.0
    assert diagnose(brought({"x": values})).converged


def test_stuck_chains_do_not_converge():
    report = diagnose(brought({"x": np.ones((4, 500))}))
    assert not report.converged
    assert "stuck" in report.problems[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_draws_that_are_not_finite(bad):
    values = noise(4, 500, 2)
    values[0, 3, 1] = bad
    report = diagnose(brought({"x": values}))
    assert not report.converged
    assert report.problems[0].startswith("x[1] is not finite")
    assert report.max_rhat < 1.02


def test_one_chain():
    report = diagnose(brought({"x": noise(1, 500)}))
    assert np.isnan(report.max_rhat)
    assert not report.converged
    assert "chains=4" in report.problems[0]


def test_nothing_to_diagnose():
    with pytest.raises(ModelError, match="no posterior"):
        diagnose(az.from_dict(prior={"x": noise(4, 500)}))
    with pytest.raises(ModelError, match="3 draws are too few"):
        diagnose(brought({"x": noise(2, 3)}))


def test_diagnoses_a_datatree():
    tree = brought({"x": noise(4, 500)})
    nodes = {f"/{name}": dataset for name, dataset in datasets(tree).items()}
    assert diagnose(xr.DataTree.from_dict(nodes)) == diagnose(tree)
