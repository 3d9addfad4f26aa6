"""Graphs compiled by Inductor in a process of its own."""

from __future__ import annotations

import shutil

import pytest
import torch

from pyro_vi_kit.capture import Program, capture
from pyro_vi_kit.capture import program as program_module
from pyro_vi_kit.core.runtime import RandomStream

NO_COMPILER = shutil.which("g++") is None and shutil.which("clang++") is None


def function(x, matrix):
    x = x.detach().requires_grad_()
    noise = torch.randn(x.shape, dtype=x.dtype)
    chol = torch.linalg.cholesky(matrix)
    value = (torch.linalg.solve_triangular(chol, (x + noise).unsqueeze(-1), upper=False) ** 2).sum()
    return value.detach(), *torch.autograd.grad(value, x)


def inputs(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    x = torch.randn(3, generator=generator, dtype=torch.float64)
    return x, half @ half.T + torch.eye(3, dtype=torch.float64)


def program() -> Program:
    return capture(function, inputs(0), [inputs(1)])


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason="there is no C++ compiler")
def test_compiled_graph_is_the_function_and_is_found_again(cache):
    first = program()
    assert first.how == "script"
    assert first.compile(inputs(2)), first.note
    again = program()
    assert again.how == "native"
    for found in (first, again):
        with RandomStream(3):
            expected = function(*inputs(4))
        with RandomStream(3):
            results = found(*inputs(4))
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def products(a, b, stack, power):
    """Products of matrices: plain, transposed, added to, in batches, with a vector."""
    row, column = a[:1], b[:, :1]
    inner = torch.addmm(column.T, torch.tanh(a @ b), b.T, beta=0.5)
    inner = inner + torch.addmm(b.T, a, a, alpha=-1.0)
    results = [inner, stack @ stack.mT, stack.mT @ stack, row @ column, column @ row, a @ b[:, 0]]
    return [result * 0.9**power for result in results]


def products_and_a_large_one(a, b, stack, power):
    """One of them is left to a library."""
    return [*products(a, b, stack, power), a.repeat(40, 1) @ b.repeat(1, 40)]


def matrices(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 5), (5, 5), (3, 4, 7), ()]
    return [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.slow
@pytest.mark.skipif(NO_COMPILER, reason="there is no C++ compiler")
@pytest.mark.parametrize("function", [products, products_and_a_large_one])
def test_small_products_are_products(cache, function):
    captured = capture(function, matrices(0), [matrices(1)])
    assert captured.compile(matrices(2)), captured.note
    for found, expected in zip(captured(*matrices(3)), function(*matrices(3)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_compiler_that_fails_is_no_harm(cache, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    captured = program()
    assert not captured.compile(inputs(2))
    assert captured.how == "script"
    assert captured.note
    assert len(captured(*inputs(5))) == 2


def test_it_can_be_turned_off(cache, monkeypatch):
    monkeypatch.setenv("PYRO_VI_KIT_COMPILE", "off")
    captured = program()
    assert not captured.compile(inputs(2))
    assert "off" in captured.note
    assert not list(cache.iterdir())


def test_a_library_that_computes_something_else_is_not_used(cache, monkeypatch):
    class Wrong:
        problem, ready = "", True

        def __init__(self, graph, inputs):
            pass

        def poll(self):
            return True

        def load(self):
            return lambda *tensors: (torch.zeros(()).double(), torch.zeros(3).double())

        def discard(self):
            pass

    monkeypatch.setattr(program_module, "Library", Wrong)
    captured = program()
    assert captured.how == "script"
    assert "something else" in captured.note
