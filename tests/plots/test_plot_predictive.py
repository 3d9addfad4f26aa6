"""The picture of predictive checks: which panels, which kinds of data, and what the titles say."""

from __future__ import annotations

import re
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_kit as vi
from models import missing_data, zero_inflated_counts
from pyro_vi_kit.core.errors import FileError, MissingDependencyError, OptionError
from pyro_vi_kit.plots import predictive
from pyro_vi_kit.plots.predictive import _edges

pytest.importorskip("matplotlib")


def counts(x, y):
    a = pyro.sample("a", dist.Normal(0.0, 2.0))
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson((a + b * x).exp()), obs=y)


@pytest.fixture(scope="module")
def poisson():
    model = vi.Model(counts, zero_inflated_counts.X, zero_inflated_counts.Y)
    return vi.fit(model, "full_rank", seed=0)


def titles(figure):
    return [axis.get_title() for axis in figure.axes]


def test_a_rootogram_and_a_panel_for_each_statistic(poisson, tmp_path):
    path = tmp_path / "check.png"
    figure = predictive(poisson, path, draws=300)
    assert path.read_bytes().startswith(b"\x89PNG")
    frame = poisson.check_predictive(draws=300)
    words = [reading.split(":")[0] for reading in frame.reading]
    assert titles(figure)[0] == "y: data and copies"
    assert [t.split(",")[0] for t in titles(figure)[1:]] == [
        f"{name}: {word}" for name, word in zip(frame.statistic, words, strict=True)
    ]
    assert "share of zeros: too high" in titles(figure)[3]
    # The bars are the square roots of how often each count occurs.
    bars = figure.axes[0].patches
    y = zero_inflated_counts.Y.numpy()
    assert bars[0].get_height() == pytest.approx(np.sqrt((y == 0).sum()))
    assert sum(bar.get_height() ** 2 for bar in bars) == pytest.approx(len(y))
    (line,) = figure.axes[3].lines
    assert line.get_xdata()[0] == pytest.approx((y == 0).mean())
    assert poisson.verdict.level in figure.get_suptitle()


def test_the_statistics_that_fit_worst_are_kept(poisson):
    figure = predictive(poisson, draws=300, max_panels=2)
    assert len(figure.axes) == 2
    assert titles(figure)[1].startswith("share of zeros")
    own = predictive(poisson, statistics={"twos": lambda y: (y == 2).sum()}, draws=300)
    # p is 0.03: which word that gets depends on the draws.
    assert re.match(r"twos: (too|somewhat) low", titles(own)[1])


def test_densities_of_several_sites():
    posterior = vi.fit(missing_data.MODEL, "full_rank", seed=0)
    figure = predictive(posterior, draws=60, max_panels=4)
    assert titles(figure)[:2] == ["y_observed: data and copies", "follow_up: data and copies"]
    assert titles(figure)[2].startswith(("y_observed: ", "follow_up: "))
    assert len(figure.axes[0].lines) == 41  # 40 copies and the data
    only = predictive(posterior, sites="follow_up", draws=60, max_panels=1)
    assert titles(only) == ["follow_up: data and copies"]


def test_shares_and_single_observations():
    def classes(c, y):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("y", dist.Normal(p[..., 0], 1.0), obs=y)
        with pyro.plate("row", len(c)):
            pyro.sample("c", dist.Categorical(p), obs=c)

    model = vi.Model(classes, torch.tensor([0, 2, 2, 1]), torch.tensor(0.3))
    figure = predictive(vi.fit(model, "mean_field", seed=0, steps=100), draws=60, max_panels=3)
    assert [t.get_text() for t in figure.axes[1].get_xticklabels()] == ["0", "1", "2"]
    assert [bar.get_height() for bar in figure.axes[1].patches] == [0.25, 0.25, 0.5]


def test_bins_of_values_on_a_grid_hold_as_many_values_each():
    shares = np.arange(101) / 101
    counted, edges = np.histogram(shares, _edges(shares))
    assert counted.sum() == 101
    assert set(counted[:-1]) == {4}
    assert np.allclose(np.diff(edges), 4 / 101)
    some = np.random.default_rng(0).normal(size=3000)
    assert len(_edges(some)) == 31
    assert len(_edges(np.array([0.0, 1.0]))) == 3


def test_what_cannot_be_drawn(poisson, tmp_path, monkeypatch):
    with pytest.raises(OptionError, match="max_panels= must be an integer of at least 1, got 0"):
        predictive(poisson, max_panels=0)
    with pytest.raises(FileError):
        predictive(poisson, tmp_path / "missing" / "a.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError):
        predictive(poisson, tmp_path / "a.png")
