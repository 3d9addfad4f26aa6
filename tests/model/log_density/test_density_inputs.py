"""Data, minibatches and precision are inputs; threads and ways to batch do not show."""

from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hand import assert_agrees, density_of, normal, points, value_and_grad
from torch import nn

import pyro_vi_kit as vi
from pyro_vi_kit.model.log_density import Density

X = torch.tensor([[1.0, 0.5], [0.2, -1.0], [-0.3, 0.8], [2.0, 0.1], [-1.0, -0.4]])
Y = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.5])
X64, Y64 = X.double(), Y.double()


def regression(x, y):
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("datum", len(x)) as index:
        pyro.sample("y", dist.Normal((x[index] * beta).sum(-1), 0.5), obs=y[index])


def regression_by_hand(z, x=X64, y=Y64):
    return normal(z).sum() + normal(y, x @ z, 0.5).sum()


def local_latents(y):
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    with pyro.plate("datum", len(y)) as index:
        s = pyro.sample("s", dist.HalfNormal(1.0))
        pyro.sample("y", dist.Normal(m, s), obs=y[index])


def test_shared_and_local_terms_make_up_the_total():
    density = density_of(local_latents, Y)
    z = points(6)
    terms = density.terms(density.block.unpack(z))
    s = z[:, 1:].exp()
    half_normal = np.log(2.0) + normal(s) + z[:, 1:]
    torch.testing.assert_close(terms.shared, normal(z[:, 0], 0.0, 2.0))
    torch.testing.assert_close(terms.local["datum"], half_normal + normal(Y64, z[:, :1], s))
    assert terms.scale == {"datum": 1.0}
    expected = terms.shared + terms.local["datum"].sum(-1)
    torch.testing.assert_close(terms.total(), expected)
    torch.testing.assert_close(density.log_prob(z), expected)


@pytest.mark.parametrize("model", [regression, local_latents])
def test_minibatches_average_to_the_whole(model):
    data = (X, Y) if model is regression else (Y,)
    density = density_of(model, *data)
    z = density.block.unpack(points(density.dim))
    totals = []
    for rows in combinations(range(5), 2):
        index = torch.tensor(rows)
        part = {n: v[:, index] if n == "s" else v for n, v in z.items()}
        terms = density.terms(part, index={"datum": index})
        assert terms.scale == {"datum": 2.5}
        totals.append(terms.total())
    torch.testing.assert_close(torch.stack(totals).mean(0), density.terms(z).total())


def subsampled_statement(y):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", len(y), subsample_size=2):
        rows = pyro.subsample(y, event_dim=0)
        pyro.sample("y", dist.Normal(m, 1.0), obs=rows)


def test_a_declared_subsample_is_the_whole_by_default():
    density = density_of(subsampled_statement, Y)
    assert density.structure.subsampled == {"datum": 2}
    assert_agrees(density, lambda z: normal(z[0]) + normal(Y64, z[0]).sum(), 1)
    z = points(1)
    terms = density.terms(density.block.unpack(z), index={"datum": torch.tensor([4, 0, 1])})
    torch.testing.assert_close(terms.local["datum"], normal(Y64[[4, 0, 1]], z))
    assert terms.scale == {"datum": 5 / 3}


def test_other_data_are_the_model_on_other_data():
    density = density_of(regression, X, Y)
    other_x, other_y = torch.randn(7, 2).double(), torch.randn(7).double()
    z = points(2)
    found = density.log_prob(z, data=[other_x, other_y])
    torch.testing.assert_close(found, density_of(regression, other_x, other_y).log_prob(z))
    expected, _ = value_and_grad(lambda row: regression_by_hand(row, other_x, other_y), z)
    torch.testing.assert_close(found, expected)


def test_gradients_flow_to_the_data():
    density = density_of(regression, X, Y)
    data = [tensor.clone().requires_grad_() for tensor in density.data]
    z = points(2, k=1)
    (grad,) = torch.autograd.grad(density.log_prob(z, data=data).sum(), data[1])
    torch.testing.assert_close(grad, -(Y64 - X64 @ z[0]) / 0.25)


def test_arguments_of_any_make():
    def model(data, rows, *, scale, options):
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2), scale["prior"]).to_event(1))
        with pyro.plate("datum", len(rows)):
            loc = (data["x"][rows] * beta).sum(-1)
            pyro.sample("y", dist.Normal(loc, options[1][0]), obs=data["y"][rows])

    kwargs = {"scale": {"prior": torch.tensor(1.0)}, "options": ["unused", (0.5, None)]}
    density = density_of(model, {"x": X, "y": Y}, torch.arange(5), **kwargs)
    assert_agrees(density, regression_by_hand, 2)
    assert [tensor.dtype for tensor in density.data] == [
        torch.float64,
        torch.float64,
        torch.int64,
        torch.float64,
    ]


