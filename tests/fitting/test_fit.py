"""`fit` from end to end: closed forms, determinism, isolation, options, and what a Posterior gives."""

import functools
import itertools
import math
import pickle
import threading
import time

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import exact
from toys import (
    SEARCHED,
    gaussian,
    guide_for,
    is_local,
    load,
    local_model,
    local_normals,
    two_scales_model,
)

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import FileError, ModelError, OptionError, UnknownNameError
from pyro_vi_kit.core.runtime import one_thread
from pyro_vi_kit.fitting import schedule
from pyro_vi_kit.guides import REGISTRY
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Elbo, Iwae
from pyro_vi_kit.optimize.stochastic.stochastic import Schedule

LOCAL = [name for name in REGISTRY if is_local(name)]
SPREAD = [name for name in REGISTRY if name != "delta"]
each_guide = pytest.mark.parametrize("name", REGISTRY)


@pytest.fixture
def short_fits(monkeypatch):
    """Stochastic fits of 40 steps."""

    def short(**options):
        return Schedule(**{**options, "window": 20, "max_steps": 40, "replicates": 4})

    monkeypatch.setattr(schedule, "Schedule", short)


@pytest.fixture(scope="module")
def schools():
    model = load("eight_schools").MODEL
    return vi.fit(model, "full_rank", seed=0)


def model_for(name):
    return local_model(dim=2) if name in LOCAL else two_scales_model()


def closed_form(name):
    """A conjugate model of the zoo with its posterior mean, covariance and log evidence."""
    module = load(name)
    X, y = module.simulate()
    if name == "gaussian_regression_2d":
        X = torch.stack([torch.ones_like(X), X], 1)
    # The model sees float64 copies of the float32 data; so does the closed form.
    return module.MODEL, *exact(X, y, module.PRIOR_SD, module.NOISE_SD)


def family_of(posterior):
    with torch.no_grad():
        return posterior.approximation.guide.families["latent"]()


def flat(draws):
    return np.concatenate([value.reshape(len(value), -1) for value in draws.values()], 1)


# -- closed forms -----------------------------------------------------------------------------


CONJUGATE = ["gaussian_regression_2d", "linear_regression"]


@pytest.mark.parametrize("name", CONJUGATE)
@pytest.mark.parametrize("method", ["lbfgs", pytest.param("stochastic", marks=pytest.mark.slow)])
def test_full_rank_is_exact_on_a_gaussian_posterior(name, method):
    model, mean, covariance, evidence = closed_form(name)
    posterior = vi.fit(model, "full_rank", method=method, seed=0)
    assert posterior.status.converged
    assert posterior.method == method
    family = family_of(posterior)
    sd = covariance.diagonal().sqrt()
    assert float(((family.mean - mean).abs() / sd).max()) < 0.02
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance))
    spread = whiten @ family.covariance_matrix @ whiten.T
    assert float((torch.linalg.eigvalsh(spread) - 1).abs().max()) < 0.03
    # With q the posterior, log p - log q is the evidence at every draw: no noise worth naming.
    assert posterior.elbo == pytest.approx(evidence, abs=0.01)
    assert posterior.log_evidence[0] == pytest.approx(evidence, abs=0.01)
    assert posterior.verdict.level == "good"


@pytest.mark.parametrize("name", CONJUGATE)
def test_draws_have_the_moments_of_the_posterior(name):
    """200,000 draws: errors of a mean 0.0022 sd; of the whitened covariance, 8 dimensions,
    2 sqrt(8 / 200,000) = 0.013. Tolerances are three times that and more."""
    model, mean, covariance, _ = closed_form(name)
    draws = torch.from_numpy(flat(vi.fit(model, "full_rank", seed=0).sample(200_000, seed=1)))
    assert float(((draws.mean(0) - mean).abs() / covariance.diagonal().sqrt()).max()) < 0.01
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariance))
    spread = whiten @ torch.cov(draws.T) @ whiten.T
    assert float((torch.linalg.eigvalsh(spread) - 1).abs().max()) < 0.04


@pytest.mark.parametrize("name", CONJUGATE)
@pytest.mark.parametrize("method", ["lbfgs", pytest.param("stochastic", marks=pytest.mark.slow)])
def test_mean_field_has_the_textbooks_sds(name, method):
    """Reverse KL: the exact mean and 1 / sqrt(precision_ii), Bishop (2006), section 10.1.2."""
    model, mean, covariance, evidence = closed_form(name)
    posterior = vi.fit(model, "mean_field", method=method, seed=0)
    family = family_of(posterior)
    expected = torch.linalg.inv(covariance).diagonal().rsqrt()
    # Stochastic steps stop within a tolerance of 0.01 nats: an sd that is off by 4 % costs 0.0016.
    rtol = 0.02 if method == "lbfgs" else 0.04
    torch.testing.assert_close(family.stddev, expected, rtol=rtol, atol=0)
    assert float(((family.mean - mean).abs() / expected).max()) < 3 * rtol
    kl = expected.log().sum() - torch.linalg.cholesky(covariance).diagonal().log().sum()
    assert abs(posterior.elbo - (evidence + float(kl))) < 0.05 + 3 * posterior.elbo_se


