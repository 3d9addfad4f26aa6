"""A fit changes nothing for other threads, and nothing that they do changes the fit."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vi_kit as vi
from pyro_vi_kit.core import runtime
from pyro_vi_kit.core.per_thread import warnings_here

ROUNDS = 200
Y = torch.tensor([1.0, 2.0, 4.0, 3.5])


def model(y):
    scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    spread = pyro.sample("spread", dist.Gamma(2.0, 1.0))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(mu, scale * spread), obs=y)


def fitted(engine="eager", guide="mean_field"):
    posterior = vi.fit(vi.Model(model, Y), guide, engine=engine, steps=25, seed=3, progress=False)
    drawn = posterior.sample(50, seed=1)
    return np.concatenate([[float(posterior.elbo)], drawn["mu"], drawn["spread"]])


def other_model():
    with pyro.plate("rows", 3):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", 2):
        pyro.sample("z", dist.Normal(pyro.param("shift", torch.tensor(0.5)), 1.0))
    return x


def seen(round_):
    """What a thread sees that uses torch and Pyro for itself."""
    torch.manual_seed(round_)
    numbers = torch.randn(3)
    trace = poutine.trace(other_model).get_trace()
    x, z = trace.nodes["x"], trace.nodes["z"]
    store = pyro.get_param_store()
    return {
        "refusals": [
            refused(lambda: dist.Normal(0.0, -1.0, validate_args=True)),
            refused(lambda: dist.Normal(0.0, -1.0)),
            refused(lambda: torch.distributions.Normal(0.0, -1.0)),
            refused(lambda: dist.Normal(0.0, -1.0, validate_args=False)),
            refused(lambda: torch.broadcast_shapes((2,), (3,))),
            refused(lambda: torch.broadcast_shapes((-2,))),
        ],
        "dtypes": [
            torch.get_default_dtype(),
            torch.tensor(1.0).dtype,
            (torch.arange(3) / 2).dtype,
            dist.Normal(0.0, 1.0).sample().dtype,
            torch.nn.Linear(2, 2).weight.dtype,
        ],
        "numbers": [numbers.tolist(), dist.Gamma(2.0, 3.0).sample().item(), x["value"].tolist()],
        "state": torch.get_rng_state().sum().item(),
        "sites": list(trace.nodes),
        "plates": [[frame.dim for frame in site["cond_indep_stack"]] for site in (x, z)],
        "store": sorted(store.keys()),
        "shift": store["shift"].item(),
        "checks": [module.is_validation_enabled() for module in (dist, pyro.infer, poutine)],
        "modes": torch._C._len_torch_function_stack(),
        "warned": warned(),
        "threads": new_thread(torch.get_num_threads),
    }


def refused(make):
    try:
        make()
    except (ValueError, RuntimeError) as error:
        return type(error).__name__
    return None


def warned():
    """Whether this thread is told of what a fit keeps quiet about."""
    try:
        warnings.warn("Encountered NaN: loss", stacklevel=2)
    except UserWarning:
        return True
    return False


def new_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


class Fitting(threading.Thread):
    """Fits until it is told to stop, and keeps what came out."""

    def __init__(self, engine, guide="mean_field"):
        super().__init__()
        self.engine, self.guide = engine, guide
        self.found, self.error, self.stopped = [], None, False

    def run(self):
        try:
            while not self.stopped or not self.found:
                self.found.append(fitted(self.engine, self.guide))
        except BaseException as error:  # noqa: BLE001  told by the main thread
            self.error = error


@pytest.fixture
def several_threads():
    """Torch computing on three threads, for those that a fit may leave on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("own_param_store", "several_threads")
@pytest.mark.parametrize("engine", ["eager", "captured", "pyro"])
def test_two_threads_do_not_see_each_other(engine):
    """One fits and one uses Pyro: 200 rounds of each see what they see alone."""
    expected, alone = [seen(k) for k in range(ROUNDS)], fitted(engine)
    fitting = Fitting(engine)
    fitting.start()
    try:
        found = [seen(k) for k in range(ROUNDS)]
        switches = []
        for k in range(ROUNDS):
            with pyro.validation_enabled(bool(k % 2)):
                switches.append(refused(lambda: dist.Normal(0.0, -1.0)) is not None)
    finally:
        fitting.stopped = True
        fitting.join()
    assert fitting.error is None
    for before, after in zip(expected, found, strict=True):
        assert after == before
    assert switches == [bool(k % 2) for k in range(ROUNDS)]
    assert all(np.array_equal(one, alone) for one in fitting.found)


