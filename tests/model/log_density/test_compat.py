"""The mends around a run: they mean what they replace, and are gone afterwards."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops import special
from torch.distributions import Distribution, transforms
from torch.distributions.utils import tril_matrix_to_vec, vec_to_tril_matrix

from pyro_vi_kit.model.log_density.batching import batched
from pyro_vi_kit.model.log_density.compat import plain

pytestmark = pytest.mark.usefixtures("float64")

PATCHED = [
    (Distribution, "__init__"),
    (special, "_SafeLog"),
    (transforms, "tril_matrix_to_vec"),
    (transforms, "vec_to_tril_matrix"),
]


def attributes():
    return [getattr(owner, name) for owner, name in PATCHED]


def raise_inside():
    with plain(), plain():
        raise KeyError


def test_everything_is_as_it_was_also_after_an_error():
    before = attributes()
    with plain():
        assert all(new is not old for new, old in zip(attributes(), before, strict=True))
    with pytest.raises(KeyError):
        raise_inside()
    assert attributes() == before


def test_explicit_validation_is_left_to_the_switch():
    with pyro.validation_enabled(False), plain():
        unchecked = dist.Normal(torch.tensor(float("nan")), 1.0, validate_args=True)
    assert unchecked.batch_shape == ()
    with pytest.raises(ValueError, match="loc"):
        dist.Normal(torch.tensor(float("nan")), 1.0, validate_args=True)


def test_the_safe_logarithm():
    x = torch.tensor([2.0, 0.0, 1e-300], requires_grad=True)
    with plain():
        y = special.safe_log(x)
    torch.testing.assert_close(y, torch.tensor([2.0, 0.0, 1e-300]).log())
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([0.5, 0.0, 1e300]))


@pytest.mark.parametrize("diag", [0, -1, -2])
def test_triangles_by_integer_indices(diag):
    matrix = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0))
    vector = tril_matrix_to_vec(matrix, diag)
    with plain():
        assert torch.equal(transforms.tril_matrix_to_vec(matrix, diag), vector)
        assert torch.equal(
            transforms.vec_to_tril_matrix(vector, diag), vec_to_tril_matrix(vector, diag)
        )


def test_a_triangle_of_nothing():
    with plain():
        matrix = transforms.vec_to_tril_matrix(torch.zeros(2, 0), -1)
    assert torch.equal(matrix, torch.zeros(2, 1, 1))


def into_new_tensors(point):
    filled = torch.zeros(3)
    for i in range(3):
        filled[i] = point["z"][i] ** 2
    return filled


def where_a_mask_holds(point):
    values = point["z"] * 2.0
    values[values < 0] = 0.25
    return values


def rows_where_a_mask_holds(point):
    values = torch.stack([point["z"], point["z"] + 1.0])
    values[torch.tensor([True, False])] = -1.0
    return values


def through_data(point):
    values = point["z"] * 1.0
    values.data[..., 0][values.data[..., 0] < 10.0] = 3.0
    return values * values.data.clamp_(min=0.1)


def clamped(point):
    return point["z"].exp().clamp_(min=1.0, max=2.0)


@pytest.mark.parametrize(
    "function",
    [into_new_tensors, where_a_mask_holds, rows_where_a_mask_holds, through_data, clamped],
    ids=lambda function: function.__name__,
)
def test_mended_vmap_is_the_loop(function):
    z = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    expected = batched(function, {"z": z}, "loop")
    assert torch.equal(batched(function, {"z": z}, "lift"), expected)