def test_the_importance_weighted_bound_rises_with_particles_to_the_evidence():
    """The bound of one mean-field guide at K = 1, 5, 50: 2,000 replicates each, at 3 s.e."""
    model, *_, evidence = closed_form("gaussian_regression_2d")
    guide = vi.fit(model, "mean_field", seed=0).approximation.guide
    found = []
    for particles in (1, 5, 50):
        torch.manual_seed(0)
        with torch.no_grad():
            log_w = guide.log_weights(particles * 2000).shared.reshape(particles, 2000)
        bounds = Iwae(particles).bound(log_w)
        found.append((float(bounds.mean()), float(bounds.std()) / math.sqrt(2000)))
    for (low, low_se), (high, high_se) in itertools.pairwise(found):
        assert high > low + 3 * math.hypot(low_se, high_se)
    assert all(bound <= evidence + 3 * se for bound, se in found)


@pytest.mark.slow
def test_trained_with_more_particles_the_bound_rises_to_the_evidence():
    """Each fit's own estimate of its bound: 64 replicates, whose s.e. is below 0.05 for K >= 5."""
    model, *_, evidence = closed_form("gaussian_regression_2d")
    bounds = [vi.fit(model, "mean_field", Iwae(k), seed=0, tol=0.05).bound for k in (1, 5, 50)]
    assert bounds[0] + 0.1 < bounds[1] < bounds[2] + 0.05
    assert bounds[2] < evidence + 0.05


def test_delta_is_the_mode_of_the_constrained_density():
    def model():
        pyro.sample("g", dist.Gamma(2.0, 1.0))

    posterior = vi.fit(vi.Model(model), "delta", seed=0)
    assert posterior.sample(3, seed=0)["g"] == pytest.approx(1.0, rel=1e-5)
    assert posterior.elbo is posterior.khat is posterior.verdict is posterior.log_evidence is None
    assert "point estimate" in repr(posterior)
    with pytest.raises(OptionError, match="has no log weights: fit a guide with spread"):
        posterior.log_weights(3)


def test_a_local_posterior_is_exact_per_datum():
    """N(y / 2, 1 / 2) row by row: the amortized normal family holds it."""
    model = local_model(n=12, seed=1)
    posterior = vi.fit(model, "amortized", seed=0, dtype=torch.float64, budget=20)
    y = model.args[0][:, 0].numpy()
    draws = posterior.sample(4000, seed=0)["z"][..., 0]
    # 4,000 draws: s.e. 0.016 sd; the fit's tolerance of 0.01 nats is at most 0.14 sd, all on one.
    np.testing.assert_allclose(draws.mean(0), y / 2, atol=0.2 * math.sqrt(0.5))
    assert posterior.verdict.level == "good"


# -- determinism and isolation ----------------------------------------------------------------


def numbers(posterior):
    return [
        posterior.losses,
        *posterior.sample(5, seed=3).values(),
        *(posterior.log_weights(5, seed=3) for _ in range(not posterior.approximation.point)),
    ]


def same(first, second):
    return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", [n for n in REGISTRY if n not in SEARCHED])
@pytest.mark.parametrize("engine", ["eager", "pyro"])
def test_the_same_seed_gives_the_same_numbers(name, engine, short_fits):
    def run(seed):
        return vi.fit(model_for(name), name, method="stochastic", engine=engine, seed=seed)

    first = run(5)
    torch.rand(3)  # the user's own draws do not matter
    assert same(numbers(first), numbers(run(5)))
    if name != "delta":
        assert not same(numbers(first), numbers(run(6)))


@pytest.mark.parametrize("name", ["delta", "mean_field", "structured", "full_rank", *SEARCHED])
def test_the_same_seed_gives_the_same_numbers_with_lbfgs(name):
    fits = [vi.fit(two_scales_model(), name, method="lbfgs", seed=5) for _ in range(2)]
    assert same(*map(numbers, fits))


def test_without_a_seed_fits_differ_and_say_which_they_took(short_fits):
    fits = [vi.fit(two_scales_model(), "affine_coupling") for _ in range(2)]
    assert fits[0].record.seed != fits[1].record.seed
    again = vi.fit(two_scales_model(), "affine_coupling", seed=fits[0].record.seed)
    assert same(numbers(again), numbers(fits[0]))


