"""Sums, extremes and other results that take many elements together."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pyro_vi_kit.capture.in_c.expressions import Expr, Nest, RefusedError, Value, element
from pyro_vi_kit.capture.in_c.writer import Call, numel

# A sum of more elements in a row is taken in this many parts, which the processor adds at once.
_PARTS = 8
_LONG = 16


class _Fold(NamedTuple):
    """How a reduction goes: its start, and what it is after an element ``x``."""

    start: str
    step: str


_SUM = _Fold("0", "{acc} += {x};")
_FOLDS = {
    "sum": _SUM,
    "mean": _SUM,
    "prod": _Fold("1", "{acc} *= {x};"),
    "amax": _Fold("-INFINITY", "{acc} = maximum_({x}, {acc});"),
    "amin": _Fold("INFINITY", "{acc} = minimum_({x}, {acc});"),
    "any": _Fold("0", "{acc} |= ({x}) != 0;"),
    "all": _Fold("1", "{acc} &= ({x}) != 0;"),
}


class _Split:
    """A tensor's dimensions as those that stay and those that are reduced, each with loops.

    Args:
        shape: What is reduced.
        dims: Which of its dimensions are.
        leaves: The tensors that are read.
        out: Where the result lies; its reduced dimensions may have been kept, as ones.
    """

    def __init__(
        self, shape: Sequence[int], dims: Sequence[int], leaves: Sequence[Value], out: Value
    ) -> None:
        staying = [dim for dim in range(len(shape)) if dim not in dims]
        steps = dict(zip(staying, _steps(out, shape, dims), strict=True))
        stride = tuple(steps.get(dim, 0) for dim in range(len(shape)))
        outer = tuple(size if dim in staying else 1 for dim, size in enumerate(shape))
        inner = tuple(size if dim in dims else 1 for dim, size in enumerate(shape))
        self.target = Value(out.buffer, tuple(shape), stride, out.offset, out.ctype, out.scalar)
        self.outer = Nest(outer, [self.target, *leaves], "i")
        self.inner = Nest(inner, leaves, "r")

    def place(self, value: Value, inner: Sequence[str] | None = None) -> str:
        """How an element is reached inside all loops."""
        pairs = zip(self.outer.indices, inner or self.inner.indices, strict=True)
        return element(value, [a if a != "0" else b for a, b in pairs])

    def load(self, expression: Expr, ctype: str) -> str:
        """The element that is read, in a type."""
        return expression.cast(ctype).code(self.place)


def _steps(out: Value, shape: Sequence[int], dims: Sequence[int]) -> Sequence[int]:
    if len(out.shape) == len(shape):
        return [step for dim, step in enumerate(out.stride) if dim not in dims]
    return out.stride


def reduced(call: Call) -> None:
    """`sum`, `mean`, `prod`, `amax`, `amin`, `any`, `all`."""
    name = call.name.split(".")[0]
    fold, shape, dims = _FOLDS[name], call.shape("self"), _dims_of(call)
    expression = call.expression("self")
    split = _Split(shape, dims, list(expression.leaves()), call.out)
    count = numel([shape[dim] for dim in dims])
    kept = call.ctype if name not in ("amax", "amin") else "double"
    body = [f"{kept} acc = {fold.start};"]
    body += _folded(split, fold, split.load(expression, _read_as(name, kept)))
    result = f"acc / {count}.0" if name == "mean" else "acc"
    call.writer.add(split.outer.lines([*body, f"{split.outer.place(split.target)} = {result};"]))


def _read_as(name: str, ctype: str) -> str:
    return "double" if name in ("any", "all") else ctype


def _dims_of(call: Call) -> tuple[int, ...]:
    names = [argument.name for argument in call.node.op._schema.arguments]
    return call.dims() if "dim" in names else tuple(range(len(call.shape("self"))))


def _folded(split: _Split, fold: _Fold, load: str) -> list[str]:
    """The inner loops; a long sum in one loop is taken in parts."""
    step = fold.step.format(acc="acc", x=load)
    sizes = split.inner.sizes
    if fold is not _SUM or len(sizes) != 1 or sizes[0] < _LONG:
        return split.inner.lines([step])
    size, whole = sizes[0], sizes[0] - sizes[0] % _PARTS
    shifted = re.sub(r"\br0\b", "(r0 + p)", load)
    return [
        f"double part[{_PARTS}] = {{0}};",
        f"for (int64_t r0 = 0; r0 < {whole}; r0 += {_PARTS})",
        f"for (int p = 0; p < {_PARTS}; p++) part[p] += {shifted};",
        f"for (int64_t r0 = {whole}; r0 < {size}; r0++) {step}",
        "acc += ((part[0] + part[4]) + (part[2] + part[6]))"
        " + ((part[1] + part[5]) + (part[3] + part[7]));",
    ]


def extreme(call: Call) -> None:
    """`max` and `min` along a dimension, with where it was found: the first place, or that of a NaN."""
    expression, shape = call.expression("self"), call.shape("self")
    dim, found = call.dims()[0] if shape else 0, call.out
    sign = ">" if call.name.startswith("max") else "<"
    split = _Split(shape, (dim,) if shape else (), list(expression.leaves()), found)
    where = call.result(1)
    other = _Split(shape, (dim,) if shape else (), list(expression.leaves()), where)
    load = split.load(expression, "double")
    index = split.inner.indices[dim] if shape else "0"
    body = [
        "double best = NAN; int64_t at = -1;",
        *split.inner.lines(
            [
                f"double x = {load};",
                f"if (at < 0 || (best == best && (x {sign} best || x != x))) "
                f"{{ best = x; at = {index}; }}",
            ]
        ),
    ]
    _require_same_loops(split, other)
    ends = [f"{s.outer.place(s.target)} = {x};" for s, x in ((split, "best"), (other, "at"))]
    call.writer.add(split.outer.lines([*body, *ends]))


def _require_same_loops(one: _Split, other: _Split) -> None:
    if one.outer.names != other.outer.names or one.outer.indices != other.outer.indices:
        raise RefusedError("results of one operation lie in memory differently")


def logsumexp(call: Call) -> None:
    """The logarithm of a sum of exponentials; minus infinity where all are."""
    expression, dims = call.expression("self"), call.dims()
    split = _Split(call.shape("self"), dims, list(expression.leaves()), call.out)
    load = split.load(expression, "double")
    body = [
        "double top = -INFINITY, acc = 0;",
        *split.inner.lines([f"top = maximum_({load}, top);"]),
        "if (isinf(top)) top = 0;",
        *split.inner.lines([f"acc += exp({load} - top);"]),
        f"{split.outer.place(split.target)} = log(acc) + top;",
    ]
    call.writer.add(split.outer.lines(body))


def _along(call: Call, body: Callable[[Callable[[Value], str], str], list[str]]) -> None:
    """Loops over all dimensions but one, around what is done along that one."""
    out, expression = call.out, call.expression("self")
    shape = out.shape or (1,)
    if not out.shape:
        raise RefusedError(f"{call.name} of a number")
    dim = call.dims()[0]
    rest = tuple(1 if position == dim else size for position, size in enumerate(shape))
    nest = Nest(rest, [out, *expression.leaves()])
    indices = list(nest.indices)
    indices[dim] = "k"

    def place(value: Value) -> str:
        return element(value, indices)

    loop = f"for (int64_t k = 0; k < {shape[dim]}; k++)"
    call.writer.add(nest.lines(body(place, loop)))


def running(call: Call) -> None:
    """`cumsum` and `cumprod`."""
    load = call.expression("self").cast(call.ctype)
    start, sign = ("0", "+") if call.name.startswith("cumsum") else ("1", "*")

    def body(place: Callable[[Value], str], loop: str) -> list[str]:
        step = f"acc {sign}= {load.code(place)}; {place(call.out)} = acc;"
        return [f"{call.ctype} acc = {start};", f"{loop} {{ {step} }}"]

    _along(call, body)


def softmax(call: Call) -> None:
    """`softmax` and `log_softmax` along a dimension."""
    load = call.expression("self")
    last = "exp({x} - top) / acc" if call.name.startswith("_softmax") else "{x} - top - log(acc)"

    def body(place: Callable[[Value], str], loop: str) -> list[str]:
        x = load.code(place)
        return [
            "double top = -INFINITY, acc = 0;",
            f"{loop} top = maximum_({x}, top);",
            f"{loop} acc += exp({x} - top);",
            f"{loop} {place(call.out)} = {last.format(x=x)};",
        ]

    _along(call, body)


def softmax_backward(call: Call) -> None:
    """The gradients of both."""
    logarithm = call.name.startswith("_log_softmax")
    gradient, output = call.expression("grad_output"), call.expression("output")
    shape, out = call.out.shape, call.out
    dim = call["dim"] % len(shape)
    rest = tuple(1 if position == dim else size for position, size in enumerate(shape))
    nest = Nest(rest, [out, *gradient.leaves(), *output.leaves()])
    indices = list(nest.indices)
    indices[dim] = "k"

    def place(value: Value) -> str:
        return element(value, indices)

    g, y = gradient.code(place), output.code(place)
    loop = f"for (int64_t k = 0; k < {shape[dim]}; k++)"
    term = g if logarithm else f"{g} * {y}"
    result = f"{g} - exp({y}) * acc" if logarithm else f"({g} - acc) * {y}"
    call.writer.add(
        nest.lines(
            ["double acc = 0;", f"{loop} acc += {term};", f"{loop} {place(out)} = {result};"]
        )
    )


def norm(call: Call) -> None:
    """The Euclidean norm."""
    if call["ord"] != 2:
        raise RefusedError(f"a norm of order {call['ord']}")
    expression = call.expression("self")
    split = _Split(call.shape("self"), call.dims(), list(expression.leaves()), call.out)
    load = split.load(expression, "double")
    body = ["double acc = 0;", *split.inner.lines([f"acc += square_({load});"])]
    body.append(f"{split.outer.place(split.target)} = sqrt(acc);")
    call.writer.add(split.outer.lines(body))


KERNELS: dict[str, Callable[[Call], None]] = {
    **{f"{name}.default": reduced for name in ("sum", "mean", "prod", "any", "all")},
    **{f"{name}.dim_IntList": reduced for name in ("sum",)},
    **{f"{name}.dim": reduced for name in ("mean", "any", "all")},
    **{f"{name}.dims": reduced for name in ("any", "all")},
    "prod.dim_int": reduced,
    "amax.default": reduced,
    "amin.default": reduced,
    "max.dim": extreme,
    "min.dim": extreme,
    "logsumexp.default": logsumexp,
    "cumsum.default": running,
    "cumprod.default": running,
    "_softmax.default": softmax,
    "_log_softmax.default": softmax,
    "_softmax_backward_data.default": softmax_backward,
    "_log_softmax_backward_data.default": softmax_backward,
    "linalg_vector_norm.default": norm,
}
