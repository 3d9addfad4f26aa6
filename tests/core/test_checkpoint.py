"""A fit that is stopped, by whatever, goes on with the numbers of one that never was."""

from __future__ import annotations

import functools
import io
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import gaussian, local_and_global_model, local_model, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core import checkpoint as checkpoints
from pyro_vi_kit.core import files
from pyro_vi_kit.core.errors import FileError, OptionError
from pyro_vi_kit.objectives import Elbo, Iwae
from pyro_vi_kit.optimize.engines import CapturedEngine, EagerEngine
from pyro_vi_kit.optimize.stochastic.runs import Runs

SMALL = guides.AffineCoupling(layers=2, hidden=(8,))
ADAM = functools.partial(torch.optim.Adam, lr=3e-3)
# Heavy-ball momentum is another kind of state than Adam's.
SGD = functools.partial(torch.optim.SGD, lr=1e-4, momentum=0.9)

SLOW = pytest.mark.slow

FITS = {
    "captured": {"guide": SMALL, "objective": Elbo(4), "steps": 330},
    "eager": {"guide": SMALL, "objective": Elbo(2), "steps": 230, "engine": "eager"},
    "optimizer": {"guide": SMALL, "objective": Elbo(4), "steps": 230, "optimizer": ADAM},
    "iwae": {"guide": "full_rank", "objective": Iwae(3), "steps": 230},
    "epochs": {
        "guide": SMALL,
        "objective": Elbo(4),
        "epochs": vi.Epochs(4, schedule="linear", clip=5.0),
    },
    "epochs, optimizer": {
        "guide": "full_rank",
        "objective": Elbo(2),
        "epochs": 3,
        "optimizer": SGD,
        "engine": "eager",
    },
    "minibatches": {"guide": "amortized", "batch_size": 2, "steps": 230},
    "minibatches, epochs": {"guide": "amortized", "batch_size": 2, "epochs": 60},
}


def model_of(name):
    return local_and_global_model() if name.startswith("minibatches") else two_scales_model()


def fit(name, path=None, **options):
    return vi.fit(model_of(name), **{"seed": 3, "checkpoint": path} | FITS[name] | options)


def assert_same(found, expected):
    """Bit for bit: losses, parameters, what is read off them."""
    assert np.array_equal(found.losses, expected.losses, equal_nan=True)
    parameters = found.approximation.guide.state_dict()
    for name, value in expected.approximation.guide.state_dict().items():
        assert torch.equal(parameters[name], value), name
    assert found.elbo == expected.elbo
    assert found.status == expected.status
    assert found.evaluations == expected.evaluations
    own, other = found.history.drop(columns="seconds"), expected.history.drop(columns="seconds")
    assert own.equals(other)


class Killed(BaseException):
    """What no handler of the package knows: to it, the process ends here."""


@pytest.fixture
def killed_in(monkeypatch):
    """``killed_in(n)``: dies in the n-th run of steps from now, half way through it."""

    def arrange(number):
        advance, runs = Runs.advance, itertools.count(1)

        def dying(self, rate, words=None):
            if next(runs) == number:
                self.engine.run(2, rate)
                raise Killed
            return advance(self, rate, words)

        monkeypatch.setattr(Runs, "advance", dying)

    yield arrange
    monkeypatch.undo()


@pytest.fixture
def eager_to_write(monkeypatch):
    monkeypatch.setattr(checkpoints, "_EVERY", 0.0)


# -- stopped and begun again ------------------------------------------------------------------


@pytest.mark.usefixtures("eager_to_write")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("captured", "epochs, optimizer") else SLOW)
        for name in FITS
    ],
)
def test_it_goes_on_as_if_it_had_never_been_stopped(name, tmp_path, killed_in, monkeypatch):
    expected = fit(name)
    path = tmp_path / "run.ckpt"
    # 31 steps, then 32 more and across the end of a stretch.
    for number in (6, 5):
        with monkeypatch.context():
            killed_in(number)
            with pytest.raises(Killed):
                fit(name, path)
            monkeypatch.undo()
            monkeypatch.setattr(checkpoints, "_EVERY", 0.0)
    made = len(checkpoints.read(path).state["losses"])
    assert 0 < made < len(expected.losses)
    found = fit(name, path)
    assert_same(found, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]


