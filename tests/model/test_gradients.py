"""Captured values and gradients are the density's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vi_kit as vi
from pyro_vi_kit.model.gradients import Gradients
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.modelfile import load_model_file

MODELS = sorted(
    path.stem for path in (Path(__file__).parents[2] / "models").glob("*.py") if path.stem[0] != "_"
)


def _density(name: str) -> Density:
    return Density(load_model_file(Path(__file__).parents[2] / "models" / f"{name}.py"))


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_captured_and_right_elsewhere(name):
    density = _density(name)
    gradients = Gradients(density, patience=0)
    for seed, points in enumerate((1, 5)):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(3):
            z = 0.3 * torch.randn(points, density.dim, generator=generator, dtype=torch.float64)
            found = gradients(z)
            expected = density.log_prob_and_grad(z)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-8)
        assert gradients.how(points).startswith(("script", "python")), gradients.how(points)
    assert gradients.evaluations == 18


def test_one_point_as_a_sampler_asks_for_it():
    density = _density("logistic_regression")
    eager, captured = Gradients(density, patience=None), Gradients(density, patience=0)
    for seed in range(3):
        point = np.random.default_rng(seed).normal(size=density.dim)
        value, gradient = eager.at(point)
        for _ in range(2):  # the first one captures
            found, at = captured.at(point)
            assert found == pytest.approx(value, rel=1e-12)
            np.testing.assert_allclose(at, gradient, rtol=1e-10, atol=1e-10)
    assert captured.how(1).startswith("script")
    assert captured.evaluations == 6


def test_capture_waits_until_it_pays():
    gradients = Gradients(_density("gaussian_regression_2d"), patience=3)
    z = torch.zeros(1, 2, dtype=torch.float64)
    ways = []
    for _ in range(5):
        gradients(z)
        ways.append(gradients.how(1).split()[0])
    assert ways == ["eager", "eager", "eager", "script", "script"]


def test_data_that_python_looks_at_are_held_fixed():
    def model(y, kept):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu, 1.0).expand([int(kept.sum())]).to_event(1), obs=y[kept])

    y = torch.arange(4.0, dtype=torch.float64)
    density = Density(vi.Model(model, y, y > 1.0))
    gradients = Gradients(density, patience=0)
    z = torch.ones(2, 1, dtype=torch.float64)
    torch.testing.assert_close(gradients(z), density.log_prob_and_grad(z))
    assert gradients.how(2).startswith("script")


def test_a_model_that_cannot_be_captured_goes_on_uncaptured():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        scale = 1.0 if mu > 0 else 2.0
        pyro.sample("y", dist.Normal(mu, scale), obs=y)

    density = Density(vi.Model(model, torch.tensor(0.5)))
    gradients = Gradients(density, patience=0)
    for value in (-1.0, 1.0):
        z = torch.full((1, 1), value, dtype=torch.float64)
        torch.testing.assert_close(gradients(z), density.log_prob_and_grad(z))
    assert gradients.how(1).startswith("eager: what depends on a latent")


def test_new_data_and_parameters_are_inputs():
    density = _density("linear_regression")
    data = [tensor * 1.5 for tensor in density.data]
    z = torch.zeros(1, density.dim, dtype=torch.float64)
    own, other = Gradients(density, patience=0), Gradients(density, data=data, patience=0)
    assert not torch.equal(own(z)[0], other(z)[0])
    torch.testing.assert_close(other(z)[0], density.log_prob(z, data=data))
