"""Stick-the-landing: no noise at the optimum, for every reparameterised family that contains it."""

import pyro
import pytest
import torch
from toys import gaussian, is_local, perturb

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.guides import REGISTRY
from pyro_vi_kit.guides.families import GaussianFamily
from pyro_vi_kit.model.log_density import Density

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")

# A point has no log q, a local family is started otherwise (tests/guides/test_local.py), and a t is a
# Gaussian in the limit alone.
EXEMPT = {"delta", "student_t"}
CONTAINS = [name for name in REGISTRY if name not in EXEMPT and not is_local(name)]
FLOWS = ["planar", "radial", "affine_coupling", "autoregressive", "neural_spline"]
OPTIONS = {"structured": {"between": "linear"}, "low_rank": {"rank": 3}, "pathfinder": {"paths": 2}}


def target(name, dim=3):
    """A Gaussian that the family contains, its mean and its factor."""
    model, mean, covariance = gaussian(dim)
    if name == "mean_field":
        covariance = covariance.diagonal().diag()
        model = vi.Model(model.fn, mean, covariance)
    return model, mean, torch.linalg.cholesky(covariance)


def at_optimum(name, dim=3):
    model, mean, tril = target(name, dim)
    guide = guides.make(name, model, **OPTIONS.get(name, {}))
    family = guide.families["latent"]
    if name == "low_rank":
        # Diagonal 0.3 and what is left: the toy's covariance is of that form.
        factor = torch.linalg.cholesky(tril @ tril.T - 0.3 * torch.eye(dim))
        family.become(mean, torch.full((dim,), 0.3).sqrt(), factor)
    elif name == "pathfinder":
        weights = torch.tensor([0.2, 0.8]).log()
        family.become(weights, mean.expand(2, -1), tril.expand(2, -1, -1))
    elif name == "mixture":
        count = family.components
        family.become(torch.randn(count), mean.expand(count, -1), tril.expand(count, -1, -1))
    else:
        assert isinstance(family, GaussianFamily)
        family.start_from(mean, tril)
    return guide


def gradients(guide, draws):
    draw = guide.draw(draws, detached=True)
    loss = guide.weigh(draw).joint().mean()
    parameters = [p for p in guide.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [g for g in found if g is not None]


@pytest.mark.parametrize("name", CONTAINS)
def test_the_gradient_is_zero_at_each_single_draw(name):
    guide = at_optimum(name)
    pyro.set_rng_seed(0)
    for _ in range(5):
        # Rounding, of sums of a few numbers of size 1 to 10.
        assert max(float(g.abs().max()) for g in gradients(guide, 1)) < 1e-11


@pytest.mark.parametrize("name", [n for n in REGISTRY if n != "delta"])
@pytest.mark.parametrize("dim", [1, 3])
def test_the_slope_of_log_q_is_that_of_the_density(name, dim):
    """Against autograd through `log_prob` at constant parameters, which goes back through the layers."""
    if is_local(name):
        return
    guide = perturb(guides.make(name, Density(gaussian(dim)[0]), init_scale=0.5), size=0.3)
    family = guide.families["latent"]
    pyro.set_rng_seed(1)
    value, log_q = family.draw((6,), detached=True)
    at = value.detach().clone().requires_grad_()
    log_prob = family().log_prob(at)
    torch.testing.assert_close(log_q, log_prob, rtol=1e-8, atol=1e-8)
    (expected,) = torch.autograd.grad(log_prob.sum(), at)
    parameters = list(family.parameters())
    weight = torch.randn(6, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(
        (weight * log_q).sum(), parameters, allow_unused=True, retain_graph=True
    )
    ours = (weight[:, None] * expected * value).sum()
    wanted = torch.autograd.grad(ours, parameters, allow_unused=True)
    for f, w in zip(found, wanted, strict=True):
        if w is None:
            continue
        slope = torch.zeros_like(w) if f is None else f
        torch.testing.assert_close(slope, w, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_a_flow_goes_there_and_back(name, dim):
    guide = perturb(guides.make(name, Density(gaussian(dim)[0])), size=0.5)
    family = guide.families["latent"]
    bend = family.bend
    x = torch.randn(4, dim, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y, log_det = bend(x)
    back = family.unbend(y)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    # Draws do not see each other, so the sum over them has each one's own Jacobian.
    jacobian = torch.autograd.functional.jacobian(lambda p: bend(p)[0].sum(0), x).movedim(1, 0)
    expected = torch.linalg.slogdet(jacobian)[1]
    torch.testing.assert_close(log_det, expected, rtol=1e-9, atol=1e-9)
