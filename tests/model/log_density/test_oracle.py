"""A density that is not the model's is refused by name: densities that are wrong on purpose."""

import itertools
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hand import density_of, points
from pyro import poutine

import pyro_vi_kit as vi
from pyro_vi_kit.capture import program
from pyro_vi_kit.capture.graph import Graph
from pyro_vi_kit.capture.in_c import CFunction
from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.model.gradients import Gradients
from pyro_vi_kit.model.log_density import batching, density, handlers, precision
from pyro_vi_kit.model.log_density.enumeration import Enumerated

Y = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.5])


def through_views(y):
    b = pyro.sample("b", dist.Normal(0.0, 10.0))
    weights = torch.zeros(5, dtype=torch.float32)
    weights[:3].fill_(2.0)
    with pyro.plate("row", 5):
        pyro.sample("y", dist.Normal(b * weights, 1.0), obs=y)


def scaled_and_masked(y):
    m = pyro.sample("m", dist.Normal(0.0, 2.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("row", 5), poutine.mask(mask=y < 1.0), poutine.scale(scale=2.0):
        pyro.sample("y", dist.Normal(m, s), obs=y)


def mixture(y):
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("row", 5):
        z = pyro.sample("z", dist.Bernoulli(p))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def pyro_log_prob(model, values, *args):
    conditioned = poutine.condition(model, values)
    return float(poutine.trace(conditioned).get_trace(*args).log_prob_sum())


def test_a_promotion_that_loses_writes(monkeypatch):
    def cast_at_each_use(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.__getitem__, torch.Tensor.__mul__):
            first, *rest = args
            args = (first.to(self.dtype), *rest)
        return func(*args, **(kwargs or {}))

    monkeypatch.setattr(precision.Precision, "__torch_function__", cast_at_each_use)
    with pytest.raises(ModelError, match="site 'y': its log density is") as error:
        density_of(through_views, Y)
    assert "dtype=torch.float32" in str(error.value)
    found = density_of(through_views, Y, dtype=torch.float32)  # the remedy
    expected = pyro_log_prob(through_views, {"b": torch.tensor(1.0)}, Y)
    assert abs(float(found.log_prob(torch.ones(1, 1))) - expected) < 1e-4


@pytest.mark.parametrize("site", ["m", "y"])
def test_a_site_whose_scale_or_mask_is_lost(monkeypatch, site):
    right = handlers.Visit.log_prob

    def wrong(self):
        if self.name == "m" == site:
            return right(self) + 1e-3
        return self.fn.log_prob(self.value) if self.name == site else right(self)

    monkeypatch.setattr(handlers.Visit, "log_prob", wrong)
    with pytest.raises(ModelError, match=f"site {site!r}: its log density is"):
        density_of(scaled_and_masked, Y)


def test_a_fault_that_the_sum_over_sites_would_hide(monkeypatch):
    right = handlers.Visit.log_prob
    shifts = {"m": 1.0, "s": -1.0}
    monkeypatch.setattr(
        handlers.Visit, "log_prob", lambda self: right(self) + shifts.get(self.name, 0.0)
    )
    with pytest.raises(ModelError, match="site 'm'"):
        density_of(scaled_and_masked, Y)


@pytest.mark.parametrize("mode", ["vmap", "lift"])
def test_a_wrong_way_to_vectorise_is_not_taken(monkeypatch, mode):
    right = batching.batched

    def wrong(single, z, how):
        results = right(single, z, how)
        shared, local = results
        return (shared + 1e-5, local) if how == mode else results

    monkeypatch.setattr(density, "batched", wrong)
    found = density_of(scaled_and_masked, Y)
    assert found.batching == ("lift" if mode == "vmap" else "vmap")


def test_a_wrong_sum_over_discrete_sites(monkeypatch):
    right = Enumerated.marginals
    monkeypatch.setattr(Enumerated, "marginals", lambda self: right(self)[:0])
    monkeypatch.setattr(Enumerated, "total", lambda self: torch.zeros(()))
    with pytest.raises(ModelError, match="gives other log densities"):
        density_of(mixture, Y)


def test_a_discrete_site_is_compared_too(monkeypatch):
    right = handlers.Visit.unscaled
    monkeypatch.setattr(
        handlers.Visit, "unscaled", lambda self: right(self) + (self.name == "z") * 0.5
    )
    with pytest.raises(ModelError, match="site 'z': its log density is"):
        density_of(mixture, Y)


def test_a_wrong_recording_is_not_replayed(monkeypatch):
    right = program.record

    def wrong(function, inputs):
        graph = right(function, inputs)
        constants = {
            name: value + 1e-4 if value.is_floating_point() else value
            for name, value in graph.constants.items()
        }
        return Graph(graph.inputs, graph.outputs, graph.nodes, constants, graph.noise)

    monkeypatch.setattr(program, "record", wrong)
    found = density_of(through_views, Y)
    gradients = Gradients(found, patience=0)
    z = points(1)
    torch.testing.assert_close(gradients(z)[0], found.log_prob(z))
    assert "a replay of the recording differs" in gradients.how(len(z))


def test_wrong_c_is_not_used(monkeypatch, cache):
    right = CFunction.__call__
    monkeypatch.setattr(
        CFunction, "__call__", lambda self, *inputs: [v + 1e-6 for v in right(self, *inputs)]
    )
    gradients = Gradients(density_of(scaled_and_masked, Y), patience=0)
    point = np.array([0.1, 0.2])
    gradients(torch.from_numpy(point).view(1, -1))
    assert not gradients.to_c(10**6, point)
    assert "it computes something else" in gradients.how(1)


def test_memory_that_numpy_writes_into():
    def model(y):
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        array = np.zeros(5, np.float32)
        weights = torch.as_tensor(array, dtype=torch.float32)
        array[:3] = 2.0
        pyro.sample("y", dist.Normal(b * weights, 1.0).to_event(1), obs=y)

    with pytest.raises(ModelError, match="site 'y': its log density is") as error:
        density_of(model, Y)
    assert "give dtype=torch.float32" in str(error.value)
    found = density_of(model, Y, dtype=torch.float32)
    expected = pyro_log_prob(model, {"b": torch.tensor(1.0)}, Y)
    assert abs(float(found.log_prob(torch.ones(1, 1))) - expected) < 1e-4


COUNT = itertools.count()


@pytest.mark.parametrize(
    "changing",
    [random.random, np.random.standard_normal, lambda: next(COUNT)],
    ids=["random", "numpy", "counter"],
)
def test_models_that_are_not_deterministic(changing):
    def model(y):
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        pyro.sample("y", dist.Normal(b + changing(), 1.0).expand([5]).to_event(1), obs=y)

    with pytest.raises(ModelError, match="not deterministic, site 'y'"):
        density_of(model, Y)


def test_what_float32_cannot_tell_is_no_disagreement():
    """A kernel matrix of condition 1e8: its float32 Cholesky factor is noise, or there is none."""
    x = torch.linspace(0.0, 1.0, 60)
    y = torch.sin(3.0 * x)

    def process():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        kernel = torch.exp(-0.5 * ((x[:, None] - x) / scale) ** 2) + 1e-5 * torch.eye(60)
        root = torch.linalg.cholesky(kernel)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(60), scale_tril=root), obs=y)

    found = density_of(process)
    kernel = torch.exp(-0.5 * (x.double()[:, None] - x.double()) ** 2) + 1e-5 * torch.eye(60)
    normal = dist.MultivariateNormal(torch.zeros(60).double(), kernel.double())
    expected = normal.log_prob(y.double()) - 0.5 * np.log(2 * np.pi)
    assert abs(float(found.log_prob(torch.zeros(1, 1).double())) - float(expected)) < 1e-3


