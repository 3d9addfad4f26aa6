"""Small models of every kind that Pyro users write, each with the batching that is right for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import reparam
from pyro.ops.indexing import Vindex
from torch import Tensor


class Entry(NamedTuple):
    """A model, its data, and how K points of it are evaluated."""

    fn: Callable[..., Any]
    args: tuple[Any, ...] = ()
    mode: str = "vmap"


def normals(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


Y = normals(7)
COUNTS = torch.tensor([0.0, 0.0, 3.0, 1.0, 0.0, 5.0, 2.0], dtype=torch.float64)
X = normals(7, 3, seed=1)


def observe(loc: Any, scale: Any = 1.0, obs: Tensor = Y) -> None:
    with pyro.plate("datum", len(obs)):
        pyro.sample("y", dist.Normal(loc, scale), obs=obs)


# -- supports ---------------------------------------------------------------------------------


def lkj_cholesky():
    scale = pyro.sample("scale", dist.HalfNormal(torch.ones(3)).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    tril = scale.unsqueeze(-1) * factor
    with pyro.plate("datum", 7):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), scale_tril=tril), obs=X)


def lkj_matrix():
    corr = pyro.sample("corr", dist.LKJ(3, 1.5))
    with pyro.plate("datum", 7):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(3), corr), obs=X)


def lower_cholesky():
    tril = pyro.sample("tril", dist.ImproperUniform(constraints.lower_cholesky, (), (2, 2)))
    pyro.factor("prior", -tril.square().sum())
    with pyro.plate("datum", 7):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril), obs=X[:, :2])


def wishart():
    precision = pyro.sample("precision", dist.Wishart(torch.tensor(4.0), torch.eye(2)))
    with pyro.plate("datum", 7):
        pyro.sample(
            "y", dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision), obs=X[:, :2]
        )


def von_mises():
    mu = pyro.sample("mu", dist.VonMises(0.0, 0.5))
    kappa = pyro.sample("kappa", dist.Gamma(2.0, 0.5))
    with pyro.plate("datum", 7):
        pyro.sample("y", dist.VonMises(mu, kappa), obs=Y)


def projected_normal():
    direction = pyro.sample("direction", dist.ProjectedNormal(torch.tensor([1.0, 0.5])))
    observe(direction.sum(-1))


def projected_normal_reparam():
    with poutine.reparam(config={"direction": reparam.ProjectedNormalReparam()}):
        projected_normal()


def ordered():
    cut = pyro.sample(
        "cut",
        dist.TransformedDistribution(
            dist.Normal(torch.zeros(3), 2.0).to_event(1), dist.transforms.OrderedTransform()
        ),
    )
    with pyro.plate("datum", 7):
        predictor = Y
        grade = torch.tensor([0, 1, 2, 3, 1, 2, 0])
        pyro.sample("y", dist.OrderedLogistic(predictor, cut), obs=grade)


def simplex():
    p = pyro.sample("p", dist.Dirichlet(torch.ones(4)))
    pyro.sample("y", dist.Multinomial(9, p), obs=torch.tensor([2.0, 0.0, 3.0, 4.0]))


def simplex_rows():
    counts = torch.tensor([[2.0, 0.0, 3.0, 4.0], [1.0, 1.0, 1.0, 6.0], [0.0, 0.0, 0.0, 9.0]])
    with pyro.plate("row", 3):
        p = pyro.sample("p", dist.Dirichlet(torch.ones(4)))
        pyro.sample("y", dist.Multinomial(9, p), obs=counts)


def explicit_validation():
    s = pyro.sample("s", dist.Gamma(2.0, 1.0, validate_args=True))
    with pyro.plate("datum", 7):
        pyro.sample("y", dist.Normal(0.0, s, validate_args=True), obs=Y)


def dynamic_support():
    top = pyro.sample("top", dist.Gamma(3.0, 1.0))
    low = pyro.sample("low", dist.Uniform(-top, top))
    observe(low, top)


def interval_of_data():
    bound = pyro.sample("bound", dist.Pareto(0.5, 2.0))
    with pyro.plate("datum", 7):
        pyro.sample("y", dist.Uniform(-bound - 3.0, bound + 3.0), obs=Y)


# -- missing data, reparameterisation -----------------------------------------------------------


def obs_mask():
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", 7):
        x = pyro.sample("x", dist.Normal(m, 1.0), obs=Y, obs_mask=Y > 0)
        pyro.sample("y", dist.Normal(x, 0.5), obs=Y + 0.1)


def masked():
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", 7), poutine.mask(mask=Y > 0):
        pyro.sample("y", dist.Normal(m, 1.0), obs=Y)


def hierarchy():
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("datum", 7):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=Y)


def loc_scale_reparam():
    with poutine.reparam(config={"theta": reparam.LocScaleReparam(0.0)}):
        hierarchy()


def loc_scale_learned():
    with poutine.reparam(config={"theta": reparam.LocScaleReparam()}):
        hierarchy()


def transform_reparam():
    with poutine.reparam(config={"s": reparam.TransformReparam()}):
        s = pyro.sample(
            "s",
            dist.TransformedDistribution(
                dist.Normal(0.0, 1.0), dist.transforms.AffineTransform(0.5, 2.0)
            ),
        )
    observe(s)


# -- observations --------------------------------------------------------------------------------


def mixture_same_family():
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("datum", 7):
        mixed = dist.MixtureSameFamily(dist.Categorical(w), dist.Normal(m, 1.0))
        pyro.sample("y", mixed, obs=Y)


def latent_mixture():
    modes = dist.Normal(torch.tensor([[-1.0, 0.0], [1.0, 2.0]]), 0.5).to_event(1)
    x = pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), modes))
    rates = dist.Gamma(torch.tensor([2.0, 5.0]), 1.0)
    r = pyro.sample("r", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), rates))
    observe(x.sum(), r)


def masked_mixture():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(1.0, 1.0))
    with pyro.plate("datum", 7):
        mixed = dist.MaskedMixture(
            Y > 0, dist.Normal(a, 1.0).expand([7]), dist.Normal(b, 2.0).expand([7])
        )
        pyro.sample("y", mixed, obs=Y)


def zero_inflated_poisson():
    gate = pyro.sample("gate", dist.Beta(1.0, 1.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("datum", 7):
        pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=gate), obs=COUNTS)


def zero_inflated_negative_binomial():
    gate = pyro.sample("gate", dist.Normal(0.0, 1.0))
    size = pyro.sample("size", dist.Gamma(2.0, 1.0))
    logits = pyro.sample("logits", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", 7):
        inflated = dist.ZeroInflatedNegativeBinomial(size, logits=logits, gate_logits=gate)
        pyro.sample("y", inflated, obs=COUNTS)


def log_normal_transformed():
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("datum", 7):
        shifted = dist.TransformedDistribution(
            dist.Normal(loc, scale),
            [dist.transforms.ExpTransform(), dist.transforms.AffineTransform(-1.0, 2.0)],
        )
        pyro.sample("y", shifted, obs=Y.exp())


def truncated():
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("datum", 7):
        pyro.sample("y", dist.TruncatedPolyaGamma(Y.abs()), obs=Y.abs() / 10)
        pyro.sample("x", dist.Exponential(rate), obs=Y.abs())


def truncated_by_factor():
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    with pyro.plate("datum", 7):
        pyro.sample("y", dist.Normal(m, s), obs=Y.abs())
        pyro.factor("truncation", -dist.Normal(m, s).cdf(torch.tensor(0.0)).neg().log1p())


def heavy_tails():
    df = pyro.sample("df", dist.Gamma(2.0, 0.1))
    skew = pyro.sample("skew", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", 7):
        pyro.sample("y", dist.StudentT(df, 0.0, 1.0), obs=Y)
        pyro.sample("x", dist.AsymmetricLaplace(skew, 1.0, 0.5), obs=Y)
        pyro.sample("w", dist.SoftLaplace(skew, 1.0), obs=Y)


def counts():
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    b = pyro.sample("b", dist.Gamma(2.0, 1.0))
    with pyro.plate("datum", 7):
        pyro.sample("bb", dist.BetaBinomial(a, b, 6), obs=COUNTS)
        pyro.sample("gp", dist.GammaPoisson(a, b), obs=COUNTS)
        pyro.sample("bn", dist.Binomial(6, a / (a + b)), obs=COUNTS)
    with pyro.plate("row", 2):
        rows = torch.tensor([[1.0, 2.0, 3.0], [4.0, 0.0, 2.0]])
        dm = dist.DirichletMultinomial(torch.stack([a, b, a + b]), torch.tensor(6.0))
        pyro.sample("dm", dm, obs=rows)


def categorical_regression():
    w = pyro.sample("w", dist.Normal(torch.zeros(3, 4), 1.0).to_event(2))
    with pyro.plate("datum", 7):
        pyro.sample("y", dist.Categorical(logits=X @ w), obs=COUNTS.clamp(max=3).long())


def stable_reparam():
    with poutine.reparam(config={"y": reparam.LatentStableReparam()}):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", 7):
            y = pyro.sample("y", dist.Stable(1.5, 0.0, 1.0, loc))
            pyro.sample("x", dist.Normal(y, 1.0), obs=Y)


# -- time --------------------------------------------------------------------------------------


def ar():
    a = pyro.sample("a", dist.Uniform(-1.0, 1.0))
    s = pyro.sample("s", dist.HalfNormal(1.0))
    previous = torch.zeros(())
    for t, value in enumerate(Y):
        pyro.sample(f"y{t}", dist.Normal(a * previous, s), obs=value)
        previous = value


def garch():
    omega = pyro.sample("omega", dist.HalfNormal(1.0))
    alpha = pyro.sample("alpha", dist.Beta(2.0, 2.0))
    beta = pyro.sample("beta", dist.Uniform(0.0, 1.0 - alpha))
    variance = [omega / (1 - alpha - beta + 0.1)]
    for t in range(1, len(Y)):
        variance.append(omega + alpha * Y[t - 1] ** 2 + beta * variance[-1])
    observe(0.0, torch.stack(variance).sqrt())


def garch_in_place():
    omega = pyro.sample("omega", dist.HalfNormal(1.0))
    alpha = pyro.sample("alpha", dist.Beta(2.0, 2.0))
    variance = torch.ones(7)
    for t in range(1, 7):
        variance[t] = omega + alpha * Y[t - 1] ** 2
    observe(0.0, variance.sqrt())


def ode():
    rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
    state, states = torch.ones(()), []
    for _ in range(7):
        for _ in range(3):
            state = state - 0.05 * rate * state
        states.append(state)
    observe(torch.stack(states), 0.3)


def sequential_plate():
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    for i in pyro.plate("datum", 7):
        pyro.sample(f"y{i}", dist.Normal(m, 1.0), obs=Y[i])


def discrete_hmm():
    initial = pyro.sample("initial", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("state", 2):
        transition = pyro.sample("transition", dist.Dirichlet(torch.ones(2)))
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    chain = dist.DiscreteHMM(initial.log(), transition.log(), dist.Normal(loc, 1.0), duration=7)
    pyro.sample("y", chain, obs=Y)


def gaussian_hmm():
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    a = pyro.sample("a", dist.Normal(0.5, 0.2))
    eye = torch.eye(2)
    noise = dist.MultivariateNormal(torch.zeros(2), s * eye)
    step = dist.MultivariateNormal(torch.zeros(2), eye)
    chain = dist.GaussianHMM(noise, a * eye, step, torch.eye(2), step, duration=7)
    pyro.sample("y", chain, obs=X[:, :2])


def gamma_gaussian_hmm():
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    a = pyro.sample("a", dist.Normal(0.5, 0.2))
    eye = torch.eye(2)
    step = dist.MultivariateNormal(torch.zeros(2), eye)
    noise = dist.MultivariateNormal(torch.zeros(2), s * eye)
    chain = dist.GammaGaussianHMM(
        dist.Gamma(torch.tensor(3.0), torch.tensor(2.0)),
        noise,
        a * eye,
        step,
        eye,
        step,
        duration=7,
    )
    pyro.sample("y", chain, obs=X[:, :2])


def gaussian_process():
    length = pyro.sample("length", dist.LogNormal(0.0, 0.5))
    time = torch.arange(7.0)
    gap = (time[:, None] - time).square()
    cov = torch.exp(-gap / (2 * length**2)) + 0.1 * torch.eye(7)
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(7), cov), obs=Y)


# -- discrete latents --------------------------------------------------------------------------

LONG = torch.cat([normals(16, seed=3), 4.0 + normals(24, seed=4)])
SERIES = LONG[:12].reshape(3, 4)
GROUPS = LONG.reshape(4, 10)


def mixture(y=LONG):
    w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("component", 2):
        m = pyro.sample("m", dist.Normal(0.0, 5.0))
    s = pyro.sample("s", dist.HalfNormal(2.0))
    with pyro.plate("datum", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.deterministic("loc", m[z])
        pyro.sample("y", dist.Normal(m[z], s), obs=y)


def chain(y=LONG[10:22]):
    with pyro.plate("state", 3):
        m = pyro.sample("m", dist.Normal(0.0, 5.0))
        transition = pyro.sample("transition", dist.Dirichlet(torch.ones(3)))
    z = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z{t}", dist.Categorical(transition[z]))
        pyro.sample(f"y{t}", dist.Normal(m[z], 1.0), obs=y[t])


def chains_of_different_lengths(y=SERIES):
    lengths = torch.tensor([4, 2, 3])
    with pyro.plate("state", 2):
        m = pyro.sample("m", dist.Normal(0.0, 5.0))
        transition = pyro.sample("transition", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("series", 3):
        z = torch.zeros(3, dtype=torch.long)
        for t in pyro.markov(range(4)):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z{t}", dist.Categorical(Vindex(transition)[z]))
                pyro.sample(f"y{t}", dist.Normal(m[z], 1.0), obs=y[:, t])


def zero_inflated_by_hand():
    gate = pyro.sample("gate", dist.Beta(2.0, 2.0))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    with pyro.plate("datum", 7):
        z = pyro.sample("z", dist.Bernoulli(gate))
        pyro.sample("y", dist.Poisson(torch.where(z > 0, torch.tensor(1e-8), rate)), obs=COUNTS)


def nested(y=GROUPS):
    a = pyro.sample("a", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    with pyro.plate("group", 4, dim=-2):
        u = pyro.sample("u", dist.Categorical(logits=a))
        with pyro.plate("member", 10, dim=-1):
            v = pyro.sample("v", dist.Bernoulli(logits=a[u]))
            pyro.sample("y", dist.Normal(3.0 * v + u, 1.0), obs=y)


def global_switch(y=Y):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    g = pyro.sample("g", dist.Bernoulli(p))
    mu = pyro.sample("mu", dist.Normal(2 * g - 1, 1.0))
    with pyro.plate("datum", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0 + g), obs=y)


def local_latents(y=LONG):
    m = pyro.sample("m", dist.Normal(torch.zeros(2), 3.0).to_event(1))
    with pyro.plate("datum", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        x = pyro.sample("x", dist.Normal(m[z.long()], 1.0))
        pyro.sample("y", dist.Normal(x, 0.5), obs=y)
        pyro.sample("w", dist.Bernoulli(logits=2 * z - 1), obs=(y > 1.0).double())


def one_hot():
    w = pyro.sample("w", dist.Dirichlet(torch.ones(3)))
    m = pyro.sample("m", dist.Normal(torch.zeros(3), 3.0).to_event(1))
    with pyro.plate("datum", 7):
        z = pyro.sample("z", dist.OneHotCategorical(w))
        pyro.sample("y", dist.Normal((z * m).sum(-1), 1.0), obs=Y)


def binomial_latent():
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("datum", 7):
        n = pyro.sample("n", dist.Binomial(6, p))
        pyro.sample("y", dist.Normal(n, 1.0), obs=COUNTS)


def no_markov(y=LONG[12:18]):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    z = torch.zeros(())
    for t in range(len(y)):
        z = pyro.sample(f"z{t}", dist.Bernoulli(torch.where(z > 0, p, 1 - p)))
        pyro.sample(f"y{t}", dist.Normal(4 * z, 1.0), obs=y[t])


DISCRETE = {
    fn.__name__: Entry(fn)
    for fn in (
        mixture,
        chain,
        chains_of_different_lengths,
        zero_inflated_by_hand,
        nested,
        global_switch,
        local_latents,
        one_hot,
        binomial_latent,
        no_markov,
    )
}

CONTINUOUS = {
    fn.__name__: Entry(fn)
    for fn in (
        lkj_cholesky,
        lkj_matrix,
        lower_cholesky,
        wishart,
        von_mises,
        projected_normal_reparam,
        ordered,
        simplex,
        simplex_rows,
        explicit_validation,
        dynamic_support,
        interval_of_data,
        obs_mask,
        masked,
        loc_scale_reparam,
        loc_scale_learned,
        transform_reparam,
        mixture_same_family,
        masked_mixture,
        zero_inflated_poisson,
        zero_inflated_negative_binomial,
        log_normal_transformed,
        truncated,
        truncated_by_factor,
        heavy_tails,
        counts,
        categorical_regression,
        stable_reparam,
        ar,
        garch,
        garch_in_place,
        ode,
        sequential_plate,
        discrete_hmm,
        gaussian_hmm,
        gamma_gaussian_hmm,
        gaussian_process,
    )
}
