"""Every operation that is written in C, against torch: strided, broadcast, and at the limits."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from pyro_vi_kit.capture import Graph
from pyro_vi_kit.capture.graph import Node, Ref
from pyro_vi_kit.capture.in_c import CFunction, algebra, library, moves, pointwise, reductions

pytestmark = pytest.mark.skipif(library.compiler() is None, reason="there is no C compiler")

ATEN = torch.ops.aten
LIMITS = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, math.inf, -math.inf, math.nan, 1e-300, 30.0, -40.0]


def inputs() -> dict[str, torch.Tensor]:
    """`x` and `y` are read through transposes; `row` and `one` are broadcast."""
    generator = torch.Generator().manual_seed(0)
    normal = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
    x, y = normal(12, 5), normal(12, 5)
    x[:, 0], y[:, 1] = torch.tensor(LIMITS).double(), torch.tensor(LIMITS).double()
    x[:, 2] = y[:, 2]
    square = normal(2, 4, 4)
    spd = square @ square.mT + torch.eye(4, dtype=torch.float64)
    whole = functools.partial(torch.randint, generator=generator)
    return {
        "x": x,
        "y": y,
        "row": normal(12),
        "one": normal(()),
        "mask": whole(0, 2, (12,)).bool(),
        "flags": whole(0, 2, (5, 12)).bool(),
        "int": whole(-5, 6, (5, 12)),
        "small": normal(3, 4, 6),
        "left": normal(2, 3, 4),
        "right": normal(2, 4, 5),
        "spd": spd,
        "broken": -spd[0],
        "picks": torch.tensor([2, 0, -1, 2]),
        "where": whole(0, 4, (3, 2, 6)),
        "long": normal(200),
    }


class Cases:
    """A graph of many independent operations, compiled and run once."""

    def __init__(self) -> None:
        self.tensors = inputs()
        self.nodes: list[Node] = []
        self.checks: dict[str, list[str]] = {}

    def node(self, op: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> list[str]:
        kwargs = kwargs or {}
        many = len(op._schema.returns) > 1
        name = f"t{len(self.nodes)}"
        names = [f"{name}_{k}" for k in range(len(op._schema.returns))] if many else [name]
        self.nodes.append(Node(op, tuple(args), kwargs, tuple(names), many, False))
        return names

    def add(self, label: str, op: Any, *args: Any, keep: int | None = None, **kwargs: Any) -> None:
        self.checks[label] = self.node(op, args, kwargs)[:keep]

    def run(self, folder: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # of quotients of whole numbers
        try:
            return self._run(folder)
        finally:
            torch.set_default_dtype(before)

    def _run(self, folder: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        outputs = [name for names in self.checks.values() for name in names]
        graph = Graph(list(self.tensors), outputs, self.nodes, {})
        values = dict(self.tensors)
        for node in self.nodes:
            result = node.run(values)
            values.update(zip(node.outputs, result if node.many else [result], strict=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("PYRO_VI_KIT_COMPILE", raising=False)
            patch.setenv("PYRO_VI_KIT_CACHE", str(folder))
            # Hundreds of loops, of a few rounds each: to optimise them would take half a minute.
            patch.setattr(library, "_PLAIN", "-O0")
            function = CFunction(graph, list(self.tensors.values()))
        found = function(*self.tensors.values())
        return {name: values[name] for name in outputs}, dict(zip(outputs, found, strict=True))


def overload(name: str) -> Any:
    packet, _, which = name.partition(".")
    return getattr(getattr(ATEN, packet), which)


OPTIONS = {
    "beta": 1.3, "threshold": 0.7, "exponent": 1.7, "min": -0.8, "max": 0.9, "value": 1.2, "weight": 0.3,
    "alpha": 1.5, "fill_value": 2.5,
}  # fmt: skip


def argument(given: Any, tensors: Iterator[str], name: str) -> Any:
    """A value for what an operation's schema asks for."""
    kind, truths = str(given.type), name.startswith("bitwise")
    if given.name in ("condition", "mask"):
        return Ref("mask")
    if kind == "Tensor":
        return Ref("one" if given.name == "value" else next(tensors))
    if kind == "List[int]":
        return [5, 12]
    if given.name == "reduction":
        return 0
    if given.name in OPTIONS and "cross_entropy" not in name:
        return OPTIONS[given.name]
    if kind in ("number", "Scalar"):
        return True if truths else 0.5
    return given.default_value


