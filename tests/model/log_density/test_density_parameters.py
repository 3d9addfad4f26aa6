"""Learned parameters, of the store, of torch modules and of Pyro modules, are inputs."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from hand import K, assert_agrees, density_of, normal, points
from pyro.distributions import constraints
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

X = torch.tensor([[1.0, 0.5], [0.2, -1.0], [-0.3, 0.8]])
Y = torch.tensor([0.3, -1.2, 0.8])
X64, Y64 = X.double(), Y.double()


def with_params():
    loc = pyro.param("loc", torch.tensor([0.5, 1.5, -0.5]))
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    m = pyro.sample("m", dist.Normal(0.0, scale))
    with pyro.plate("datum", 3):
        pyro.sample("y", dist.Normal(m + loc, 1.0), obs=Y)


def with_params_by_hand(z, loc=None, scale=2.0):
    loc = torch.tensor([0.5, 1.5, -0.5]) if loc is None else loc
    return normal(z[0], 0.0, scale) + normal(Y64, z[0] + loc).sum()


def test_parameters_of_the_store():
    density = density_of(with_params)
    assert_agrees(density, with_params_by_hand, 1)
    assert list(density.params) == ["loc", "scale"]
    assert density.structure.parameters["scale"].value == pytest.approx(math.log(2.0))


def test_parameters_are_inputs():
    density = density_of(with_params)
    loc = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    params = {"loc": loc, "scale": torch.tensor(0.3, dtype=torch.float64)}
    z = points(1)
    found = density.log_prob(z, params)
    expected = torch.stack([with_params_by_hand(row, loc, math.exp(0.3)) for row in z])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    (grad,) = torch.autograd.grad(found.sum(), loc)
    (expected_grad,) = torch.autograd.grad(expected.sum(), loc)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-10)


def test_what_the_user_has_learned_is_where_it_starts():
    with pyro.get_param_store().scope():
        pyro.param("scale", torch.tensor(3.0), constraint=constraints.positive)
        density = density_of(with_params)
        assert set(pyro.get_param_store().keys()) == {"scale"}
    assert float(density.params["scale"].detach()) == pytest.approx(math.log(3.0))


def with_rows():
    """Each row has a parameter of its own, which a minibatch subsamples along with it."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("datum", 3) as index:
        w = pyro.param("w", X.clone(), event_dim=1)
        s = pyro.param("s", torch.ones(3), constraint=constraints.positive, event_dim=0)
        pyro.sample("y", dist.Normal(m * w.sum(-1), s), obs=Y[index])


def with_rows_by_hand(z, rows=slice(None)):
    return normal(Y64[rows], z[0] * X64.sum(-1)[rows])


def test_parameters_with_a_row_for_each_datum():
    density = density_of(with_rows)
    assert_agrees(density, lambda z: normal(z[0]) + with_rows_by_hand(z).sum(), 1)
    index, z = torch.tensor([2, 0]), points(1)
    terms = density.terms(density.block.unpack(z), index={"datum": index})
    expected = torch.stack([with_rows_by_hand(row, index) for row in z])
    torch.testing.assert_close(terms.local["datum"], expected, rtol=1e-10, atol=1e-10)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 1))
        with torch.no_grad():
            self.inner[0].weight.copy_(torch.tensor([[0.5, -0.25]]))
            self.inner[0].bias.fill_(0.125)
        self.register_buffer("offset", torch.tensor([0.5]))

    def forward(self, x):
        return (self.inner(x) + self.offset).squeeze(-1)


def with_module(network):
    def model(x, y):
        net = pyro.module("net", network)
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", len(x)) as index:
            pyro.sample("y", dist.Normal(m + net(x[index]), 1.0), obs=y[index])

    return model


def network_by_hand(z, weight=(0.5, -0.25), bias=0.125):
    loc = X64[:, 0] * weight[0] + X64[:, 1] * weight[1] + bias + 0.5
    return normal(z[0]) + normal(Y64, z[0] + loc).sum()


def test_a_torch_module():
    network = Network()
    density = density_of(with_module(network), X, Y)
    assert_agrees(density, network_by_hand, 1)
    assert list(density.params) == ["net$$$inner.0.weight", "net$$$inner.0.bias"]


