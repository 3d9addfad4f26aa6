"""Graphs in C: the same numbers, kept on disk, refused by name, and never in the way."""

from __future__ import annotations

import threading

import pytest
import torch

import models.eight_schools
import pyro_vi_kit as vi
from pyro_vi_kit.capture import Program, capture
from pyro_vi_kit.capture.in_c import CFunction, RefusedError, library, source
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.model.gradients import Gradients
from pyro_vi_kit.model.log_density import Density

needs_compiler = pytest.mark.skipif(library.compiler() is None, reason="there is no C compiler")
MANY = 10**6


def function(x, matrix):
    x = x.detach().requires_grad_()
    noise = torch.randn(x.shape, dtype=x.dtype)
    value = ((matrix @ (x + noise)) ** 2).sum() + torch.lgamma(x.exp()).sum()
    return value.detach(), *torch.autograd.grad(value, x)


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    make = [torch.randn(shape, generator=generator).double() for shape in ((3,), (3, 3))]
    return make[0], make[1]


def program() -> Program:
    return capture(function, inputs(0), [inputs(1)])


def held_in_c(model: vi.Model) -> tuple[Density, Gradients]:
    """A model's gradients in C, and at one point by the model itself."""
    density = Density(model, dtype=torch.float64)
    gradients = Gradients(density, patience=0)
    z = torch.full((1, density.dim), 0.1, dtype=torch.float64)
    gradients(z)
    assert gradients.to_c(MANY, z.numpy()[0]), gradients.how(1)
    return density, gradients


@needs_compiler
def test_a_program_in_c_is_the_function(cache):
    captured = program()
    assert captured.to_c([inputs(2), inputs(3)]), captured.note
    assert (captured.how, captured.note) == ("c", "")
    with RandomStream(3):
        expected = function(*inputs(4))
    with RandomStream(3):
        found = captured(*inputs(4))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    turned = inputs(4)[1].T  # what does not lie in a row is copied
    with RandomStream(3):
        other = captured(inputs(4)[0], turned)
    with RandomStream(3):
        torch.testing.assert_close(other[0], function(inputs(4)[0], turned)[0], rtol=1e-12, atol=0)


@needs_compiler
def test_libraries_are_kept_and_found_again(cache, monkeypatch):
    assert program().to_c([inputs(2)])
    (made,) = cache.glob("*.so")
    before = made.stat().st_ino
    monkeypatch.setattr(library, "_compile", None)  # nothing is compiled
    assert program().to_c([inputs(3)])
    assert [path.stat().st_ino for path in cache.glob("*.so")] == [before]
    assert not list(cache.glob("*.partial"))


@needs_compiler
def test_calls_from_several_threads(cache):
    _, gradients = held_in_c(models.eight_schools.MODEL)
    with RandomStream(5):
        points = torch.randn(200, 10, dtype=torch.float64).numpy()
    before = gradients.evaluations
    expected = [gradients.at(point)[0] for point in points]
    found: list[list[float]] = []
    threads = [
        threading.Thread(target=lambda: found.append([gradients.at(p)[0] for p in points]))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
    assert gradients.evaluations - before == 5 * len(points)


@needs_compiler
def test_short_runs_are_not_compiled(cache):
    density = Density(models.eight_schools.MODEL, dtype=torch.float64)
    gradients = Gradients(density, patience=0)
    z = torch.zeros(1, 10, dtype=torch.float64)
    gradients(z)
    assert not gradients.to_c(100, z.numpy()[0])
    assert gradients.how(1) == "script"
    assert gradients.engine == "captured"


def refusal(captured: Program) -> str:
    assert not captured.to_c([inputs(2)])
    assert captured.how == "script"
    assert len(captured(*inputs(3))) >= 1
    return captured.note


def test_it_can_be_turned_off(cache, monkeypatch):
    monkeypatch.setenv("PYRO_VI_KIT_COMPILE", "off")
    assert "not in C: compilation is off" in refusal(program())
    assert not list(cache.iterdir())


def test_no_compiler_is_no_harm(cache, monkeypatch):
    captured = program()
    monkeypatch.setattr(library.shutil, "which", lambda name: None)
    assert "no C compiler was found" in refusal(captured)


def test_a_compiler_that_fails_is_no_harm(cache, monkeypatch):
    monkeypatch.setenv("CC", "false")
    assert "the C compiler failed" in refusal(program())
    assert not list(cache.iterdir())


@needs_compiler
def test_what_computes_something_else_is_not_used(cache, monkeypatch):
    table = source.TEMPLATES | {"lgamma.default": "({self} * 2)"}
    monkeypatch.setattr(source, "TEMPLATES", table)
    assert "computes something else" in refusal(program())
    assert not list(cache.glob("*.so"))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, m: [torch.linalg.slogdet(m + x)[1]], "slogdet"),
        (lambda x, m: [(m + x).float().exp()], "float32"),
        (lambda x, m: [(x.repeat(60_000) ** 2).sum()], "more than"),
        (lambda x, m: [(m.repeat(30, 30) + x[0]) @ (m.repeat(30, 30) + x[1])], "90 x 90"),
        (lambda x, m: [torch._standard_gamma(x.exp())], "random"),
    ],
    ids=["unknown", "single", "large", "product", "random"],
)
def test_refusals_say_why(cache, function, reason):
    with RandomStream(0):
        captured = capture(function, inputs(0), [inputs(1)])
    with pytest.raises(RefusedError, match=reason):
        CFunction(captured.graph, [*inputs(0), *captured.graph.draw_noise()])


def test_long_graphs_are_refused(cache, monkeypatch):
    monkeypatch.setattr(source, "MAX_NODES", 3)
    assert "more than 3" in refusal(program())


@needs_compiler
def test_large_work_lies_in_memory_of_its_own(cache):
    """More than a stack should hold."""

    def wide(x):
        y = torch.outer(x, x)
        return [(y @ x).sin(), y.cumsum(0), y.cumsum(1)[:, ::2]]

    x = torch.linspace(0.1, 1.0, 120, dtype=torch.float64)
    captured = capture(wide, (x,), [(2 * x,)])
    assert captured.to_c([(x,), (0.5 * x,)]), captured.note
    for found, expected in zip(captured(3 * x), wide(3 * x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
