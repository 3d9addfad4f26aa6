"""Predictive checks: p-values of right and wrong models, corrected draws, masks, statistics."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_kit as vi
from models import eight_schools, missing_data
from pyro_vi_kit.core.errors import OptionError, UnknownNameError
from pyro_vi_kit.posterior.diagnostics.observations import data_kind_of, observations
from pyro_vi_kit.posterior.diagnostics.predictive import Comparison, replicate

pytestmark = pytest.mark.usefixtures("float64")


def normal(y):
    m = pyro.sample("m", dist.Normal(0.0, 10.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def poisson(y):
    rate = pyro.sample("rate", dist.Gamma(1.0, 0.1))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def row(frame, statistic, site="y"):
    return frame[(frame.site == site) & (frame.statistic == statistic)].iloc[0]


# -- p-values ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_p_values_of_a_right_model():
    """That of the sd, which the fit does not see, is uniform; the mean was fitted and always fits."""
    rng = np.random.default_rng(0)
    sets = 40
    found = {"sd": [], "mean": []}
    for i in range(sets):
        model = vi.Model(normal, torch.tensor(rng.normal(2.0, 1.0, 30)))
        frame = vi.fit(model, "full_rank", seed=0).check_predictive(draws=400, seed=i)
        for name, values in found.items():
            values.append(row(frame, name)["p_above"])
    p = np.sort(found["sd"])
    # Kolmogorov-Smirnov: 1.63 / sqrt(n) is exceeded with probability 0.01.
    steps = np.arange(sets + 1) / sets
    assert max(np.abs(p - steps[1:]).max(), np.abs(p - steps[:-1]).max()) < 1.63 / math.sqrt(sets)
    # A replicated mean is the data's plus noise of known sd, up to the prior: p is 1/2, with the noise
    # 0.5 / sqrt(400) of the share of 400.
    assert np.abs(np.array(found["mean"]) - 0.5).max() < 4.5 * 0.5 / math.sqrt(400) + 0.01


def test_the_shape_of_the_predictive_distribution_is_the_closed_form():
    y = torch.tensor(np.random.default_rng(1).normal(2.0, 1.0, 30))
    draws = 4000
    frame = vi.fit(vi.Model(normal, y), "full_rank", seed=0).check_predictive(draws=draws)
    mean = row(frame, "mean")
    precision = 1 / 100 + 30
    sd = math.sqrt(1 / precision + 1 / 30)
    # Of a mean of normals sd / sqrt(S), of their sd sd / sqrt(2 S).
    assert mean["mean"] == pytest.approx(
        float(y.sum()) / precision, abs=4.5 * sd / math.sqrt(draws)
    )
    assert mean["sd"] == pytest.approx(sd, abs=4.5 * sd / math.sqrt(2 * draws))
    assert mean["observed"] == pytest.approx(float(y.mean()))
    # The s.e. of a normal's 5 % quantile is 2.1 sd / sqrt(S).
    assert mean["5%"] == pytest.approx(
        mean["mean"] - 1.645 * sd, abs=4.5 * 2.1 * sd / math.sqrt(draws)
    )


def test_overdispersed_counts_are_found_out():
    rng = np.random.default_rng(0)
    counts = torch.tensor(rng.negative_binomial(1, 0.2, 100).astype(float))
    frame = vi.fit(vi.Model(poisson, counts), "full_rank", seed=0).check_predictive()
    for name in ("sd", "max", "share of zeros"):
        found = row(frame, name)
        assert found["reading"] == "too high: none of 1,000 as high"
        # None of 1,000 and itself: (0 + 1/2) / 1,001, twice.
        assert found["p_value"] == pytest.approx(1 / 1001)
    assert row(frame, "mean")["reading"] == "fits"
    right = torch.tensor(rng.poisson(4.0, 100).astype(float))
    frame = vi.fit(vi.Model(poisson, right), "full_rank", seed=0).check_predictive()
    assert (frame["p_value"] > 0.02).all()


def test_ties_count_by_half():
    same = Comparison("y", "share", 0.1 + 0.2, np.full(99, 0.3))
    assert same.p_above == pytest.approx(0.5)
    assert same.reading == "fits"
    some = Comparison("y", "max", 3.0, np.array([1.0, 3.0, 4.0, np.nan]))
    assert some.p_above == pytest.approx((1 + 0.5 * 2) / 4)
    unknown = Comparison("y", "ratio", math.nan, np.ones(5))
    assert unknown.reading.startswith("cannot be told")


# -- which draws ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("level", "corrected", "words"),
    [
        ("good", None, "made by the model at draws of the guide"),
        ("resample", None, "corrected by importance resampling (the verdict is resample)"),
        ("resample", False, "made by the model at draws of the guide"),
        ("good", True, "corrected by importance resampling"),
        ("reject", None, "The verdict is reject: what does not fit may be the guide's fault"),
    ],
)
def test_draws_are_corrected_where_the_verdict_says_so(school_fit, level, corrected, words):
    posterior, asked = school_fit, {"sites": None, "draws": 50, "seed": 1}
    made = [
        replicate(
            posterior.approximation, posterior.density, posterior.model,
            level=level, corrected=choice, **asked,
        )
        for choice in (corrected, words.startswith("corrected"))
    ]  # fmt: skip
    assert words in made[0].note
    assert np.array_equal(made[0].sites[0].replicated, made[1].sites[0].replicated)


@pytest.fixture(scope="module")
def school_fit():
    return vi.fit(eight_schools.MODEL, "full_rank", seed=0)


def test_corrected_predictions_are_those_of_resampled_draws(school_fit):
    posterior = school_fit
    drawn = posterior.approximation.predict(posterior.model, 500, 3, corrected=True)
    again = posterior.approximation.predict(posterior.model, 500, 3, corrected=True)
    assert torch.equal(drawn["theta"], again["theta"])
    # Those of a deterministic site have the moments of `resample`: two sets of 4,000 draws.
    many = posterior.predict(draws=4000, seed=3, corrected=True)["theta"]
    other = posterior.resample(4000, seed=5)["theta"]
    se = other.std(0) * math.sqrt(2 / (4000 * 0.3))  # as few effective draws as 30 %
    assert (np.abs(many.mean(0) - other.mean(0)) < 4.5 * se).all()


@pytest.mark.slow
def test_a_point_estimate_and_a_pyro_guide():
    y = torch.tensor([0.5, 1.5, 1.0])
    point = vi.fit(vi.Model(normal, y), "delta", seed=0)
    frame = point.check_predictive(draws=50)
    assert "at the point estimate" in frame.attrs["note"]
    with pytest.raises(OptionError, match="no weights to resample by"):
        point.check_predictive(corrected=True)
    with pyro.get_param_store().scope():
        guide = pyro.infer.autoguide.AutoNormal(normal)
        posterior = vi.fit(vi.Model(normal, y), guide, seed=0, steps=20)
        drawn = posterior.approximation.predict(posterior.model, 20, 0, corrected=False)
        assert set(drawn) == {"y"}


def test_a_pyro_guide_is_corrected_too(monkeypatch):
    from pyro_vi_kit.posterior.approximation import of_traces

    monkeypatch.setattr(of_traces, "pool_of", lambda draws: 400)

    def wide(y):
        pyro.sample("m", dist.Normal(1.0, 2.0))

    y = torch.tensor([0.5, 1.5, 1.0, 1.0])
    posterior = vi.fit(vi.Model(normal, y), wide, seed=0, steps=1)
    replicates = posterior.replicate(300, corrected=True)
    # Posterior sd 0.5 and an effective 120 of 400 draws: the mean of a data set has an sd of 0.71.
    means = replicates.sites[0].replicated.mean(-1)
    assert means.mean() == pytest.approx(1.0, abs=4.5 * math.sqrt(0.25 / 120 + 0.25 / 300))
    assert means.std() < 1.0


# -- what is compared -------------------------------------------------------------------------


def test_what_masks_hide_is_left_out_of_data_and_copies():
    y = torch.tensor([1.0, 2.0, 1e6, 1.5, 1e6])

    def masked(y):
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyro.plate("row", len(y)), pyro.poutine.mask(mask=y < 1e5):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    posterior = vi.fit(vi.Model(masked, y), "full_rank", seed=0)
    (site,) = posterior.replicate(20).sites
    assert site.observed.tolist() == [1.0, 2.0, 1.5]
    assert site.replicated.shape == (20, 3)
    assert row(posterior.check_predictive(draws=50), "max")["observed"] == 2.0


def test_masks_of_parts_of_an_observation():
    y = torch.arange(6.0).reshape(3, 2)
    hidden = torch.tensor([[True, True], [True, False], [False, False]])

    def partly(y):
        m = pyro.sample("m", dist.Normal(0.0, 10.0))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0).expand([3, 2]).mask(hidden).to_event(1), obs=y)

    posterior = vi.fit(vi.Model(partly, y), "full_rank", seed=0)
    (site,) = posterior.replicate(4).sites
    assert site.observed.tolist() == [0.0, 1.0, 2.0]
    assert site.replicated.shape == (4, 3)
    (seen,) = observations(posterior.density)
    assert seen.seen.tolist() == [True, True, False]


def test_several_sites_and_imputed_data():
    posterior = vi.fit(missing_data.MODEL, "full_rank", seed=0)
    replicates = posterior.replicate(200)
    first, second = replicates.sites
    assert (first.name, second.name) == ("y_observed", "follow_up")
    assert len(first.observed) == int(missing_data.SEEN.sum())
    # In one data set the follow-up is that of the first measurement drawn anew.
    rows = missing_data.SEEN.numpy() > 0
    correlation = [
        np.corrcoef(a, b[rows])[0, 1]
        for a, b in zip(first.replicated, second.replicated, strict=True)
    ]
    assert np.mean(correlation) > 0.8
    only = posterior.check_predictive(sites="follow_up", draws=20)
    assert set(only.site) == {"follow_up"}


def test_kinds_of_data_have_statistics_of_their_own():
    kinds = {
        "real": dist.StudentT(3.0),
        "positive": dist.LogNormal(0.0, 1.0),
        "angle": dist.VonMises(0.0, 1.0),
        "count": dist.ZeroInflatedPoisson(torch.tensor(1.0), gate=torch.tensor(0.2)),
        "binary": dist.Bernoulli(0.3).expand([3]).to_event(1).mask(True),
        "category": dist.OrderedLogistic(torch.tensor(0.0), torch.tensor([0.0, 1.0])),
    }
    assert {kind: data_kind_of(fn) for kind, fn in kinds.items()} == {kind: kind for kind in kinds}
    assert data_kind_of(dist.Binomial(5, 0.2)) == "count"
    assert data_kind_of(dist.Uniform(0.0, 1.0)) == "real"

    def many(y, c, b, v):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("row", 4):
            pyro.sample("c", dist.Categorical(p), obs=c)
            pyro.sample("o", dist.OneHotCategorical(p), obs=torch.eye(3)[c])
            pyro.sample("b", dist.Bernoulli(logits=m), obs=b)
            pyro.sample("v", dist.VonMises(m, 1.0), obs=v)

    c, b = torch.tensor([0, 2, 2, 1]), torch.tensor([1.0, 0.0, 0.0, 1.0])
    model = vi.Model(many, b, c, b, torch.tensor([0.1, 0.2, -0.3, 3.0]))
    frame = vi.fit(model, "mean_field", seed=0, steps=200).check_predictive(draws=30)
    names = {site: list(part.statistic) for site, part in frame.groupby("site")}
    assert names["c"] == names["o"] == ["share of 0", "share of 1", "share of 2"]
    assert row(frame, "share of 2", "o")["observed"] == 0.5
    assert row(frame, "switches", "b")["observed"] == 2
    assert names["v"] == ["mean cosine", "mean sine", "resultant length"]


def test_statistics_of_ones_own():
    y = torch.tensor([1.0, 4.0, 2.0])
    posterior = vi.fit(vi.Model(normal, y), "full_rank", seed=0)
    frame = posterior.check_predictive({"range": np.ptp}, draws=50, prob=0.5)
    assert list(frame.statistic) == ["range"]
    assert frame["observed"].iloc[0] == 3.0
    assert {"25%", "75%"} <= set(frame.columns)
    again = posterior.check_predictive({"range": np.ptp}, draws=50, prob=0.5)
    assert frame.equals(again)

    def broken(data):
        raise RuntimeError("no")

    for statistics, message in [
        (
            {"raw": lambda data: data},
            r"'raw' must give one number for a data set, got shape \(3,\)",
        ),
        ({"no": broken}, r"'no' raised RuntimeError on an array of shape \(3,\): no"),
        ({"x": 3}, "'x' must be a function of an array, got int"),
        (np.ptp, "must be a dict by name"),
    ]:
        with pytest.raises(OptionError, match=message):
            posterior.check_predictive(statistics, draws=3)
    with pytest.raises(UnknownNameError, match="unknown observed site 'z'"):
        posterior.check_predictive(sites="z")
    with pytest.raises(OptionError, match="prob= must lie between 0 and 1"):
        posterior.check_predictive(prob=90)
