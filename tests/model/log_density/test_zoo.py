"""Every kind of model in the zoo: log density and gradient by Pyro's own traces, and a fit."""

import math

import pyro
import pytest
import torch
import zoo
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer import config_enumerate
from pyro.infer.mcmc.util import initialize_model
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites

import pyro_vi_kit as vi
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.supports import bijector

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")

# Prime, and no size in the zoo but a mixture's; the single-point oracle would tell.
K = 5
# Models that vmap takes with its in-place writes mended, and those with a number as a Python float.
LIFTED = {
    "ordered",
    "simplex",
    "simplex_rows",
    "projected_normal_reparam",
    "garch_in_place",
    "gaussian_hmm",
    "discrete_hmm",
}
LOOPED = {"stable_reparam"}
# One sampler of Pyro takes no batch, the other is not implemented.
UNSAMPLED = {"truncated", "gamma_gaussian_hmm"}


def density_of(name) -> Density:
    entry = (zoo.CONTINUOUS | zoo.DISCRETE)[name]
    return Density(vi.Model(entry.fn, *entry.args, name=name))


def points(density, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return 0.7 * torch.randn(K, density.dim, generator=generator)


class Transformed(Messenger):
    """Sets latents from one unconstrained point, the naive way, and adds up log determinants."""

    def __init__(self, point):
        super().__init__()
        self.point, self.log_det = point, torch.zeros(())

    def _pyro_sample(self, msg):
        if msg["name"] in self.point and not msg["is_observed"]:
            assert isinstance(msg["fn"], TorchDistributionMixin)
            transform = bijector(msg["name"], msg["fn"])
            msg["value"] = transform(self.point[msg["name"]])
            det = transform.log_abs_det_jacobian(self.point[msg["name"]], msg["value"])
            self.log_det = self.log_det + det.sum()
            msg["done"] = True


def by_trace(density, z):
    """Log density and gradient by a Pyro trace, one point after another."""
    values, gradients = [], []
    for row in z:
        leaf = row.clone().requires_grad_()
        handler = Transformed({n: v[0] for n, v in density.block.unpack(leaf[None]).items()})
        with pyro.validation_enabled(False):
            # Outside of the model's own handlers, reparameterisations among them.
            with handler:
                trace = poutine.trace(density.model.fn).get_trace(*density.model.args)
            value = prune_subsample_sites(trace).log_prob_sum() + handler.log_det
            if density.model.name == "obs_mask":
                # Rows that were observed: a standard normal in the place of a flat direction.
                value = (
                    value + torch.distributions.Normal(0.0, 1.0).log_prob(leaf[1:][zoo.Y > 0]).sum()
                )
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, leaf)[0])
    return torch.stack(values), torch.stack(gradients)


def by_enumeration(density, z):
    """The same by the potential of Pyro's own NUTS, which enumerates discrete sites.

    It counts each masked discrete site once for each of its values, unlike `TraceEnum_ELBO`.
    """
    masked = 3 if density.model.name == "chains_of_different_lengths" else 0
    model = config_enumerate(density.model.fn)
    potential = initialize_model(model, model_args=density.model.args, max_plate_nesting=2)[1]
    values, gradients = [], []
    for row in z:
        leaf = row.clone().requires_grad_()
        value = -potential({n: v[0] for n, v in density.block.unpack(leaf[None]).items()})
        values.append(value.detach() - masked * math.log(2.0))
        gradients.append(torch.autograd.grad(value, leaf)[0])
    return torch.stack(values), torch.stack(gradients)


@pytest.mark.parametrize("name", [*zoo.CONTINUOUS, *zoo.DISCRETE])
def test_value_and_gradient_are_those_of_pyro(name):
    density = density_of(name)
    z = points(density)
    expected = by_enumeration(density, z) if name in zoo.DISCRETE else by_trace(density, z)
    found = density.log_prob_and_grad(z)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    if name in LOOPED:
        assert density.batching == "loop"
    else:
        assert density.batching == ("lift" if name in LIFTED else "vmap")


@pytest.mark.parametrize("name", [*zoo.CONTINUOUS, *zoo.DISCRETE])
def test_draws_have_the_shapes_of_the_sites(name):
    density = density_of(name)
    z = points(density)
    with RandomStream(0):
        values = density.constrain(z)
        likelihood = density.log_likelihood(z)
        simulated = {} if name in UNSAMPLED else density.simulate(z)
    for site in density.structure.sites.values():
        shape = (K, *site.batch_shape, *site.event_shape)
        if site.kind in ("latent", "discrete"):
            assert values[site.name].shape == shape
            assert values[site.name].isfinite().all()
        if site.kind == "discrete":
            assert values[site.name].dtype == torch.int64
        if site.kind == "observed":
            assert likelihood[site.name].shape == (K, *site.batch_shape)
            assert name in UNSAMPLED or simulated[site.name].shape == shape


# One of each kind, for tests that take longer.
FITTED = [
    "lkj_cholesky",
    "wishart",
    "von_mises",
    "ordered",
    "simplex_rows",
    "dynamic_support",
    "obs_mask",
    "zero_inflated_negative_binomial",
    "truncated",
    "ar",
    "garch",
    "discrete_hmm",
    "gaussian_hmm",
    "chains_of_different_lengths",
    "nested",
    "global_switch",
]


@pytest.mark.parametrize("name", FITTED)
def test_it_is_fitted_and_exported(name):
    entry = (zoo.CONTINUOUS | zoo.DISCRETE)[name]
    posterior = vi.fit(vi.Model(entry.fn, *entry.args), "mean_field", seed=0)
    assert posterior.status.reason == "converged"
    assert posterior.elbo is not None
    # An ELBO is at most the evidence; standard errors of both.
    evidence, se = posterior.log_evidence
    assert posterior.elbo <= evidence + 5 * (posterior.elbo_se + se)
    groups = posterior.groups(7, seed=0)
    structure = posterior.density.structure
    assert ("posterior_predictive" in groups) == (name not in UNSAMPLED)
    for group in ("posterior", "posterior_predictive", "log_likelihood", "prior"):
        for site, values in groups[group].variables.items() if group in groups else ():
            known = structure.sites[site]
            event = () if group == "log_likelihood" else known.event_shape
            plates = tuple(p.size for p in sorted(known.plates, key=lambda p: p.dim))
            assert values.shape[2:] == (*plates, *event), (group, site)
            assert len(groups[group].dims[site]) == values.ndim - 2
