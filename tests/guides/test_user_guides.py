"""Pyro guides of the user's: enumeration, point masses, and sites that do not go with the model's."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch.distributions import constraints

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.posterior import evaluation

Y = torch.tensor([-2.1, -1.7, -2.6, 2.2, 1.4, 1.9])
fit = functools.partial(vi.fit, seed=0, progress=False)


@pytest.fixture(autouse=True)
def own_params():
    with pyro.get_param_store().scope():
        yield


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """A trace takes milliseconds: fewer draws than a verdict has."""
    monkeypatch.setattr(evaluation, "_MAX_DRAWS", 300)


@pytest.fixture(autouse=True)
def double():
    """Closed forms to more digits than float32 has."""
    outer = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(outer)


def mixture(y):
    """Two components at -loc and loc; assignments left to be summed out, without a mark."""
    loc = pyro.sample("loc", dist.Normal(2.0, 0.5))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
        pyro.sample("y", dist.Normal(loc * (2.0 * z - 1.0), 1.0), obs=y)


def own_guide(y):
    mean = pyro.param("mean", torch.tensor(1.9))
    sd = pyro.param("sd", torch.tensor(0.35), constraint=constraints.positive)
    pyro.sample("loc", dist.Normal(mean, sd))


def model():
    return vi.Model(mixture, Y.double())


def log_joint(loc, y=Y):
    """log p(loc, y) with the assignments summed out, `[S]`."""
    parts = [
        math.log(w) - 0.5 * ((y - s * loc[:, None]) ** 2 + math.log(2 * math.pi))
        for w, s in ((0.3, -1.0), (0.7, 1.0))
    ]
    prior = -0.5 * (((loc - 2.0) / 0.5) ** 2 + math.log(2 * math.pi)) - math.log(0.5)
    return prior + torch.logaddexp(*parts).sum(-1)


@pytest.fixture(scope="module")
def fitted():
    with pyro.get_param_store().scope():
        torch.set_default_dtype(torch.float64)
        try:
            yield fit(model(), own_guide, steps=300)
        finally:
            torch.set_default_dtype(torch.float32)


def grid():
    loc = torch.linspace(-4.0, 6.0, 4001)
    log_p = log_joint(loc)
    weights = log_p.softmax(0)
    return loc, log_p, weights


def test_training_is_that_of_trace_enum(fitted):
    """A step on one draw is one of stock `TraceEnum_ELBO`: their losses differ by draws alone."""
    pyro.clear_param_store()
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    svi = SVI(config_enumerate(mixture), own_guide, pyro.optim.Adam({"lr": 1e-9}), loss)
    stock = np.array([svi.step(Y.double()) for _ in range(100)])
    ours = fit(
        model(), own_guide, optimizer=functools.partial(torch.optim.Adam, lr=1e-9), steps=300
    )
    assert ours.engine == "pyro"
    se = math.hypot(stock.std(), ours.losses.std()) / math.sqrt(100)
    assert abs(stock.mean() - ours.losses.mean()) < 4 * se
    # The prior's draws of assignments would cost many nats.
    assert stock.std() < 3.0


def test_what_is_reported_has_the_assignments_summed_out(fitted):
    loc, log_p, weights = grid()
    evidence = float(log_p.logsumexp(0)) + math.log(float(loc[1] - loc[0]))
    nats, se = fitted.log_evidence
    assert abs(nats - evidence) < 4 * se + 1e-3
    drawn = torch.as_tensor(fitted.sample(400, seed=1)["loc"])
    state = fitted.approximation.state["params"]
    q = torch.distributions.Normal(state["mean"], state["sd"].exp())
    with torch.no_grad():
        expected = log_joint(drawn) - q.log_prob(drawn)
    np.testing.assert_allclose(fitted.log_weights(400, seed=1), expected.numpy(), rtol=1e-9)
    assert fitted.khat < 0.7
    # An sd of 0.35 and 400 draws of the 4,000 that were weighed.
    corrected = fitted.resample(400, seed=2)["loc"].mean()
    assert abs(corrected - float(weights @ loc)) < 4 * 0.35 / math.sqrt(400)


def test_assignments_are_drawn_given_the_data(fitted):
    loc, _, weights = grid()
    odds = math.log(0.7 / 0.3) + 2.0 * loc[:, None] * Y
    expected = (weights[:, None] * odds.sigmoid()).sum(0)
    z = fitted.sample(2000, seed=3)["z"]
    assert z.shape == (2000, 6)
    # An indicator's sd of at most 0.5, over the root of 2,000; q is not quite the posterior.
    assert np.abs(z.mean(0) - expected.numpy()).max() < 4 * 0.5 / math.sqrt(2000) + 0.01


def test_everything_else_knows_of_it(fitted, tmp_path):
    assert fitted.loo(draws=100) is not None
    assert fitted.predict(draws=10, seed=0)["y"].shape == (10, 6)
    groups = fitted.to_arviz(20)
    assert set(groups["posterior"].data_vars) == {"loc", "z"}
    fitted.save(tmp_path / "mixture.nc")
    loaded = vi.load(tmp_path / "mixture.nc", model(), guide=own_guide)
    assert loaded.elbo == fitted.elbo
    again = fit(model(), resume=fitted, steps=20)
    assert abs(again.elbo - fitted.elbo) < 0.1


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_a_guide_that_enumerates_its_own_sites(kind):
    """Posterior of a coin's side given one noisy look at it: 0.8 x 0.3 / (0.8 x 0.3 + 0.2 x 0.7)."""

    def look():
        side = pyro.sample("side", dist.Bernoulli(0.3))
        pyro.sample("seen", dist.Bernoulli(0.2 + 0.6 * side), obs=torch.tensor(1.0))

    def guide():
        odds = pyro.param("odds", torch.tensor(0.0))
        pyro.sample("side", dist.Bernoulli(logits=odds), infer={"enumerate": kind})

    posterior = fit(vi.Model(look), guide, steps=300)
    # Without noise, for the sum is exact.
    p = 0.24 / 0.38
    odds = float(posterior.approximation.state["params"]["odds"].detach())
    assert abs(odds - math.log(p / (1 - p))) < 0.02
    # Four standard errors of 1,000 draws.
    assert abs(posterior.sample(1000, seed=0)["side"].mean() - p) < 4 * 0.5 / math.sqrt(1000)


