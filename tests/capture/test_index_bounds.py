"""Indices that depend on inputs: in C they pick what torch picks, and fail where torch fails."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_vi_kit as vi
from pyro_vi_kit.capture.in_c import CFunction, library
from pyro_vi_kit.capture.native import impossible
from pyro_vi_kit.capture.program import Program
from pyro_vi_kit.capture.recorder import record
from pyro_vi_kit.core.undefined import ERRORS, is_undefined
from pyro_vi_kit.model.gradients import Gradients
from pyro_vi_kit.model.log_density import Density

needs_compiler = pytest.mark.skipif(library.compiler() is None, reason="there is no C compiler")

# Of a table `[4, 5]` and floating-point numbers `[3, 5]` or `[3]`, which are made indices.
WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index": lambda x, i: x[i.long()],
    "index_last": lambda x, i: x[:, i.long()],
    "index_both": lambda x, i: x[i.long(), (i + 1).long()],
    "index_apart": lambda x, i: x[:, None][i.long(), :, (i + 1).long()],
    "index_one": lambda x, i: x[:1][(i / 9).long()],
    "put": lambda x, i: x.index_put((i[0].long(),), x[0] * 2),
    "add": lambda x, i: x.index_put((i[0].long(),), x[0] * 2, accumulate=True),
    "gather": lambda x, i: x.gather(0, i.long()),
    "gather_last": lambda x, i: x[:3].gather(1, i.long()),
    "scatter": lambda x, i: x.scatter(0, i[:1].long(), x[:3]),
    "scatter_number": lambda x, i: x.scatter(1, i.long(), 2.0),
    "scatter_add": lambda x, i: x.scatter_add(0, i.long(), x[:3]),
    "select": lambda x, i: x.index_select(0, i[0].long()),
    "select_last": lambda x, i: x.index_select(1, i[0].long()),
}
BAD = (math.nan, math.inf, -math.inf, 1e300, -1e19, 4.0, 5.0, -5.0, -6.0, 2.0**62)


def run(function: Callable[..., list[Tensor]], *inputs: Tensor) -> Tensor | None:
    """A result; None where it is not defined."""
    try:
        return function(*inputs)[0]
    except ERRORS as error:
        if not is_undefined(error):
            raise
        return None


@needs_compiler
@pytest.mark.parametrize("name", WAYS)
def test_c_fails_where_torch_fails(
    name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRO_VI_KIT_CACHE", str(tmp_path_factory.getbasetemp() / "libraries"))
    monkeypatch.delenv("PYRO_VI_KIT_COMPILE", raising=False)
    monkeypatch.setattr(library, "_VECTORS", "-O2")
    generator = torch.Generator().manual_seed(len(name))
    x = torch.randn(4, 5, generator=generator, dtype=torch.float64)

    def way(x: Tensor, i: Tensor) -> list[Tensor]:
        return [WAYS[name](x, i)]

    graph = record(way, [x, torch.zeros(3, 5, dtype=torch.float64)])
    assert "index is computed" in impossible(graph)
    in_c = CFunction(graph, [x, torch.zeros(3, 5, dtype=torch.float64)])
    outcomes = set()
    for trial in range(60):
        low = -4 if trial % 2 else 0
        i = torch.randint(low, 4, (3, 5), generator=generator).double() + 0.3
        if trial >= 30:
            at = torch.randint(15, (1 + trial % 2,), generator=generator)
            i.view(-1)[at] = BAD[trial % len(BAD)]
        expected, found = run(way, x, i), run(in_c, x, i)
        assert (expected is None) == (found is None), (trial, i)
        if expected is not None and found is not None:
            assert torch.equal(expected, found)
        outcomes.add(expected is None)
    assert outcomes == {True, False}


def test_an_index_by_data_may_be_compiled() -> None:
    county = torch.tensor([2, 0, 1])
    graph = record(lambda x, i: [x[i]], [torch.randn(4), county])
    assert "index" not in impossible(graph)


def delayed(t: Tensor, y: Tensor, spread: float = 1.0, noise: float = 0.5) -> None:
    level = pyro.sample("level", dist.Normal(torch.zeros(40), 1.0).to_event(1))
    delay = pyro.sample("delay", dist.Normal(10.0, spread))
    with pyro.plate("t", len(t)):
        pyro.sample("y", dist.Normal(level[(t + delay).long()], noise), obs=y)


T = torch.arange(20.0)


@pytest.mark.parametrize("way", ["eager", "captured", "c"])
def test_a_density_is_not_defined_beyond_a_table(way: str, tmp_path: object) -> None:
    """It is the same by every means: a number up to the last row, and NaN behind it."""
    if way == "c" and library.compiler() is None:
        pytest.skip("there is no C compiler")
    density = Density(vi.Model(delayed, T, torch.sin(T / 3)), dtype=torch.float64)
    gradients = Gradients(density, patience=None if way == "eager" else 0)
    z = np.zeros(density.dim)
    z[-1] = 10.0
    gradients.at(z)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYRO_VI_KIT_CACHE", str(tmp_path))
        patch.delenv("PYRO_VI_KIT_COMPILE", raising=False)
        assert (way == "c") == (way == "c" and gradients.to_c(10**9, z))
    assert gradients.engine == {"c": "compiled"}.get(way, way)
    for delay, defined in (
        (-19.5, True),
        (20.9, True),
        (21.0, False),
        (-41.0, False),
        (1e9, False),
    ):
        z[-1] = delay
        value, slope = gradients.at(z)
        assert np.isfinite(value) == np.isfinite(slope).all() == defined
        if defined:
            level = np.zeros(20)
            y = np.sin(np.arange(20) / 3)
            exact = (
                -0.5 * ((y - level) / 0.5) ** 2 - math.log(0.5) - 0.5 * math.log(2 * math.pi)
            ).sum()
            exact += -0.5 * (delay - 10.0) ** 2 - 20.5 * math.log(2 * math.pi)
            assert value == pytest.approx(exact, rel=1e-6)  # sin(t / 3) is of float32


@pytest.mark.filterwarnings("ignore::pyro_vi_kit.validation.nuts.SamplerWarning")
def test_nuts_goes_on_where_the_density_is_not_defined() -> None:
    """Nearly all of the prior's draws lie beyond the table: there is no mass there, and no crash."""
    pytest.importorskip("nutpie")
    model = vi.Model(delayed, T, torch.sin(T / 3), 1e4, 50.0)
    tree = vi.nuts(model, chains=2, draws=1000, tune=400, seed=0, progress=False)
    delay = tree["posterior"]["delay"].to_numpy()
    assert (delay > -41.0).all()
    assert (delay < 21.0).all()


def test_a_program_is_the_same_in_torchscript() -> None:
    x = torch.randn(4, dtype=torch.float64)
    graph = record(lambda x, i: [x[i.long()]], [x, torch.zeros(2, dtype=torch.float64)])
    program = Program(graph, [x, torch.zeros(2, dtype=torch.float64)], compiles=False)
    assert program.how == "script"
    assert run(program, x, torch.tensor([1.0, 4.0]).double()) is None
    assert run(program, x, torch.tensor([1.0, -4.0]).double()) is not None