def closed_over():
    """Float32 data out of the Density's sight, with numbers, vectors, products and factors."""
    beta = pyro.sample("beta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    root = torch.linalg.cholesky(COVARIANCE)
    with pyro.plate("datum", 5):
        pyro.factor("weight", -0.5 * (Y - shift) ** 2)
    pyro.sample("y", dist.MultivariateNormal(X @ beta + shift * Y, scale_tril=root), obs=Y)


COVARIANCE = X @ X.T + torch.eye(5)


def closed_over_by_hand(z):
    residual = Y64 - X64 @ z[:2] - z[2] * Y64
    covariance = COVARIANCE.double()
    quadratic = residual @ torch.linalg.inv(covariance) @ residual
    log_p = -0.5 * (quadratic + torch.logdet(covariance) + 5 * np.log(2 * np.pi))
    return normal(z).sum() - 0.5 * ((Y64 - z[2]) ** 2).sum() + log_p


def test_closed_over_float32_is_computed_with_in_float64():
    assert_agrees(density_of(closed_over), closed_over_by_hand, 3)


def test_a_closed_over_number_and_what_the_model_makes_itself():
    sd = torch.tensor(0.5)

    def model():
        m = pyro.sample("m", dist.Normal(0.0, sd))
        weights = torch.tensor([1.0, 2.0, 0.1])
        pyro.sample("y", dist.Normal(weights * m, 1.0).to_event(1), obs=Y[:3])

    def by_hand(z):
        return normal(z[0], 0.0, 0.5) + normal(Y64[:3], torch.tensor([1.0, 2.0, 0.1]) * z[0]).sum()

    assert_agrees(density_of(model), by_hand, 1)


def test_a_model_may_write_into_what_it_makes():
    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        loc = torch.zeros(5)
        loc[0] = m
        for i in range(1, 5):
            loc[i] = 0.5 * loc[i - 1] + m
        pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=Y)

    def by_hand(z):
        loc = [z[0]]
        for _ in range(4):
            loc.append(0.5 * loc[-1] + z[0])
        return normal(z[0]) + normal(Y64, torch.stack(loc)).sum()

    density = density_of(model)
    assert density.batching == "lift"
    assert_agrees(density, by_hand, 1)


def test_what_vmap_cannot_do_is_done_in_a_loop():
    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        scale = 1.0 if m > 0 else 2.0
        pyro.sample("y", dist.Normal(m, scale), obs=Y[0])

    density = density_of(model)
    assert density.batching == "loop"

    def by_hand(z):
        return normal(z[0]) + normal(Y64[0], z[0], 1.0 if z[0] > 0 else 2.0)

    assert_agrees(density, by_hand, 1)


@pytest.mark.parametrize("model", [regression, local_latents])
def test_every_way_to_batch_agrees(model):
    density = density_of(model, *((X, Y) if model is regression else (Y,)))
    z = points(density.dim)
    assert density.batching == "vmap"
    results = []
    for mode in ("vmap", "lift", "loop"):
        density.batching = mode
        results.append(density.log_prob_and_grad(z))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-12, atol=1e-12)


def test_float32_is_float64_to_its_own_rounding():
    single = density_of(regression, X, Y, dtype=torch.float32)
    z = points(2)
    value, grad = single.log_prob_and_grad(z.float())
    assert value.dtype is grad.dtype is torch.float32
    exact = density_of(regression, X, Y).log_prob_and_grad(z)
    # Sums of a dozen terms of size 10: 1e-6 relative.
    torch.testing.assert_close((value.double(), grad.double()), exact, rtol=1e-5, atol=1e-5)


def test_a_float32_density_takes_float64_data_along():
    density = density_of(closed_over, dtype=torch.float32)
    assert density.log_prob(points(3).float()).dtype is torch.float32


def test_threads_do_not_see_each_other():
    def first():
        m = pyro.sample("m", dist.Normal(1.0, 2.0))
        pyro.sample("y", dist.Normal(m, 1.0), obs=torch.tensor(0.5))

    def second():
        m = pyro.sample("m", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(m.sum(), 1.0), obs=torch.tensor(0.5))

    densities = [density_of(first), density_of(second, dtype=torch.float32)]
    inputs = [points(d.dim).to(d.dtype) for d in densities]
    expected = [d.log_prob_and_grad(z) for d, z in zip(densities, inputs, strict=True)]

    def work(i):
        return [densities[i % 2].log_prob_and_grad(inputs[i % 2]) for _ in range(20)]

    with ThreadPoolExecutor(4) as pool:
        for i, results in enumerate(pool.map(work, range(4))):
            for result in results:
                torch.testing.assert_close(result, expected[i % 2], rtol=0, atol=0)
    assert torch.get_default_dtype() is torch.float32


def test_building_a_density_changes_nothing_of_the_users():
    network = nn.Linear(2, 1)

    def model():
        net = pyro.module("net", network)
        scale = pyro.param("scale", torch.tensor(1.0))
        m = pyro.sample("m", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(m + net(X).squeeze(-1), 1.0).to_event(1), obs=Y)

    rng, threads = torch.get_rng_state(), torch.get_num_threads()
    density = density_of(model)
    density.log_prob_and_grad(points(1))
    density.constrain(points(1))
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.get_num_threads() == threads
    assert torch.get_default_dtype() is torch.float32
    assert not pyro.get_param_store().keys()
    assert all(p.grad is None and p.dtype is torch.float32 for p in network.parameters())


def test_data_are_cast_and_the_users_tensors_kept():
    density = Density(vi.Model(regression, X, Y))
    assert X.dtype is torch.float32
    assert [tensor.dtype for tensor in density.data] == [torch.float64] * 2
    args, kwargs = density.arguments()
    assert args[0] is density.data[0]
    assert kwargs == {}