def test_some_discrete_sites_in_the_guide_and_some_summed_out():
    """log p(y, side) by hand, the second coin summed out."""
    y = torch.tensor(1.3)

    def two():
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        side = pyro.sample("side", dist.Bernoulli(0.3))
        other = pyro.sample("other", dist.Bernoulli(0.4))
        pyro.sample("y", dist.Normal(level + side + 2.0 * other, 1.0), obs=y)

    def guide():
        pyro.sample("level", dist.Normal(0.0, 1.0))
        pyro.sample("side", dist.Bernoulli(0.5))

    posterior = fit(vi.Model(two), guide, steps=2)
    drawn = posterior.sample(200, seed=0)
    level, side = torch.as_tensor(drawn["level"]), torch.as_tensor(drawn["side"]).double()
    parts = [
        math.log(w) + dist.Normal(level + side + 2.0 * v, 1.0).log_prob(y)
        for w, v in ((0.6, 0.0), (0.4, 1.0))
    ]
    log_w = torch.logaddexp(*parts) + dist.Bernoulli(0.3).log_prob(side) - math.log(0.5)
    np.testing.assert_allclose(posterior.log_weights(200, seed=0), log_w.numpy(), rtol=1e-9)
    assert set(np.unique(drawn["other"])) == {0, 1}


@pytest.mark.parametrize("objective", ["iwae", "renyi"])
def test_sums_and_other_bounds_do_not_go_together(objective):
    with pytest.raises(OptionError, match=r"'z'.*objective='elbo'"):
        fit(model(), own_guide, objective)


def test_what_cannot_be_summed_out_is_refused_before_training():
    def counts():
        n = pyro.sample("n", dist.Poisson(3.0))
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Normal(n * rate, 1.0), obs=torch.tensor(2.0))

    def guide():
        pyro.sample("rate", dist.Gamma(2.0, 1.0))

    with pytest.raises(OptionError, match=r"'n', and Poisson.*finite"):
        fit(vi.Model(counts), guide, steps=10)


# -- point masses ------------------------------------------------------------------------------