def pointwise_case(cases: Cases, name: str) -> None:
    """An operation of the table on tensors that its schema asks for."""
    op = overload(name)
    supply = [X, "row", Y] if "add" in name else [X, Y, "row"]
    tensors = iter(["flags", "mask"] if name.startswith("bitwise") else supply)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for given in op._schema.arguments:
        value = argument(given, tensors, name)
        if not given.kwarg_only:
            args.append(value)
        elif value is not None or not given.has_default_value():
            kwargs[given.name] = value
    if name == "_to_copy.default":
        kwargs = {"dtype": torch.float64}
    if name == "log_sigmoid_backward.default":
        args[2] = Ref(LOG_SIGMOID_BUFFER)
    cases.add(name, op, *args, keep=1, **kwargs)


X, Y, LOG_SIGMOID_BUFFER = "t0", "t1", "t2_1"


def all_pointwise() -> Cases:
    cases = Cases()
    cases.node(ATEN.t.default, [Ref("x")])
    cases.node(ATEN.t.default, [Ref("y")])
    cases.node(ATEN.log_sigmoid_forward.default, [Ref(Y)])
    for name in pointwise.TEMPLATES:
        pointwise_case(cases, name)
    for exponent in (0, 1, 2, 3, 0.5, -0.5, -1, -2, 2.5):
        cases.add(f"pow {exponent}", ATEN.pow.Tensor_Scalar, Ref(X), exponent)
    for low, high in ((None, 0.3), (-0.2, None), (-0.2, 0.3)):
        cases.add(f"clamp {low} {high}", ATEN.clamp.default, Ref(X), low, high)
    for dtype in (torch.int64, torch.bool, torch.float64):
        for source in ("int", "flags", "long"):
            cases.add(f"{source} to {dtype}", ATEN._to_copy.default, Ref(source), dtype=dtype)
    whole = Ref("int")
    for name in ("add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "lt.Tensor", "where.self"):
        front = [Ref("flags")] if name == "where.self" else []
        if name != "sub.Tensor":
            cases.add(f"whole {name}", overload(name), *front, whole, Ref("flags"))
        cases.add(f"mixed {name}", overload(name), *front, whole, Ref("row"))
    for name in ("neg", "abs", "sgn", "relu", "square", "bitwise_not", "exp"):
        cases.add(f"whole {name}", getattr(ATEN, name).default, whole)
    for name in ("bitwise_and", "bitwise_or", "bitwise_xor"):
        cases.add(f"whole {name}", getattr(ATEN, name).Scalar, whole, 5)
    cases.add("whole by a fraction", ATEN.mul.Scalar, whole, 0.5)
    cases.add("whole compared", ATEN.ge.Scalar, whole, 0.5)
    cases.add("one", ATEN.exp.default, Ref("one"))
    return cases


def all_others() -> Cases:
    cases = Cases()
    strided = Ref(cases.node(ATEN.permute.default, [Ref("small"), [2, 0, 1]])[0])  # [6, 3, 4]
    whole_cases(cases, strided)
    some_cases(cases, strided)
    along_cases(cases, strided)
    move_cases(cases, strided)
    algebra_cases(cases)
    return cases


def whole_cases(cases: Cases, strided: Ref) -> None:
    """Reductions of all elements."""
    for name in ("sum", "mean", "prod", "any", "all"):
        for tensor in (strided, Ref("x"), Ref("long"), Ref("one"), Ref("flags")):
            if (name, tensor.name) != ("mean", "flags"):
                cases.add(f"{name} {tensor.name}", getattr(ATEN, name).default, tensor)


def some_cases(cases: Cases, strided: Ref) -> None:
    """Reductions of some dimensions."""
    for dims, keep in itertools.product(([0], [1], [-1], [0, 2], [0, 1, 2], []), (False, True)):
        for name in ("sum.dim_IntList", "mean.dim", "amax.default", "amin.default"):
            cases.add(f"{name} {dims} {keep}", overload(name), strided, dims, keep)
        if dims:
            cases.add(f"logsumexp {dims} {keep}", ATEN.logsumexp.default, strided, dims, keep)
            cases.add(f"any {dims} {keep}", ATEN.any.dims, Ref("flags"), dims[:1], keep)
            cases.add(f"all {dims} {keep}", ATEN.all.dims, Ref("flags"), dims[:1], keep)
    cases.add("norm", ATEN.linalg_vector_norm.default, strided, 2, [1], True)
    for name in ("amax", "amin", "logsumexp"):
        cases.add(f"{name} limits", getattr(ATEN, name).default, Ref("x"), [0])
    cases.add("sum whole", ATEN.sum.dim_IntList, Ref("int"), [1])


def along_cases(cases: Cases, strided: Ref) -> None:
    """What is done along one dimension."""
    small = Ref("small")
    for dim in (0, 1, -1):
        for name in ("max.dim", "min.dim", "prod.dim_int", "any.dim", "all.dim"):
            cases.add(f"{name} {dim}", overload(name), strided, dim)
        for name in ("cumsum", "cumprod"):
            cases.add(f"{name} {dim}", getattr(ATEN, name).default, strided, dim)
        for name in ("_softmax", "_log_softmax"):
            cases.add(f"{name} {dim}", getattr(ATEN, name).default, strided, dim, False)
            (value,) = cases.node(getattr(ATEN, name).default, [small, dim, False])
            back = getattr(ATEN, f"{name}_backward_data").default
            cases.add(f"{name} backward {dim}", back, small, Ref(value), dim, torch.float64)
    cases.add("max with NaN", ATEN.max.dim, Ref("x"), 0)
    cases.add("cumsum whole", ATEN.cumsum.default, Ref("int"), 1)


def move_cases(cases: Cases, strided: Ref) -> None:
    small, x, row, picks = Ref("small"), Ref("x"), Ref("row"), Ref("picks")
    (part,) = cases.node(ATEN.slice.Tensor, [strided, 0, 1, 6, 2])  # [3, 3, 4]
    part_ref = Ref(part)
    (line,) = cases.node(ATEN.select.int, [strided, 1, -1])  # [6, 4]
    for dim in (0, -1):
        cases.add(f"cat {dim}", ATEN.cat.default, [part_ref, part_ref], dim)
        cases.add(f"stack {dim}", ATEN.stack.default, [part_ref, part_ref], dim)
    cases.add("select_backward", ATEN.select_backward.default, Ref(line), [6, 3, 4], 1, -1)
    cases.add("slice_backward", ATEN.slice_backward.default, part_ref, [6, 3, 4], 0, 1, 6, 2)
    cases.add("slice_scatter", ATEN.slice_scatter.default, strided, part_ref, 0, 1, 6, 2)
    cases.add("select_scatter", ATEN.select_scatter.default, strided, Ref(line), 1, 2)
    cases.add("pad", ATEN.constant_pad_nd.default, strided, [1, 2, 0, 1], 0.5)
    cases.add("crop", ATEN.constant_pad_nd.default, strided, [-1, 2, 0, -1], 0.0)
    cases.add("flip", ATEN.flip.default, strided, [0, -1])
    cases.add("repeat", ATEN.repeat.default, strided, [2, 1, 3, 2])
    cases.add("reshape", ATEN.reshape.default, strided, [4, 18])
    for name in ("view", "_unsafe_view", "_reshape_alias"):
        args = [small, [12, 6]] + ([[6, 1]] if name == "_reshape_alias" else [])
        cases.add(name, getattr(ATEN, name).default, *args)
    for diagonal in (0, -1, 2):
        cases.add(f"tril {diagonal}", ATEN.tril.default, strided, diagonal)
        cases.add(f"triu {diagonal}", ATEN.triu.default, strided, diagonal)
    for offset in (0, 1, -1):
        (diagonal,) = cases.node(ATEN.diagonal.default, [strided, offset, 1, 2])
        cases.add(f"diagonal {offset}", ATEN.exp.default, Ref(diagonal))
        back = ATEN.diagonal_backward.default
        cases.add(f"diagonal_backward {offset}", back, Ref(diagonal), [6, 3, 4], offset, 1, 2)
    cases.add("index", ATEN.index.Tensor, strided, [picks])
    cases.add("index inside", ATEN.index.Tensor, strided, [None, picks, None])
    cases.add("index two", ATEN.index.Tensor, strided, [None, picks, picks])
    cases.add("index apart", ATEN.index.Tensor, small, [picks, None, picks])
    for accumulate in (False, True):
        put = functools.partial(cases.add, f"index_put {accumulate}", ATEN.index_put.default)
        put(small, [Ref("picks")], Ref("one"), accumulate)
        put = functools.partial(cases.add, f"put a mask {accumulate}", ATEN.index_put.default)
        put(row, [Ref("mask")], Ref("one"), accumulate)
    (values,) = cases.node(ATEN.index.Tensor, [small, [None, picks, None]])
    cases.add("index_put +=", ATEN.index_put.default, small, [None, picks], Ref(values), True)
    rows = Ref("where")  # [3, 2, 6]
    (source,) = cases.node(ATEN.slice.Tensor, [small, 1, 0, 2])
    cases.add("gather", ATEN.gather.default, small, 1, rows)
    cases.add("scatter.value", ATEN.scatter.value, small, 1, rows, 0.5)
    (first,) = cases.node(ATEN.zeros_like.default, [rows], {"dtype": torch.int64})
    cases.add("scatter.src", ATEN.scatter.src, small, 0, Ref(first), Ref(source))
    cases.add("scatter_add", ATEN.scatter_add.default, small, 1, rows, small)
    (forward,) = cases.node(ATEN.abs.default, [picks])
    cases.add("index_select", ATEN.index_select.default, small, 1, Ref(forward))
    cases.add("expand", ATEN.expand.default, row, [2, 12])
    (columns,) = cases.node(ATEN.unsqueeze.default, [row, 1])
    cases.add("broadcast", ATEN.add.Tensor, x, Ref(columns))


def algebra_cases(cases: Cases) -> None:
    left, right, spd = Ref("left"), Ref("right"), Ref("spd")
    flat = {}
    for name, tensor in (("left", left), ("right", right), ("spd", spd)):
        flat[name] = Ref(cases.node(ATEN.select.int, [tensor, 0, 1])[0])
    a, b, s = flat["left"], flat["right"], flat["spd"]  # [3, 4], [4, 5], [4, 4]
    turned = {key: Ref(cases.node(ATEN.t.default, [value])[0]) for key, value in flat.items()}
    wide = Ref(cases.node(ATEN.repeat.default, [a, [1, 10]])[0])  # [3, 40]
    high = Ref(cases.node(ATEN.t.default, [wide])[0])
    cases.add("mm", ATEN.mm.default, a, b)
    cases.add("mm turned", ATEN.mm.default, turned["right"], turned["left"])
    cases.add("mm long", ATEN.mm.default, wide, high)
    cases.add("bmm", ATEN.bmm.default, left, right)
    vector = Ref(cases.node(ATEN.select.int, [right, 2, 0])[0])  # [2, 4]
    v = Ref(cases.node(ATEN.select.int, [vector, 0, 0])[0])
    cases.add("mv", ATEN.mv.default, a, v)
    cases.add("dot", ATEN.dot.default, v, v)
    row = Ref(cases.node(ATEN.select.int, [b, 0, 0])[0])  # [5]
    column = Ref(cases.node(ATEN.select.int, [a, 1, 0])[0])  # [3]
    cases.add("addmm", ATEN.addmm.default, row, a, b, beta=0.5, alpha=2.0)
    cases.add("addmm without", ATEN.addmm.default, row, a, b, beta=0)
    cases.add("addmv", ATEN.addmv.default, column, a, v)
    cases.add("baddbmm", ATEN.baddbmm.default, Ref("one"), left, right)
    for upper in (False, True):
        factor, _ = cases.node(ATEN.linalg_cholesky_ex.default, [spd], {"upper": upper})
        cases.add(f"cholesky {upper}", ATEN.linalg_cholesky_ex.default, spd, upper=upper)
        f = Ref(factor)
        for unit in (False, True):
            solve = ATEN.linalg_solve_triangular.default
            how = {"upper": upper, "unitriangular": unit}
            cases.add(f"solve {how}", solve, f, right, **how)
            cases.add(f"solve right {how}", solve, f, left, **how, left=False)
        cases.add(f"cholesky_solve {upper}", ATEN.cholesky_solve.default, right, f, upper)
        cases.add(f"cholesky_inverse {upper}", ATEN.cholesky_inverse.default, f, upper)
    _, info = cases.node(ATEN.linalg_cholesky_ex.default, [Ref("broken")])
    cases.add("no cholesky", ATEN.ne.Scalar, Ref(info), 0)
    cases.add("square", ATEN.mm.default, s, turned["spd"])


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Both graphs' results by torch and in C."""
    folder = tmp_path_factory.mktemp("cache")
    return {which: make().run(folder) for which, make in MAKERS.items()}


MAKERS = {"pointwise": all_pointwise, "others": all_others}
LABELS = [
    (which, label, name)
    for which, make in MAKERS.items()
    for label, names in make().checks.items()
    for name in names
]


@pytest.mark.parametrize(
    ("which", "label", "name"), LABELS, ids=[f"{label}-{name}" for _, label, name in LABELS]
)
def test_operation_is_torchs(ran, which, label, name):
    expected, found = (results[name] for results in ran[which])
    assert (found.shape, found.stride(), found.dtype) == (
        expected.shape, torch.empty_like(expected).stride(), expected.dtype,
    )  # fmt: skip
    # A few roundings of numbers up to 1e2, and of sums of 200.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_all_of_the_tables_are_tested():
    ran = {str(node.op).removeprefix("aten.") for make in MAKERS.values() for node in make().nodes}
    for table in (pointwise.TEMPLATES, reductions.KERNELS, moves.KERNELS, algebra.KERNELS):
        assert not set(table) - ran