def test_between_two_writes_it_goes_back_to_the_older_one(tmp_path, killed_in, monkeypatch):
    """Epochs write at their end only, as long as they are short."""
    path = tmp_path / "run.ckpt"
    with monkeypatch.context():
        # 100 steps in runs of 1, 2, 4, ... 32 and 37, then of 64 and 36: in the third epoch.
        killed_in(7 + 2 + 2)
        with pytest.raises(Killed):
            fit("epochs", path)
        monkeypatch.undo()
    assert len(checkpoints.read(path).state["losses"]) == 200
    assert_same(fit("epochs", path), fit("epochs"))


@pytest.mark.parametrize("name", ["captured", "epochs"])
def test_ctrl_c_writes_what_there_is(name, tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    run, runs = CapturedEngine.run, itertools.count()

    def interrupted(self, steps, rate):
        if next(runs) == 8:
            run(self, 2, rate)
            raise KeyboardInterrupt
        return run(self, steps, rate)

    with monkeypatch.context() as patch:
        patch.setattr(CapturedEngine, "run", interrupted)
        broken = fit(name, path)
    assert broken.status.reason == "interrupted"
    assert broken.status.advice.endswith(f"The same call goes on from {path}.")
    assert len(checkpoints.read(path).state["losses"]) == len(broken.losses) > 0
    assert_same(fit(name, path), fit(name))


@pytest.mark.parametrize("name", ["captured", "epochs"])
def test_a_finished_fit_comes_back_without_a_step(name, tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    expected = fit(name, path)

    def never(self, steps, rate):
        raise AssertionError("trained again")

    monkeypatch.setattr(CapturedEngine, "run", never)
    monkeypatch.setattr("pyro_vi_kit.optimize.deterministic.fixed_draws.prefit", never)
    again = fit(name, path)
    assert_same(again, expected)
    assert again.engine == expected.engine == "captured"
    assert again.seconds >= expected.seconds - 1.0
    # And what came back can be saved, loaded and gone on from.
    monkeypatch.undo()
    saved = again.save(tmp_path / "run.nc", draws=5)
    later = vi.fit(model_of(name), resume=saved, steps=10)
    assert len(later.losses) == len(expected.losses) + 10


def test_a_budget_that_ran_out_is_no_end(tmp_path):
    path = tmp_path / "run.ckpt"
    # A start that no search under a deadline has cut short.
    first = fit("eager", path, budget=1e-6, init="origin")
    assert first.status.reason == "budget"
    assert len(first.losses) == 1
    assert_same(fit("eager", path, init="origin"), fit("eager", init="origin"))


def test_a_fit_without_a_seed_keeps_the_one_it_drew(tmp_path):
    path = tmp_path / "run.ckpt"
    first = fit("eager", path, seed=None, steps=20)
    assert_same(fit("eager", path, seed=None, steps=20), first)


def test_it_goes_with_resume(tmp_path):
    model, path = two_scales_model(), tmp_path / "run.ckpt"
    first = vi.fit(model, SMALL, steps=30, engine="eager", seed=0)
    expected = vi.fit(model, resume=first, steps=40, engine="eager")
    fresh = vi.fit(model, resume=first, steps=40, engine="eager", checkpoint=path)
    again = vi.fit(model, resume=first, steps=40, engine="eager", checkpoint=path)
    for found in (fresh, again):
        assert_same(found, expected)
    with pytest.raises(OptionError, match="resume"):
        vi.fit(model, SMALL, steps=40, engine="eager", seed=31, checkpoint=path)


def test_learned_parameters_of_the_model_go_on(tmp_path, killed_in, monkeypatch, eager_to_write):
    def learning(y):
        sd = pyro.param("sd", torch.tensor(0.2), constraint=dist.constraints.positive)
        with pyro.plate("datum", len(y)) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, sd), obs=y[index])

    model = vi.Model(learning, torch.tensor([0.5, -1.0, 2.0, 0.1]))
    train = functools.partial(vi.fit, model, "amortized", batch_size=2, steps=300, seed=0)
    expected, path = train(), tmp_path / "run.ckpt"
    killed_in(6)
    with pytest.raises(Killed):
        train(checkpoint=path)
    monkeypatch.undo()
    found = train(checkpoint=path)
    assert_same(found, expected)
    assert found.parameters["sd"] == expected.parameters["sd"]


