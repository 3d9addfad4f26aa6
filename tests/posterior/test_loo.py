"""Leave-one-out from a fit, against leaving out in closed form and against ArviZ on exact draws."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import exact

import pyro_vi_kit as vi
from models import eight_schools_centered, hmm, missing_data
from pyro_vi_kit.core.errors import ModelError, OptionError, UnknownNameError
from pyro_vi_kit.core.export import arviz_major, import_arviz
from pyro_vi_kit.core.psis import psis
from pyro_vi_kit.posterior.diagnostics.loo import LooWarning, leave_one_out

pytestmark = pytest.mark.usefixtures("float64")
PRIOR, NOISE, N = 2.0, 0.7, 24


def regression(X, y):
    beta = pyro.sample("beta", dist.Normal(0.0, PRIOR).expand([X.shape[1]]).to_event(1))
    with pyro.plate("row", len(X)):
        pyro.sample("y", dist.Normal((X * beta).sum(-1), NOISE), obs=y)


def data(columns=3, correlation=0.95):
    """Rows whose columns correlate, so that the posterior's coefficients do."""
    generator = torch.Generator().manual_seed(3)
    common = torch.randn(N, 1, generator=generator).double()
    own = torch.randn(N, columns, generator=generator).double()
    X = math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own
    noise = NOISE * torch.randn(N, generator=generator).double()
    return X, X @ torch.tensor([1.0, -0.5, 0.3][:columns]).double() + noise


X, Y = data()
NAMES = [f"r{i}" for i in range(N)]


def predictive(X, y, x, value):
    """log p(value | x, y) in closed form."""
    mean, covariance, _ = exact(X, y, PRIOR, NOISE)
    sd = (NOISE**2 + x @ covariance @ x).sqrt()
    return float(dist.Normal(x @ mean, sd).log_prob(value))


def left_out(i, X, y):
    """log p(y_i | the others) in closed form."""
    keep = torch.arange(N) != i
    return predictive(X[keep], y[keep], X[i], y[i])


EXACT = np.array([left_out(i, X, Y) for i in range(N)])
LPD = np.array([predictive(X, Y, X[i], Y[i]) for i in range(N)])


def pointwise(result):
    return result["elpd_i" if arviz_major() >= 1 else "loo_i"]


def total(result):
    return float(result["elpd" if arviz_major() >= 1 else "elpd_loo"])


def parameters(result):
    return float(result["p" if arviz_major() >= 1 else "p_loo"])


@pytest.fixture(scope="module")
def fitted():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    model = vi.Model(regression, X, Y, coords={"row": NAMES})
    fitted = vi.fit(model, "full_rank", seed=0)
    torch.set_default_dtype(before)
    return fitted


# -- the closed form --------------------------------------------------------------------------


@pytest.mark.slow
def test_of_the_exact_posterior_it_is_leaving_out(fitted):
    results = [fitted.loo(seed=seed) for seed in range(10)]
    found = np.array([pointwise(result).values for result in results])
    # Ten answers show the Monte Carlo error of one: their mean lies within 4.5 s.e. of the truth (24
    # observations), and the log of a mean of 4,000 draws is biased by half its variance at most.
    sd = found.std(0, ddof=1)
    assert (np.abs(found.mean(0) - EXACT) < 4.5 * sd / math.sqrt(10) + sd**2).all()
    assert np.abs(found - EXACT).max() < 0.1
    assert total(results[0]) == pytest.approx(EXACT.sum(), abs=4.5 * sd.sum())
    assert parameters(results[0]) == pytest.approx((LPD - EXACT).sum(), abs=4.5 * sd.sum())
    assert results[0]["se"] == pytest.approx(math.sqrt(N * found[0].var()))