JOBS = [
    ("mean_field", {}),
    ("full_rank", {}),
    ("affine_coupling", {"engine": "eager"}),
    ("full_rank", {"engine": "pyro", "method": "stochastic"}),
    ("amortized", {"batch_size": 3}),
]


def test_fits_in_threads_are_bit_for_bit_those_of_one_thread(short_fits):
    def run(job):
        name, options = job
        return numbers(vi.fit(model_for(name), name, seed=1, **options))

    expected = [run(job) for job in JOBS]
    found: list = [None] * len(JOBS)

    def work(i):
        found[i] = run(JOBS[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(JOBS))]
    threads_before = torch.get_num_threads()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))
    assert torch.get_num_threads() == threads_before


def test_the_number_of_threads_comes_back_to_each_thread_whoever_ends_last():
    """Torch keeps it per thread: the last to leave cannot restore it for the others."""
    inside, leave, found = threading.Event(), threading.Event(), {}

    def work():
        torch.set_num_threads(2)
        with one_thread(), one_thread():
            inside.set()
            leave.wait()
            found["inside"] = torch.get_num_threads()
        found["after"] = torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        other = threading.Thread(target=work)
        with one_thread():
            other.start()
            inside.wait()
        leave.set()
        other.join()
        late = threading.Thread(target=lambda: found.update(late=torch.get_num_threads()))
        late.start()
        late.join()
        assert found == {"inside": 1, "after": 2, "late": 2}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_two_fits_in_one_process_do_not_touch_each_other(short_fits):
    first = vi.fit(two_scales_model(), "affine_coupling", seed=0)
    before = numbers(first)
    vi.fit(two_scales_model(dim=5), "affine_coupling", seed=1)
    assert same(before, numbers(first))


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("outcome", ["done", "error"])
@pytest.mark.parametrize("engine", ["eager", "pyro"])
def test_the_users_state_is_as_it_was(outcome, engine, short_fits):
    calls = []

    def model(y):
        calls.append(1)
        if outcome == "error" and len(calls) > 30:
            raise BrokenError
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    pyro.param("mine", torch.tensor(2.0))
    torch.manual_seed(7)
    threads, validation = torch.get_num_threads(), pyro.settings.get("validate_distributions_pyro")
    torch.set_num_threads(2)
    rng, generator = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    try:
        # From the origin: at the optimum no step would be made.
        arguments = {"method": "stochastic", "engine": engine, "init": "origin", "seed": 0}
        if outcome == "error":
            with pytest.raises((BrokenError, ModelError)):
                vi.fit(vi.Model(model, torch.tensor(1.0)), "mean_field", **arguments)
        else:
            vi.fit(vi.Model(model, torch.tensor(1.0)), "mean_field", **arguments).verdict  # noqa: B018
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), rng)
    assert (np.random.get_state()[1] == generator).all()  # noqa: NPY002
    assert torch.get_default_dtype() is torch.float32
    assert pyro.settings.get("validate_distributions_pyro") == validation
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert pyro.param("mine").item() == 2.0
    assert not pyro.poutine.runtime._PYRO_STACK
    pyro.clear_param_store()


# -- options ----------------------------------------------------------------------------------


def recording():
    """A model that records its calls."""
    calls = []

    def model(y):
        calls.append(1)
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    return vi.Model(model, torch.tensor(1.0)), calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guide": "fullrank"}, "Did you mean 'full_rank'"),
        ({"guide": 3}, "guide= takes a name"),
        ({"guide": guides.FullRank}, "guide= takes a name"),
        ({"objective": "elb"}, "Did you mean 'elbo'"),
        ({"objective": 3}, "objective= takes a name"),
        ({"method": "lbfsg"}, "Did you mean 'lbfgs'"),
        ({"engine": "eagre"}, "Did you mean 'eager'"),
        ({"tol": 0}, "tol= must be a positive number"),
        ({"tol": math.nan}, "tol= must be a positive number"),
        ({"tol": True}, "tol= must be a positive number"),
        ({"tol": "0.1"}, "tol= must be a positive number"),
        ({"steps": 0}, "steps= must be an integer of at least 1"),
        ({"steps": 2.5}, "steps= must be an integer of at least 1"),
        ({"estimator": "dregs"}, "Did you mean 'dreg'"),
        ({"budget": -1}, "budget= must be a positive number"),
        ({"budget": "1"}, "budget= must be a positive number"),
        ({"seed": -1}, "seed= must be an integer of at least 0"),
        ({"seed": 1.0}, "seed= must be an integer of at least 0"),
        ({"seed": True}, "seed= must be an integer of at least 0"),
        ({"init": "mode"}, "init= must be 'auto', 'origin', 'median'"),
        ({"init": torch.zeros(2)}, "init= must be 'auto', 'origin', 'median'"),
        ({"optimizer": 0.01}, "optimizer= must make an optimiser"),
        ({"dtype": "float64"}, "dtype= must be"),
        ({"batch_size": 0}, "batch_size= must be an integer of at least 1"),
        ({"batch_size": 2.5}, "batch_size= must be an integer of at least 1"),
        ({"batch_size": True}, "batch_size= must be an integer of at least 1"),
    ],
)
def test_a_wrong_option_is_refused_before_the_model_runs(options, message):
    model, calls = recording()
    with pytest.raises(OptionError, match=message):
        vi.fit(model, **options)
    assert not calls


