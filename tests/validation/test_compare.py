"""`compare` against closed forms: exact fits, textbook mean field, and references that are none."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from conjugate import exact

import pyro_vi_kit as vi
from models import linear_regression
from pyro_vi_kit.core.errors import ModelError, OptionError
from pyro_vi_kit.core.export import Group, to_arviz
from pyro_vi_kit.validation.compare import COLUMNS, Paired, compare, format_overview, overview
from pyro_vi_kit.validation.compare.measures import Distances, effective_draws
from pyro_vi_kit.validation.nuts import SamplerWarning

MODEL = linear_regression.MODEL
MEAN, COVARIANCE, LOG_EVIDENCE = exact(
    *MODEL.args, linear_regression.PRIOR_SD, linear_regression.NOISE_SD
)
D, CHAINS, DRAWS = 8, 4, 1000
N = CHAINS * DRAWS
NAMES = list(MODEL.coords["coefficient"])
# A z-score that D independent normal errors stay below in 999 of 1,000 tests (Bonferroni).
Z = NormalDist().inv_cdf(1 - 0.001 / (2 * D))
# Standard error of the mean of N draws against the mean of N others, in sd.
MCSE = math.sqrt(2 / N)


def exact_draws(seed=0, chains=CHAINS):
    rng = np.random.default_rng(seed)
    return rng.multivariate_normal(MEAN.numpy(), COVARIANCE.numpy(), (chains, DRAWS))


def tree(draws, dims=("coefficient",), names=NAMES, **attrs):
    group = Group({"beta": draws}, {"beta": list(dims)})
    return to_arviz({"posterior": group}, {dims[0]: names}, attrs)


@pytest.fixture(scope="module")
def reference():
    return tree(exact_draws(), seconds=10.0, sampler="exact")


@pytest.fixture(scope="module")
def fits():
    return {g: vi.fit(MODEL, g, seed=0) for g in ("full_rank", "mean_field", "delta")}


@pytest.fixture(scope="module")
def frame(reference, fits):
    return compare(reference, fits, draws=N)


def rows(frame, fit):
    return frame[(frame["fit"] == fit) & (frame["parameter"] != "overall")]


def last(frame, fit):
    return frame[(frame["fit"] == fit) & (frame["parameter"] == "overall")].iloc[0]


def test_columns_and_rows(frame):
    assert tuple(frame.columns) == COLUMNS
    assert list(rows(frame, "delta")["parameter"]) == [f"beta[{name}]" for name in NAMES]
    assert len(frame) == 3 * (D + 1)
    assert frame.attrs["reference_converged"] is True
    assert frame.attrs["reference_problems"] == []
    assert frame.attrs["reference_draws"] == N


def test_exact_fit_has_monte_carlo_errors_only(frame):
    fit = rows(frame, "full_rank")
    assert (fit["mean_error"].abs() < Z * MCSE).all()
    # The sd of a normal's log sd from n draws is 1 / sqrt(2 n), and there are two.
    assert (np.log(fit["sd_ratio"]).abs() < Z * math.sqrt(1 / N)).all()
    for column, p in (("q05_error", 0.05), ("q50_error", 0.5), ("q95_error", 0.95)):
        density = NormalDist().pdf(NormalDist().inv_cdf(p))
        assert (fit[column].abs() < Z * math.sqrt(p * (1 - p)) / density * MCSE).all()


def test_monte_carlo_error_of_the_mean(frame):
    # The effective number of independent draws is estimated to within some 5 %, which enters
    # half of the variance.
    assert rows(frame, "full_rank")["mean_error_mcse"].to_numpy() == pytest.approx(MCSE, rel=0.1)
    assert rows(frame, "delta")["mean_error_mcse"].to_numpy() == pytest.approx(
        math.sqrt(1 / N), rel=0.1
    )
    z = NormalDist().inv_cdf(1 - 0.01 / (2 * D))
    assert frame.attrs["mean_error_noise"] == pytest.approx(z * MCSE, rel=0.1)


def test_exact_fit_is_as_close_as_exact_draws(frame):
    fit = last(frame, "full_rank")
    assert fit["sliced_w1"] < fit["sliced_w1_null_q99"]
    # Two sets of 1,000 draws of a standard normal: E|difference| of sorted draws is, to first
    # order, the integral of sqrt(2 / (pi n)) sqrt(2 F (1 - F)) dx (del Barrio et al. 1999).
    x = np.linspace(-8, 8, 4001)
    F = np.array([NormalDist().cdf(v) for v in x])
    theory = np.trapezoid(np.sqrt(F * (1 - F)), x) * math.sqrt(2 / 1000) * math.sqrt(2 / math.pi)
    # 256 directions in 8 dimensions and 50 repeats leave 2 %; 5 % is generous.
    assert fit["sliced_w1_null"] == pytest.approx(theory, rel=0.05)
    assert fit["verdict"] == "good"
    assert fit["elbo"] == pytest.approx(LOG_EVIDENCE, abs=0.01)


def test_mean_field_has_the_textbook_sd(frame):
    """The optimal factor has one over the precision's diagonal as its variance (Bishop, 10.1.2)."""
    sd = 1 / torch.linalg.inv(COVARIANCE).diagonal().sqrt()
    textbook = (sd / COVARIANCE.diagonal().sqrt()).numpy()
    found = rows(frame, "mean_field")["sd_ratio"].to_numpy()
    assert (np.abs(np.log(found / textbook)) < Z * math.sqrt(1 / N)).all()
    fit = last(frame, "mean_field")
    assert fit["sd_ratio"] == found.min()
    assert fit["sliced_w1"] > 3 * fit["sliced_w1_null_q99"]
    assert fit["verdict"] == "reject"