def test_the_answer_is_the_posteriors_and_not_the_guides():
    """A mean_field q of correlated coefficients is another posterior, and so is LOO of it alone.

    k-hat of its weights tends to the coefficients' correlation, here 0.5, so that they can be used.
    """
    X, y = data(columns=2, correlation=0.5)
    truth = np.array([left_out(i, X, y) for i in range(N)])
    posterior = vi.fit(vi.Model(regression, X, y), "mean_field", seed=0)
    loo = import_arviz().loo
    with warnings.catch_warnings():
        # At k-hats of 0.7 and more for some sets of draws: what is asked here is the mean error.
        warnings.simplefilter("ignore", LooWarning)
        corrected = [pointwise(posterior.loo(seed=s)).values for s in range(5)]
    plain = [pointwise(loo(posterior.to_arviz(4000, s), pointwise=True)).values for s in range(5)]
    errors = [np.abs(np.array(found) - truth).mean() for found in (corrected, plain)]
    # Weights worth 2,000 draws or more and densities with an sd of 0.3: an s.e. of 0.3 / sqrt(2,000).
    assert errors[0] < 0.3 / math.sqrt(2000)
    assert errors[1] > 3 * errors[0]


def test_it_is_arviz_loo_where_draws_are_the_posteriors(fitted):
    posterior = fitted
    mine, theirs = (
        posterior.loo(draws=2000),
        import_arviz().loo(posterior.to_arviz(2000), pointwise=True),
    )
    # q is the posterior up to the fit's tolerance of 0.01 nats: so uneven are its weights.
    assert np.abs(pointwise(mine).values - pointwise(theirs).values).max() < 0.02
    assert total(mine) == pytest.approx(total(theirs), abs=0.02)
    assert mine["n_samples"] == theirs["n_samples"] == 2000
    assert mine["n_data_points"] == theirs["n_data_points"] == N
    assert mine["good_k"] == theirs["good_k"]
    assert type(mine) is type(theirs)


def test_smoothed_weights_are_those_of_a_naive_loop():
    rng = np.random.default_rng(0)
    log_likelihood, log_ratios = rng.normal(-1.0, 0.7, (400, 5)), rng.normal(0.0, 0.8, 400)
    log_ratios[3] = -np.inf
    found = leave_one_out(log_likelihood, log_ratios)
    for i in range(5):
        smoothed = psis(log_ratios - log_likelihood[:, i])
        weights = np.exp(smoothed.log_weights)
        assert found.elpd[i] == pytest.approx(
            math.log((weights * np.exp(log_likelihood[:, i])).sum())
        )
        assert found.khat[i] == smoothed.khat
    weights = np.exp(psis(log_ratios).log_weights)
    np.testing.assert_allclose(found.lpd, np.log(weights @ np.exp(log_likelihood)))


# -- what ArviZ does with it ------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # ArviZ 0.23 with this SciPy or pandas
def test_arviz_compares_and_plots(fitted):
    az = import_arviz()
    constant = vi.Model(regression, torch.ones(N, 1).double(), Y, coords={"row": NAMES})
    other = vi.fit(constant, "full_rank", seed=0)
    table = az.compare({"constant": other.loo(), "regression": fitted.loo()})
    assert list(table.index) == ["regression", "constant"]
    pytest.importorskip("matplotlib")
    if arviz_major() < 1:
        assert az.plot_khat(fitted.loo()) is not None
    assert "24 observations" in str(fitted.loo())


def test_observations_have_the_plates_names(fitted):
    result = fitted.loo(draws=500)
    for values in (pointwise(result), result["pareto_k"]):
        assert values.dims == ("row",)
        assert list(values.coords["row"].values) == NAMES
    again = fitted.loo(draws=500)
    assert np.array_equal(pointwise(result), pointwise(again))


# -- what is left out -------------------------------------------------------------------------


def test_what_a_mask_hides_is_not_counted():
    seen = torch.arange(N) % 3 > 0

    def masked(X, y):
        beta = pyro.sample("beta", dist.Normal(0.0, PRIOR).expand([3]).to_event(1))
        with pyro.plate("row", len(X)), pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal((X * beta).sum(-1), NOISE), obs=y)

    posterior = vi.fit(vi.Model(masked, X, Y, coords={"row": NAMES}), "full_rank", seed=0)
    result = posterior.loo()
    assert result["n_data_points"] == int(seen.sum())
    assert list(pointwise(result).coords["row"].values) == [
        n for n, s in zip(NAMES, seen, strict=True) if s
    ]
    few = vi.fit(vi.Model(regression, X[seen], Y[seen]), "full_rank", seed=0).loo()
    # Two fits of the same posterior, 4,000 draws each: an elpd of 0.1 s.e. at the most, as above.
    assert np.abs(pointwise(result).values - pointwise(few).values).max() < 0.1


