"""What is raised, interrupted, terminated or killed in the middle keeps what there was."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from test_checkpoint import assert_same
from test_fork import in_child
from toys import gaussian, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit.core import checkpoint, stopping
from pyro_vi_kit.core.errors import FitError, ModelError, OptionError
from pyro_vi_kit.validation import suite
from pyro_vi_kit.validation.calibrate import workers
from pyro_vi_kit.validation.nuts import with_nutpie
from pyro_vi_kit.validation.nuts.target import Draws, Target

Y = torch.tensor([1.0, 2.0, 4.0])
STEPS = {"method": "stochastic", "engine": "eager", "init": "origin", "seed": 0}


# -- a model that raises ----------------------------------------------------------------------


class Raising:
    """A model of two means that raises from one of its calls on."""

    def __init__(self, error, at=10**9):
        self.error, self.at, self.calls = error, at, 0

    def __call__(self, y):
        self.calls += 1
        if self.calls >= self.at:
            raise self.error
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        with pyro.plate("n", len(y)) as index:
            pyro.sample("y", dist.Normal(b, 1.0), obs=y[index])


def calls_of(**options):
    """How often a fit that goes well calls its model."""
    model = Raising(None)
    vi.fit(vi.Model(model, Y), **options)
    return model.calls


ERRORS = [ZeroDivisionError("boom"), MemoryError("boom"), RuntimeError("boom"), KeyError("boom")]
WAYS = {
    "steps": {"guide": "mean_field", "steps": 40} | STEPS,
    "epochs": {"guide": "mean_field", "epochs": 3, "engine": "eager", "init": "origin", "seed": 0},
    "pyro": {"guide": "mean_field", "steps": 30, "seed": 0, "engine": "pyro", "init": "origin"},
}


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("way", WAYS)
def test_what_a_model_raises_in_a_fit_is_told_and_what_there_was_is_kept(way, error):
    at = calls_of(**WAYS[way]) - 8
    model = Raising(error, at)
    with pytest.raises(
        FitError, match=rf"the model raised {type(error).__name__}: .*boom.*{__name__}"
    ) as told:
        vi.fit(vi.Model(model, Y), **WAYS[way])
    # Pyro adds shapes to what it lets through.
    assert type(told.value.__cause__) is type(error)
    found = told.value.posterior
    assert found.status.reason == "failed"
    assert "boom" in found.status.advice
    assert len(found.losses) > 0
    # It is a posterior like that of an interrupt.
    model.at = 10**9
    assert np.isfinite(found.elbo)
    later = vi.fit(found.model, resume=found, steps=5)
    assert len(later.losses) == len(found.losses) + 5


def test_an_option_that_fit_has_not_is_no_fault_of_the_model():
    with pytest.raises(OptionError, match=r"fit: got an unexpected .* 'max_steps'; .* steps, init"):
        vi.fit(vi.Model(Raising(TypeError("no number")), Y), max_steps=3)  # pyright: ignore[reportCallIssue]
    model = Raising(TypeError("no number"))
    model.at = 0
    with pytest.raises(ModelError, match="the model raised TypeError: no number"):
        vi.fit(vi.Model(model, Y))


def test_a_model_that_raises_after_the_fit_is_told_of_too():
    model = Raising(MemoryError("no room"))
    posterior = vi.fit(vi.Model(model, Y), "mean_field", seed=0)
    model.at = 0
    asked = [lambda: posterior.elbo, lambda: posterior.sample(3), lambda: posterior.to_arviz(3)]
    for ask in asked:
        with pytest.raises(
            ModelError, match=r"the model or guide raised MemoryError: no room \(at"
        ):
            ask()


@pytest.mark.parametrize("way", ["steps", "epochs"])
def test_the_same_call_goes_on_once_the_model_is_mended(way, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_EVERY", 0.0)
    expected, path = vi.fit(vi.Model(Raising(None), Y), **WAYS[way]), tmp_path / "run.ckpt"
    model = Raising(MemoryError("no room"), calls_of(**WAYS[way]) - 6)
    with pytest.raises(FitError, match=f"no room.*The same call goes on from {path}"):
        vi.fit(vi.Model(model, Y, name=expected.model.name), checkpoint=path, **WAYS[way])
    model.at = 10**9
    again = vi.fit(vi.Model(model, Y, name=expected.model.name), checkpoint=path, **WAYS[way])
    assert_same(again, expected)


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize(
    "guide", ["mean_field", "full_rank", "low_rank", "mixture", "delta", "auto"]
)
def test_wherever_a_search_is_the_error_is_ours(guide, share):
    at = int(share * calls_of(guide=guide, seed=0))
    with pytest.raises(vi.ViError, match="boom"):
        vi.fit(vi.Model(Raising(ZeroDivisionError("boom"), at), Y), guide, seed=0)


# -- an interrupt -----------------------------------------------------------------------------


def interrupted_after(monkeypatch, draws):
    """Ctrl-C once the chains have made so many draws, warm-up among them."""
    check = Target.check

    def checked(self):
        check(self)
        if self.draws >= draws:
            raise KeyboardInterrupt

    monkeypatch.setattr(Target, "check", checked)
    monkeypatch.setattr(with_nutpie, "_POLL_SECONDS", 0.001)


@pytest.mark.filterwarnings("ignore::pyro_vi_kit.validation.nuts.SamplerWarning")
def test_ctrl_c_in_nuts_keeps_the_draws(monkeypatch):
    """Two chains after one another: one and a half are made."""
    interrupted_after(monkeypatch, 100 + 200 + 100 + 80)
    tree = vi.nuts(gaussian(2)[0], chains=2, draws=200, tune=100, sampler="pyro", progress=False)
    assert "interrupted: there are 1 of 2 chains, of 200 of 200" in tree.attrs["warnings"]
    assert dict(tree["posterior"].sizes)["draw"] == 200
    assert tree.attrs["interrupted"] == 1
    assert tree.attrs["converged"] == 0
    assert tree.attrs["draws"] == 200


@pytest.mark.filterwarnings("ignore::pyro_vi_kit.validation.nuts.SamplerWarning")
def test_ctrl_c_in_nutpie_keeps_the_draws(monkeypatch):
    pytest.importorskip("nutpie")
    interrupted_after(monkeypatch, 2_000)
    tree = vi.nuts(gaussian(2)[0], chains=2, draws=200_000, tune=50, cores=2, progress=False)
    sizes = dict(tree["posterior"].sizes)
    assert 4 <= sizes["draw"] < 200_000
    assert np.isfinite(tree["posterior"]["z"].to_numpy()).all()
    assert tree.attrs["interrupted"] == 1
    assert "interrupted: there are" in tree.attrs["warnings"]


@pytest.mark.parametrize("sampler", ["pyro", "nutpie"])
def test_an_interrupt_before_there_are_draws_is_one(sampler, monkeypatch):
    if sampler == "nutpie":
        pytest.importorskip("nutpie")
    monkeypatch.setattr(Target, "check", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr(with_nutpie, "_POLL_SECONDS", 0.001)
    monkeypatch.setattr(with_nutpie, "_so_far", lambda sampler: sampler.cancel())
    with pytest.raises(KeyboardInterrupt):
        vi.nuts(
            gaussian(2)[0], chains=2, draws=100_000, tune=5_000, sampler=sampler, progress=False
        )


@pytest.mark.parametrize(
    ("lengths", "kept"),
    [([9, 9, 9], (3, 9)), ([9, 5, 0], (2, 5)), ([9, 4, 0], (1, 9)), ([3, 0], None)],
)
def test_chains_of_different_lengths_become_a_rectangle(lengths, kept):
    z = np.full((len(lengths), 9, 2), np.nan)
    for chain, length in enumerate(lengths):
        z[chain, :length] = chain
    found = Draws(z, {"lp": z[..., 0]}).rectangle()
    assert (None if found is None else found.z.shape[:2]) == kept
    assert found is None or np.isfinite(found.stats["lp"]).all()


def one_mean(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def test_ctrl_c_in_calibrate_keeps_the_simulations(monkeypatch):
    calibrate = functools.partial(
        vi.calibrate, vi.Model(one_mean, Y), "mean_field", simulations=40, draws=19, seed=0, jobs=1
    )
    one, done = workers.Run.one, itertools.count(1)

    def interrupted(self, number):
        if next(done) == stop:
            raise KeyboardInterrupt
        one(self, number)

    monkeypatch.setattr(workers.Run, "one", interrupted)
    stop = 26
    found = calibrate()
    assert found.interrupted
    assert found.numbers.tolist() == list(range(25))
    assert "25 of 40 simulations (interrupted)" in repr(found)
    done, stop = itertools.count(1), 20
    with pytest.raises(KeyboardInterrupt):
        calibrate()


# -- SIGTERM ----------------------------------------------------------------------------------

MODEL_FILE = """
import os, signal
import torch, pyro, pyro.distributions as dist, pyro_vi_kit as vi