def plain(y):
    a = pyro.sample("a", dist.Normal(0.0, 5.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("i", len(y)):
        pyro.sample("y", dist.Normal(a, s), obs=y)


def mixed(fn):
    guide = AutoGuideList(fn)
    guide.append(AutoDelta(poutine.block(fn, expose=["s"])))
    guide.append(AutoNormal(poutine.block(fn, expose=["a"])))
    return guide


def by_hand(fn):
    def guide(y):
        pyro.sample("a", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))
        positive = constraints.positive
        value = pyro.param("v", torch.tensor(1.0), constraint=positive)
        # An auxiliary point, pushed forward: no less a point.
        inner = pyro.sample("inner", dist.Delta(value.log()), infer={"is_auxiliary": True})
        pyro.sample("s", dist.Delta(inner.exp()))

    return guide


@pytest.mark.parametrize(
    ("make", "points"),
    [
        (AutoDelta, {"a", "s"}),
        (AutoLaplaceApproximation, {"a", "s"}),
        (mixed, {"s"}),
        (by_hand, {"s"}),
    ],
    ids=["AutoDelta", "AutoLaplaceApproximation", "AutoGuideList", "by hand"],
)
def test_a_point_mass_has_no_verdict(make, points, tmp_path):
    posterior = fit(vi.Model(plain, Y), make(plain), steps=20)
    assert set(posterior.approximation.points) == points
    assert posterior.approximation.point
    quality = (posterior.elbo, posterior.khat, posterior.verdict, posterior.log_evidence)
    assert quality == (None, None, None, None)
    for name in points:
        assert f"'{name}'" in str(posterior).splitlines()[0]
    assert "at one value), without ELBO" in str(posterior)
    assert (posterior.summary()["verdict"] == "").all()
    for ask in (posterior.log_weights, posterior.resample, posterior.diagnose, posterior.loo):
        with pytest.raises(OptionError, match="at one value"):
            ask()
    posterior.save(tmp_path / "point.nc")
    loaded = vi.load(tmp_path / "point.nc", vi.Model(plain, Y), guide=make(plain))
    assert loaded.verdict is None
    np.testing.assert_array_equal(loaded.sample(3, seed=0)["s"], posterior.sample(3, seed=0)["s"])


@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal])
def test_a_delta_that_only_carries_a_draw_is_no_point(make):
    posterior = fit(vi.Model(plain, Y), make(plain), steps=20)
    assert not posterior.approximation.point
    assert posterior.verdict is not None


def test_a_point_beside_what_is_summed_out():
    """MAP of the mixture's location as plain Pyro has it, with assignments drawn given it."""
    posterior = fit(model(), AutoDelta(poutine.block(mixture, expose=["loc"])), steps=300)
    loc, log_p, _ = grid()
    assert abs(posterior.sample(2, seed=0)["loc"][0] - float(loc[log_p.argmax()])) < 0.01
    assert posterior.sample(20, seed=0)["z"].shape == (20, 6)
    assert posterior.elbo is None


# -- no latents --------------------------------------------------------------------------------


def coin(d):
    f = pyro.param("f", torch.tensor(0.5), constraint=constraints.unit_interval)
    with pyro.plate("data", len(d)):
        pyro.sample("obs", dist.Bernoulli(f), obs=d)


def test_maximum_likelihood_by_an_empty_guide(tmp_path):
    data = torch.tensor([1.0] * 6 + [0.0] * 4)
    posterior = fit(vi.Model(coin, data), lambda d: None, steps=400)
    assert abs(posterior.parameters["f"] - 0.6) < 1e-3
    assert "has no latents" in str(posterior)
    assert (posterior.elbo, posterior.verdict, posterior.khat) == (None, None, None)
    assert posterior.sample(3) == {}
    assert len(posterior.summary()) == 0
    assert posterior.predict(draws=5, seed=0)["obs"].shape == (5, 10)
    assert "posterior" not in list(posterior.to_arviz().groups())
    for ask in (posterior.log_weights, posterior.resample, posterior.diagnose, posterior.evidence):
        with pytest.raises(OptionError, match="no latents"):
            ask()
    posterior.save(tmp_path / "coin.nc")
    loaded = vi.load(tmp_path / "coin.nc", vi.Model(coin, data), guide=lambda d: None)
    assert loaded.parameters == posterior.parameters


def test_maximum_likelihood_with_everything_else_summed_out():
    """Pyro's hidden Markov models without latents: weights of a mixture by EM's fixed point."""

    def components(y):
        w = pyro.param("w", torch.tensor(0.5), constraint=constraints.unit_interval)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(w))
            pyro.sample("y", dist.Normal(4.0 * z - 2.0, 1.0), obs=y)

    posterior = fit(vi.Model(components, Y), lambda y: None, steps=300)
    w = 0.5
    for _ in range(500):
        odds = math.log(w / (1 - w)) + 4.0 * Y
        w = float(odds.sigmoid().mean())
    assert abs(posterior.parameters["w"] - w) < 2e-3
    z = posterior.sample(300, seed=0)["z"]
    expected = (math.log(w / (1 - w)) + 4.0 * Y).sigmoid().numpy()
    assert np.abs(z.mean(0) - expected).max() < 4 * 0.5 / math.sqrt(300)
    # Draws of z from its prior would make up an ELBO far below the bound, and a verdict on it.
    assert (posterior.elbo, posterior.verdict, posterior.khat) == (None, None, None)
    assert "point estimate" in str(posterior)
    assert "posterior" in list(posterior.to_arviz().groups())


# -- sites that do not go together ---------------------------------------------------------------


def normal(name, shape=(), **options):
    loc = pyro.param(f"{name}_loc", torch.zeros(shape))
    return pyro.sample(name, dist.Normal(loc, 1.0), **options)


def lacking(y):
    normal("a")


def one_too_many(y):
    plain_parts(y)
    normal("extra")


def misspelt(y):
    normal("a_")
    pyro.sample("s", dist.LogNormal(0.0, 1.0))