def test_point_estimate(frame, fits):
    assert (rows(frame, "delta")["sd_ratio"] == 0).all()
    fit = last(frame, "delta")
    assert fit["sd_ratio"] == 0
    assert abs(fit["mean_error"]) < Z / math.sqrt(N)  # a Gaussian's mode is its mean
    # In direction u a normal with correlations R is sqrt(2 / pi) sqrt(u'Ru) from its mean.
    scale = COVARIANCE.diagonal().sqrt()
    units = np.random.default_rng(0).normal(size=(4000, D))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    variance = ((units @ (COVARIANCE / scale / scale[:, None]).numpy()) * units).sum(1)
    distances = math.sqrt(2 / math.pi) * np.sqrt(variance)
    error = distances.std() / math.sqrt(256)  # from the directions that were drawn
    assert abs(fit["sliced_w1"] - distances.mean()) < 4 * error
    assert np.isnan(fit[["khat", "elbo", "elbo_se"]].astype(float)).all()
    assert fit["verdict"] == ""


def test_overall_rows(frame, fits):
    for name, posterior in fits.items():
        overall, each = last(frame, name), rows(frame, name)
        for column in ("mean_error", "q05_error", "q50_error", "q95_error"):
            assert overall[column] == each[column].iloc[each[column].abs().argmax()]
        assert overall["seconds"] == posterior.seconds
        assert overall["speedup"] == pytest.approx(10.0 / posterior.seconds)
        assert each["seconds"].isna().all()
        assert (each["verdict"] == "").all()


def test_one_fit_and_the_same_seed(reference, fits, frame):
    again = compare(reference, fits["full_rank"], draws=N)
    expected = frame[frame["fit"] == "full_rank"].reset_index(drop=True)
    pd.testing.assert_frame_equal(again, expected)
    other = compare(reference, fits["full_rank"], draws=N, seed=1)
    assert other["mean_error"].iloc[0] != again["mean_error"].iloc[0]


def test_sites_are_matched_by_their_labels(fits, frame):
    """A reference whose coefficients come in another order is not taken for a wrong fit."""
    backwards = tree(exact_draws()[..., ::-1], names=NAMES[::-1])
    again = rows(compare(backwards, fits["full_rank"], draws=N), "full_rank")
    expected = rows(frame, "full_rank")
    assert again["mean_error"].to_numpy() == pytest.approx(expected["mean_error"].to_numpy())
    unnamed = tree(exact_draws(), dims=("beta_dim_0",), names=range(D))
    again = rows(compare(unnamed, fits["full_rank"], draws=N), "full_rank")
    assert list(again["parameter"]) == list(expected["parameter"])
    assert again["mean_error"].to_numpy() == pytest.approx(expected["mean_error"].to_numpy())


