"""Latents that are written into a copy of the data are vectorised, and captured."""

import copy

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hand import density_of, normal, points

from pyro_vi_kit.model.gradients import Gradients

GENERATOR = torch.Generator().manual_seed(0)
WHOLE = torch.randn(7, 2, generator=GENERATOR)
MISSING = (
    torch.zeros(7, 2, dtype=torch.bool).view(-1).scatter(0, torch.tensor([1, 4, 9]), 1).view(7, 2)
)
X = WHOLE.masked_fill(MISSING, float("nan"))
Y = torch.randn(7, generator=GENERATOR)


def written(make):
    def fill(x, missing, z):
        full = make(x)
        full[missing] = z
        return full

    return fill


def by_integers(x, missing, z):
    full = x.clone()
    rows, columns = missing.nonzero(as_tuple=True)
    full[rows, columns] = z
    return full


def one_by_one(x, missing, z):
    full = x.clone()
    for k, (i, j) in enumerate(missing.nonzero().tolist()):
        full[i, j] = z[k]
    return full


def row_by_row(x, missing, z):
    full, k = x.clone(), 0
    for i, row in enumerate(missing):
        n = int(row.sum())
        full[i][row] = z[k : k + n]
        k += n
    return full


def scattered(x, missing, z):
    return x.clone().masked_scatter_(missing, z)


def added(x, missing, z):
    full = x.nan_to_num() * 1.0
    full[missing] += z
    return full


def flat(x, missing, z):
    full = x.clone()
    full.view(-1)[missing.view(-1)] = z
    return full


def filled(x):
    full = torch.empty_like(x)
    full.copy_(x)
    return full


WAYS = {
    "clone": written(torch.Tensor.clone),
    "nan_to_num": written(torch.nan_to_num),
    "cat": written(lambda x: torch.cat([x[:3], x[3:]])),
    "stack": written(lambda x: torch.stack(list(x))),
    "empty_like": written(filled),
    "deepcopy": written(copy.deepcopy),
    "repeat": written(lambda x: x.repeat(1, 1)),
    "contiguous": written(lambda x: x.t().contiguous().t()),
    "to(copy=True)": written(lambda x: x.to(x.dtype, copy=True)),
    "detach": written(lambda x: x.detach().clone()),
    "where": lambda x, missing, z: torch.where(
        missing, written(torch.zeros_like)(x, missing, z), x
    ),
    "integers": by_integers,
    "one by one": one_by_one,
    "row by row": row_by_row,
    "masked_scatter": torch.Tensor.masked_scatter,
    "masked_scatter_": scattered,
    "+=": added,
    "flat": flat,
}


def model_of(fill):
    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        full = fill(x, x.isnan(), z)
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(full @ w, 0.5), obs=y)

    return model


def by_hand(z):
    full = X.double().masked_scatter(MISSING, z[2:])
    return normal(z).sum() + normal(Y.double(), full @ z[:2], 0.5).sum()


@pytest.mark.parametrize("way", WAYS)
def test_imputation_in_place(way):
    density = density_of(model_of(WAYS[way]), X, Y)
    assert density.batching in ("lift", "lift_all")
    z = points(5)
    expected = torch.stack([by_hand(row) for row in z])
    torch.testing.assert_close(density.log_prob(z), expected)
    gradients = Gradients(density, patience=0)
    torch.testing.assert_close(gradients(z)[0], expected)
    assert not gradients.how(len(z)).startswith("eager")


def test_it_goes_to_c(cache):
    gradients = Gradients(density_of(model_of(WAYS["clone"]), X, Y), patience=0)
    point = points(5)[0]
    gradients(point.view(1, -1))
    assert gradients.to_c(10**6, point.numpy()), gradients.how(1)
    value, gradient = gradients.at(point.numpy())
    leaf = point.clone().requires_grad_()
    expected = by_hand(leaf)
    (slope,) = torch.autograd.grad(expected, leaf)
    np.testing.assert_allclose(value, float(expected.detach()), rtol=1e-10)
    np.testing.assert_allclose(gradient, slope.numpy(), rtol=1e-8)


def test_latents_that_are_read_by_a_mask_are_captured():
    chosen = torch.tensor([True, False, True])

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("some", -w[chosen].square().sum())

    density = density_of(model)
    gradients, z = Gradients(density, patience=0), points(3)
    expected = normal(z).sum(-1) - z[:, chosen].square().sum(-1)
    torch.testing.assert_close(gradients(z)[0], expected)
    assert not gradients.how(len(z)).startswith("eager")