@pytest.mark.parametrize("wrong", [local_normals, None, "model.py"])
def test_what_is_no_model_is_refused(wrong):
    with pytest.raises(OptionError, match=r"model must be a vi\.Model.*vi\.Model\(fn"):
        vi.fit(wrong)


def test_an_unknown_name_is_also_a_key_error():
    with pytest.raises(UnknownNameError) as info:
        vi.fit(recording()[0], "fulrank")
    assert isinstance(info.value, KeyError)
    assert "mean_field" in str(info.value)


@pytest.mark.parametrize(
    "options",
    [
        {"guide": "affine_coupling"},
        {"guide": "full_rank", "objective": "iwae"},
        {"guide": "full_rank", "engine": "pyro"},
        {"guide": "full_rank", "optimizer": torch.optim.Adam},
    ],
)
def test_lbfgs_says_what_it_needs(options):
    with pytest.raises(OptionError, match=r"method='lbfgs' needs.*use method='stochastic'"):
        vi.fit(recording()[0], method="lbfgs", seed=0, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "stochastic"},
        {"objective": "iwae"},
        {"engine": "pyro"},
        {"estimator": "pathwise"},
        {"steps": 10},
        {"batch_size": 2},
        {"optimizer": torch.optim.Adam},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", SEARCHED)
def test_a_guide_that_is_searched_takes_no_steps(name, options):
    with pytest.raises(OptionError, match=rf"'{name}' is found by a search.*guide='full_rank'"):
        vi.fit(two_scales_model(), name, seed=0, **options)


def test_a_point_has_no_multi_sample_bound():
    with pytest.raises(OptionError, match=r"'delta' is a point.*use objective='elbo'"):
        vi.fit(recording()[0], "delta", "iwae", seed=0)


@pytest.mark.parametrize("name", [n for n in REGISTRY if n not in (*LOCAL, *SEARCHED)])
def test_a_model_whose_rows_depend_on_all_data_takes_no_minibatches(name):
    def centred(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y - y.mean())

    model = vi.Model(centred, *two_scales_model().args)
    with pytest.raises(
        ModelError, match=r"site 'y' does not follow the plate's indices.*obs=y\[i\]"
    ):
        vi.fit(model, name, batch_size=2, seed=0)


def test_a_minibatch_larger_than_the_data_is_refused():
    with pytest.raises(OptionError, match="between 1 and the 6 rows of plate 'datum', got 7"):
        vi.fit(local_model(), "amortized", batch_size=7, seed=0)


@pytest.mark.parametrize("name", ["full_rank", "delta", "affine_coupling"])
def test_a_start_in_site_values(name, short_fits):
    """Two modes, at -2 and 2: the fit stays at the one where it starts."""

    def model():
        s = pyro.sample("s", dist.LogNormal(0.0, 0.2))
        x = pyro.sample("x", dist.Normal(0.0, 10.0))
        pyro.sample("y", dist.Normal(x**2, 0.2 * s), obs=torch.tensor(4.0))

    for sign in (-1, 1):
        posterior = vi.fit(vi.Model(model), name, init={"x": 1.5 * sign, "s": 1.0}, seed=0)
        assert (sign * posterior.sample(50, seed=0)["x"] > 1.5).all()


def test_a_wrong_start_is_refused():
    with pytest.raises(ModelError, match="no latent site named 'z'"):
        vi.fit(two_scales_model(), init={"z": 1.0}, seed=0)
    with pytest.raises(ModelError, match="site 'sd' is not inside its support"):
        vi.fit(two_scales_model(), init={"sd": -1.0}, seed=0)
    with pytest.raises(OptionError, match="needs a guide with one block"):
        vi.fit(local_model(), "amortized", init={"z": torch.zeros(6, 1)}, seed=0)


def test_a_start_at_the_origin():
    model, mean, _ = gaussian(3)
    posterior = vi.fit(model, init="origin", seed=0)
    assert posterior.status.converged
    family = family_of(posterior)
    torch.testing.assert_close(family.mean, mean, rtol=0, atol=1e-3)


