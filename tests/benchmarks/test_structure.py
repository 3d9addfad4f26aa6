"""The structure that benchmarks.structure measures: its arithmetic, and what the package keeps to."""

from __future__ import annotations

import ast

import pytest

from benchmarks import structure


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(): return 1", 1),
        ("def f(a, b):\n    if a and b: return 1\n    return 2", 3),
        ("def f(a):\n    return [x for x in a if x] if a else 0", 4),
        ("def f(a):\n    while a:\n        try: a()\n        except ValueError: break", 3),
        ("def f(a):\n    for x in a or ():\n        assert x", 4),
    ],
)
def test_complexity_counts_branches(source, expected):
    assert structure.complexity(ast.parse(source).body[0]) == expected


def test_circles_are_found_and_chains_are_none():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}, "e": set()}
    assert structure.circles(graph) == [["a", "b", "c"]]
    assert structure.circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


def test_hops_are_counted_where_a_run_goes_on_in_another_file():
    from pyro_vi_kit.core.registry import About, Registry

    files, hops = structure.passed_through(lambda: Registry("guide", About, "").describe())
    assert list(files) == ["core/registry.py"]
    assert hops == []


def test_the_table_has_every_figure():
    figures = dict.fromkeys(structure.BEFORE, 1)
    table = structure.report(figures)
    assert all(name in table for name in structure.BEFORE)
