"""Densities of every kind in C, against the models themselves."""

from __future__ import annotations

import pyro
import pytest
import torch
import zoo

import pyro_vi_kit as vi
from pyro_vi_kit.capture.in_c.library import compiler
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.model.gradients import Gradients
from pyro_vi_kit.model.log_density import Density

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C compiler")
MANY = 10**6


def held_in_c(model: vi.Model) -> tuple[Density, Gradients]:
    """A model's gradients in C, and at one point by the model itself."""
    density = Density(model, dtype=torch.float64)
    gradients = Gradients(density, patience=0)
    z = torch.full((1, density.dim), 0.1, dtype=torch.float64)
    gradients(z)
    assert gradients.to_c(MANY, z.numpy()[0]), gradients.how(1)
    return density, gradients


ZOO = [
    *("lkj_cholesky", "wishart_like", "von_mises", "ordered", "simplex", "mixture_same_family"),
    *("counts", "garch_in_place", "gaussian_process", "discrete_hmm", "stable_reparam", "obs_mask"),
]
ENTRIES = {
    name: entry
    for table in vars(zoo).values()
    if isinstance(table, dict)
    for name, entry in table.items()
    if isinstance(entry, zoo.Entry)
}


@pytest.mark.parametrize("name", sorted(set(ZOO) & set(ENTRIES)))
def test_gradients_of_the_zoo(cache, name):
    """To rounding: 1e-10 of the largest number."""
    entry = ENTRIES[name]
    with pyro.get_param_store().scope():
        density, gradients = held_in_c(vi.Model(entry.fn, *entry.args))
        with RandomStream(5):
            points = 0.5 * torch.randn(3, 1, density.dim, dtype=torch.float64)
        for z in points:
            expected = density.log_prob_and_grad(z)
            for found, exact in zip(gradients(z), expected, strict=True):
                size = 1.0 + float(exact.abs().max())
                torch.testing.assert_close(found, exact.detach(), rtol=0, atol=1e-10 * size)
            value, gradient = gradients.at(z.numpy()[0])
            assert value == pytest.approx(float(expected[0]), rel=1e-10)
            torch.testing.assert_close(torch.from_numpy(gradient), gradients(z)[1][0])


def test_where_a_density_is_not_defined(cache):
    """As in torch: not finite, and no exception."""
    entry = ENTRIES["gaussian_process"]
    density, gradients = held_in_c(vi.Model(entry.fn, *entry.args))
    value, _ = gradients.at(torch.full((density.dim,), -800.0, dtype=torch.float64).numpy())
    assert not torch.tensor(value).isfinite()