def test_an_optimiser_of_the_users(short_fits):
    rates = []

    class Recording(torch.optim.SGD):
        def step(self, *args):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args)

    optimizer = functools.partial(Recording, lr=1e-6)
    for engine in ("eager", "pyro"):
        posterior = vi.fit(gaussian(2)[0], "mean_field", optimizer=optimizer, engine=engine, seed=0)
        assert posterior.method == "stochastic"
        assert set(rates) == {1e-6}
        rates.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision(dtype, short_fits):
    for name in ("full_rank", "affine_coupling"):
        posterior = vi.fit(two_scales_model(dtype=torch.float32), name, dtype=dtype, seed=0)
        draws = posterior.sample(3, seed=0)
        assert {value.dtype for value in draws.values()} == {np.dtype(str(dtype)[6:])}
        assert posterior.log_weights(3, seed=0).dtype == np.float64
        assert math.isfinite(posterior.elbo)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("affine_coupling", {}),
        ("full_rank", {"objective": vi.objectives.Iwae(2000)}),
        ("full_rank", {"engine": "pyro", "method": "stochastic"}),
    ],
)
def test_a_budget_is_kept(name, options):
    started = time.monotonic()
    posterior = vi.fit(two_scales_model(), name, budget=0.5, seed=0, **options)
    seconds = time.monotonic() - started
    assert posterior.status.reason == "budget"
    assert "budget=" in posterior.status.advice
    # A prefit of some 0.2 s, one look at the bound and a busy machine come on top.
    assert seconds < 4
    assert posterior.seconds == pytest.approx(seconds, abs=0.5)
    assert math.isfinite(posterior.elbo)
    assert "has not converged (budget)" in "; ".join(posterior.verdict.reasons)


# -- what a Posterior gives -------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted():
    """A short fit with each guide."""
    made = {}

    def get(name):
        if name not in made:
            model = model_for(name)
            guide = guide_for(name, Density(two_scales_model()), Density(model)).name
            made[name] = vi.fit(model, guide, seed=0, budget=1.5, dtype=torch.float64)
        return made[name]

    return get


SHAPES = {"beta": (3,), "sd": (), "shift": (), "z": (6, 2), "y": (7,)}


@each_guide
def test_draws_have_the_shapes_of_their_sites(name, fitted):
    posterior = fitted(name)
    for draws in (1, 4):
        values = posterior.sample(draws, seed=0)
        assert {n: v.shape for n, v in values.items()} == {n: (draws, *SHAPES[n]) for n in values}
        assert set(values) == {site.name for site in posterior.density.latents}
    predicted = posterior.predict(draws=4, seed=0)
    assert predicted["y"].shape == (4, *(posterior.density.observed["y"].shape))
    assert set(predicted) == {"y"}


@pytest.mark.parametrize("name", SPREAD)
def test_log_weights_are_those_of_the_draws(name, fitted):
    posterior = fitted(name)
    log_w = posterior.log_weights(6, seed=2)
    assert log_w.shape == (6,)
    values = posterior.sample(6, seed=2)
    density, guide = posterior.density, posterior.approximation.guide
    for i in range(6):
        point = density.unconstrain({n: v[i] for n, v in values.items()})
        log_p = float(density.log_prob(point[None]).detach())
        log_q = 0.0
        sites = density.block.unpack(point[None])
        for block in guide.blocks:
            family = guide.families[block.name](None if block.plate is None else guide.rows(block))
            log_q += float(family.log_prob(block.pack(sites)).sum().detach())
        assert log_w[i] == pytest.approx(log_p - log_q, abs=1e-6)


@pytest.mark.parametrize("name", SPREAD)
def test_resampled_draws_are_draws_of_the_pool(name, fitted):
    posterior = fitted(name)
    values = posterior.resample(50, seed=4)
    pool = flat(posterior.sample(4000, seed=4))
    rows = {tuple(row) for row in pool}
    assert all(tuple(row) in rows for row in flat(values))
    again = posterior.resample(50, seed=4)
    assert all(np.array_equal(values[n], again[n]) for n in values)


def test_resampling_corrects_the_sds_of_mean_field():
    """Mean-field sds are 0.36 of the exact ones here, and k-hat is near 0.6: the tails of 40,000
    draws are thin, so resampling corrects a good part of the error and not all of it."""
    model, _, covariance, _ = closed_form("gaussian_regression_2d")
    posterior = vi.fit(model, "mean_field", seed=0)
    exact_sd = covariance.diagonal().sqrt().numpy()
    plain = flat(posterior.sample(4000, seed=0)).std(0) / exact_sd
    better = flat(posterior.resample(4000, seed=0)).std(0) / exact_sd
    assert (abs(better - 1) < 0.7 * abs(plain - 1)).all()