def observed_too(y):
    plain_parts(y)
    with pyro.plate("i", len(y)):
        pyro.sample("y", dist.Normal(0.0, 1.0))


def wrong_support(y):
    normal("a")
    normal("s")


def wrong_point(y):
    normal("a")
    pyro.sample("s", dist.Delta(torch.tensor(-1.0)))


def wrong_shape(y):
    normal("a", (2,))
    pyro.sample("s", dist.LogNormal(0.0, 1.0))


def discrete_for_continuous(y):
    pyro.sample("a", dist.Bernoulli(0.5))
    pyro.sample("s", dist.LogNormal(0.0, 1.0))


def raising(y):
    raise ValueError("no such thing")


def plain_parts(y):
    normal("a")
    pyro.sample("s", dist.LogNormal(0.0, 1.0))


@pytest.mark.parametrize(
    ("guide", "words"),
    [
        (lacking, "lacks the latent 's'.*pyro.sample"),
        (one_too_many, "has site 'extra'.*is_auxiliary"),
        (misspelt, "has site 'a_'"),
        (observed_too, "site 'y', which is observed"),
        (wrong_support, "site 's' from Normal.*LogNormal.*outside|site 's' from Normal.*outside"),
        (wrong_point, "site 's' from Delta.*outside"),
        (wrong_shape, r"site 'a' of shape \(2,\).*shape \(\)"),
        (discrete_for_continuous, "site 'a' from Bernoulli, which is discrete"),
        (raising, "'raising' raised ValueError: no such thing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_site_that_does_not_go_with_the_model_is_named(guide, words):
    with pytest.raises(OptionError, match=words):
        fit(vi.Model(plain, Y), guide, steps=10)


def test_a_site_outside_of_its_plate_is_named():
    def rows(y):
        with pyro.plate("i", len(y)):
            t = pyro.sample("t", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(t, 1.0), obs=y)

    with pytest.raises(OptionError, match=r"site 't' of shape \(\).*shape \(6,\)"):
        fit(vi.Model(rows, Y), lambda y: normal("t"), steps=10)


def test_what_goes_together_is_let_through():
    """Auxiliary sites, a support within the model's, and a normal far from a boundary."""

    def guide(y):
        normal("own", infer={"is_auxiliary": True})
        normal("a")
        pyro.sample("s", dist.Normal(3.0, 0.05))

    assert fit(vi.Model(plain, Y), guide, steps=5).engine == "pyro"


# -- learned modules ----------------------------------------------------------------------------


def test_weights_are_of_the_trained_modules():
    """The model reads its module, not the parameter store."""
    net = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        net.weight.fill_(0.0)
    x = torch.linspace(-1.0, 1.0, 20).unsqueeze(-1)
    y = 3.0 * x[:, 0]

    def learned(x, y):
        pyro.module("net", net)
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("i", len(y)):
            pyro.sample("y", dist.Normal(net(x)[:, 0] + shift, 0.1), obs=y)

    def guide(x, y):
        mean = pyro.param("mean", torch.tensor(0.0))
        pyro.sample("shift", dist.Normal(mean, 0.0224))

    posterior = fit(vi.Model(learned, x, y), guide, steps=500)
    assert float(net.weight.detach()) == 0.0
    assert abs(posterior.parameters["net$$$weight"].item() - 3.0) < 0.05
    assert abs(posterior.elbo + np.mean(posterior.losses[-100:])) < 1.0


class _Net(pyro.nn.PyroModule):
    """A layer that model and guide may have of one name."""

    def __init__(self, layer, is_model):
        super().__init__()
        self.net, self.is_model = layer, is_model

    def forward(self, y):
        loc = self.net(y.unsqueeze(-1)).squeeze(-1)
        if not self.is_model:
            return pyro.sample("z", dist.Normal(loc.mean(), 1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            return pyro.sample("y", dist.Normal(z + 0.1 * loc, 1.0), obs=y)


def test_two_parameters_of_one_name_are_refused():
    # Pyro's store holds one: its SVI trains that and leaves the other, without a word.
    y = torch.tensor([0.3, -0.2, 1.1])
    model, guide = _Net(torch.nn.Linear(1, 1), True), _Net(torch.nn.Linear(1, 1), False)
    with pytest.raises(OptionError, match=r"each have a parameter 'net\$\$\$\w+' of their own"):
        vi.fit(vi.Model(model, y), guide, budget=1.0, progress=False)


def test_a_layer_that_model_and_guide_share_is_trained():
    y, layer = torch.tensor([0.3, -0.2, 1.1]), torch.nn.Linear(1, 1)
    model, guide = _Net(layer, True), _Net(layer, False)
    fitted = vi.fit(vi.Model(model, y), guide, budget=1.0, progress=False)
    assert math.isfinite(fitted.elbo)