def test_dims_are_matched_by_their_names():
    def matrix():
        with pyro.plate("row", 2, dim=-2), pyro.plate("column", 3, dim=-1):
            pyro.sample("m", dist.Normal(torch.arange(6.0).reshape(2, 3), 1.0))

    draws = np.random.default_rng(0).normal(size=(4, 200, 2, 3)) + np.arange(6.0).reshape(2, 3)
    turned = Group({"m": draws.swapaxes(2, 3)}, {"m": ["column", "row"]})
    posterior = vi.fit(vi.Model(matrix), "mean_field", seed=0)
    frame = compare(to_arviz({"posterior": turned}), posterior, draws=800)
    assert frame["parameter"].iloc[1] == "m[0, 1]"
    # A wrong order would be an error of 1 sd or more; the noise is sqrt(2 / 800) = 0.05.
    assert last(frame, "mean_field")["mean_error"] == pytest.approx(0.0, abs=0.25)


def test_reference_that_has_not_converged(fits):
    apart = exact_draws()
    apart[0] += 1.0
    with pytest.warns(SamplerWarning, match="has not converged, so that it is no reference.*R-hat"):
        frame = compare(tree(apart), fits["full_rank"])
    assert frame.attrs["reference_converged"] is False
    assert "R-hat" in frame.attrs["reference_problems"][0]
    assert "has not converged and is no reference: R-hat" in format_overview(frame)


def test_correlated_reference_is_thinned():
    """Draws of a chain with an effective size of a tenth do not make an exact fit look wrong."""
    rng, rho = np.random.default_rng(0), 0.82
    noise = rng.normal(size=(CHAINS, 2 * DRAWS, 3)) * math.sqrt(1 - rho**2)
    truth = np.empty_like(noise)
    truth[:, 0] = rng.normal(size=(CHAINS, 3))
    for i in range(1, 2 * DRAWS):
        truth[:, i] = rho * truth[:, i - 1] + noise[:, i]
    names = ("a", "b", "c")
    paired = Paired(names, names, truth, rng.normal(size=(4000, 3)), ())
    ess = effective_draws(truth)
    expected = CHAINS * 2 * DRAWS * (1 - rho) / (1 + rho)
    # The estimate's own error at 800 effective draws is some 10 %.
    assert ess == pytest.approx(expected, rel=0.35)
    distance = Distances(0)(paired, ess)
    assert distance.value < distance.null_q99


def with_constants():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.deterministic("one", torch.ones_like(x))
    pyro.deterministic("broken", torch.full_like(x, math.nan))
    pyro.deterministic("overall", 2 * x)


def test_constants_and_numbers_that_are_not_finite():
    x = np.random.default_rng(0).normal(size=(4, 500))
    sites = {"x": x, "one": np.ones_like(x), "broken": x, "overall": 2 * x}
    posterior = vi.fit(vi.Model(with_constants), "full_rank", seed=0)
    frame = compare(to_arviz({"posterior": Group(sites)}), posterior).set_index("parameter")
    assert list(frame.loc["one", ["mean_error", "sd_ratio", "q05_error", "mean_error_mcse"]]) == [
        0, 1, 0, 0,
    ]  # fmt: skip
    assert frame.loc["broken", "mean_error"] == math.inf
    assert frame["mean_error"].iloc[-1] == math.inf
    # A site may be called "overall"; the overview has the other row.
    assert len(overview(frame.reset_index())) == 1
    assert overview(frame.reset_index())["sliced_w1"].iloc[0] == math.inf
    sites["broken"] = np.full_like(x, math.nan)
    with pytest.warns(SamplerWarning, match="broken is not finite"):
        frame = compare(to_arviz({"posterior": Group(sites)}), posterior).set_index("parameter")
    assert math.isnan(frame.loc["broken", "mean_error"])
    assert abs(frame["mean_error"].iloc[-1]) < 0.2  # noise is sqrt(1/2000 + 1/4000) = 0.03
    assert frame["sliced_w1"].iloc[-1] < 0.2