@pytest.mark.parametrize("draws", [0, -1, 2.5, True, "3"])
def test_a_number_of_draws_is_a_positive_integer(draws, schools):
    for method in (schools.sample, schools.resample, schools.log_weights, schools.to_arviz):
        with pytest.raises(OptionError, match="draws= must be an integer of at least 1"):
            method(draws)
    with pytest.raises(OptionError, match="draws= must be an integer of at least 1"):
        schools.predict(draws=draws)


def test_deterministic_sites_come_with_the_draws(schools):
    values = schools.sample(10, seed=0)
    expected = values["mu"][:, None] + values["tau"][:, None] * values["theta_trans"]
    np.testing.assert_allclose(values["theta"], expected, rtol=1e-12)
    assert (values["tau"] > 0).all()


def test_predictions_at_new_inputs():
    """y = N(slope x, 1) with the slope's exact posterior: moments of 20,000 draws, at 4 s.e."""
    module = load("gaussian_regression")
    x, y = module.simulate()
    mean, covariance, _ = exact(x, y, module.PRIOR_SD, module.NOISE_SD)
    posterior = vi.fit(module.MODEL, seed=0)
    new = torch.tensor([-3.0, 0.0, 1.0, 10.0, 2.0])
    predicted = posterior.predict(new, None, draws=20_000, seed=0)["y"]
    assert predicted.shape == (20_000, 5)
    sd = (1 + new.double() ** 2 * covariance[0, 0]).sqrt().numpy()
    error = (predicted.mean(0) - (new.double() * mean).numpy()) / sd
    assert (abs(error) < 4 / math.sqrt(20_000)).all()
    assert (abs(predicted.std(0) / sd - 1) < 4 / math.sqrt(2 * 20_000)).all()
    assert np.array_equal(predicted, posterior.predict(new, None, draws=20_000, seed=0)["y"])


def test_predictions_keep_deterministic_sites_and_refuse_other_lengths(schools):
    predicted = schools.predict(draws=4, seed=0)
    assert {n: v.shape for n, v in predicted.items()} == {"theta": (4, 8), "y": (4, 8)}
    with pytest.raises(ModelError, match=r"cannot predict with these arguments|raised"):
        schools.predict(torch.ones(5), None, draws=4)


def test_the_summary_names_what_it_lists(schools):
    frame = schools.summary(prob=0.8)
    assert list(frame.columns) == ["mean", "sd", "10%", "90%", "mcse_mean", "verdict"]
    assert {"mu", "tau", "theta[Choate]", "theta_trans[St. Paul's]"} <= set(frame.index)
    assert len(frame) == 18
    assert (frame["10%"] < frame["mean"]).all()
    order = ("good", "resample", "reject")
    for site, level in schools.verdict.sites.items():
        rows = frame["verdict"][[label.partition("[")[0] == site for label in frame.index]]
        assert max(rows, key=order.index) == level
    assert frame.attrs["verdict"] == str(schools.verdict)
    draws = schools.sample(4000, seed=0)["mu"]
    # 4,000 draws on each side.
    assert frame.loc["mu", "mean"] == pytest.approx(draws.mean(), abs=0.1 * draws.std())
    assert frame.loc["mu", "mcse_mean"] == pytest.approx(draws.std() / math.sqrt(4000), rel=0.1)


@each_guide
def test_every_guide_has_a_summary_and_words(name, fitted):
    posterior = fitted(name)
    assert posterior.summary()[["mean", "sd"]].notna().all().all()
    assert posterior.status.reason in repr(posterior)
    assert posterior.evaluations > 0
    assert len(posterior.losses) > 0
    assert posterior.guide == name


def test_the_elbo_is_that_of_one_draw_whatever_was_trained():
    posterior = vi.fit(two_scales_model(), "mean_field", "iwae", seed=0, budget=1)
    log_w = posterior.log_weights(20_000, seed=1)
    se = math.hypot(posterior.elbo_se, log_w.std() / math.sqrt(20_000))
    assert abs(posterior.elbo - log_w.mean()) < 4 * se
    assert posterior.bound > posterior.elbo
    plain = vi.fit(two_scales_model(), "mean_field", seed=0)
    assert plain.bound == plain.elbo


# -- ArviZ ------------------------------------------------------------------------------------


GROUPS = {
    "posterior",
    "unconstrained_posterior",
    "posterior_predictive",
    "log_likelihood",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
    "sample_stats",
    "loss_trace",
}