def test_no_compiler_takes_over(tmp_path, monkeypatch):
    """One that is ready at once would; with a checkpoint it is not even looked for."""
    asked = []
    monkeypatch.setattr(
        "pyro_vi_kit.capture.program.impossible", lambda graph: asked.append(1) or "no"
    )
    fit("captured", tmp_path / "run.ckpt", steps=10)
    assert not asked
    fit("captured", steps=10)
    assert asked


# -- killed from outside ----------------------------------------------------------------------

CHILD = """
import os, sys, time
sys.path[:0] = {tests!r}
import torch
torch.set_num_threads(1)
import test_checkpoint as tests
from pyro_vi_kit.core import checkpoint
from pyro_vi_kit.optimize.stochastic.runs import Runs

checkpoint._EVERY = 0.0
number = 0
if {where!r} == "run":
    advance = Runs.advance
    def counted(self, rate, words=None):
        global number
        number += 1
        if number == {number}:
            self.engine.run(3, rate)
            print("now", flush=True)
            time.sleep(600)
        return advance(self, rate, words)
    Runs.advance = counted
else:
    replace = os.replace
    def counted(source, target):
        global number
        number += 1
        if number == {number}:
            print("now", flush=True)
            time.sleep(600)
        replace(source, target)
    os.replace = counted
tests.fit({name!r}, {path!r})
print("finished", flush=True)
"""


def kill_a_fit(name, path, where, number):
    """Run a fit in a process of its own, and SIGKILL it once it is where it is to die."""
    tests = [str(Path(__file__).parents[up]) for up in (0, 1)]
    code = CHILD.format(tests=tests, where=where, number=number, name=name, path=str(path))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdout.readline().strip() == "now"
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "where", "number"),
    [
        ("captured", "run", 12),
        ("captured", "write", 9),
        ("epochs", "run", 11),
        ("epochs, optimizer", "run", 11),
        ("minibatches, epochs", "write", 40),
    ],
)
def test_sigkill_costs_no_bit(name, where, number, tmp_path):
    path = tmp_path / "run.ckpt"
    kill_a_fit(name, path, where, number)
    expected = fit(name)
    made = len(checkpoints.read(path).state["losses"])
    assert 0 < made < len(expected.losses)
    assert_same(fit(name, path), expected)
    # Nor does it leave half a file.
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]


def test_a_disk_that_is_full_is_told_of_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run.ckpt"
    fit("eager", path, steps=5)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_EVERY", 0.0)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileError, match=r"cannot write .*run\.ckpt.*No space left"):
        fit("eager", path, steps=5)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]


# -- what is refused --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("written") / "run.ckpt"
    fit("eager", path, steps=5)
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guide": guides.AffineCoupling(layers=4, hidden=(8,))}, "guide"),
        ({"seed": 4}, "seed 3, now 4"),
        ({"steps": 6}, "steps 5, now 6"),
        ({"objective": Elbo(7)}, "objective"),
        ({"optimizer": ADAM}, r"optimizer None, now 'Adam\(lr=0.003\)'"),
        ({"epochs": 3}, "epochs None"),
        ({"dtype": torch.float32}, "dtype 'torch.float64', now 'torch.float32'"),
        ({"engine": "auto"}, "engine 'eager', now 'captured'"),
    ],
)
def test_another_request_is_refused(written, options, words):
    with pytest.raises(OptionError, match=rf"of another fit \(.*{words}"):
        fit("eager", written, **{"steps": 5} | options)