def test_precisions_that_pyro_cannot_mix_are_mixed():
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))

    def model(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=y)

    with pytest.raises(RuntimeError, match="dtype"):
        model(Y)
    z = points(2, k=1)
    expected = -0.5 * (z.square().sum() + (Y.double() - x.double() @ z[0]).square().sum())
    found = density_of(model, Y).log_prob(z) + 3.5 * np.log(2 * np.pi)
    torch.testing.assert_close(found, expected.reshape(1))


def test_a_model_that_pyro_cannot_run_by_itself():
    def model(y):
        b = pyro.sample("b", dist.Normal(0.0, 10.0))
        if not any(isinstance(h, handlers.Replay) for h in pyro.poutine.runtime._PYRO_STACK):
            raise ValueError("only under handlers of the fit's own")
        pyro.sample("y", dist.Normal(b, 1.0).expand([5]).to_event(1), obs=y)

    with pytest.raises(ModelError, match="own trace of the model raises ValueError"):
        density_of(model, Y)


def test_fits_and_checks_are_guarded(monkeypatch):
    right = handlers.Visit.log_prob
    monkeypatch.setattr(
        handlers.Visit, "log_prob", lambda self: right(self) * (0.5 if self.name == "y" else 1.0)
    )
    for call in (vi.fit, vi.nuts):
        with pytest.raises(ModelError, match="site 'y': its log density is"):
            call(vi.Model(scaled_and_masked, Y))
