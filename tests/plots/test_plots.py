"""The plots: what is on them, in which files, and densities against closed forms."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest

import pyro_vi_kit as vi
from models import eight_schools
from pyro_vi_kit.core.errors import FileError, MissingDependencyError, OptionError, UnknownNameError
from pyro_vi_kit.core.export import Group, to_arviz
from pyro_vi_kit.plots import losses, marginals
from pyro_vi_kit.plots.density import density, support
from pyro_vi_kit.plots.losses import smoothed

MODEL = eight_schools.MODEL
EVERYWHERE = (-math.inf, math.inf)


@pytest.fixture(scope="module")
def fits():
    return {guide: vi.fit(MODEL, guide, seed=0) for guide in ("delta", "mean_field", "full_rank")}


@pytest.fixture(scope="module")
def reference(fits):
    """Draws of a fit in the place of NUTS's: the plots do not care."""
    draws = {name: v.reshape(4, 500, *v.shape[1:]) for name, v in
             fits["full_rank"].sample(2000, seed=1).items()}  # fmt: skip
    draws["mu"] = np.ones((4, 500))
    return to_arviz({"posterior": Group(draws)}, attrs={"sampler": "nutpie"})


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def test_marginals(reference, fits, tmp_path):
    path = tmp_path / "marginals.png"
    figure = marginals(reference, fits, path, max_panels=30, draws=500)
    assert path.read_bytes().startswith(b"\x89PNG")
    # All but mu, which is a constant in this reference.
    assert len(figure.axes) == 17
    assert titles(figure)[:2] == ["tau", "theta_trans[Choate]"]
    assert legend(figure) == [
        "NUTS", "delta: point estimate",
        *(f"{name}: {fits[name].verdict.level}" for name in ("mean_field", "full_rank")),
    ]  # fmt: skip
    point, *curves = figure.axes[0].lines
    assert len(curves) == 2
    assert set(point.get_xdata()) == {float(fits["delta"].sample(1)["tau"][0])}
    left, right = figure.axes[0].get_xlim()
    tau = fits["full_rank"].sample(2000, seed=1)["tau"]
    assert left < np.quantile(tau, 0.01) < np.quantile(tau, 0.99) < right


def test_panels_are_those_where_a_fit_is_farthest(reference, fits):
    figure = marginals(reference, {"delta": fits["delta"]}, max_panels=3, draws=500)
    assert len(figure.axes) == 3
    assert "tau" in titles(figure)  # whose mode is far from its mass
    assert "the 3 of 17 parameters where a fit is farthest" in figure.get_suptitle()


def test_sites_by_name_and_by_label(reference, fits):
    figure = marginals(reference, fits["full_rank"], sites=["tau", "theta[Choate]"], draws=500)
    assert titles(figure) == ["tau", "theta[Choate]"]
    with pytest.raises(UnknownNameError, match=r"unknown site 'thta'\. Did you mean 'theta'"):
        marginals(reference, fits, sites=["thta"])


def test_fit_that_is_somewhere_else(fits):
    away = to_arviz({"posterior": Group({"mu": np.random.default_rng(0).normal(90, 1, (4, 500))})})
    axis = marginals(away, fits["full_rank"], draws=500).axes[0]
    assert [text.get_text() for text in axis.texts] == ["← full_rank"]
    # The reference and at most its width beyond: 5.5 sd, three times.
    assert np.ptp(axis.get_xlim()) < 20


def test_reference_that_has_not_converged_says_so(fits):
    draws = np.random.default_rng(0).normal(size=(4, 500)) + np.arange(4)[:, None]
    figure = marginals(to_arviz({"posterior": Group({"mu": draws})}), fits["full_rank"])
    assert legend(figure)[0] == "reference (not converged)"


@pytest.mark.parametrize(
    ("draw", "pdf", "bounds"),
    [
        (lambda rng: rng.normal(size=20_000), lambda x: np.exp(-(x**2) / 2) / 2.5066, EVERYWHERE),
        (lambda rng: rng.exponential(size=20_000), lambda x: np.exp(-x), (0.0, math.inf)),
        (lambda rng: rng.uniform(size=20_000), np.ones_like, (0.0, 1.0)),
    ],
    ids=["normal", "exponential", "uniform"],
)
def test_density(draw, pdf, bounds):
    values = draw(np.random.default_rng(0))
    # The extremes of n draws lie within 10 / n of a bound at which the density is 1.
    assert support([values]) == pytest.approx(bounds, abs=10 / 20_000)
    curve = density(values, (-4.0, 12.0), support([values]))
    assert np.trapezoid(curve.y, curve.x) == pytest.approx(1.0, abs=0.01)
    assert curve.x.min() >= bounds[0]
    assert curve.x.max() <= bounds[1]
    # Standard error sqrt(f / (2 sqrt(pi) n h)) is below 0.02 for f <= 1 and h >= 0.04; at an
    # exponential's bound the reflected tails add h sqrt(2 / pi) = 0.1.
    inner = slice(1, -1)
    assert np.abs(curve.y - pdf(curve.x))[inner].max() < 4 * 0.02 + 0.1 * (bounds[1] == math.inf)


