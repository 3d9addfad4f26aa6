"""The mixture's density, draws and gradients against stock torch, a naive loop and closed forms."""

import math

import pyro
import pytest
import torch
from toys import gaussian

from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.guides import Mixture
from pyro_vi_kit.guides.mixtures.gaussian_mixture import split
from pyro_vi_kit.guides.mixtures.mixture import MixtureNormal
from pyro_vi_kit.guides.mixtures.normal_mixture import NormalMixture
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Elbo, surrogate

pytestmark = pytest.mark.usefixtures("float64", "own_param_store")


def tensors(dim, *, dense, components=3, seed=0):
    """Logits, means and scales of components that overlap, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(components, generator=generator)
    locs = torch.randn(components, dim, generator=generator)
    scales = 0.5 + torch.rand(components, dim, generator=generator)
    if dense:
        lower = 0.5 * torch.randn(components, dim, dim, generator=generator)
        scales = scales.diag_embed() + lower.tril(-1)
    return [t.requires_grad_() for t in (logits, locs, scales)]


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "full"])
@pytest.mark.parametrize("dim", [1, 3])
def test_its_density_and_moments_are_those_of_torch(dim, dense):
    logits, locs, scales = (t.detach() for t in tensors(dim, dense=dense))
    trils = scales if dense else scales.diag_embed()
    stock = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=logits),
        torch.distributions.MultivariateNormal(locs, scale_tril=trils),
    )
    ours = NormalMixture(logits, locs, scales)
    value = torch.randn(5, 2, dim, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours.log_prob(value), stock.log_prob(value))
    torch.testing.assert_close(ours.mean, stock.mean)
    torch.testing.assert_close(ours.variance, stock.variance)
    wide = ours.expand((4, 2))
    assert wide.rsample((3,)).shape == (3, 4, 2, dim)
    assert wide.mean.shape == (4, 2, dim)


def test_gradients_are_those_of_the_naive_loop():
    """`MixtureNormal` differentiates one coordinate after another, for diagonal covariances."""
    known = tensors(4, dense=False)
    ours, naive = NormalMixture(*known), MixtureNormal(*known)
    pyro.set_rng_seed(0)
    value = ours._drawn(torch.Size((6,))).detach()
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((ours._with_gradient(value) * weight).sum(), known)
    expected = torch.autograd.grad((naive._with_gradient(value) * weight).sum(), known)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_full_covariances_that_are_diagonal_have_the_same_gradients():
    logits, locs, sds = tensors(4, dense=False)
    pyro.set_rng_seed(0)
    value = NormalMixture(logits, locs, sds)._drawn(torch.Size((6,))).detach()
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    found = [
        torch.autograd.grad(
            (NormalMixture(logits, locs, scales)._with_gradient(value) * weight).sum(),
            [logits, locs, sds],
        )
        for scales in (sds, sds.diag_embed())
    ]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dense", [False, True], ids=["diagonal", "full"])
def test_gradients_of_moments_are_exact_on_average(dense):
    """E[z] and E[z z^T] of a mixture are known, and so are their slopes in every parameter."""
    known = tensors(3, dense=dense)
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(3))
    ours = NormalMixture(*known)
    shares = ours.logits.softmax(-1)
    trils = ours.scales.tril() if dense else ours.scales.diag_embed()
    second = ours.locs[:, :, None] * ours.locs[:, None] + trils @ trils.mT
    exact = (shares @ ours.locs).sum() + (shares[:, None, None] * second * weights).sum()
    expected = torch.autograd.grad(exact, known, retain_graph=True)
    pyro.set_rng_seed(0)
    draws = 200
    each = []
    for _ in range(draws):
        z = ours.rsample((100,))
        value = z.sum(-1) + torch.einsum("si,ij,sj->s", z, weights, z)
        each.append(torch.autograd.grad(value.mean(), known, retain_graph=True))
    for i, truth in enumerate(expected):
        found = torch.stack([gradients[i] for gradients in each])
        # Four and a half standard errors of 200 means of 100 draws, at a fixed seed, of at most 27.
        se = found.std(0) / math.sqrt(draws)
        assert bool(((found.mean(0) - truth).abs() <= 4.5 * se + 1e-12).all())


def test_sticking_the_landing_has_no_variance_at_the_optimum():
    """A target that is Gaussian is a mixture of equal components, too."""
    model, mean, covariance = gaussian(3)
    guide = guides.make("mixture", Density(model), components=3)
    family = guide.families[guide.blocks[0].name]
    tril = torch.linalg.cholesky(covariance)
    family.become(torch.tensor([0.0, 1.0, -1.0]), mean.expand(3, -1), tril.expand(3, -1, -1))
    pyro.set_rng_seed(0)
    _, loss = surrogate(guide, Elbo(8), 8, share=False, estimator="dreg")
    gradients = torch.autograd.grad(loss, list(guide.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-9


@pytest.mark.parametrize(("parts", "dim"), [(1, 3), (2, 1), (2, 3), (4, 1), (5, 3), (8, 2)])
def test_parts_of_a_gaussian_have_its_moments_together(parts, dim):
    _, mean, covariance = gaussian(dim)
    locs, trils = split(mean, torch.linalg.cholesky(covariance), parts)
    mixture = NormalMixture(torch.zeros(parts), locs, trils)
    second = (locs[:, :, None] * locs[:, None] + trils @ trils.mT).mean(0)
    torch.testing.assert_close(mixture.mean, mean)
    torch.testing.assert_close(second - mean[:, None] * mean, covariance)
    apart = torch.pdist(locs) if parts > 1 else torch.ones(1)
    assert float(apart.min()) > 0.01


def test_two_hundred_dimensions():
    guide = guides.make("mixture", Density(gaussian(200)[0]), components=2)
    log_w = guide.log_weights(3).joint()
    log_w.mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in guide.parameters())


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"components": 0}, "components must be a positive integer, got 0"),
        ({"covariance": "dense"}, "covariance must be one of full, diagonal"),
        ({"init_scale": -1.0}, "init_scale"),
    ],
)
def test_wrong_options_are_refused(options, complaint):
    with pytest.raises(OptionError, match=complaint):
        Mixture(**options)


def test_too_many_dimensions_are_refused_with_a_remedy():
    with pytest.raises(OptionError, match=r"at most 200 .* has 201: use covariance='diagonal'"):
        Mixture().family(201)
    assert Mixture(covariance="diagonal").family(201)
    with pytest.raises(OptionError, match="use guide='mean_field'"):
        Mixture(covariance="diagonal").family(1001)
