"""Plates, factors and Pyro's handlers in the density, against formulas written out by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hand import assert_agrees, bernoulli, density_of, gamma, normal, points
from pyro import poutine

Y = torch.tensor([0.3, -1.2, 0.8, 2.0])
GRID = torch.arange(12.0).reshape(4, 3) / 10
Y64, GRID64 = Y.double(), GRID.double()


def one_plate():
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("datum", 4):
        x = pyro.sample("x", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(x, 0.5), obs=Y)


def one_plate_by_hand(z):
    m, x = z[0], z[1:]
    return normal(m, 0.0, 2.0) + (normal(x, m, 1.0) + normal(Y64, x, 0.5)).sum()


def nested_plates():
    with pyro.plate("column", 3, dim=-1):
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        with pyro.plate("row", 4, dim=-2):
            b = pyro.sample("b", dist.Normal(0.0, a))
            pyro.sample("y", dist.Normal(b, 1.0), obs=GRID)


def nested_plates_by_hand(z):
    a, b = z[:3].exp(), z[3:].reshape(4, 3)
    prior = (gamma(a, 2.0, 1.0) + z[:3]).sum() + normal(b, 0.0, a).sum()
    return prior + normal(GRID64, b).sum()


def crossed_plates():
    rows, columns = pyro.plate("row", 4, dim=-2), pyro.plate("column", 3, dim=-1)
    with rows:
        r = pyro.sample("r", dist.Normal(0.0, 1.0))
    with columns:
        c = pyro.sample("c", dist.Normal(0.0, 2.0))
    with rows, columns:
        pyro.sample("y", dist.Normal(r + c, 1.0), obs=GRID)


def crossed_plates_by_hand(z):
    r, c = z[:4, None], z[4:]
    return normal(r).sum() + normal(c, 0.0, 2.0).sum() + normal(GRID64, r + c).sum()


def plate_in_the_second_dim_alone():
    with pyro.plate("row", 4, dim=-2):
        r = pyro.sample("r", dist.Normal(torch.zeros(4, 1), 1.0))
        pyro.sample("y", dist.Normal(r, 1.0).expand([4, 1]), obs=Y[:, None])


def plate_in_the_second_dim_by_hand(z):
    return normal(z).sum() + normal(Y64, z).sum()


def plate_with_events():
    with pyro.plate("row", 4):
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w, 0.5).to_event(1), obs=GRID)


def plate_with_events_by_hand(z):
    w = z.reshape(4, 3)
    return normal(w).sum() + normal(GRID64, w, 0.5).sum()


def batch_without_plate():
    x = pyro.sample("x", dist.Normal(torch.zeros(4), 1.0))
    pyro.sample("y", dist.Normal(x, 0.5), obs=Y)


def batch_without_plate_by_hand(z):
    return (normal(z) + normal(Y64, z, 0.5)).sum()


def sequential_plate():
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    for i in pyro.plate("datum", 4):
        x = pyro.sample(f"x_{i}", dist.Normal(m, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(x, 0.5), obs=Y[i])


def local_factor():
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("datum", 4):
        pyro.factor("f", -((Y - m) ** 4))


def local_factor_by_hand(z):
    return normal(z[0], 0.0, 2.0) - ((Y64 - z[0]) ** 4).sum()


def global_factor():
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    pyro.factor("f", -((Y - m) ** 4).sum())


def narrow_factor():
    """A factor whose value is one number inside a plate of four."""
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("datum", 4):
        pyro.factor("f", -(m**2))


def narrow_factor_by_hand(z):
    # The plate repeats it, as in Pyro's own traces.
    return normal(z[0], 0.0, 2.0) - 4 * z[0] ** 2


def batched_factor():
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    pyro.factor("f", -((Y - m) ** 4))


def scaled():
    with poutine.scale(scale=0.25):
        m = pyro.sample("m", dist.HalfNormal(2.0))
        with pyro.plate("datum", 4):
            pyro.sample("y", dist.Normal(m, 0.5), obs=Y)


def scaled_by_hand(z):
    m = z[0].exp()
    # The Jacobian belongs to the coordinates and is not scaled.
    log_p = math.log(2) + normal(m, 0.0, 2.0) + normal(Y64, m, 0.5).sum()
    return 0.25 * log_p + z[0]


def scaled_by_a_tensor():
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("datum", 4), poutine.scale(scale=torch.tensor([1.0, 2.0, 0.5, 3.0])):
        pyro.sample("y", dist.Normal(m, 0.5), obs=Y)


def scaled_by_a_tensor_by_hand(z):
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    return normal(z[0], 0.0, 2.0) + (weights * normal(Y64, z[0], 0.5)).sum()


SEEN = torch.tensor([True, False, True, True])


def masked():
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("datum", 4), poutine.mask(mask=SEEN):
        pyro.sample("y", dist.Normal(m, 0.5), obs=Y)


def masked_distribution():
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("datum", 4):
        pyro.sample("y", dist.Normal(m, 0.5).mask(SEEN), obs=Y)


def masked_latent():
    with pyro.plate("datum", 4):
        x = pyro.sample("x", dist.HalfNormal(2.0).mask(SEEN))
        pyro.sample("y", dist.Normal(x, 0.5).mask(SEEN), obs=Y)


def masked_by_hand(z):
    return normal(z[0], 0.0, 2.0) + normal(Y64[SEEN], z[0], 0.5).sum()


def masked_latent_by_hand(z):
    x = z.exp()
    log_p = math.log(2) + normal(x, 0.0, 2.0) + normal(Y64, x, 0.5)
    return log_p[SEEN].sum() + z.sum()


def masked_away():
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with poutine.mask(mask=False), pyro.plate("datum", 4):
        pyro.sample("y", dist.Normal(m, 0.5), obs=Y)


def unobserved():
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("datum", 4):
        pyro.sample("y", dist.Normal(m, 0.5))


conditioned = poutine.condition(unobserved, data={"y": Y})


def all_latent():
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("datum", 4):
        pyro.sample("y", dist.Normal(m, s), obs=Y)


conditioned_on_a_latent = poutine.condition(all_latent, data={"s": torch.tensor(0.5)})


def conditioned_on_a_latent_by_hand(z):
    half_normal = math.log(2) + normal(torch.tensor(0.5))
    return half_normal + global_by_hand(z)


def global_by_hand(z):
    return normal(z[0], 0.0, 2.0) + normal(Y64, z[0], 0.5).sum()


def deterministic():
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    half = pyro.deterministic("half", m / 2)
    with pyro.plate("datum", 4):
        loc = pyro.deterministic("loc", half + torch.zeros(4))
        pyro.deterministic("pair", torch.stack([loc, loc], -1), event_dim=1)
        pyro.sample("y", dist.Normal(loc, 0.5), obs=Y)


def deterministic_by_hand(z):
    return normal(z[0], 0.0, 2.0) + normal(Y64, z[0] / 2, 0.5).sum()


def mixture():
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    mix = dist.Categorical(torch.tensor([0.25, 0.75]))
    with pyro.plate("datum", 4):
        pyro.sample("y", dist.MixtureSameFamily(mix, dist.Normal(loc, 1.0)), obs=Y)


def mixture_by_hand(z):
    parts = normal(Y64[:, None], z) + torch.tensor([0.25, 0.75]).log()
    return normal(z, 0.0, 3.0).sum() + parts.logsumexp(-1).sum()


def discrete_data():
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("datum", 4):
        pyro.sample("y", dist.Bernoulli(logits=m), obs=(Y > 0).float())


def discrete_data_by_hand(z):
    return normal(z[0], 0.0, 2.0) + bernoulli((Y64 > 0).double(), z[0]).sum()


def given_a_subsample():
    """A plate that says by itself which rows it holds."""
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("datum", 8, subsample=torch.tensor([0, 2, 3, 6])):
        pyro.sample("y", dist.Normal(m, 0.5), obs=Y)


def given_a_subsample_by_hand(z):
    return normal(z[0], 0.0, 2.0) + 2 * normal(Y64, z[0], 0.5).sum()


def declares_a_subsample():
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("datum", 4, subsample_size=2) as index:
        pyro.sample("y", dist.Normal(m, 0.5), obs=Y[index])


CASES = [
    (one_plate, one_plate_by_hand, 5),
    (nested_plates, nested_plates_by_hand, 15),
    (crossed_plates, crossed_plates_by_hand, 7),
    (plate_in_the_second_dim_alone, plate_in_the_second_dim_by_hand, 4),
    (plate_with_events, plate_with_events_by_hand, 12),
    (batch_without_plate, batch_without_plate_by_hand, 4),
    (sequential_plate, one_plate_by_hand, 5),
    (local_factor, local_factor_by_hand, 1),
    (global_factor, local_factor_by_hand, 1),
    (narrow_factor, narrow_factor_by_hand, 1),
    (batched_factor, local_factor_by_hand, 1),
    (scaled, scaled_by_hand, 1),
    (scaled_by_a_tensor, scaled_by_a_tensor_by_hand, 1),
    (masked, masked_by_hand, 1),
    (masked_distribution, masked_by_hand, 1),
    (masked_latent, masked_latent_by_hand, 4),
    (masked_away, lambda z: normal(z[0], 0.0, 2.0), 1),
    (conditioned, global_by_hand, 1),
    (conditioned_on_a_latent, conditioned_on_a_latent_by_hand, 1),
    (deterministic, deterministic_by_hand, 1),
    (mixture, mixture_by_hand, 2),
    (discrete_data, discrete_data_by_hand, 1),
    (given_a_subsample, given_a_subsample_by_hand, 1),
    (declares_a_subsample, global_by_hand, 1),
]
NAMES = [getattr(case[0], "__name__", "handler") for case in CASES]


@pytest.mark.parametrize(("model", "hand", "dim"), CASES, ids=NAMES)
def test_value_and_gradient(model, hand, dim):
    assert_agrees(density_of(model), hand, dim)


@pytest.mark.parametrize(("model", "hand", "dim"), CASES, ids=NAMES)
def test_the_log_likelihood_is_the_observed_part(model, hand, dim):
    """What is left of log p(z, y) when the observed sites are hidden from it."""
    density = density_of(model)
    z = points(dim)
    names = {site.name for site in density.structure.of_kind("observed")}
    factors = {site.name for site in density.structure.of_kind("factor") if site.plates}
    parts = density.log_likelihood(z)
    # A factor in a plate is the likelihood of the plate's rows.
    assert set(parts) == names | factors
    rest = density_of(poutine.block(model, hide=list(parts))).log_prob(z)
    total = sum((part.reshape(len(z), -1).sum(-1) for part in parts.values()), rest)
    torch.testing.assert_close(total, density.log_prob(z), rtol=1e-10, atol=1e-10)


def test_deterministic_sites_keep_their_dims():
    density = density_of(deterministic)
    values = density.constrain(points(1))
    assert values["half"].shape == (5,)
    assert values["loc"].shape == (5, 4)
    assert values["pair"].shape == (5, 4, 2)
    sites = density.structure.sites
    assert [p.name for p in sites["loc"].plates] == ["datum"]
    assert (sites["pair"].batch_shape, sites["pair"].event_shape) == ((4,), (2,))
    assert sites["half"].plates == ()


def test_plates_are_named_outermost_first():
    site = density_of(nested_plates).structure.sites["b"]
    assert [(p.name, p.dim, p.size) for p in site.plates] == [("column", -1, 3), ("row", -2, 4)]
    assert site.data_plate == site.plates[0]
