"""Posteriors of kinds that break fits from a cold start, written down as a user would."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

import pyro_vi_kit as vi

F = torch.nn.functional


def normals(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def counts(rate: Tensor, seed: int) -> Tensor:
    return torch.poisson(rate, generator=torch.Generator().manual_seed(seed))


def coins(p: Tensor, seed: int) -> Tensor:
    return torch.bernoulli(p, generator=torch.Generator().manual_seed(seed)).double()


def flat(*shape: int) -> dist.ImproperUniform:
    return dist.ImproperUniform(constraints.real_vector, (), shape)


def raw_regression():
    """Predictors on scales of 1 to 10,000, two of them correlated at 0.99, flat priors."""
    z = normals(200, 4, seed=1)
    x = torch.stack([40 + 10 * z[:, 0], 41 + 10 * (0.99 * z[:, 0] + 0.14 * z[:, 1])], 1)
    x = torch.cat([x, 3e4 + 1e4 * z[:, 2:3], 0.01 * z[:, 3:]], 1)
    y = 500 + x @ torch.tensor([3.0, -2.0, 0.01, 700.0]).double() + 20 * normals(200, seed=2)

    def model(x, y):
        a = pyro.sample("a", dist.ImproperUniform(constraints.real, (), ()))
        b = pyro.sample("b", flat(4))
        sigma = pyro.sample("sigma", dist.HalfCauchy(25.0))
        pyro.sample("y", dist.Normal(a + x @ b, sigma).to_event(1), obs=y)

    return vi.Model(model, x, y)


def centred_groups():
    """Eight groups of ten, centred: a funnel that the data close."""
    effects = 3.0 + 1.5 * normals(8, seed=3)
    y = effects[:, None] + 4.0 * normals(8, 10, seed=4)

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(10.0))
        with pyro.plate("group", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta[..., None], sigma).to_event(1), obs=y)

    return vi.Model(model, y)


def horseshoe():
    """Twenty coefficients under a horseshoe, non-centred: 42 dimensions with heavy tails."""
    x = normals(80, 20, seed=5)
    truth = torch.zeros(20).double()
    truth[:3] = torch.tensor([3.0, -2.0, 1.0])
    y = x @ truth + normals(80, seed=6)

    def model(x, y):
        tau = pyro.sample("tau", dist.HalfCauchy(0.1))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
        with pyro.plate("coef", 20):
            lam = pyro.sample("lam", dist.HalfCauchy(1.0))
            raw = pyro.sample("raw", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x @ (raw * lam * tau), sigma).to_event(1), obs=y)

    return vi.Model(model, x, y)


def ordered_mixture():
    """Two overlapping normals, means in order."""
    z = normals(300, seed=7)
    y = torch.where(torch.arange(300) % 3 == 0, -1.5 + 0.8 * z, 2.0 + 1.2 * z)

    def model(y):
        mu = pyro.sample("mu", dist.ImproperUniform(constraints.ordered_vector, (), (2,)))
        pyro.factor("prior", dist.Normal(0.0, 5.0).log_prob(mu).sum(-1))
        sd = pyro.sample("sd", dist.HalfNormal(2.0).expand([2]).to_event(1))
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        logits = torch.stack([share.log(), (-share).log1p()], -1)
        parts = dist.Normal(mu, sd).log_prob(y[:, None]) + logits
        pyro.factor("y", parts.logsumexp(-1).sum(-1))

    return vi.Model(model, y)


def gp_classification():
    """Thirty latent values under a squared-exponential kernel of unknown scale, binary data."""
    t = torch.linspace(0.0, 3.0, 30).double()
    y = coins(torch.sigmoid(3.0 * torch.sin(2.0 * t)), seed=8)

    def model(t, y):
        length = pyro.sample("length", dist.LogNormal(-0.5, 0.5))
        size = pyro.sample("size", dist.HalfNormal(3.0))
        raw = pyro.sample("raw", dist.Normal(t.new_zeros(30), 1.0).to_event(1))
        gaps = (t[:, None] - t) / length
        kernel = size**2 * torch.exp(-0.5 * gaps**2) + 1e-6 * torch.eye(30, dtype=t.dtype)
        f = (torch.linalg.cholesky(kernel) @ raw[..., None])[..., 0]
        pyro.sample("y", dist.Bernoulli(logits=f).to_event(1), obs=y)

    return vi.Model(model, t, y)


def autoregression():
    """AR(5) with an intercept, on the scale of the hundreds."""
    noise, y = normals(250, seed=9), [torch.tensor(300.0).double()] * 5
    for e in noise:
        past = torch.stack(y[-5:])
        weights = torch.tensor([0.05, -0.1, 0.1, 0.1, 0.7]).double()
        y.append(45.0 + (weights * past).sum() + 10.0 * e)
    series = torch.stack(y)
    lags = series.unfold(0, 5, 1)[:-1]

    def model(lags, y):
        a = pyro.sample("a", dist.Normal(0.0, 1000.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(5), 2.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfCauchy(25.0))
        pyro.sample("y", dist.Normal(a + lags @ b, sigma).to_event(1), obs=y)

    return vi.Model(model, lags, series[5:])


def poisson_regression():
    """Four hundred counts; a calendar year and its square as they come, flat priors."""
    year = torch.linspace(1960.0, 2000.0, 400).double()
    rate = torch.exp(1.0 + 0.05 * (year - 1980) - 0.002 * (year - 1980) ** 2)
    y = counts(rate, seed=10)

    def model(year, y):
        b = pyro.sample("b", flat(3))
        past = year - 1960.0
        pyro.sample(
            "y",
            dist.Poisson((b[..., 0] + b[..., 1] * past + b[..., 2] * past**2).exp()).to_event(1),
            obs=y,
        )

    return vi.Model(model, year, y)


def survey():
    """A logistic regression of 800 votes on 50 states, 30 groups and 4 predictors: 89 dimensions."""
    generator = torch.Generator().manual_seed(11)
    state = torch.randint(50, (800,), generator=generator)
    group = torch.randint(30, (800,), generator=generator)
    x = normals(800, 4, seed=12)
    linear = 0.4 * normals(50, seed=13)[state] + 0.3 * normals(30, seed=14)[group]
    y = coins(torch.sigmoid(0.3 + linear + x @ torch.tensor([0.5, -0.5, 0.0, 0.2]).double()), 15)

    def model(x, state, group, y):
        a = pyro.sample("a", dist.Normal(0.0, 5.0))
        b = pyro.sample("b", dist.Normal(x.new_zeros(4), 5.0).to_event(1))
        sds = pyro.sample("sds", dist.HalfNormal(1.0).expand([4]).to_event(1))
        u = pyro.sample("u", dist.Normal(x.new_zeros(50), sds[..., :1]).to_event(1))
        v = pyro.sample("v", dist.Normal(x.new_zeros(30), sds[..., 1:2]).to_event(1))
        logits = a + x @ b + u[..., state] + v[..., group]
        pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)

    return vi.Model(model, x, state, group, y)


def capture_recapture():
    """Survival and capture probabilities by year, from 600 histories summed up as counts."""
    years = 6
    released = torch.full((years,), 100.0).double()
    phi, p = 0.7, 0.4
    cells = [[phi * p * (phi * (1 - p)) ** (j - i) for j in range(i, years)] for i in range(years)]
    seen = [[round(100 * c) for c in row] for row in cells]
    table = torch.zeros(years, years).double()
    for i, row in enumerate(seen):
        table[i, i:] = torch.tensor(row).double()
    never = released - table.sum(1)

    def model(table, never):
        phi = pyro.sample("phi", dist.Uniform(0.0, 1.0).expand([years]).to_event(1))
        p = pyro.sample("p", dist.Uniform(0.0, 1.0).expand([years]).to_event(1))
        total = torch.zeros(()).double()
        for i in range(years):
            alive, left = 1.0, 1.0
            for j in range(i, years):
                cell = alive * phi[..., j] * p[..., j]
                total = total + table[i, j] * cell.log()
                left = left - cell
                alive = alive * phi[..., j] * (1 - p[..., j])
            total = total + never[i] * left.log()
        pyro.factor("histories", total)

    return vi.Model(model, table, never)


def garch():
    """GARCH(1, 1) of 60 steps, as a linear recursion with its matrix written out."""
    e, y, variance = normals(60, seed=16), [], 0.5
    for x in e.tolist():
        y.append(math.sqrt(variance) * x)
        variance = 0.1 + 0.3 * y[-1] ** 2 + 0.5 * variance
    series = torch.tensor(y).double()

    def model(y):
        omega = pyro.sample("omega", dist.HalfNormal(1.0))
        alpha = pyro.sample("alpha", dist.Uniform(0.0, 1.0))
        share = pyro.sample("share", dist.Uniform(0.0, 1.0))
        beta = (1 - alpha) * share
        n = len(y)
        steps = (torch.arange(n)[:, None] - torch.arange(n)).double()
        powers = torch.where(steps > 0, beta ** (steps - 1).clamp_min(0), 0.0)
        variance = powers @ (omega + alpha * y**2) + beta ** torch.arange(n).double() * 0.5
        pyro.sample("y", dist.Normal(0.0, variance.sqrt()).to_event(1), obs=y)

    return vi.Model(model, series)


MODELS = {
    "raw_regression": raw_regression,
    "centred_groups": centred_groups,
    "horseshoe": horseshoe,
    "ordered_mixture": ordered_mixture,
    "gp_classification": gp_classification,
    "autoregression": autoregression,
    "poisson_regression": poisson_regression,
    "survey": survey,
    "capture_recapture": capture_recapture,
    "garch": garch,
}
