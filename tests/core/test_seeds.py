"""Random numbers of different purposes: what is drawn anew is not what a fit was trained on."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_vi_kit as vi
from pyro_vi_kit.core.runtime import RandomStream, generator_of, seed_of
from pyro_vi_kit.optimize.deterministic.search import matched_normals, sobol_normals
from pyro_vi_kit.posterior.diagnostics.loo import LooWarning


def regression(x, y):
    slope = pyro.sample("slope", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(x @ slope, scale), obs=y)


@pytest.fixture
def model():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    noise = torch.randn(20, generator=generator, dtype=torch.float64)
    return vi.Model(regression, x, x.sum(-1) + noise)


class Recorder(TorchDispatchMode):
    """Keeps every number that torch draws at random, whoever asks for it."""

    def __init__(self):
        super().__init__()
        self.drawn: set[float] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags and isinstance(found, torch.Tensor):
            with torch.utils._python_dispatch._disable_current_modes():
                # Whole numbers (a scrambling's digits, orders of rows) meet by chance.
                self.drawn |= {x for x in found.detach().flatten().tolist() if x != round(x)}
        return found

    def of(self, call):
        """The numbers that one call draws, and what it gives."""
        self.drawn = set()
        with self:
            given = call()
        return self.drawn, given


def warned(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LooWarning)
        return call()


FRESH = {
    "sample": lambda p, seed: p.sample(300, seed=seed),
    "resample": lambda p, seed: p.resample(300, seed=seed),
    "predict": lambda p, seed: p.predict(draws=300, seed=seed),
    "log_weights": lambda p, seed: p.log_weights(300, seed=seed),
    "loo": lambda p, seed: warned(lambda: p.loo(draws=300, seed=seed)),
    "evidence": lambda p, seed: p.evidence(300, seed=seed),
    "verdict": lambda p, seed: p.verdict,
    "linear response": lambda p, seed: p.linear_response(64, seed=seed),
}


@pytest.mark.parametrize("method", ["lbfgs", "stochastic", "pyro"])
def test_nothing_drawn_anew_was_trained_on(model, method):
    recorder = Recorder()
    options = {"method": method} if method != "pyro" else {"engine": "pyro"}
    if method != "lbfgs":
        options |= {"steps": 50, "engine": "eager" if method == "stochastic" else "pyro"}
    options["progress"] = False
    trained, posterior = recorder.of(lambda: vi.fit(model, "mean_field", seed=0, **options))
    # Points at which a model is looked over are the same for all.
    trained -= recorder.of(lambda: vi.fit(model, "mean_field", seed=99, **options))[0]
    assert len(trained) > 300
    for name, draw in FRESH.items():
        # Sums of seeds would meet at a neighbour's seed, or at one a number of draws away.
        for seed in (0, 1) if name != "verdict" else (0,):
            fresh, _ = recorder.of(lambda draw=draw, seed=seed: draw(posterior, seed))
            assert len(fresh) > 100, name
            assert not fresh & trained, (name, seed)


def test_fits_of_neighbouring_seeds_share_no_noise(model):
    # Draws double while they are too few: seed + draws would be 64 + 64 and 0 + 128.
    recorder = Recorder()
    noise = [
        recorder.of(lambda s=seed: vi.fit(model, "full_rank", seed=s, progress=False))[0]
        for seed in (0, 64, 2**32)
    ]
    # Points at which a model is looked over are the same for all.
    fixed = set.intersection(*noise)
    for i, one in enumerate(noise):
        assert len(one - fixed) > 100
        for other in noise[:i]:
            assert one & other == fixed


def test_a_resumed_fit_draws_other_numbers(model):
    recorder = Recorder()
    options = {"engine": "eager", "steps": 40, "progress": False}
    first, posterior = recorder.of(lambda: vi.fit(model, "mean_field", seed=0, **options))
    other, _ = recorder.of(lambda: vi.fit(model, "mean_field", seed=99, **options))
    again, _ = recorder.of(lambda: vi.fit(model, resume=posterior, **options))
    assert len(again - other) > 100
    assert first & again <= first & other


def test_the_trained_and_the_true_of_a_calibration_are_apart():
    def line(y):
        m = pyro.sample("m", dist.Normal(torch.zeros(()), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    recorder = Recorder()
    toy = vi.Model(line, torch.zeros(4, dtype=torch.float64))
    seen = []
    for seed in (0, 1, 2):
        found, _ = recorder.of(
            lambda s=seed: vi.calibrate(
                toy, "mean_field", simulations=20, draws=20, seed=s, progress=False
            )
        )
        seen.append(found)
    assert seen[0] & seen[1] == set.intersection(*seen)
    assert len(seen[0] - seen[1]) > 100


def test_purposes_and_seeds_have_numbers_of_their_own():
    seeds = [0, 1, 2**31, 2**32, 2**32 + 1, seed_of(0, "steps")]
    purposes = [(), ("steps",), ("looks",), ("steps", 1), ("steps", "1"), ("steps1",)]
    made = {seed_of(seed, *purpose) % 2**32 for seed in seeds for purpose in purposes}
    assert len(made) == len(seeds) * len(purposes)
    assert seed_of(3, "steps") == seed_of(3, "steps")


@pytest.mark.parametrize("draw", [matched_normals, sobol_normals])
def test_fixed_draws_of_two_purposes_differ(draw):
    one, other = (draw(64, 3, seed_of(0, "fixed draws", n)) for n in (64, 128))
    assert not set(one.flatten().tolist()) & set(other.flatten().tolist())


def test_a_stream_and_a_generator_of_a_purpose_repeat_themselves():
    def drawn():
        with RandomStream(5, "draws"):
            return torch.rand(3), torch.rand(3, generator=generator_of(5, "draws"))

    (a, b), (c, d) = drawn(), drawn()
    assert torch.equal(a, c)
    assert torch.equal(b, d)