@pytest.mark.parametrize(
    ("model", "words"),
    [(two_scales_model(dim=2), "latents"), (two_scales_model(seed=1), "data '[0-9a-f]{8}', now")],
)
def test_another_model_is_refused(written, model, words):
    with pytest.raises(OptionError, match=words):
        vi.fit(model, SMALL, engine="eager", steps=5, seed=3, checkpoint=written)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04 and no more"])
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "run.ckpt"
    path.write_bytes(content)
    with pytest.raises(FileError, match="no checkpoint, or a damaged one"):
        fit("eager", path)
    assert path.read_bytes() == content


def test_half_a_file_is_refused(tmp_path, written):
    path = tmp_path / "run.ckpt"
    path.write_bytes(written.read_bytes()[: written.stat().st_size // 2])
    with pytest.raises(FileError, match="damaged one"):
        fit("eager", path)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path = tmp_path / "run.ckpt"
    torch.save({"kind": functools.partial(print, "run")}, path)
    with pytest.raises(FileError, match="no checkpoint"):
        fit("eager", path)


def rewrite(source, target, change):
    """Another checkpoint with a seal of its own, as only somebody who means to could make it."""
    content = torch.load(io.BytesIO(files.unsealed(source.read_bytes(), source)[0]))
    memory = io.BytesIO()
    torch.save(change(content), memory)
    target.write_bytes(files.sealed(memory.getvalue()))


@pytest.mark.parametrize(
    ("change", "words"), [({"kind": "x"}, "no checkpoint of"), ({"format": 99}, "format 99")]
)
def test_a_foreign_file_is_refused(written, tmp_path, change, words):
    path = tmp_path / "run.ckpt"
    rewrite(written, path, lambda content: content | change)
    with pytest.raises(FileError, match=words):
        fit("eager", path)


def test_a_place_that_cannot_be_written_to_is_refused_at_once(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "run.ckpt"):
        with pytest.raises(FileError, match="cannot write"):
            fit("eager", path)
    with pytest.raises(OptionError, match="must be the path of a file"):
        fit("eager", 3)


def pyro_guide(mean, covariance):
    loc = pyro.param("loc", torch.zeros(2))
    pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))


@pytest.mark.parametrize(
    ("guide", "options", "words"),
    [
        ("full_rank", {}, "L-BFGS on fixed draws"),
        ("full_rank", {"method": "stochastic", "engine": "pyro"}, "leave out engine='pyro'"),
        (pyro_guide, {}, "needs a guide of this package"),
    ],
)
def test_what_has_no_state_is_refused(guide, options, words, tmp_path):
    path = tmp_path / "run.ckpt"
    with pytest.raises(OptionError, match=words):
        vi.fit(gaussian(2)[0], guide, checkpoint=path, seed=0, **options)
    assert not path.exists()


# -- an engine's state ------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [None, ADAM, SGD])
@pytest.mark.parametrize("kind", [EagerEngine, CapturedEngine])
def test_an_engine_goes_on_from_its_state(kind, optimizer):
    def engine():
        density = vi.guides.make("amortized", density_of(local_model(dim=2)))
        plate = density.blocks[0].plate
        return kind(density, Elbo(2), seed=1, batches=Batches({plate: 4}), optimizer=optimizer)

    from pyro_vi_kit.model.log_density import Density
    from pyro_vi_kit.optimize.engines import Batches

    def density_of(model):
        torch.manual_seed(0)
        return Density(model)

    first, second = engine(), engine()
    first.run(5, 0.01)
    state = first.state()
    expected = first.run(6, 0.02)
    second.run(2, 0.1)
    second.restore(state)
    found = second.run(6, 0.02)
    assert torch.equal(found.bounds, expected.bounds)
    assert all(torch.equal(found.average[n], v) for n, v in expected.average.items())
    own = second.parameters()
    assert all(torch.equal(own[n], v) for n, v in first.parameters().items())