def test_the_groups_and_dims_of_an_arviz_object(schools):
    data = schools.to_arviz(200, seed=0)
    assert set(data.groups()) == GROUPS
    posterior = data.posterior
    assert posterior["theta"].dims == ("chain", "draw", "school")
    assert posterior["mu"].dims == ("chain", "draw")
    assert posterior["theta"].shape == (1, 200, 8)
    assert list(posterior["school"].values[:2]) == ["Choate", "Deerfield"]
    assert data.log_likelihood["y"].dims == ("chain", "draw", "school")
    assert data.posterior_predictive["y"].dims == ("chain", "draw", "school")
    assert data.observed_data["y"].dims == ("school",)
    assert data.constant_data["sigma"].dims == ("school",)
    np.testing.assert_allclose(posterior["theta"][0], schools.sample(200, seed=0)["theta"])
    stats = data.sample_stats
    np.testing.assert_allclose(stats["log_w"][0], schools.log_weights(200, seed=0))
    np.testing.assert_allclose(stats["log_w"], stats["log_p"] - stats["log_q"])
    assert data.attrs["verdict"] == schools.verdict.level
    assert data.attrs["guide"] == "full_rank"


@each_guide
def test_every_guide_exports(name, fitted):
    data = fitted(name).to_arviz(10, seed=0)
    assert {"posterior", "posterior_predictive", "log_likelihood", "loss_trace"} <= set(
        data.groups()
    )
    assert ("sample_stats" in data.groups()) == (name != "delta")
    if name in LOCAL:
        assert data.posterior["z"].dims[:3] == ("chain", "draw", "datum")


# ArviZ 0.23 uses names that Matplotlib 3.11 deprecates, and computes R-hat of one chain.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*shape.*:UserWarning")
@pytest.mark.slow
def test_arviz_works_on_it(schools):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    data = schools.to_arviz(1000, seed=0)
    table = az.summary(data, var_names=["mu", "tau"])
    assert table.loc["mu", "mean"] == pytest.approx(
        schools.sample(1000, seed=0)["mu"].mean(), abs=0.01
    )
    loo = az.loo(data)
    assert math.isfinite(loo.elpd_loo)
    assert len(az.loo(data, pointwise=True).loo_i) == 8
    az.plot_posterior(data, var_names=["mu", "tau"])
    az.plot_ppc(data)
    matplotlib.pyplot.close("all")


# -- files ------------------------------------------------------------------------------------


@pytest.fixture
def no_pickle(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a file was unpickled")

    # torch imports some of its parts on first use, and they derive from what is taken away here.
    torch.func.hessian(lambda x: (x + x.square()).sum())(torch.ones(2))
    for owner, attribute in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(owner, attribute, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch.jit, "load", refuse)


def test_a_file_holds_fewer_draws_where_each_makes_many_numbers(tmp_path):
    def wide(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    posterior = vi.fit(vi.Model(wide, torch.zeros(60_000)), guide="mean_field", seed=0)
    tree = az.from_netcdf(posterior.save(tmp_path / "wide.nc"))
    assert tree["posterior"].sizes["draw"] == 100 == tree["prior"].sizes["draw"]
    assert az.from_netcdf(posterior.save(tmp_path / "few.nc", 3))["posterior"].sizes["draw"] == 3


@each_guide
def test_a_file_gives_back_the_same_posterior(name, fitted, tmp_path, no_pickle):
    posterior = fitted(name)
    path = posterior.save(tmp_path / "fit.nc", draws=20)
    loaded = vi.load(path, posterior.model)
    assert same(numbers(posterior), numbers(loaded))
    assert same(
        posterior.predict(draws=3, seed=0).values(), loaded.predict(draws=3, seed=0).values()
    )
    assert loaded.status == posterior.status
    assert loaded.elbo == posterior.elbo
    assert loaded.bound == posterior.bound
    assert loaded.guide == name
    assert loaded.spec == posterior.spec
    for field in ("method", "engine", "evaluations", "seconds", "seed", "skipped", "objective"):
        assert getattr(loaded.record, field) == getattr(posterior.record, field)
    assert repr(loaded) == repr(posterior)
    assert "posterior" in az.from_netcdf(path).groups()
    assert "vi_guide" in az.from_netcdf(path).groups()


def test_a_configured_guide_and_objective_come_back(tmp_path, short_fits):
    spec = guides.AffineCoupling(layers=2, hidden=(4, 3), permutations="reverse")
    posterior = vi.fit(two_scales_model(), spec, Iwae(particles=7), seed=0)
    loaded = vi.load(posterior.save(tmp_path / "fit.nc", draws=5), posterior.model)
    assert loaded.spec == spec
    assert loaded.record.objective == Iwae(particles=7)
    assert same(numbers(posterior), numbers(loaded))


def test_learned_parameters_come_back(tmp_path, short_fits):
    def model(y):
        sd = pyro.param("sd", torch.tensor(0.7), constraint=dist.constraints.positive)
        with pyro.plate("datum", len(y)) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, sd), obs=y[index])

    posterior = vi.fit(vi.Model(model, torch.tensor([0.3, -1.0, 2.0])), "amortized", seed=0)
    assert posterior.parameters["sd"] != pytest.approx(0.7, abs=1e-4)
    loaded = vi.load(posterior.save(tmp_path / "fit.nc", draws=5), posterior.model)
    assert loaded.parameters["sd"] == posterior.parameters["sd"]
    assert same(numbers(posterior), numbers(loaded))