def test_shared_sites_only():
    x = np.random.default_rng(0).normal(size=(4, 500))
    posterior = vi.fit(vi.Model(two_latents), "full_rank", seed=0)
    frame = compare(to_arviz({"posterior": Group({"a": x, "z": x})}), {"fit": posterior})
    assert list(frame["parameter"]) == ["a", "overall"]
    assert frame.attrs["left_out"] == ["b"]
    assert "not compared: b." in format_overview(frame)
    assert math.isnan(frame["speedup"].iloc[-1])


def two_latents():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(0.0, 1.0))


def test_sampling_time_of_another_library(fits):
    attrs = {"sampling_time": 3.0}
    group = Group({"beta": exact_draws()}, {"beta": ["coefficient"]}, attrs=attrs)
    frame = compare(to_arviz({"posterior": group}), fits["delta"])
    assert last(frame, "delta")["speedup"] == pytest.approx(3.0 / fits["delta"].seconds)


def test_overview(frame):
    table = overview(frame)
    assert list(table.columns) == [
        "fit", "verdict", "khat", "elbo", "mean_error", "sd_ratio", "sliced_w1", "sliced_w1_null",
        "seconds", "speedup",
    ]  # fmt: skip
    assert list(table["fit"]) == ["full_rank", "mean_field", "delta"]
    assert (table["mean_error"] == table["mean_error"].round(2)).all()
    assert table.attrs["reference"] == "NUTS"


def test_overview_of_a_file(frame, tmp_path):
    frame.to_csv(tmp_path / "table.csv", index=False)
    text = format_overview(pd.read_csv(tmp_path / "table.csv"))
    assert "× reference" in text
    assert text.splitlines()[-1].split()[:2] == ["delta", "–"]


def test_format_overview(frame):
    text = format_overview(frame, "Linear regression")
    assert text == format_overview(overview(frame), "Linear regression")
    lines = text.splitlines()
    assert lines[0] == "Linear regression"
    for heading in ("worst mean", "worst", "sliced W1", "× NUTS"):
        assert heading in lines[2]
    for heading in ("fit", "verdict", "k-hat", "(nats)", "error (sd)", "(exact: 0.06)", "speed"):
        assert heading in lines[3]
    assert {len(line) for line in lines[2:8]} == {len(lines[4])}
    assert lines[7].split()[:4] == ["delta", "–", "–", "–"]
    assert lines[9].startswith("Against NUTS, 4,000 draws in 4 chains in 10 s.")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda fit: fit, OptionError, r"got Posterior: make one with its to_arviz\(\)"),
        (lambda fit: {"beta": [0.0]}, OptionError, "must be an ArviZ object, got dict"),
        (
            lambda fit: to_arviz({"prior": Group({"beta": exact_draws()})}),
            ModelError,
            "no posterior group, only prior",
        ),
        (
            lambda fit: to_arviz({"posterior": Group({"b": exact_draws()})}),
            ModelError,
            "'full_rank' has no site that the reference has: beta against b",
        ),
        (
            lambda fit: to_arviz({"posterior": Group({"beta": exact_draws()[..., :3]})}),
            ModelError,
            r"site 'beta' has shape \(8,\) in fit 'full_rank' but \(3,\) in the reference",
        ),
    ],
)
def test_references_that_cannot_be_used(fits, make, error, message):
    with pytest.raises(error, match=message):
        compare(make(fits["full_rank"]), fits["full_rank"])


def test_options_that_cannot_be_used(reference, fits):
    with pytest.raises(OptionError, match=r"posteriors must be a fit or a dict"):
        compare(reference, {})
    with pytest.raises(OptionError, match=r"posteriors\['a'\] must be what vi.fit.*got str"):
        compare(reference, {"a": "full_rank"})  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="draws= must be an integer of at least 4, got 1"):
        compare(reference, fits, draws=1)
