"""Guides in Pyro's Jit losses: a trace has the gradients of the loss that it is a trace of."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import JitTrace_ELBO, Trace_ELBO

import pyro_vi_kit as vi
from pyro_vi_kit import guides

Y = torch.tensor([0.3, -0.2, 1.1, 0.4])


def model(y):
    m = pyro.sample("m", dist.Normal(0.0, 5.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("i", len(y)):
        pyro.sample("y", dist.Normal(m, s), obs=y)


NAMES = [name for name in guides.names() if name not in ("auto", "amortized")]


@pytest.mark.filterwarnings("ignore")  # torch.jit.trace is deprecated, and warns of constants
@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_a_trace_are_those_of_the_loss(name):
    """At other parameters than those that it was traced at."""
    with pyro.get_param_store().scope():
        guide = guides.make(name, vi.Model(model, Y), seed=1)
        traced = JitTrace_ELBO()
        traced.loss_and_grads(model, guide, Y)
        gradients = []
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.add_(0.1)
        for loss in (traced, Trace_ELBO()):
            for parameter in guide.parameters():
                parameter.grad = None
            torch.manual_seed(3)
            loss.loss_and_grads(model, guide, Y)
            gradients.append([p.grad.clone() for p in guide.parameters() if p.grad is not None])
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