@pytest.mark.usefixtures("own_param_store")
def test_what_another_thread_sets_stays_set():
    """Switches, dtype, parameters and seeds that it sets while a fit runs are there afterwards."""
    entered, go = threading.Event(), threading.Event()

    def standing(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        if torch.get_default_dtype() == torch.float64:
            entered.set()
            assert go.wait(60)
        pyro.sample("y", dist.Normal(mu, 1.0).expand(y.shape).to_event(1), obs=y)

    thread = threading.Thread(
        target=lambda: vi.fit(vi.Model(standing, Y), "mean_field", steps=2, progress=False)
    )
    thread.start()
    assert entered.wait(60)
    try:
        pyro.enable_validation(False)
        torch.set_default_dtype(torch.float16)
        pyro.param("mine", torch.tensor(2.0))
        torch.manual_seed(7)
        assert dist.Normal(0.0, -1.0).scale == -1
        assert torch.tensor(1.0).dtype == torch.float16
    finally:
        go.set()
        thread.join()
        left = torch.get_default_dtype(), dist.is_validation_enabled(), torch.randn(2)
        torch.set_default_dtype(torch.float32)
        pyro.enable_validation(True)
    assert left[:2] == (torch.float16, False)
    torch.manual_seed(7)
    assert torch.equal(left[2], torch.randn(2, dtype=torch.float16))
    assert pyro.get_param_store()["mine"] == 2.0


def test_two_fits_at_the_same_time_are_as_each_alone():
    guides = ["mean_field", "full_rank"]
    alone = [fitted("captured", guide) for guide in guides]
    both = [Fitting("captured", guide) for guide in guides]
    for one in both:
        one.start()
    for one in both:
        one.stopped = True
        one.join()
        assert one.error is None
    for expected, one in zip(alone, both, strict=True):
        assert all(np.array_equal(found, expected) for found in one.found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_defaults_inside_are_those_of_the_default_dtype(dtype):
    """All ways to make a floating tensor of nothing, in a thread's own default dtype."""

    def made():
        n, c = torch.arange(1, 4), torch.tensor([True, False, True])
        torch.manual_seed(0)
        return [
            torch.tensor(0.1), torch.tensor([0.1, 2]), torch.tensor([[1, 0.3]]), torch.as_tensor(0.1),
            torch.tensor(0.1 + 0.2j), torch.asarray([0.1]), torch.full((2,), 0.1),
            torch.arange(0, 1, 0.1),
            torch.zeros(2), torch.ones(2), torch.eye(2), torch.linspace(0, 1, 7),
            torch.scalar_tensor(0.1),
            n / 3, n * 0.1, 0.1 * n, n + 0.1, 1 / n, n ** 0.3, 0.3**n, n.sqrt(), n.log(), n.sigmoid(),
            c * 0.1, torch.where(c, 0.1, 0.2), torch.where(c, n, 0.1), n.where(c, 0.1),
            torch.true_divide(n, 7), torch.lgamma(n), n.new_tensor([0.1]), n * 0.1j,
            torch.rand(3), torch.randn(3), torch.normal(0.0, 0.1, (2,)), torch.rand((2,), dtype=None),
            torch.nn.Linear(2, 2).weight.detach(), dist.Normal(0.1, 0.3).sample(),
            dist.Dirichlet(torch.tensor([0.3, 0.4])).sample(),
            torch.zeros(2, dtype=torch.get_default_dtype()),
            torch.tensor(1), torch.tensor([True]), torch.arange(3), torch.tensor(np.float32(0.1)),
            torch.tensor(np.array([0.1])), torch.zeros(2, dtype=torch.float16), n.float(), n.double(),
            torch.full((2,), 1), n // 2, torch.tensor(0.1, dtype=torch.float32),
        ]  # fmt: skip

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        expected = made()
    finally:
        torch.set_default_dtype(before)
    with runtime.isolated(dtype), runtime.RandomStream(0):
        found = made()
    for k, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert a.dtype == b.dtype, k
        assert torch.equal(a, b), k


def test_a_stream_is_torchs_own_numbers():
    """Whatever draws has the numbers that the global generator with that seed would give."""

    def drawn():
        x = torch.full((4, 3), 0.4)
        return [
            torch.rand(2), torch.randn(2), torch.randint(9, (5,)), torch.randperm(6), torch.normal(x, x),
            torch.bernoulli(x), torch.poisson(9 * x), torch._standard_gamma(x), torch.rand_like(x),
            torch.randn_like(x), torch.randint_like(x, 9), torch.multinomial(x, 2), x.clone().normal_(),
            x.clone().uniform_(), x.clone().exponential_(), x.clone().cauchy_(),
            x.clone().geometric_(0.3),
            x.clone().log_normal_(), x.clone().random_(), x.clone().bernoulli_(0.3), x.bernoulli(),
            torch.binomial(9 * x.round() + 9, x), dist.Dirichlet(x).sample(), dist.Beta(x, x).rsample(),
            dist.Categorical(x).sample(), torch.nn.functional.dropout(x),
            torch.nn.Linear(3, 3).weight.detach(),
            torch.nn.functional.gumbel_softmax(x), torch.poisson(x, None),
            torch.func.vmap(torch.randn_like, randomness="different")(x),
            torch.func.vmap(lambda row: torch.rand(2) * row[0], randomness="different")(x),
        ]  # fmt: skip

    torch.manual_seed(5)
    expected = drawn()
    before = runtime.random_state()
    with runtime.RandomStream(0):
        torch.manual_seed(5)
        found = drawn()
    assert runtime.random_state() == before
    for k, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert torch.equal(a, b), k


def test_warnings_are_kept_quiet_in_their_own_thread_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with warnings_here("ignore", "Encountered NaN"):
            assert not warned()
            assert new_thread(warned)
        with warnings_here("ignore"), warnings_here("error", "Encountered"):
            assert warned()
        assert warned()
