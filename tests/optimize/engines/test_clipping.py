"""Clipped gradients and mixed precision, against torch's own and the plain step."""

import functools

import pytest
import torch
from torch import nn
from toys import local_model, perturb, two_scales_model

from pyro_vi_kit import guides
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.objectives import Elbo
from pyro_vi_kit.optimize.engines import CapturedEngine, EagerEngine
from pyro_vi_kit.optimize.engines.adam import clipped


@pytest.mark.parametrize("length", [0.3, 1.0, 100.0])
def test_it_is_what_torch_does(length):
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(5))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    found = clipped([parameter.grad for parameter in parameters], length)
    nn.utils.clip_grad_norm_(parameters, length)
    for part, parameter in zip(found, parameters, strict=True):
        torch.testing.assert_close(part, parameter.grad, rtol=1e-6, atol=0)


def test_no_length_is_no_clipping_and_nan_stays():
    gradient = torch.tensor([3.0, 4.0])
    assert clipped([gradient], None)[0] is gradient
    assert clipped([torch.tensor([torch.nan, 1.0])], 1.0)[0].isnan().any()
    assert not clipped([torch.tensor([torch.inf, 1.0])], 1.0)[0].isfinite().all()


def engine(kind, **options):
    guide = perturb(guides.make("full_rank", Density(two_scales_model())), size=0.5)
    return kind(guide, Elbo(3), seed=2, **options)


SGD = functools.partial(torch.optim.SGD, lr=1.0)


@pytest.mark.parametrize("kind", [EagerEngine, CapturedEngine])
def test_a_step_of_the_users_optimiser_has_that_length(kind):
    free, bound = engine(kind, optimizer=SGD), engine(kind, optimizer=SGD, clip=0.01)
    before = free.adam.x.clone()
    free.run(1, 0.0)
    bound.run(1, 0.0)
    steps = [made.adam.x - before for made in (free, bound)]
    assert float(steps[0].norm()) > 1.0
    assert float(steps[1].norm()) == pytest.approx(0.01, rel=1e-4)
    torch.testing.assert_close(steps[1] / steps[1].norm(), steps[0] / steps[0].norm())


def test_captured_steps_clip_as_eager_ones():
    eager, captured = engine(EagerEngine, clip=0.5), engine(CapturedEngine, clip=0.5)
    free = engine(EagerEngine)
    expected, found = eager.run(6, 0.05), captured.run(6, 0.05)
    torch.testing.assert_close(found.bounds, expected.bounds, rtol=1e-9, atol=1e-9)
    assert captured.name == "captured"
    # Adam divides by the gradient's size, so a clip shows only where it varies from step to step.
    assert not torch.equal(free.run(6, 0.05).bounds, expected.bounds)


@pytest.mark.parametrize("kind", [EagerEngine, CapturedEngine])
def test_mixed_precision_is_the_step_with_fewer_bits(kind):
    def made(precision):
        torch.manual_seed(0)
        density = Density(local_model(n=40, dim=4, dtype=torch.float32), dtype=torch.float32)
        guide = perturb(guides.make("amortized", density))
        return kind(guide, Elbo(4), seed=2, precision=precision)

    plain, mixed = made(None), made("bfloat16")
    expected, found = plain.run(3, 0.01), mixed.run(3, 0.01)
    assert mixed.name == plain.name, mixed.note
    assert not torch.equal(found.bounds, expected.bounds)
    # The encoder's numbers have 8 bits: a relative error of 2^-8 in each, here of a bound of -600.
    torch.testing.assert_close(found.bounds, expected.bounds, rtol=2**-6, atol=1.0)
    assert mixed.adam.x.dtype == torch.float32
