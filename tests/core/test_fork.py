"""A process that is forked while another thread is inside a fit can fit, with everything as it was."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_kit as vi
from pyro_vi_kit.core import runtime

Y = torch.tensor([1.0, 2.0, 4.0])


def in_child(work, seconds=120.0):
    """Run it in a fork of this process; what it returns, as text, or fail after so many seconds."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            said = str(work())
        except BaseException:  # noqa: BLE001  told by the parent
            said = traceback.format_exc()
        os.write(writing, said.encode()[-4000:])
        os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + seconds
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.02)
    with os.fdopen(reading, "rb") as pipe:
        return pipe.read().decode()


def model(y, plate="n"):
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    with pyro.plate(plate, len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def fitted():
    posterior = vi.fit(vi.Model(model, Y), "mean_field", seed=0, progress=False)
    return [float(posterior.elbo), *posterior.sample(3, seed=1)["mu"].tolist()]


def state():
    """Everything global that a fit borrows."""
    return (
        torch.get_default_dtype(),
        torch.broadcast_shapes.__module__,
        dist.Distribution.__init__.__qualname__,
        torch.distributions.Distribution.__init__.__qualname__,
        dist.is_validation_enabled(),
        pyro.infer.is_validation_enabled(),
        pyro.poutine.is_validation_enabled(),
        len(pyro.poutine.runtime._PYRO_STACK),
        list(pyro.poutine.runtime._DIM_ALLOCATOR._stack),
        sorted(pyro.get_param_store().keys()),
        runtime.random_state(),
        torch.get_num_threads(),
    )


@pytest.fixture
def expected():
    return fitted()


@pytest.fixture
def inside():
    """A thread that stands still inside of a plate of a model that learns a parameter, in a fit."""
    entered, go = threading.Event(), threading.Event()

    def standing(y):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        mu = pyro.sample("mu", dist.Normal(0.0, scale))
        with pyro.plate("n", len(y)):
            # Not in the first runs, which have another default dtype's literals to look for.
            if runtime._OneThread.users and torch.get_default_dtype() == torch.float64:
                entered.set()
                assert go.wait(300)
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    def work():
        vi.fit(vi.Model(standing, Y), "mean_field", steps=3, engine="eager", seed=0, progress=False)

    before = state()
    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(300)
    yield before
    go.set()
    thread.join()


def test_a_child_fits_while_a_thread_of_its_parent_is_inside_a_fit(expected, inside):
    assert state() != inside  # or there is nothing to give back
    assert in_child(lambda: state() == inside) == "True"
    found = json.loads(in_child(fitted))
    assert np.array_equal(found, expected)


def test_a_thread_that_forks_inside_keeps_what_it_borrowed():
    """It goes on there in the child, and gives it back itself."""
    before = state()
    with runtime.isolated(torch.float64), runtime.RandomStream(3):
        torch.randn(2)
        here = state()
        assert in_child(lambda: state() == here) == "True"
    assert state() == before
