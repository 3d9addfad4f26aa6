"""What a refusal says to do works when it is done: remedies, tried on the models refused."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import infer_discrete
from pyro.infer.reparam import ProjectedNormalReparam
from pyro.ops.indexing import Vindex
from torch.distributions import biject_to, constraints
from torch.utils.data import TensorDataset

import pyro_vi_kit as vi
from pyro_vi_kit.core.errors import ViError

X = torch.linspace(-1.0, 1.0, 8)
Y = torch.tensor([0.3, -0.7, 0.2, 1.1, -0.4, 0.9, 0.1, 0.5])
BAD = Y.clone()
BAD[2] = float("nan")


@dataclasses.dataclass(frozen=True)
class Case:
    """A refusal, a pattern of its message, and what the message says to do."""

    refused: Callable[[], Any]
    says: str
    remedies: Mapping[str, Callable[[], Any]]


def fitted(fn: Callable[..., Any], *args: Any, guide: Any = "mean_field", **options: Any) -> Any:
    """A short fit; keyword arguments of the model under ``kwargs``."""
    kwargs = options.pop("kwargs", {})
    settings = {"seed": 0, "steps": 10} | options
    return vi.fit(vi.Model(fn, *args, kwargs=kwargs), guide, **settings)


def scale() -> Any:
    return pyro.sample("scale", dist.LogNormal(0.0, 1.0))


def location() -> Any:
    return pyro.sample("m", dist.Normal(0.0, 1.0))


def regression(y: Any, noise: Callable[[], Any] = lambda: 0.0) -> None:
    m = location()
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(m + noise(), 1.0), obs=y)


# -- structure and randomness -------------------------------------------------------------------


def branching(y: Any) -> None:
    if location() > 0:
        scale()
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y[0])


def not_branching(y: Any) -> None:
    m, s = location(), scale()
    pyro.sample("y", dist.Normal(0.0, torch.where(m > 0, s, torch.ones_like(s))), obs=y[0])


def branching_guide(y: Any) -> None:
    loc = pyro.param("loc", torch.tensor(0.0))
    if pyro.sample("m", dist.Normal(loc, 1.0)) > 0:
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))


def growing(y: Any) -> None:
    n = 1 + int(location() > 0)
    pyro.sample("y", dist.Normal(torch.zeros(n), 1.0).to_event(1), obs=y[:n])


def masked_growth(y: Any) -> None:
    shown = torch.stack([torch.ones(()), (location() > 0).float()]) > 0
    with pyro.plate("row", 2):
        pyro.sample("y", dist.Normal(0.0, 1.0).mask(shown), obs=y[:2])


def noisy(y: Any) -> None:
    regression(y, lambda: torch.randn(()))


def noisy_by_site(y: Any) -> None:
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
    regression(y, lambda: noise)


def dropping_out(y: Any, layer: Any) -> None:
    regression(y, lambda: layer(torch.ones(20)).sum())


def detached(y: Any) -> None:
    s = scale()
    regression(y, lambda: torch.tensor([s.detach()])[0])


def attached(y: Any) -> None:
    s = scale()
    regression(y, lambda: torch.stack([s])[0])


def twice(y: Any) -> None:
    m = location()
    for value in y:
        pyro.sample("y", dist.Normal(m, 1.0), obs=value)


def once_each(y: Any) -> None:
    m = location()
    for i, value in enumerate(y):
        pyro.sample(f"y_{i}", dist.Normal(m, 1.0), obs=value)


STRUCTURE = {
    "branches": Case(
        lambda: fitted(branching, Y),
        "structure changes",
        {
            "torch.where": lambda: fitted(not_branching, Y),
            "a guide of one's own": lambda: fitted(
                branching, Y, guide=branching_guide, engine="pyro"
            ),
        },
    ),
    "shapes": Case(
        lambda: fitted(growing, Y),
        "use a fixed size and mask",
        {"mask": lambda: fitted(masked_growth, Y)},
    ),
    "randomness": Case(
        lambda: fitted(noisy, Y),
        r"make each draw a pyro\.sample site",
        {"a site": lambda: fitted(noisy_by_site, Y)},
    ),
    "dropout": Case(
        lambda: fitted(dropping_out, Y, torch.nn.Dropout(0.5)),
        r"call module\.eval\(\) first",
        {"eval": lambda: fitted(dropping_out, Y, torch.nn.Dropout(0.5).eval())},
    ),
    "cut off": Case(
        lambda: fitted(detached, Y),
        r"torch\.stack for vectors of latents",
        {"torch.stack": lambda: fitted(attached, Y)},
    ),
    "two sites of one name": Case(
        lambda: fitted(twice, Y),
        "a name of its own",
        {"names": lambda: fitted(once_each, Y)},
    ),
}


# -- discrete latents ---------------------------------------------------------------------------


def coins(y: Any, plate: bool = False, event: bool = False) -> None:
    m = location()
    p = torch.full((8,), 0.3)
    if plate:
        with pyro.plate("row", 8):
            k = pyro.sample("k", dist.Bernoulli(p))
            pyro.sample("y", dist.Normal(m + k, 1.0), obs=y)
        return
    k = pyro.sample("k", dist.Bernoulli(p).to_event(1) if event else dist.Bernoulli(p))
    pyro.sample("y", dist.Normal(m + k, 1.0).to_event(1), obs=y)


def counts(y: Any, prior: Any = None) -> None:
    m = location()
    with pyro.plate("row", 8):
        k = pyro.sample("k", dist.Poisson(1.0) if prior is None else prior)
        pyro.sample("y", dist.Normal(m + k, 1.0), obs=y)


def truncated(y: Any) -> None:
    counts(y, dist.Categorical(logits=dist.Poisson(1.0).log_prob(torch.arange(10.0))))


def summed_by_hand(y: Any) -> None:
    m, k = location(), torch.arange(10.0)
    parts = dist.Poisson(1.0).log_prob(k) + dist.Normal(m + k, 1.0).log_prob(y[:, None])
    with pyro.plate("row", 8):
        pyro.factor("y", parts.logsumexp(-1))


def counts_guide(y: Any) -> None:
    pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))
    with pyro.plate("row", 8):
        pyro.sample("k", dist.Poisson(1.0))


def only_coins(y: Any) -> None:
    k = pyro.sample("k", dist.Bernoulli(0.3))
    pyro.sample("y", dist.Normal(k, 1.0), obs=y[0])


def by_python_if(y: Any) -> None:
    m, k = location(), pyro.sample("k", dist.Bernoulli(0.3))
    shift = 1.0 if bool((k > 0).any()) else 0.0
    pyro.sample("y", dist.Normal(m + shift, 1.0), obs=y[0])


def by_where(y: Any) -> None:
    m, k = location(), pyro.sample("k", dist.Bernoulli(0.3))
    pyro.sample("y", dist.Normal(m + torch.where(k > 0, 1.0, 0.0), 1.0), obs=y[0])


def by_vindex(y: Any) -> None:
    m, k = location(), pyro.sample("k", dist.Categorical(torch.tensor([0.7, 0.3])))
    pyro.sample("y", dist.Normal(m + Vindex(torch.tensor([0.0, 1.0]))[..., k], 1.0), obs=y[0])


def moving_support(y: Any, fixed: bool = False) -> None:
    top = 1.0 + pyro.sample("k", dist.Bernoulli(0.3))
    u = pyro.sample("u", dist.Uniform(0.0, 1.0 if fixed else top))
    pyro.sample("y", dist.Normal(u * top if fixed else u, 1.0), obs=y[0])


def scaled_apart(y: Any, together: bool = False) -> None:
    m, k = location(), pyro.sample("k", dist.Bernoulli(0.3))
    with poutine.scale(scale=1.0 if together else 2.0):
        pyro.sample("y", dist.Normal(m + k, 1.0), obs=y[0])


def many_states(y: Any, how: str = "all") -> None:
    m, k, total = location(), torch.zeros(()), torch.zeros(())
    steps = pyro.markov(range(26)) if how == "markov" else range(26)
    for t in steps:
        k = pyro.sample(f"k_{t}", dist.Bernoulli(0.3 + 0.2 * k if how == "markov" else 0.3))
        total = total + k
        if how == "markov":
            pyro.sample(f"y_{t}", dist.Normal(m + k, 1.0), obs=y[t % 8])
    if how == "all":
        pyro.sample("y", dist.Normal(m + total, 1.0), obs=y[0])


def relaxed_categories(y: Any, one_hot: bool = False) -> None:
    means, p = pyro.sample("means", dist.Normal(torch.zeros(2), 1.0).to_event(1)), torch.ones(2)
    with pyro.plate("row", 8):
        k = pyro.sample("k", dist.OneHotCategorical(p) if one_hot else dist.Categorical(p))
        loc = k @ means if one_hot else means[..., k.long()]
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def rounded(y: Any, smooth: bool = False) -> None:
    m = location()
    with pyro.plate("row", 8):
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(m + (k if smooth else (k > 0.5).to(m.dtype)), 1.0), obs=y)


RELAXED = vi.guides.MeanField(discrete="relaxed")
SCORED = vi.guides.MeanField(discrete={"k": "score"})

DISCRETE = {
    "no plate": Case(
        lambda: fitted(coins, Y),
        r"put them into a pyro\.plate|pyro\.plate",
        {"plate": lambda: fitted(coins, Y, kwargs={"plate": True})},
    ),
    "event": Case(
        lambda: fitted(coins, Y, kwargs={"event": True}),
        r"pyro\.plate in the place of \.to_event",
        {"plate": lambda: fitted(coins, Y, kwargs={"plate": True})},
    ),
    "infinitely many": Case(
        lambda: fitted(counts, Y),
        r"truncate to a dist\.Categorical .* logsumexp\), or pass a Pyro guide",
        {
            "truncate": lambda: fitted(truncated, Y),
            "sum by hand": lambda: fitted(summed_by_hand, Y),
            "a guide of one's own": lambda: fitted(counts, Y, guide=counts_guide, budget=5.0),
        },
    ),
    "nothing else": Case(
        lambda: fitted(only_coins, Y),
        r"pyro\.infer\.infer_discrete draws from it",
        {
            "infer_discrete": lambda: poutine.trace(
                infer_discrete(
                    pyro.infer.config_enumerate(only_coins), first_available_dim=-1, temperature=1
                )
            ).get_trace(Y)
        },
    ),
    "Python if": Case(
        lambda: fitted(by_python_if, Y),
        r"torch\.where; no Python if",
        {"torch.where": lambda: fitted(by_where, Y), "Vindex": lambda: fitted(by_vindex, Y)},
    ),
    "support": Case(
        lambda: fitted(moving_support, Y),
        "give it a fixed support",
        {"fixed": lambda: fitted(moving_support, Y, kwargs={"fixed": True})},
    ),
    "scales": Case(
        lambda: fitted(scaled_apart, Y),
        "give them one scale",
        {"one scale": lambda: fitted(scaled_apart, Y, kwargs={"together": True})},
    ),
    "too many states": Case(
        lambda: fitted(many_states, Y),
        r"chains into pyro\.markov",
        {"markov": lambda: fitted(many_states, Y, kwargs={"how": "markov"})},
    ),
    "relaxed categories": Case(
        lambda: fitted(relaxed_categories, Y, guide=RELAXED),
        r"write it as dist\.OneHotCategorical .* 'score'",
        {
            "one-hot": lambda: fitted(
                relaxed_categories, Y, guide=RELAXED, kwargs={"one_hot": True}
            ),
            "score": lambda: fitted(relaxed_categories, Y, guide=SCORED),
        },
    ),
    "rounded": Case(
        lambda: fitted(rounded, Y, guide=RELAXED),
        "multiply by them .* 'score'",
        {
            "multiply": lambda: fitted(rounded, Y, guide=RELAXED, kwargs={"smooth": True}),
            "score": lambda: fitted(rounded, Y, guide=SCORED),
        },
    ),
}


# -- data, shapes and supports ------------------------------------------------------------------


def hidden(y: Any) -> None:
    m = location()
    with pyro.plate("row", len(y)), poutine.mask(mask=~y.isnan()):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y.nan_to_num())


def imputed(y: Any) -> None:
    m = location()
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(m, 1.0), obs=y.nan_to_num(), obs_mask=~y.isnan())


def nothing_hidden(y: Any, known: bool = True) -> None:
    pyro.sample("m", dist.Normal(0.0, 1.0), obs=torch.tensor(0.0) if known else None)
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y[0])


def stray(y: Any, how: str = "") -> None:
    m = location()
    normal = dist.Normal(m.expand(2, 8), 1.0)
    if how == "plate":
        with pyro.plate("group", 2, dim=-2), pyro.plate("row", 8, dim=-1):
            pyro.sample("y", normal, obs=y.expand(2, 8))
    elif how == "event":
        with pyro.plate("group", 2):
            pyro.sample("y", normal.to_event(1), obs=y.expand(2, 8))
    else:
        with pyro.plate("row", 8):
            pyro.sample("y", normal, obs=y.expand(2, 8))


def column(y: Any, x: Any) -> None:
    m = location()
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Normal(m * x, 1.0), obs=y)


def sphere(how: str = "") -> None:
    with poutine.reparam(config={"v": ProjectedNormalReparam()} if how else {}):
        v = pyro.sample("v", dist.ProjectedNormal(torch.tensor([1.0, 0.0])))
    pyro.sample("y", dist.Normal(v[0], 1.0), obs=torch.tensor(0.3))


class Odd(constraints.Constraint):
    """A support that nobody has a map for."""

    event_dim = 0

    def check(self, value: Any) -> Any:
        return value > 3


class OddGamma(dist.TransformedDistribution):
    """Gamma(2, 1) + 3."""

    support = Odd()

    def __init__(self) -> None:
        shift = torch.distributions.transforms.AffineTransform(3.0, 1.0)
        super().__init__(dist.Gamma(torch.tensor(2.0), 1.0), [shift], validate_args=False)


def odd() -> None:
    value = pyro.sample("v", OddGamma())
    pyro.sample("y", dist.Normal(value, 1.0), obs=torch.tensor(4.0))


def registered() -> float:
    """The remedy, undone afterwards."""
    biject_to.register(Odd, lambda support: biject_to(constraints.greater_than(3.0)))
    try:
        return fitted(odd).elbo
    finally:
        del biject_to._registry[Odd]


def lengths(y: Any, size: int | None = None) -> None:
    m = location()
    with pyro.plate("row", size):
        pyro.sample("x", dist.Normal(m, 1.0), obs=y)
        pyro.sample("y", dist.Normal(m, 1.0), obs=y[: size or 5])


def positive(y: Any, prior: Any = dist.Exponential) -> None:
    with pyro.plate("row", len(y)):
        pyro.sample("y", prior(scale()), obs=y)


DATA = {
    "NaN": Case(
        lambda: fitted(regression, BAD),
        r"drop the rows, or fill the values and hide them with poutine\.mask or obs_mask=",
        {
            "drop": lambda: fitted(regression, BAD[~BAD.isnan()]),
            "mask": lambda: fitted(hidden, BAD),
            "obs_mask": lambda: fitted(imputed, BAD),
        },
    ),
    "outside": Case(
        lambda: fitted(positive, Y),
        "correct the values, or choose a distribution that can produce them",
        {
            "correct": lambda: fitted(positive, Y.abs()),
            "another distribution": lambda: fitted(
                positive, Y, kwargs={"prior": lambda s: dist.Normal(0.0, s)}
            ),
        },
    ),
    "no latents": Case(
        lambda: fitted(nothing_hidden, Y),
        "leave obs= out where a value is unknown",
        {"without obs": lambda: fitted(nothing_hidden, Y, kwargs={"known": False})},
    ),
    "stray dims": Case(
        lambda: fitted(stray, Y),
        r"\.to_event\(1\).*pyro\.plate",
        {
            "plate": lambda: fitted(stray, Y, kwargs={"how": "plate"}),
            "event": lambda: fitted(stray, Y, kwargs={"how": "event"}),
        },
    ),
    "columns": Case(
        lambda: fitted(column, Y, X[:, None]),
        r"x\.squeeze\(-1\)",
        {"squeeze": lambda: fitted(column, Y, X[:, None].squeeze(-1))},
    ),
    "no map": Case(
        lambda: fitted(odd),
        r"biject_to\.register",
        {"register": registered},
    ),
    "sphere": Case(
        lambda: fitted(sphere),
        r"ProjectedNormalReparam\(\)",
        {"reparam": lambda: fitted(sphere, kwargs={"how": "reparam"})},
    ),
    "plate without a size": Case(
        lambda: fitted(lengths, Y),
        r"give it one, pyro\.plate\('row', size\)",
        {"size": lambda: fitted(lengths, Y[:5], kwargs={"size": 5})},
    ),
}


# -- guides and minibatches ---------------------------------------------------------------------


def rows(y: Any, seen: bool = True, index: bool = True) -> None:
    m = location()
    with pyro.plate("row", 8) as i:
        z = pyro.sample("z", dist.Normal(m, 1.0))
        if seen:
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[i] if index else y)


def nested(y: Any) -> None:
    m = location()
    with pyro.plate("group", 4, dim=-2) as i, pyro.plate("row", 2, dim=-1) as j:
        pyro.sample("y", dist.Normal(m, 1.0), obs=y.reshape(4, 2)[i][:, j])


def crossed(y: Any, once: bool = False) -> None:
    one, other = pyro.plate("one", 4, dim=-2), pyro.plate("other", 2, dim=-1)
    with one as i:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with other as j:
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
    with one, other:
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y.reshape(4, 2)[i][:, j])


def fixed(y: Any, indexed: str = "") -> None:
    m = location()
    with pyro.plate("row", 8) as i:
        data = {"i": lambda: y[i], "subsample": lambda: pyro.subsample(y, event_dim=0)}
        pyro.sample("y", dist.Normal(m, 1.0), obs=data[indexed]() if indexed else y)


def own_guide(y: Any, size: int | None = None) -> None:
    pyro.sample("m", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))


def declared(y: Any) -> None:
    m = location()
    with pyro.plate("row", 8, 4) as i:
        pyro.sample("y", dist.Normal(m, 1.0), obs=y[i])


def made(model: Callable[..., Any], name: str) -> Any:
    return vi.guides.make(name, vi.Model(model, Y), dtype=torch.float64)


def streamed(x: Any, how: str = "") -> None:
    m = location()
    if how == "":
        pyro.sample("x", dist.Normal(m, 1.0).expand(x.shape).to_event(1), obs=x)
        return
    if how == "local":
        with pyro.plate("row", len(x)):
            z = pyro.sample("z", dist.Normal(m, torch.ones(len(x))))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        return
    with pyro.plate("row", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x)


def stock_svi(guide: Any, model: Any) -> Any:
    optim = pyro.optim.Adam({"lr": 0.01})
    with pyro.get_param_store().scope():
        return pyro.infer.SVI(model, guide, optim, pyro.infer.Trace_ELBO()).step(Y)


def local_declared(y: Any, subsample: int | None = 4) -> None:
    with pyro.plate("row", 8, subsample) as i:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[i])


ENCODERS = {name: torch.nn.Linear(size, 2) for name, size in (("one", 2), ("other", 4))}

GUIDES = {
    "amortized without a plate": Case(
        lambda: fitted(regression, Y, guide="amortized"),
        "use guide='full_rank' or guide='affine_coupling'",
        {
            name: lambda name=name: fitted(regression, Y, guide=name)
            for name in ("full_rank", "affine_coupling")
        },
    ),
    "nothing to read": Case(
        lambda: fitted(rows, Y, guide="amortized", kwargs={"seen": False}),
        "guide without an encoder, e.g. guide='mean_field'",
        {"mean_field": lambda: fitted(rows, Y, kwargs={"seen": False})},
    ),
    "one encoder for two plates": Case(
        lambda: fitted(crossed, Y, guide=vi.guides.Amortized(encoder=ENCODERS["one"])),
        "give encoder= a dict by plate, or leave it out",
        {
            "dict": lambda: fitted(crossed, Y, guide=vi.guides.Amortized(encoder=ENCODERS)),
            "leave out": lambda: fitted(crossed, Y, guide="amortized"),
        },
    ),
    "inner plate": Case(
        lambda: fitted(nested, Y, batch_size={"row": 1}),
        r"batch_size=\{'group'",
        {"outer": lambda: fitted(nested, Y, batch_size={"group": 2})},
    ),
    "no indices": Case(
        lambda: fitted(fixed, Y, batch_size=4),
        r"y\[i\].*pyro\.subsample",
        {
            "index": lambda: fitted(fixed, Y, batch_size=4, kwargs={"indexed": "i"}),
            "subsample": lambda: fitted(fixed, Y, batch_size=4, kwargs={"indexed": "subsample"}),
        },
    ),
    "no data plate": Case(
        lambda: fitted(streamed, Y, batch_size=4),
        r"declare it, .* or leave batch_size= out",
        {
            "plate": lambda: fitted(streamed, Y, batch_size=4, kwargs={"how": "plate"}),
            "leave out": lambda: fitted(streamed, Y),
        },
    ),
    "a built guide": Case(
        lambda: fitted(rows, Y, guide=made(rows, "mean_field"), batch_size=4),
        "name the guide .* or use guide='amortized'",
        {
            "name": lambda: fitted(rows, Y, batch_size=4),
            "amortized": lambda: fitted(rows, Y, guide="amortized", batch_size=4),
        },
    ),
    "a family without rows": Case(
        lambda: fitted(rows, Y, guide="structured", batch_size=4),
        "needs guide='amortized' or one of",
        {
            name: lambda name=name: fitted(rows, Y, guide=name, batch_size=4)
            for name in ("amortized", "delta", "student_t", "mixture")
        },
    ),
    "a joint bound on rows": Case(
        lambda: fitted(fixed, Y, objective="iwae", batch_size=4, kwargs={"indexed": "i"}),
        "use objective='elbo', or leave batch_size= out",
        {
            "elbo": lambda: fitted(fixed, Y, batch_size=4, kwargs={"indexed": "i"}),
            "all rows": lambda: fitted(fixed, Y, objective="iwae", kwargs={"indexed": "i"}),
        },
    ),
    "a bound of two plates": Case(
        lambda: fitted(crossed, Y, guide="amortized", objective="iwae"),
        "use objective='elbo'",
        {"elbo": lambda: fitted(crossed, Y, guide="amortized")},
    ),
    "Pyro's engine without indices": Case(
        lambda: fitted(streamed, Y, batch_size=4, engine="pyro", kwargs={"how": "plate"}),
        r"leave engine= out, or index in the model, obs=y\[i\]",
        {
            "engine": lambda: fitted(streamed, Y, batch_size=4, kwargs={"how": "plate"}),
            "index": lambda: fitted(fixed, Y, batch_size=4, engine="pyro", kwargs={"indexed": "i"}),
        },
    ),
    "a guide of one's own on rows": Case(
        lambda: fitted(fixed, Y, guide=own_guide, batch_size=4, kwargs={"indexed": "i"}),
        "give the plates of model and guide a subsample_size",
        {"subsample_size": lambda: fitted(declared, Y, guide=own_guide)},
    ),
    "stock SVI on rows": Case(
        lambda: stock_svi(made(local_declared, "mean_field"), local_declared),
        "use guide='amortized', or remove subsample_size",
        {
            "amortized": lambda: stock_svi(
                vi.guides.make("amortized", vi.Model(local_declared, Y)), local_declared
            ),
            "remove": lambda: stock_svi(
                vi.guides.make(
                    "mean_field", vi.Model(local_declared, Y, kwargs={"subsample": None})
                ),
                lambda y: local_declared(y, None),
            ),
        },
    ),
    "a start of rows": Case(
        lambda: fitted(rows, Y, guide="amortized", init={"z": Y}),
        "it can start from values of m",
        {"globals": lambda: fitted(rows, Y, guide="amortized", init={"m": 0.5})},
    ),
}


# -- streamed data ------------------------------------------------------------------------------

DATASET = TensorDataset(Y)

STREAMS = {
    "no plate": Case(
        lambda: fitted(streamed, DATASET),
        r"pyro\.plate\('row', len\(x\)\)",
        {"plate": lambda: fitted(streamed, DATASET, kwargs={"how": "plate"})},
    ),
    "latents": Case(
        lambda: fitted(streamed, DATASET, kwargs={"how": "local"}),
        "use guide='amortized'",
        {
            "amortized": lambda: fitted(
                streamed, DATASET, guide="amortized", kwargs={"how": "local"}
            )
        },
    ),
    "joint bounds": Case(
        lambda: fitted(streamed, DATASET, objective="iwae", kwargs={"how": "plate"}),
        "use objective='elbo', or pass tensors",
        {
            "elbo": lambda: fitted(streamed, DATASET, kwargs={"how": "plate"}),
            "tensors": lambda: fitted(streamed, Y, objective="iwae", kwargs={"how": "plate"}),
        },
    ),
    "L-BFGS": Case(
        lambda: fitted(streamed, DATASET, method="lbfgs", kwargs={"how": "plate"}),
        "use method='stochastic', or pass tensors",
        {
            "stochastic": lambda: fitted(
                streamed, DATASET, method="stochastic", kwargs={"how": "plate"}
            ),
            "tensors": lambda: fitted(
                streamed, Y, method="lbfgs", steps=None, kwargs={"how": "plate"}
            ),
        },
    ),
    "Pyro's engine": Case(
        lambda: fitted(streamed, DATASET, engine="pyro", kwargs={"how": "plate"}),
        "leave engine= out, or pass tensors",
        {"tensors": lambda: fitted(streamed, Y, engine="pyro", kwargs={"how": "plate"})},
    ),
    "a guide of one's own": Case(
        lambda: fitted(streamed, DATASET, guide=own_guide, kwargs={"how": "plate"}),
        "name a guide",
        {"name": lambda: fitted(streamed, DATASET, kwargs={"how": "plate"})},
    ),
}

CASES = {
    f"{group}: {name}": case
    for group, cases in {
        "structure": STRUCTURE,
        "discrete": DISCRETE,
        "data": DATA,
        "guides": GUIDES,
        "streams": STREAMS,
    }.items()
    for name, case in cases.items()
}


# What sums out too much needs much before it is known to; guides of one's own are drawn one by one.
SLOW = ("discrete: too many states", "a guide of one's own", "subsample_size")


def quick(*values: str) -> Any:
    """A parameter of a test, marked where it is slow."""
    return pytest.param(*values, marks=[pytest.mark.slow] if set(values) & set(SLOW) else [])


@pytest.mark.parametrize("name", [quick(name) for name in CASES])
def test_the_refusal_says_what_to_do(name):
    with pytest.raises(ViError, match=f"(?s){CASES[name].says}"):
        CASES[name].refused()


@pytest.mark.parametrize(
    ("name", "remedy"),
    [quick(name, remedy) for name, case in CASES.items() for remedy in case.remedies],
)
def test_what_it_says_works(name, remedy):
    result = CASES[name].remedies[remedy]()
    if isinstance(result, float):
        assert math.isfinite(result)
    elif getattr(result, "elbo", None) is not None:
        assert math.isfinite(result.elbo)
        assert all(v.size and (v == v).all() for v in result.sample(5, seed=0).values())