calls = 0

def model(y):
    global calls
    calls += 1
    {at_each_call}
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

MODEL = vi.Model(model, torch.tensor([1.0, 2.0, 4.0]))
"""


def vi_kit(folder, *arguments, at_each_call="pass", wait=True):
    """Run the command line with a model that does something at each of its calls."""
    (folder / "tmp").mkdir(exist_ok=True)
    (folder / "model.py").write_text(MODEL_FILE.format(at_each_call=at_each_call))
    environment = os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "TMPDIR": str(folder / "tmp"),
        "PYRO_VI_KIT_COMPILE": "off",
    }
    code = "from pyro_vi_kit.cli.app import main; main()"
    command, rest = arguments[0], arguments[1:]
    return subprocess.run(
        [sys.executable, "-c", code, command, str(folder / "model.py"), *rest],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        check=False,
    )


def test_a_fit_that_is_terminated_goes_on(tmp_path):
    """Under SIGTERM it ends as on Ctrl-C, with 143."""
    options = ["--method", "stochastic", "--steps", "400", "--engine", "eager", "--seed", "0"]
    options += [
        "--init",
        "origin",
        "--guide",
        "mean_field",
        "--checkpoint",
        str(tmp_path / "run.ckpt"),
    ]
    out = tmp_path / "fit.nc"
    kill = "calls == 100 and os.kill(os.getpid(), signal.SIGTERM)"
    done = vi_kit(tmp_path, "fit", *options, "--out", str(out), at_each_call=kill)
    assert done.returncode == stopping.TERMINATED == 143, done.stderr
    assert "terminated (SIGTERM)" in done.stderr
    assert "Traceback" not in done.stderr
    model = vi.Model(one_mean, Y, name="model")
    broken = vi.load(out, model)
    assert broken.status.reason == "interrupted"
    options = {"method": "stochastic", "steps": 400, "engine": "eager", "init": "origin", "seed": 0}
    again = vi.fit(model, "mean_field", checkpoint=tmp_path / "run.ckpt", **options)
    whole = vi.fit(model, "mean_field", **options)
    assert 0 < len(broken.losses) < len(whole.losses)
    assert np.array_equal(again.losses, whole.losses)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_library_call_that_is_terminated_ends_the_process_in_order(tmp_path):
    code = (
        "import atexit, runpy, pyro_vi_kit as vi\n"
        "atexit.register(print, 'exit handlers ran', flush=True)\n"
        f"model = runpy.run_path({str(tmp_path / 'model.py')!r})['MODEL']\n"
        "try:\n"
        "    vi.fit(model, 'mean_field', seed=0)\n"
        "finally:\n"
        "    print('finally', flush=True)\n"
    )
    kill = "calls == 12 and os.kill(os.getpid(), signal.SIGTERM)"
    (tmp_path / "model.py").write_text(MODEL_FILE.format(at_each_call=kill))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 143, done.stderr
    assert done.stdout.split("\n")[:2] == ["finally", "exit handlers ran"]
    assert done.stderr.startswith("fit: terminated (SIGTERM)")


def test_somebody_elses_handler_is_left_alone():
    asked = []
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    try:
        with stopping.sigterm_as_interrupt() as received:
            os.kill(os.getpid(), signal.SIGTERM)
        assert asked == [1]
        assert received == []
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(stopping.Terminated), stopping.sigterm_as_interrupt():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGKILL", -9)])
def test_no_worker_outlives_calibrate(name, code, tmp_path):
    """A worker ends its parent at one of its calls; it has to see that itself after a SIGKILL."""
    pids = tmp_path / "pids"
    pids.mkdir()
    at_each_call = (
        "('loky' in ' '.join(open('/proc/self/cmdline').read().split('\\0'))) and "
        f"(open({str(pids)!r} + '/' + str(os.getpid()), 'w').close() or "
        f"(calls == 150 and os.kill(os.getppid(), signal.{name})))"
    )
    done = vi_kit(
        tmp_path,
        "calibrate",
        "--jobs",
        "2",
        "--simulations",
        "400",
        "--guide",
        "mean_field",
        at_each_call=at_each_call,
    )
    assert done.returncode == code, done.stderr
    workers_ = [int(path.name) for path in pids.iterdir()]
    assert workers_
    assert gone(workers_), "workers are alive"
    assert gone_files(tmp_path / "tmp"), list((tmp_path / "tmp").iterdir())


def gone(pids, seconds=60.0):
    return waited(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), seconds)


def gone_files(folder, seconds=60.0):
    return waited(lambda: list(folder.iterdir()) == [], seconds)


def waited(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# -- kill -9 ----------------------------------------------------------------------------------


def killing(monkeypatch_at, work):
    """Run it in a fork that kills itself at the n-th step of writing files; whether it was killed."""

    def killed():
        left = itertools.count(1)

        def dying(function):
            def call(*args, **kwargs):
                if next(left) == monkeypatch_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for name in ("fsync", "replace"):
            setattr(os, name, dying(getattr(os, name)))
        work()
        return "done"

    return in_child(killed) != "done"


def test_a_fit_that_is_killed_at_any_moment_loses_nothing(tmp_path, monkeypatch):
    """At ten moments of its writing and stepping, one after the other; the numbers are the same."""
    monkeypatch.setattr(checkpoint, "_EVERY", 0.0)
    path, model = tmp_path / "run.ckpt", two_scales_model()
    fit = functools.partial(vi.fit, model, "mean_field", steps=150, **STEPS)
    expected = fit()
    moments = [1, 2, 3, 4, 6, 8, 2, 3, 5, 1]
    assert all(killing(at, lambda: fit(checkpoint=path)) for at in moments)
    assert_same(fit(checkpoint=path), expected)
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.ckpt"]


@pytest.mark.filterwarnings("ignore::pyro_vi_kit.validation.nuts.SamplerWarning")
def test_a_bench_that_is_killed_at_any_moment_loses_nothing(tmp_path):
    (tmp_path / "model.py").write_text(MODEL_FILE.format(at_each_call="pass"))

    def run(folder):
        return suite.run(
            [tmp_path / "model.py"],
            ["mean_field", "full_rank"],
            ["elbo"],
            tmp_path / folder,
            resume=True,
            nuts=None,
            say=lambda text: None,
        )

    expected = run("whole")
    # Each cell writes its posterior, its record and the table, in three steps each.
    assert all(killing(at, lambda: run("killed")) for at in (1, 2, 3, 4, 5, 7, 1, 3, 5, 2))
    found = run("killed")
    same = [name for name in expected.columns if name not in ("seconds",)]
    assert found[same].equals(expected[same])
    assert sorted(p.name for p in (tmp_path / "killed").rglob("*")) == sorted(
        p.name for p in (tmp_path / "whole").rglob("*")
    )


# -- copies -----------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy])
def test_a_posterior_is_saved_and_not_pickled(copied):
    posterior = vi.fit(gaussian(2)[0], "mean_field", seed=0)
    with pytest.raises(OptionError, match=r"posterior\.save\(path\).*vi\.load\(path, model\)"):
        copied(posterior)