def two_outcomes(X, y, w):
    beta = pyro.sample("beta", dist.Normal(0.0, PRIOR).expand([3]).to_event(1))
    with pyro.plate("row", len(X)):
        pyro.sample("y", dist.Normal((X * beta).sum(-1), NOISE), obs=y)
        pyro.sample("w", dist.Normal((X * beta).sum(-1), NOISE), obs=w)


def test_several_sites_are_left_out_row_by_row():
    W = Y.flip(0)
    posterior = vi.fit(vi.Model(two_outcomes, X, Y, W), "full_rank", seed=0)
    both, one = posterior.loo(), posterior.loo("y")
    keep = torch.arange(N) != 5
    # The mean of two outcomes of a row says what both say; their difference says nothing of beta.
    mean, covariance, _ = exact(
        torch.cat([X[keep], X[keep]]), torch.cat([Y[keep], W[keep]]), PRIOR, NOISE
    )
    x = torch.stack([X[5], X[5]])
    row = dist.MultivariateNormal(x @ mean, NOISE**2 * torch.eye(2).double() + x @ covariance @ x.T)
    expected = float(row.log_prob(torch.stack([Y[5], W[5]])))
    # As above: 0.1 is over four s.e. of one observation.
    assert float(pointwise(both)[5]) == pytest.approx(expected, abs=0.1)
    rows = torch.cat([X[keep], X]), torch.cat([Y[keep], W])
    assert float(pointwise(one)[5]) == pytest.approx(predictive(*rows, X[5], Y[5]), abs=0.1)


def grouped(y):
    m = pyro.sample("m", dist.Normal(0.0, PRIOR))
    with pyro.plate("item", y.shape[1], dim=-1), pyro.plate("group", y.shape[0], dim=-2):
        pyro.sample("y", dist.Normal(m, NOISE), obs=y)


def test_whole_rows_of_a_plate():
    y = Y.reshape(8, 3)
    posterior = vi.fit(
        vi.Model(grouped, y, coords={"group": list("abcdefgh")}), "full_rank", seed=0
    )
    single, whole = posterior.loo(), posterior.loo(plate="group")
    assert pointwise(single).shape == (8, 3)
    assert list(pointwise(whole).coords["group"].values) == list("abcdefgh")
    rest = torch.cat([y[:2], y[3:]]).flatten()
    mean, covariance, _ = exact(torch.ones(21), rest, PRIOR, NOISE)
    joint = dist.MultivariateNormal(mean.expand(3), NOISE**2 * torch.eye(3).double() + covariance)
    # 4,000 draws whose weights have an sd of about 1: an s.e. of 1 / sqrt(4,000) = 0.016.
    assert float(pointwise(whole)[2]) == pytest.approx(float(joint.log_prob(y[2])), abs=5 * 0.016)
    with pytest.raises(UnknownNameError, match="unknown plate of the observed sites 'grup'"):
        posterior.loo(plate="grup")


@pytest.mark.slow
def test_rows_that_share_discrete_sites_are_whole():
    posterior = vi.fit(hmm.MODEL, "full_rank", seed=0)
    # Of a thousand draws k-hats up to 0.67 are to be trusted, and one of four is about that.
    result = posterior.loo(draws=4000)
    assert pointwise(result).shape == (4,)
    # Uncorrected, at the mean: each series' likelihood with its states summed out, by the forward pass.
    z = posterior.sample(400, seed=0)
    lpd = np.array([np.logaddexp.reduce([forward(z, s, i) for s in range(400)]) for i in range(4)])
    # Leaving out costs less than half a nat a parameter and series here, and never gains much.
    assert (pointwise(result).values < lpd - math.log(400) + 0.1).all()
    assert (pointwise(result).values > lpd - math.log(400) - 4).all()
    with pytest.raises(OptionError, match="observed sites share the discrete site 'busy_0'"):
        posterior.loo("y_3")