def test_an_encoder_of_the_users_is_asked_for(tmp_path, short_fits):
    torch.manual_seed(0)
    spec = guides.Amortized(encoder=torch.nn.Linear(2, 4))
    posterior = vi.fit(local_model(dim=2, dtype=torch.float32), spec, seed=0)
    path = posterior.save(tmp_path / "fit.nc", draws=5)
    with pytest.raises(OptionError, match=r"vi\.load\(path, model, guide=\.\.\.\).*'amortized'"):
        vi.load(path, posterior.model)
    fresh = guides.Amortized(encoder=torch.nn.Linear(2, 4))
    loaded = vi.load(path, posterior.model, guide=fresh)
    assert same(numbers(posterior), numbers(loaded))


def users_guide(y):
    loc = pyro.param("loc", torch.tensor(0.0))
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    pyro.sample("m", dist.Normal(loc, scale))


def others_guide(y):
    pyro.sample("m", dist.Normal(pyro.param("other", torch.tensor(0.0)), 1.0))


def test_a_pyro_guide_of_the_users_comes_back(tmp_path, short_fits, no_pickle):
    model, _ = recording()
    posterior = vi.fit(model, users_guide, Elbo(1), seed=0)
    path = posterior.save(tmp_path / "fit.nc", draws=5)
    loaded = vi.load(path, model, guide=users_guide)
    assert same(numbers(posterior), numbers(loaded))
    with pytest.raises(OptionError, match="pass it, guide=my_guide"):
        vi.load(path, model)
    with pytest.raises(ModelError, match="holds parameters"):
        vi.load(path, model, guide=others_guide)


def test_a_file_of_another_model_is_refused(tmp_path, schools):
    path = schools.save(tmp_path / "fit.nc", draws=5)
    with pytest.raises(ModelError, match=r"latents mu\(\), tau\(\), theta_trans\(8,\)"):
        vi.load(path, two_scales_model())
    with pytest.raises(OptionError, match=r"model must be a vi\.Model, got function"):
        vi.load(path, local_normals)


def test_a_file_that_is_no_posterior_is_refused(tmp_path):
    model, _ = recording()
    text = tmp_path / "text.nc"
    text.write_text("not a netCDF file")
    with pytest.raises(FileError):
        vi.load(text, model)
    with pytest.raises(FileError):
        vi.load(tmp_path / "missing.nc", model)
    with pytest.raises(FileError):
        vi.load(tmp_path, model)
    other = tmp_path / "other.nc"
    az.from_dict(posterior={"m": np.zeros((1, 3))}).to_netcdf(str(other))
    with pytest.raises(FileError, match=r"was not written by Posterior\.save"):
        vi.load(other, model)


def test_a_path_that_cannot_be_written_is_refused(tmp_path, schools):
    with pytest.raises(FileError):
        schools.save(tmp_path / "missing" / "fit.nc", draws=5)


def test_only_an_amortized_guide_infers(schools):
    with pytest.raises(OptionError, match="'full_rank' has no encoder to infer new data with"):
        schools.infer(torch.ones(8), torch.ones(8))


def many_locals(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    with pyro.plate("row", len(y)):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_a_dense_guide_of_thousands_of_dimensions_is_refused_before_its_memory_is_taken():
    model = vi.Model(many_locals, torch.zeros(4001))
    for guide in ("full_rank", "affine_coupling"):
        with pytest.raises(OptionError, match=r"4,002 unconstrained dimensions.*mean_field"):
            vi.fit(model, guide)


def test_many_dimensions_are_left_to_stochastic_steps(short_fits):
    model = vi.Model(many_locals, torch.ones(1100))
    posterior = vi.fit(model, "mean_field", init={"mu": 1.0, "z": torch.ones(1100)}, seed=0)
    assert posterior.method == "stochastic"
    # The start is the posterior mean of every site; a few hundred steps stay near it.
    assert abs(posterior.sample(2000, seed=0)["z"].mean() - 1.0) < 0.1
    with pytest.raises(OptionError, match="at most 1,000 dimensions"):
        vi.fit(model, "mean_field", method="lbfgs")
