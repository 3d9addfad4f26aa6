"""A density on other data: the same numbers as one made of them, by recordings that serve all."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from toys import load, two_scales_model

import pyro_vi_kit as vi
from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.model.gradients import Gradients, second_derivatives
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model


def other(density, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [t + torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in density.data]


def test_the_same_as_a_density_of_its_own():
    density = Density(two_scales_model())
    x, y = other(density)
    moved, own = density.with_data([x, y]), Density(density.model.with_args(x, y))
    z = 0.3 * torch.randn(5, density.dim, generator=torch.Generator().manual_seed(2)).double()
    assert torch.equal(moved.log_prob(z), own.log_prob(z))
    assert torch.equal(moved.observed["y"], y)
    assert torch.equal(moved.model.args[1], y)
    assert not torch.equal(density.observed["y"], y)


def test_one_recording_serves_all():
    density = Density(load("eight_schools").MODEL)
    sigma, y = density.data
    first, second = density.with_data([sigma, y + 1]), density.with_data([sigma, -y])
    z = 0.5 * torch.randn(7, density.dim, generator=torch.Generator().manual_seed(3)).double()
    square = z[:1].expand(density.dim, -1).clone()
    for moved in (first, second):
        own = Density(density.model.with_args(*moved.data))
        gradients = Gradients(moved)
        for found, expected in zip(gradients(z), own.log_prob_and_grad(z), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        assert gradients.engine == "captured"
        rows = second_derivatives(moved, square)
        torch.testing.assert_close(rows, second_derivatives(own, square), rtol=1e-12, atol=1e-12)
    assert first.recordings is second.recordings


def test_a_model_that_looks_at_its_data_is_run():
    def model(y):
        sd = 2.0 if float(y.sum()) > 0 else 1.0
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("row", 3):
            pyro.sample("y", dist.Normal(mean, sd), obs=y)

    density = Density(Model(model, torch.ones(3)))
    moved = density.with_data([-torch.ones(3)])
    z = torch.zeros(2, 1, dtype=torch.float64)
    found, _ = Gradients(moved)(z)
    torch.testing.assert_close(found, Density(Model(model, -torch.ones(3))).log_prob(z))


def test_shapes_and_numbers():
    density = Density(two_scales_model())
    x, y = density.data
    with pytest.raises(ModelError, match="do not fit a model on"):
        density.with_data([x, y[:-1]])
    with pytest.raises(ModelError, match="site 'y' hold 7 NaN"):
        density.with_data([x, y * torch.nan])


@pytest.mark.parametrize("name", ["eight_schools", "correlated_regression"])
def test_unconstrained_is_the_inverse(name):
    density = Density(load(name).MODEL)
    z = torch.randn(4, density.dim, generator=torch.Generator().manual_seed(4)).double()
    found = density.unconstrained(density.constrain(z))
    torch.testing.assert_close(found, z, rtol=1e-8, atol=1e-8)


def test_a_fit_on_shared_recordings_has_the_same_numbers():
    density = Density(load("eight_schools").MODEL)
    sigma, y = density.data
    moved = density.with_data([sigma, 0.5 * y])
    shared = vi.fit(moved.model, guides.specify("full_rank").build(moved), seed=1)
    alone = vi.fit(moved.model, "full_rank", seed=1)
    assert shared.engine == "captured"
    # Replays round differently in the last digits.
    for name, draws in alone.sample(10, seed=0).items():
        np.testing.assert_allclose(shared.sample(10, seed=0)[name], draws, rtol=1e-6, atol=1e-8)
