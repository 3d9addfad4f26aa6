"""Discrete latents: sums by Pyro's TraceEnum_ELBO and by brute force, exact draws, the groups."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import zoo
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import ModelError, OptionError
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.elimination import Factor, eliminate

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")

K = 3


def density_of(fn, *args) -> Density:
    return Density(vi.Model(fn, *args))


def points(density, seed=0, k=K):
    generator = torch.Generator().manual_seed(seed)
    return 0.7 * torch.randn(k, density.dim, generator=generator)


def by_trace_enum(density, z):
    """Log densities of the constrained values, by TraceEnum_ELBO with a guide of points."""
    losses = []
    for row in z:
        with RandomStream(0):
            values = density.constrain(row[None])
        latents = {site.name: values[site.name][0] for site in density.latents}
        model = config_enumerate(poutine.condition(density.model.fn, data=latents))
        elbo = TraceEnum_ELBO(max_plate_nesting=2)
        losses.append(-elbo.loss(model, lambda *args: None, *density.model.args))
    return torch.tensor(losses)


@pytest.mark.parametrize("name", zoo.DISCRETE)
def test_sums_are_those_of_trace_enum_elbo(name):
    density = density_of(zoo.DISCRETE[name].fn)
    z = points(density)
    found = density.log_prob(z, jacobian=False)
    torch.testing.assert_close(found, by_trace_enum(density, z), rtol=1e-9, atol=1e-9)


def test_one_scale_for_all_is_applied_after_the_sum():
    def tempered():
        with poutine.scale(scale=0.25):
            zoo.chains_of_different_lengths()

    density, plain = density_of(tempered), density_of(zoo.chains_of_different_lengths)
    z = points(density)
    found = density.log_prob(z, jacobian=False)
    torch.testing.assert_close(found, by_trace_enum(density, z), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, 0.25 * plain.log_prob(z, jacobian=False))


def normal(y, loc, scale=1.0):
    return -0.5 * ((y - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


def rows(outside):
    """Data of two kinds in a plate that takes minibatches; the switch is one, or one for each row."""
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    switch = dist.Bernoulli(0.4)
    z = pyro.sample("z", switch) if outside else None
    with pyro.plate("datum", 40) as index:
        z = pyro.sample("z", switch) if z is None else z
        x = pyro.sample("x", dist.Normal(m * z, 1.0))
        pyro.sample("y", dist.Normal(x, 0.5), obs=zoo.LONG[index])


def test_a_minibatch_has_one_unscaled_number_per_row():
    density = density_of(rows, False)
    z, index = density.block.unpack(points(density)), torch.tensor([4, 0, 33, 17])
    m, x = z["m"], z["x"][:, index]
    terms = density.terms({"m": m, "x": x}, index={"datum": index})
    states = [0.6 * normal(x, 0.0).exp(), 0.4 * normal(x, m[:, None]).exp()]
    expected = sum(states).log() + normal(zoo.LONG[index], x, 0.5)
    assert terms.scale == {"datum": 10.0}
    torch.testing.assert_close(terms.local["datum"], expected)
    torch.testing.assert_close(terms.shared, normal(m, 0.0, 2.0))


def test_a_minibatch_of_a_plate_inside_a_discrete_site_is_refused():
    density = density_of(rows, True)
    z, index = density.block.unpack(points(density)), torch.tensor([4, 0, 33, 17])
    with pytest.raises(ModelError, match=r"'x' and 'z' .*minibatches only of plates that enclose"):
        density.terms({"m": z["m"], "x": z["x"][:, index]}, index={"datum": index})


def test_zero_inflation_by_hand_is_the_closed_form():
    density = density_of(zoo.zero_inflated_by_hand)
    z = points(density)
    with RandomStream(0):
        values = density.constrain(z)
    gate, rate = values["gate"][:, None], values["rate"][:, None]
    nothing = gate * torch.distributions.Poisson(1e-8).log_prob(zoo.COUNTS).exp()
    something = (1 - gate) * torch.distributions.Poisson(rate).log_prob(zoo.COUNTS).exp()
    prior = torch.distributions.Beta(2.0, 2.0).log_prob(gate[:, 0])
    prior = prior + torch.distributions.Gamma(2.0, 1.0).log_prob(rate[:, 0])
    expected = prior + (nothing + something).log().sum(-1)
    found = density.log_prob(z, jacobian=False)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


# -- draws -----------------------------------------------------------------------------------


def test_draws_of_a_chain_have_their_joint_probabilities():
    y = zoo.LONG[14:18]
    density = density_of(zoo.chain, y)
    z = points(density)[:1]
    values = density.block.unpack(z)
    m, logits = values["m"][0], values["transition"]
    transition = torch.distributions.biject_to(torch.distributions.constraints.simplex)(logits)[0]
    paths = list(itertools.product(range(3), repeat=4))
    log_p = []
    for path in paths:
        before = (0, *path[:-1])
        step = sum(transition[i, j].log() for i, j in zip(before, path, strict=True))
        log_p.append(step + sum(normal(y[t], m[s]) for t, s in enumerate(path)))
    p = torch.stack(log_p).softmax(0)
    count = 4000
    with RandomStream(1):
        draws = density.constrain(z.expand(count, -1))
    drawn = sum(draws[f"z{t}"] * 3 ** (3 - t) for t in range(4))
    share = torch.bincount(drawn, minlength=len(paths)) / count
    # Five standard errors of a share, and one draw for the rarest.
    assert ((share - p).abs() <= 5 * (p * (1 - p) / count).sqrt() + 1 / count).all()


def test_draws_in_plates_have_their_probabilities():
    density = density_of(zoo.nested)
    z = points(density)[:1]
    a = density.block.unpack(z)["a"][0]
    count = 4000
    with RandomStream(2):
        draws = density.constrain(z.expand(count, -1))
    y, states = zoo.GROUPS, torch.arange(3)
    v_one = a.sigmoid()[:, None, None] * normal(y, 3.0 + states[:, None, None]).exp()
    v_zero = (1 - a.sigmoid())[:, None, None] * normal(y, states[:, None, None]).exp()
    log_u = a.log_softmax(0)[:, None] + (v_one + v_zero).log().sum(-1)
    p_u = log_u.softmax(0)
    p_v = (p_u[:, :, None] * v_one / (v_one + v_zero)).sum(0)
    for state in range(3):
        share = (draws["u"][:, :, 0] == state).double().mean(0)
        assert ((share - p_u[state]).abs() <= 5 * (p_u[state] / count).sqrt() + 1 / count).all()
    share = draws["v"].double().mean(0)
    assert ((share - p_v).abs() <= 5 * (p_v * (1 - p_v) / count).sqrt() + 1 / count).all()


def test_deterministic_sites_follow_the_draws():
    density = density_of(zoo.mixture)
    with RandomStream(0):
        values = density.constrain(points(density))
    assert values["loc"].shape == (K, 40)
    torch.testing.assert_close(values["loc"], values["m"].gather(-1, values["z"]))


# -- likelihoods and predictions -----------------------------------------------------------------


def test_a_local_discrete_site_is_summed_out_of_the_likelihood():
    density = density_of(zoo.mixture)
    z = points(density)
    with RandomStream(0):
        values, found = density.constrain(z), density.log_likelihood(z)["y"]
    m, s = values["m"][:, None], values["s"][:, None, None]
    parts = torch.distributions.Normal(m, s).log_prob(zoo.LONG[:, None])
    expected = torch.logsumexp(values["w"].log()[:, None] + parts, -1)
    torch.testing.assert_close(found, expected)


def test_two_observations_of_a_row_are_each_given_the_continuous_latents_alone():
    density = density_of(zoo.local_latents)
    z = points(density)
    sites = density.block.unpack(z)
    with RandomStream(0):
        found = density.log_likelihood(z)
    torch.testing.assert_close(found["y"], normal(zoo.LONG, sites["x"], 0.5))
    one = 0.4 * normal(sites["x"], sites["m"][:, 1:]).exp()
    zero = 0.6 * normal(sites["x"], sites["m"][:, :1]).exp()
    high, low = torch.sigmoid(torch.tensor(1.0)), torch.sigmoid(torch.tensor(-1.0))
    p = (one * high + zero * low) / (one + zero)
    expected = torch.where(zoo.LONG > 1.0, p, 1 - p).log()
    torch.testing.assert_close(found["w"], expected)


def test_a_global_discrete_site_is_drawn_for_the_likelihood():
    density = density_of(zoo.global_switch)
    z = points(density, k=200)
    with RandomStream(0):
        found = density.log_likelihood(z)["y"]
        # The same draws: the numbers are taken in the same order.
    mu = density.block.unpack(z)["mu"][:, None]
    either = torch.stack([normal(zoo.Y, mu, 1.0 + g) for g in (0, 1)])
    wrong = (either - found).abs().amax(-1)
    assert (wrong.amin(0) < 1e-12).all()
    assert 0 < int((wrong[0] < wrong[1]).sum()) < 200


def test_new_rows_get_new_assignments_and_old_rows_keep_theirs():
    def placed(y, n):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", n):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(m + 100.0 * z, 1.0), obs=y)

    y = torch.tensor([0.0, 100.0, 100.0])
    model = vi.Model(placed, y, 3)
    density = Density(model)
    z = points(density, k=200)
    with RandomStream(0):
        again = density.simulate(z, model.with_args(None, 3))
        more = density.simulate(z, model.with_args(None, 5))
    assert ((again["y"] - y).abs() < 10).all()
    assert more["y"].shape == (200, 5)
    # Fair coins: six standard errors of their mean.
    assert abs(more["z"].double().mean() - 0.5) < 6 * 0.5 / math.sqrt(1000)


# -- from end to end ---------------------------------------------------------------------------


def test_a_posterior_holds_the_discrete_sites():
    model = vi.Model(zoo.mixture, coords={"datum": [f"d{i}" for i in range(40)]})
    posterior = vi.fit(model, "full_rank", seed=1)
    draws = posterior.sample(300, seed=3)
    assert draws["z"].shape == (300, 40)
    assert draws["z"].dtype == np.int64
    np.testing.assert_array_equal(draws["z"], posterior.sample(300, seed=3)["z"])
    # Sixteen data around 0, twenty-four around 4: one component has nearly all of each.
    low, high = draws["z"][:, :16].mean(), draws["z"][:, 16:].mean()
    assert abs(low - high) > 0.8
    tree = posterior.to_arviz(300, seed=3)
    assert tree.posterior["z"].dims == ("chain", "draw", "datum")
    assert tree.posterior["z"].dtype.kind == "i"
    np.testing.assert_array_equal(tree.posterior["z"][0], draws["z"])
    assert tree.log_likelihood["y"].dims == ("chain", "draw", "datum")
    assert tree.prior["z"].dims == ("chain", "draw", "datum")
    assert set(posterior.predict(draws=10)) == {"y", "loc"}
    assert "z[d0]" in posterior.summary().index


def test_stock_svi_of_a_named_guide_is_refused():
    with pytest.raises(OptionError, match=r"engine='pyro'.*discrete.*z"):
        vi.fit(vi.Model(zoo.mixture), "mean_field", engine="pyro", seed=0)


def test_nuts_draws_the_discrete_sites():
    tree = vi.nuts(
        vi.Model(zoo.zero_inflated_by_hand), chains=2, draws=150, tune=150, progress=False
    )
    z = tree.posterior["z"].to_numpy()
    assert z.shape == (2, 150, 7)
    assert z.dtype.kind == "i"
    # Where something was counted, it was no structural zero.
    assert not z[..., zoo.COUNTS.numpy() > 0].any()
    assert z[..., zoo.COUNTS.numpy() == 0].any()


# -- elimination itself ------------------------------------------------------------------------


def test_elimination_by_brute_force():
    """Two variables in a plate of three, one outside, in factors of all shapes."""
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randn(shape, generator=generator) for shape in ((2,), (2, 3, 2), (3, 2, 4))]
    inside, nothing = frozenset({"p"}), frozenset[str]()
    factors = [
        Factor(tables[0], (0,), nothing, frozenset({"a"})),
        Factor(tables[1], (0, "p", 1), inside, frozenset({"b"})),
        Factor(tables[2], ("p", 1, 2), inside, frozenset({"c"})),
    ]
    (result,), steps = eliminate(factors, {0: nothing, 1: inside, 2: inside})
    expected = torch.zeros(())
    for g in range(2):
        rows = torch.ones(())
        for row in range(3):
            cells = [
                (tables[1][g, row, u] + tables[2][row, u, v]).exp()
                for u, v in itertools.product(range(2), range(4))
            ]
            rows = rows * torch.stack(cells).sum()
        expected = expected + tables[0][g].exp() * rows
    torch.testing.assert_close(result.value, expected.log())
    assert result.sources == {"a", "b", "c"}
    assert [step.variable for step in steps][-1] == 0


def test_impossible_states_leave_gradients_finite():
    def impossible():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", 3):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
            pyro.sample("n", dist.Delta(z.double()), obs=torch.tensor([0.0, 2.0, 2.0]))
            pyro.sample("y", dist.Normal(m + z, 1.0), obs=zoo.Y[:3])

    density = density_of(impossible)
    z = points(density)
    value, gradient = density.log_prob_and_grad(z)
    states = torch.tensor([0.0, 2.0, 2.0])
    prior = torch.tensor([0.5, 0.2, 0.2]).log().sum()
    expected = normal(z[:, 0], 0.0) + prior + normal(zoo.Y[:3], z + states).sum(-1)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, -z + (zoo.Y[:3] - z - states).sum(-1, keepdim=True))
    with RandomStream(0):
        assert (density.constrain(z)["z"] == states.long()).all()


def test_long_chain_is_summed_in_its_order():
    """A chain of 1,000 states against the forward algorithm; to count all costs anew took minutes."""
    generator = torch.Generator().manual_seed(3)
    T, S = 1_000, 3
    transition = torch.randn(S, S, generator=generator, dtype=torch.float64).log_softmax(-1)
    emission = torch.randn(T, S, generator=generator, dtype=torch.float64)
    factors, homes = [], {t: frozenset[str]() for t in range(T)}
    for t in range(T):
        names = (t - 1, t) if t else (0,)
        value = transition if t else torch.full((S,), 1 / S, dtype=torch.float64).log()
        factors.append(Factor(value, names, frozenset(), frozenset([f"z{t}"])))
        factors.append(Factor(emission[t], (t,), frozenset(), frozenset([f"y{t}"])))
    (left,), steps = eliminate(factors, homes)
    forward = emission[0] - math.log(S)
    for t in range(1, T):
        forward = (forward[:, None] + transition).logsumexp(0) + emission[t]
    assert left.value.item() == pytest.approx(forward.logsumexp(0).item(), rel=1e-12)
    assert len(steps) == T
    assert max(step.product.value.numel() for step in steps) <= S * S
