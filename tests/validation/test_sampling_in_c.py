"""NUTS on a density in C: by its address, through Python, and without, the same posterior."""

from __future__ import annotations

import _thread
import importlib
import threading
import time

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import models.eight_schools
import pyro_vi_kit as vi
from pyro_vi_kit.capture.in_c import library
from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.validation.nuts import SamplerWarning, nuts, with_nutpie

pytestmark = [
    pytest.mark.filterwarnings("ignore::pyro_vi_kit.validation.nuts.SamplerWarning"),
    pytest.mark.skipif(library.compiler() is None, reason="there is no C compiler"),
]

EIGHT = models.eight_schools.MODEL
# Enough for a compiler to be asked.
LONG = dict(chains=2, draws=500, tune=300, progress=False)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "in_c"
    monkeypatch.setenv("PYRO_VI_KIT_CACHE", str(folder))
    monkeypatch.delenv("PYRO_VI_KIT_COMPILE", raising=False)


@pytest.fixture
def models_made(monkeypatch):
    """What `with_nutpie.by_address` gave nutpie, call by call."""
    made = []
    original = with_nutpie.by_address

    def model(*arguments):
        made.append(original(*arguments))
        return made[-1]

    monkeypatch.setattr(with_nutpie, "by_address", model)
    return made


def values(tree):
    return tree.posterior["theta"].to_numpy()


def test_all_ways_have_the_same_posterior(models_made, monkeypatch):
    by_its_address = nuts(EIGHT, **LONG)
    assert by_its_address.attrs["engine"] == "c"
    assert models_made[-1] is not None
    made = len(models_made)
    monkeypatch.setattr(with_nutpie, "_found", {})
    monkeypatch.setattr(with_nutpie, "_RELEASES", ("0.15.0",))
    through_python = nuts(EIGHT, **LONG)
    assert len(models_made) == made
    assert through_python.attrs["engine"].startswith("c (called through Python: nutpie 0.16.")
    assert np.array_equal(values(by_its_address), values(through_python))
    for fact in ("evaluations", "divergences", "max_rhat"):
        assert by_its_address.attrs[fact] == through_python.attrs[fact]
    monkeypatch.setenv("PYRO_VI_KIT_COMPILE", "off")
    without = nuts(EIGHT, **LONG)
    assert without.attrs["engine"].startswith("script")
    for name in ("mu", "tau", "theta"):
        found, expected = (tree.posterior[[name]] for tree in (by_its_address, without))
        error = np.hypot(az.mcse(found)[name], az.mcse(expected)[name])
        difference = found[name].mean(("chain", "draw")) - expected[name].mean(("chain", "draw"))
        # Ten means, each within 4 Monte Carlo standard errors of a difference.
        assert (np.abs(difference) < 4 * error).all(), name


def test_same_seed_same_draws_on_any_number_of_cores():
    runs = [values(nuts(EIGHT, seed=seed, cores=n, **LONG)) for seed, n in ((3, 1), (3, 2), (4, 1))]
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])
    assert not np.array_equal(runs[0][0], runs[0][1])


def test_what_was_done_is_counted():
    tree = nuts(EIGHT, **LONG)
    steps = int(tree.sample_stats["n_steps"].sum())
    assert tree.attrs["evaluations"] > steps + 2 * 300
    assert tree.sample_stats["lp"].shape == (2, 500)


def test_progress_is_shown(capfd, monkeypatch):
    monkeypatch.setattr("pyro_vi_kit.core.progress._DELAY", 0.0)
    nuts(EIGHT, **{**LONG, "draws": 4000, "progress": True})
    assert "NUTS, 2 chains" in capfd.readouterr().err


def test_divergences_are_reported(models_made):
    def wall(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(mu > 0.5, -torch.inf, 0.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    plan = LONG | {"draws": 4000}
    with pytest.warns(SamplerWarning, match="transitions diverged.*target_accept"):
        tree = nuts(vi.Model(wall, torch.tensor(0.0)), **plan)
    assert tree.attrs["engine"] == "c"
    assert models_made[-1] is not None
    assert tree.attrs["divergences"] > 0


def test_no_starting_point():
    def impossible(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.where(mu.abs() < 100.0, -torch.inf, 0.0))
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    with pytest.raises(ModelError, match="no starting point"):
        nuts(vi.Model(impossible, torch.tensor(0.0)), **LONG | {"draws": 4000})


def test_interrupt():
    """Ctrl-C ends sampling at once, and nothing is left running."""
    timer = threading.Timer(3.0, _thread.interrupt_main)
    running = set(threading.enumerate())
    timer.start()
    start = time.perf_counter()
    try:
        tree = nuts(EIGHT, draws=1_000_000, chains=2, progress=False)
    except KeyboardInterrupt:
        pass  # there were no draws yet
    else:
        assert tree.attrs["interrupted"] == 1
    assert time.perf_counter() - start < 3.0 + 5.0
    timer.join()
    assert set(threading.enumerate()) <= running
    nuts(EIGHT, **LONG)


def test_short_runs_do_without():
    tree = nuts(EIGHT, chains=2, draws=10, tune=10, progress=False)
    assert tree.attrs["engine"].startswith("script")


@pytest.mark.parametrize("broken", ["signature", "sampler", "draws", "raises"])
def test_a_nutpie_that_does_otherwise_is_called_through_python(broken, monkeypatch):
    """Whatever it does otherwise, the draws are those of its public interface, and it is said."""
    expected = nuts(EIGHT, **LONG)
    made = with_nutpie.by_address

    def other(nutpie, dim, density, start):
        if broken == "raises":
            raise TypeError("another signature")
        return made(nutpie, dim, density, lambda seed: start(seed) + 0.1)

    monkeypatch.setattr(with_nutpie, "_found", {})
    if broken == "signature":
        changed = with_nutpie._SIGNATURES | {"LogpFunc": "(ptr)"}
        monkeypatch.setattr(with_nutpie, "_SIGNATURES", changed)
    elif broken == "sampler":
        model = importlib.import_module("nutpie").compiled_pyfunc.PyFuncModel
        monkeypatch.setattr(model, "_make_sampler", lambda self, a, b, cores, more: None)
        monkeypatch.setattr(with_nutpie, "_differs", lambda *arguments: "")
        assert "makes samplers otherwise" in with_nutpie._unknown(importlib.import_module("nutpie"))
        return
    else:
        monkeypatch.setattr(with_nutpie, "by_address", other)
    found = nuts(EIGHT, **LONG)
    assert "called through Python" in found.attrs["engine"]
    assert np.array_equal(values(found), values(expected))