def test_bound_that_one_set_of_draws_shows_holds_for_all():
    rng = np.random.default_rng(0)
    log_normal, exponential = np.exp(rng.normal(size=4000)), rng.exponential(size=4000)
    low, high = support([1 + log_normal, 1 + exponential])
    assert low == pytest.approx(1.0, abs=10 / 4000)
    assert high == math.inf


def test_losses(fits, tmp_path):
    path = tmp_path / "losses.png"
    figure = losses(fits, path)
    assert path.stat().st_size > 10_000
    assert [title.split("\n")[0] for title in titles(figure)] == list(fits)
    for axis, (name, fit) in zip(figure.axes, fits.items(), strict=True):
        assert np.array_equal(axis.lines[0].get_ydata(), -fit.losses)
        if name != "delta":
            labels = axis.get_legend_handles_labels()[1]
            assert labels[-1] == f"ELBO of the fit −{-fit.elbo:.2f}"
    assert figure.axes[0].get_ylabel() == "log density (nats)"
    assert figure.axes[1].get_ylabel() == "ELBO (nats)"


def trained(fit, losses, **changes):
    """The fit as if these had been its losses."""
    record = dataclasses.replace(fit.record, losses=np.asarray(losses), **changes)
    return vi.Posterior(fit.model, fit.approximation, record, fit.density, fit.spec)


def test_early_steps_do_not_flatten_the_rest(fits):
    steps = np.arange(2000)
    noise = np.random.default_rng(0).normal(0, 0.1, 2000)
    values = 31.6 + 1e6 * np.exp(-steps / 20) + noise
    values[500:700:3] = np.nan
    posterior = trained(fits["full_rank"], values, method="stochastic", skipped=67)
    (axis,) = losses(posterior).axes
    low, high = axis.get_ylim()
    # After 15 % of the steps 1e6 exp(-300 / 20) = 0.3 nats are left.
    assert -33 < low < -31.8
    assert -31.6 < high < -31
    assert "67 skipped" in axis.get_title()
    assert any("starts at −1e+06" in label for label in axis.get_legend_handles_labels()[1])
    assert np.isfinite(axis.lines[1].get_ydata()).all()


def test_losses_that_are_never_finite(fits):
    (axis,) = losses(trained(fits["full_rank"], [np.nan, np.inf])).axes
    assert axis.texts[0].get_text() == "never finite"


def test_smoothed():
    assert np.array_equal(smoothed(np.arange(10.0)), np.arange(10.0))
    line = np.arange(500.0)
    # A centred mean of ten leaves a line where it is, up to half a step for an even window.
    assert smoothed(line)[10:-10] == pytest.approx(line[10:-10], abs=0.5 + 1e-9)
    line[100:105] = np.nan
    assert smoothed(line)[10:-10] == pytest.approx(np.arange(500.0)[10:-10], abs=3)
    assert np.isnan(smoothed(np.full(300, np.nan))).all()


def test_paths_that_cannot_be_used(reference, fits, tmp_path):
    with pytest.raises(OptionError, match=r"cannot write a picture to a\.txt: end it in \.png"):
        losses(fits, tmp_path / "a.txt")
    with pytest.raises(FileError):
        marginals(reference, fits, tmp_path / "missing" / "a.png")
    with pytest.raises(OptionError, match="max_panels= must be an integer of at least 1, got 0"):
        marginals(reference, fits, max_panels=0)


def test_matplotlib_is_optional(reference, fits, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (lambda: losses(fits), lambda: marginals(reference, fits, "a.png")):
        with pytest.raises(MissingDependencyError, match=r"pip install 'pyro_vi_kit\[plots\]'"):
            draw()


def test_matplotlib_is_imported_only_where_it_is_used():
    code = "import sys, pyro_vi_kit.plots; print('matplotlib' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