def forward(z, s, i):
    """log p(series i | draw s), the textbook recursion."""
    stay = z["stay"][s]
    alpha = np.log([0.5, 0.5])
    move = np.log([[stay[0], 1 - stay[0]], [1 - stay[1], stay[1]]])
    for t, (hours, y) in enumerate(zip(hmm.HOURS[i].numpy(), hmm.Y[i].numpy(), strict=True)):
        if t:
            alpha = np.logaddexp.reduce(alpha[:, None] + move, axis=0)
        rate = (z["low"][s] + z["gap"][s] * np.array([0, 1])) * hours
        alpha = alpha + y * np.log(rate) - rate - math.lgamma(y + 1)
    return np.logaddexp.reduce(alpha)


# -- when it cannot be ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_warning_says_whose_fault_it_is():
    strange = torch.cat([0.1 * torch.randn(1, 7), torch.tensor([[30.0]])], -1).double()
    exactly = vi.fit(vi.Model(grouped, strange), "full_rank", seed=0)
    with pytest.warns(LooWarning, match="surprising and influential"):
        exactly.loo()
    with pytest.warns(
        LooWarning, match="The guide 'mean_field' is the reason, not the observations"
    ):
        vi.fit(eight_schools_centered.MODEL, "mean_field", seed=0).loo()
    with pytest.warns(LooWarning, match="Site 'y_unobserved' has a latent for each row"):
        vi.fit(missing_data.MODEL, "full_rank", seed=0).loo()


@pytest.mark.slow
def test_a_pyro_guide():
    guide_of = pyro.infer.autoguide.AutoMultivariateNormal
    with pyro.get_param_store().scope():
        model = vi.Model(regression, X, Y)
        posterior = vi.fit(model, guide_of(regression), seed=0, steps=20)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LooWarning)
            result = posterior.loo(draws=50)
    assert pointwise(result).dims == ("row",)
    assert np.isfinite(pointwise(result)).all()


def test_models_without_anything_to_leave_out(fitted):
    def factor_only():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.factor("f", -(m**2))

    def whole(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m, 1.0).expand([N]).to_event(1), obs=y)

    def scaled(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", N), pyro.poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    def apart(y):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("row", N):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)
        with pyro.plate("other", 3):
            pyro.sample("w", dist.Normal(m, 1.0), obs=y[:3])

    for model, message in [
        (vi.Model(factor_only), "model 'factor_only' has no observed site"),
        (vi.Model(whole, Y), "site 'y' is one observation as a whole"),
        (vi.Model(scaled, Y), r"site 'y' is scaled by poutine\.scale"),
        (vi.Model(apart, Y), r"choose sites='y' \['row'\] or sites='w' \['other'\]"),
    ]:
        with pytest.raises(OptionError, match=message):
            vi.fit(model, "full_rank", seed=0).loo()
    with pytest.raises(OptionError, match="a point estimate"):
        vi.fit(vi.Model(regression, X, Y), "delta", seed=0).loo()
    with pytest.raises(UnknownNameError, match="unknown observed site 'z'"):
        fitted.loo("z")
    with pytest.raises(OptionError, match="do not fit into memory"):
        fitted.loo(draws=10**9)
    no_density = vi.Posterior(fitted.model, fitted.approximation, fitted.record, None)
    with pytest.raises(ModelError, match="has no batched density"):
        no_density.loo()


def test_streamed_data_are_not_in_memory():
    from torch.utils.data import TensorDataset

    model = vi.Model(regression, TensorDataset(X, Y))
    posterior = vi.fit(model, "mean_field", batch_size=8, seed=0, steps=20)
    with pytest.raises(OptionError, match="streamed"):
        posterior.loo()
    with pytest.raises(OptionError, match="streamed"):
        posterior.check_predictive()