def test_a_torch_modules_weights_are_inputs_and_stay_the_users():
    network = Network()
    own = dict(network.named_parameters())
    before = {name: value.detach().clone() for name, value in own.items()}
    density = density_of(with_module(network), X, Y)
    weight = torch.tensor([[2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    z = points(1)
    found = density.log_prob(z, {**density.params, "net$$$inner.0.weight": weight})
    expected = torch.stack([network_by_hand(row, weight=weight[0]) for row in z])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    (grad,) = torch.autograd.grad(found.sum(), weight)
    (expected_grad,) = torch.autograd.grad(expected.sum(), weight)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-10)
    for name, value in network.named_parameters():
        assert value is own[name]
        assert torch.equal(value, before[name])
        assert value.grad is None


def test_a_modules_own_parameters_come_back_when_the_model_raises():
    network = Network()
    weight = network.inner[0].weight
    density = density_of(with_module(network), X, Y)
    with pytest.raises(IndexError):
        density.terms(density.block.unpack(points(1)), index={"datum": torch.tensor([7])})
    assert network.inner[0].weight is weight


class Regression(PyroModule):
    def __init__(self):
        super().__init__()
        self.scale = PyroParam(torch.tensor(2.0), constraint=constraints.positive)
        self.shift = nn.Parameter(torch.tensor(0.25))
        self.slope = PyroSample(dist.Normal(0.0, 1.0).expand([2]).to_event(1))

    def forward(self, x, y):
        loc = x @ self.slope + self.shift
        with pyro.plate("datum", len(x)):
            pyro.sample("y", dist.Normal(loc, self.scale), obs=y)


def regression_by_hand(z):
    # The module keeps the logarithm of its scale, in its own precision.
    scale = torch.tensor(2.0, dtype=torch.float32).log().double().exp()
    return normal(z).sum() + normal(Y64, X64 @ z + 0.25, scale).sum()


def test_a_pyro_module():
    module = Regression()
    own = {name: (value, value.detach().clone()) for name, value in module.named_parameters()}
    density = density_of(module, X, Y)
    assert_agrees(density, regression_by_hand, 2)
    assert set(density.params) == {"scale", "shift"}
    assert density.structure.parameters["scale"].constraint is constraints.positive
    for name, value in module.named_parameters():
        assert value is own[name][0]
        assert torch.equal(value, own[name][1])


def test_a_pyro_modules_parameters_are_inputs():
    density = density_of(Regression(), X, Y)
    params = {
        "scale": torch.tensor(0.1, dtype=torch.float64, requires_grad=True),
        "shift": torch.tensor(-1.0, dtype=torch.float64, requires_grad=True),
    }
    z = points(2)
    found = density.log_prob(z, params)
    expected = torch.stack(
        [
            normal(row).sum()
            + normal(Y64, X64 @ row + params["shift"], params["scale"].exp()).sum()
            for row in z
        ]
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(found.sum(), list(params.values())),
        torch.autograd.grad(expected.sum(), list(params.values())),
        rtol=1e-10,
        atol=1e-10,
    )


def test_a_network_with_priors_on_its_weights():
    layer = PyroModule[nn.Linear](2, 1)
    layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
    layer.bias = PyroSample(dist.Normal(0.0, 3.0).expand([1]).to_event(1))

    def model(x, y):
        loc = layer(x).squeeze(-1)
        with pyro.plate("datum", len(x)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    def by_hand(z):
        bias, weight = by_name(density, z, "bias"), by_name(density, z, "weight")
        loc = X64 @ weight + bias
        return normal(weight).sum() + normal(bias, 0.0, 3.0).sum() + normal(Y64, loc).sum()

    density = density_of(model, X, Y)
    assert_agrees(density, by_hand, 3)


def by_name(density, z, name):
    return z[[i for i, (site, _) in enumerate(density.block.labels()) if site == name]]


def test_modules_in_lazily_started_parameters():
    module = PyroModule()
    module.scale = PyroParam(lambda: torch.tensor(1.0), constraint=constraints.positive)

    def model():
        m = pyro.sample("m", dist.Normal(0.0, module.scale))
        pyro.sample("y", dist.Normal(m, 1.0).expand([3]).to_event(1), obs=Y)

    density = density_of(model)
    assert_agrees(density, lambda z: normal(z[0]) + normal(Y64, z[0]).sum(), 1)


def test_batch_norm_in_eval_mode_keeps_its_buffers():
    norm = nn.BatchNorm1d(2).eval()

    def model(x, y):
        net = pyro.module("norm", norm)
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("datum", len(x)):
            pyro.sample("y", dist.Normal(m + net(x).sum(-1), 1.0), obs=y)

    density = density_of(model, X, Y)

    def by_hand(z):
        loc = z[0] + (X64 / math.sqrt(1 + 1e-5)).sum(-1)
        return normal(z[0]) + normal(Y64, loc).sum()

    assert_agrees(density, by_hand, 1)
    assert norm.running_mean.dtype is torch.float32


def test_a_parameter_of_random_origin_is_drawn_once():
    def model():
        w = pyro.param("w", lambda: torch.randn(3))
        again = pyro.param("again", torch.randn(3))
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(m + w + again, 1.0).to_event(1), obs=Y)

    rng = torch.get_rng_state()
    density = density_of(model)
    assert torch.equal(torch.get_rng_state(), rng)
    params = {name: value.detach() for name, value in density.params.items()}

    def by_hand(z):
        loc = z[0] + params["w"] + params["again"]
        return normal(z[0]) + normal(Y64, loc).sum()

    assert_agrees(density, by_hand, 1)
    assert torch.equal(density_of(model).params["w"], params["w"])


def test_no_gradient_flows_to_parameters_that_are_given_without_one():
    density = density_of(with_params)
    frozen = {name: value.detach() for name, value in density.params.items()}
    assert not density.log_prob(points(1), frozen).requires_grad
    assert density.log_prob(points(1)).shape == (K,)
