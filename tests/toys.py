"""Small models with known answers, and the log weights of Pyro's own traces: test oracles."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import prune_subsample_sites

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.model.log_density import Density

MODELS = Path(__file__).parents[1] / "models"


def load(name):
    """A fresh module of a file in models/."""
    spec = importlib.util.spec_from_file_location(f"toy_of_{name}", MODELS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gaussian(dim, seed=0):
    """A model whose posterior is N(mean, covariance), and both; its log evidence is 0."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    covariance = factor @ factor.T / dim + 0.3 * torch.eye(dim, dtype=torch.float64)
    mean = torch.randn(dim, generator=generator, dtype=torch.float64)

    def target(mean, covariance):
        pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    return vi.Model(target, mean, covariance), mean, covariance


def two_scales(x, y=None):
    """A vector, a positive and a plain latent, so that blocks and Jacobians have work to do."""
    beta = pyro.sample("beta", dist.Normal(x.new_zeros(x.shape[-1]), 1.0).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(1.0))
    shift = pyro.sample("shift", dist.Normal(0.0, 2.0))
    mean = shift + (x * beta).sum(-1)
    with pyro.plate("datum", len(x)):
        return pyro.sample("y", dist.Normal(mean, sd), obs=y)


def two_scales_model(n=7, dim=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator, dtype=dtype)
    noise = 0.5 * torch.randn(n, generator=generator, dtype=dtype)
    return vi.Model(two_scales, x, x.sum(-1) + 0.5 + noise)


def local_normals(y, dim=1):
    """z_i ~ N(0, I), y_i ~ N(z_i, I), row by row."""
    with pyro.plate("datum", len(y)) as index:
        z = pyro.sample("z", dist.Normal(y.new_zeros(dim), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y[index])


def local_model(n=6, dim=1, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    y = 1.4 * torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return vi.Model(local_normals, y.to(dtype), kwargs={"dim": dim})


def local_evidence(y):
    """log p(y) of `local_normals`: independent N(0, 2)."""
    return float((-0.25 * y**2 - 0.5 * math.log(4 * math.pi)).sum())


def local_and_global(y):
    """m ~ N(0, 1), z_i ~ N(m, 1), y_i ~ N(z_i, 1)."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y)) as index:
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def local_and_global_model(n=5, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    y = 0.5 + 1.7 * torch.randn(n, generator=generator, dtype=torch.float64)
    return vi.Model(local_and_global, y.to(dtype))


def guide_for(name, density, local_density, **options):
    """A registry guide on the first model, or on the second where it needs local latents."""
    try:
        return guides.make(name, density, **options)
    except OptionError:
        return guides.make(name, local_density, **options)


def is_local(name):
    """Whether a registry guide refuses a model with global latents only."""
    try:
        guides.make(name, Density(gaussian(2)[0]))
    except OptionError:
        return True
    return False


# Found by a search of the log density alone: they take no stochastic steps in a fit.
SEARCHED = ("laplace", "pathfinder")


def perturb(guide, seed=0, size=0.1):
    """Move every parameter off its special initial value (zeros, the identity)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in guide.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.data.add_(size * noise)
    return guide


def traced_log_weight(model, guide):
    """log p - log q of one draw by Pyro's traces, and the guide's trace."""
    guide_trace = poutine.trace(guide).get_trace(*model.args, **model.kwargs)
    replayed = poutine.replay(model.fn, trace=guide_trace)
    model_trace = poutine.trace(replayed).get_trace(*model.args, **model.kwargs)
    guide_trace.compute_log_prob()
    log_q = prune_subsample_sites(guide_trace).log_prob_sum()
    return prune_subsample_sites(model_trace).log_prob_sum() - log_q, guide_trace
