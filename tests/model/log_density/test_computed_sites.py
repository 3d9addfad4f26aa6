"""Unobserved Delta sites are computed from other latents, whatever stands around them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hand import assert_agrees, bernoulli, density_of, normal, points
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

import pyro_vi_kit as vi
from pyro_vi_kit.guides import make
from pyro_vi_kit.model.log_density import Density

Y = torch.tensor([0.3, -1.2, 0.8])


def plain(x):
    return dist.Delta(x)


def masked(x):
    return dist.Delta(x).mask(torch.tensor([True, False, True]))


def expanded(x):
    return dist.Delta(x.sum()).expand([3])


def as_event(x):
    return dist.Delta(x).to_event(1)


def event_dim(x):
    return dist.Delta(x, event_dim=1)


@pytest.mark.parametrize("delta", [plain, masked, expanded, as_event, event_dim])
def test_a_computed_delta_is_no_latent(delta):
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        w = pyro.sample("w", delta(x))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(w, 1.0), obs=Y)

    density = density_of(model)
    assert [site.name for site in density.latents] == ["x"]
    assert density.structure.sites["w"].kind == "deterministic"

    def by_hand(z):
        w = z.sum().expand(3) if delta is expanded else z
        return normal(z).sum() + normal(Y.double(), w).sum()

    assert_agrees(density, by_hand, 3)


def weighted_in_a_plate(x):
    with pyro.plate("row", 3) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Delta(2 * z, log_density=-z.square()))
        pyro.sample("y", dist.Normal(w, 1.0), obs=x[i])


def test_the_log_density_of_a_delta_counts():
    def by_hand(z):
        return (normal(z) - z.square() + normal(Y.double(), 2 * z)).sum()

    assert_agrees(density_of(weighted_in_a_plate, Y), by_hand, 3)


def test_a_masked_log_density_does_not_count():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Delta(z, log_density=-z.square()).mask(False))
        pyro.sample("v", dist.Delta(z, log_density=-z.square()).mask(z > 0))

    def by_hand(z):
        return (normal(z) + torch.where(z > 0, -z.square(), torch.zeros_like(z))).sum()

    assert_agrees(density_of(model), by_hand, 1)


def test_a_delta_of_an_enumerated_site():
    """Of k in {0, 1} with log density -k: p(y) = sum over k of p(k) exp(-k) N(y; x + k, 1)."""

    def model(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            k = pyro.sample("k", dist.Bernoulli(0.3))
            w = pyro.sample("w", dist.Delta(x + k, log_density=-k))
            pyro.sample("y", dist.Normal(w, 1.0), obs=y)

    def by_hand(z):
        y, logits = Y.double(), torch.tensor(math.log(0.3 / 0.7), dtype=torch.float64)
        parts = [
            bernoulli(torch.tensor(k, dtype=torch.float64), logits) - k + normal(y, z + k)
            for k in (0.0, 1.0)
        ]
        return normal(z).sum() + torch.stack(parts).logsumexp(0).sum()

    density = density_of(model, Y)
    assert_agrees(density, by_hand, 1)
    values = density.constrain(points(1))
    torch.testing.assert_close(values["w"], values["x"].reshape(-1, 1) + values["k"])


# x ~ N(0, 1), v = 2 x with log density -x^2, y = -2 ~ N(v, 1): precision 1 + 2 + 4, mean -4 / 7.
def conjugate(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    v = pyro.sample("v", dist.Delta(2 * x, log_density=-x.square()))
    pyro.sample("sign", dist.Delta((x > 0).float()))
    pyro.sample("y", dist.Normal(v, 1.0), obs=y)


@pytest.fixture(scope="module")
def model():
    return vi.Model(conjugate, torch.tensor(-2.0))


def test_fit_draws_and_predictions_follow_what_is_computed(model):
    posterior = vi.fit(model, guide="full_rank", seed=0)
    draws = posterior.sample(4000, seed=0)
    assert set(draws) == {"x", "v", "sign"}
    # 4,000 draws: the mean's standard error is sd / sqrt(4,000), here four of them.
    assert abs(draws["x"].mean() + 4 / 7) < 4 * 7**-0.5 / 4000**0.5
    assert abs(draws["x"].std() - 7**-0.5) < 4 * 7**-0.5 / 8000**0.5
    assert (draws["v"] == 2 * draws["x"]).all()
    assert set(draws["sign"]) == {0.0, 1.0}
    assert posterior.verdict.level == "good"
    assert set(posterior.predict()) >= {"y", "v", "sign"}
    assert "sign" in posterior.to_arviz().posterior


def test_the_pyro_engine_has_the_same_elbo(model):
    options = {"method": "stochastic", "steps": 50, "seed": 0}
    fits = [vi.fit(model, guide="mean_field", engine=e, **options) for e in ("eager", "pyro")]
    assert fits[0].elbo == pytest.approx(fits[1].elbo, abs=1e-8)


def test_nuts_moves_the_latent_alone(model):
    posterior = vi.nuts(model, chains=2, draws=500, seed=0).posterior
    # At least 200 effective draws, four standard errors.
    assert abs(float(posterior.x.mean()) + 4 / 7) < 4 * 7**-0.5 / 200**0.5
    assert (posterior.v == 2 * posterior.x).all()


def test_stock_svi_takes_the_guide(model):
    with pyro.get_param_store().scope():
        guide = make("mean_field", Density(model, dtype=torch.float32))
        trace = poutine.trace(guide).get_trace(*model.args)
        replayed = poutine.replay(model.fn, trace=trace)
        assert poutine.trace(replayed).get_trace(*model.args).log_prob_sum().isfinite()


def noted(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    pyro.deterministic("d", m * 2)
    with poutine.reparam(config={"t": LocScaleReparam(0.0)}):
        t = pyro.sample("t", dist.Normal(m, 1.0))
    pyro.factor("f", -0.5 * t.square())
    pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def test_uncondition_leaves_alone_what_is_computed():
    """`poutine.uncondition` calls deterministic, reparameterised and factor sites not observed."""
    y = torch.tensor(2.0)
    anew = poutine.condition(poutine.uncondition(noted), data={"y": y})
    one, other = density_of(noted, y), density_of(anew, torch.tensor(0.0))
    assert {n: s.kind for n, s in one.structure.sites.items()} == {
        n: s.kind for n, s in other.structure.sites.items()
    }
    z = points(2)
    torch.testing.assert_close(one.log_prob(z), other.log_prob(z))
    torch.testing.assert_close(one.constrain(z), other.constrain(z))
