"""Products and factors of small matrices; large ones are a library's business."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pyro_vi_kit.capture.in_c.expressions import Expr, RefusedError, Value, element
from pyro_vi_kit.capture.in_c.writer import Call

# Multiplications in one product beyond which blocks that fit the cache pay, as BLAS takes them.
_LARGEST_PRODUCT = 2**17
# Unless one side is this thin: such a product reads each number about once whoever does it.
_THIN = 4
_LARGEST_FACTOR = 64
_PARTS = 8


@dataclass(frozen=True)
class _Matrix:
    """One matrix of a stack, by its index in C."""

    value: Value
    lead: tuple[str, ...] = ()

    @property
    def steps(self) -> tuple[int, int]:
        """Elements between rows, and between columns."""
        row, column = self.value.stride[-2:]
        return row, column

    def at(self, row: str, column: str) -> str:
        """An element of it."""
        return element(self.value, [*self.lead, row, column])

    def turned(self) -> _Matrix:
        """Rows as columns."""
        shape, stride = list(self.value.shape), list(self.value.stride)
        shape[-2:], stride[-2:] = shape[:-3:-1], stride[:-3:-1]
        return _Matrix(replace(self.value, shape=tuple(shape), stride=tuple(stride)), self.lead)


def _matrix(value: Value, column: bool = True) -> Value:
    """A vector as a column or a row."""
    shape, stride = value.shape, value.stride
    if column:
        return replace(value, shape=(*shape, 1), stride=(*stride, 0))
    return replace(value, shape=(1, *shape), stride=(0, *stride))


def _stacked(call: Call, value: Value, lead: tuple[int, ...]) -> Value:
    return value.expanded((*lead, *value.shape[-2:]))


def _loops(lead: tuple[int, ...]) -> tuple[tuple[str, ...], str]:
    """Indices of a stack of matrices, and the loops over them."""
    names = tuple(f"s{dim}" for dim in range(len(lead)))
    pairs = zip(names, lead, strict=True)
    return names, " ".join(f"for (int64_t {n} = 0; {n} < {size}; {n}++)" for n, size in pairs)


def _product(call: Call, out: Value, left: Value, right: Value, start: str = "0") -> None:
    """``out = start + left @ right``, where ``start`` is written in terms of ``m`` and ``n``."""
    (rows, inner), columns = left.shape[-2:], right.shape[-1]
    size = rows * inner * columns
    if size > _LARGEST_PRODUCT and min(rows, inner, columns) > _THIN:
        raise RefusedError(f"a product of {rows} x {inner} and {inner} x {columns} matrices")
    if any(value.ctype != "double" for value in (out, left, right)):
        raise RefusedError("a product of matrices of whole numbers")
    lead = out.shape[:-2]
    names, loops = _loops(lead)
    target = _Matrix(out, names)
    a, b = (_Matrix(_stacked(call, value, lead), names) for value in (left, right))
    body = "\n".join(_order(target, a, b, start))
    call.writer.add([f"{loops} {{", body, "}"])


def _order(target: _Matrix, a: _Matrix, b: _Matrix, start: str) -> list[str]:
    """The three loops, the innermost over what lies in a row."""
    rows, inner, columns = (*a.value.shape[-2:], b.value.shape[-1])
    over = "for (int64_t {0} = 0; {0} < {1}; {0}++)".format
    product = f"{a.at('m', 'k')} * {b.at('k', 'n')}"
    sum_up = f"{target.at('m', 'n')} += {product};"
    begin = f"{over('m', rows)} {over('n', columns)} {target.at('m', 'n')} = {start};"
    if columns > 1 and b.steps[1] == 1 and target.steps[1] == 1:
        return [begin, f"{over('m', rows)} {over('k', inner)} {over('n', columns)} {sum_up}"]
    if rows > 1 and a.steps[0] == 1 and target.steps[0] == 1:
        return [begin, f"{over('n', columns)} {over('k', inner)} {over('m', rows)} {sum_up}"]
    whole = inner - inner % _PARTS
    ahead = f"{a.at('m', '(k + p)')} * {b.at('(k + p)', 'n')}"
    return [
        f"{over('m', rows)} {over('n', columns)} {{",
        f"double acc = {start}, part[{_PARTS}] = {{0}};",
        f"for (int64_t k = 0; k < {whole}; k += {_PARTS})",
        f"for (int p = 0; p < {_PARTS}; p++) part[p] += {ahead};",
        f"for (int64_t k = {whole}; k < {inner}; k++) acc += {product};",
        "acc += ((part[0] + part[4]) + (part[2] + part[6]))"
        " + ((part[1] + part[5]) + (part[3] + part[7]));",
        f"{target.at('m', 'n')} = acc;",
        "}",
    ]


def product(call: Call) -> None:
    """`mm` and `bmm`."""
    right = call.value("mat2")
    _product(call, call.out, call.value("self"), right)


def vector_product(call: Call) -> None:
    """`mv` and `dot`."""
    if call.name.startswith("mv"):
        return _product(call, _matrix(call.out), call.value("self"), _matrix(call.value("vec")))
    out = _matrix(_matrix(call.out))
    left, right = _matrix(call.value("self"), column=False), _matrix(call.value("tensor"))
    return _product(call, out, left, right)


def added_product(call: Call) -> None:
    """`addmm`, `addmv` and `baddbmm`: ``beta * self + alpha * (one @ two)``."""
    kind = call.name.split(".")[0]
    out, names = call.out, ("mat", "vec")
    if kind != "addmv":
        names = ("mat1", "mat2") if kind == "addmm" else ("batch1", "batch2")
    left, right = (call.value(name) for name in names)
    if kind == "addmv":
        out, right = _matrix(out), _matrix(right)
    _product(call, out, left, right)
    beta, alpha = call.expression("beta"), call.expression("alpha")
    total = Expr(
        "double",
        "({0} * {1} + {2} * {3})",
        (beta, call.expression("self", call.out.shape), alpha, Expr("double", value=call.out)),
    )
    if call["beta"] == 0:
        total = Expr("double", "({0} * {1})", (alpha, Expr("double", value=call.out)))
    call.writer.store(call.out, total)


def cholesky(call: Call) -> None:
    """The Cholesky factor, and where there is none, which leading part of the matrix fails first."""
    out, info, size = call.out, call.result(1), call.out.shape[-1]
    _require_small(size)
    names, loops = _loops(out.shape[:-2])
    source = _Matrix(call.value("self"), names)
    factor = _Matrix(out, names)
    if call["upper"]:
        source, factor = source.turned(), factor.turned()
    failed = element(info, names)
    call.writer.add(
        [
            f"{loops} {{",
            f"{failed} = 0;",
            f"for (int64_t m = 0; m < {size}; m++) for (int64_t n = 0; n < {size}; n++)",
            f"{factor.at('m', 'n')} = n <= m ? {source.at('m', 'n')} : 0;",
            f"for (int64_t n = 0; n < {size}; n++) {{",
            f"double d = {factor.at('n', 'n')};",
            f"for (int64_t k = 0; k < n; k++) d -= square_({factor.at('n', 'k')});",
            f"if (!(d > 0)) {{ {failed} = n + 1; break; }}",
            f"{factor.at('n', 'n')} = d = sqrt(d);",
            f"for (int64_t m = n + 1; m < {size}; m++) {{",
            f"double x = {factor.at('m', 'n')};",
            f"for (int64_t k = 0; k < n; k++) x -= {factor.at('m', 'k')} * {factor.at('n', 'k')};",
            f"{factor.at('m', 'n')} = x / d;",
            "}",
            "}",
            "}",
        ]
    )


def solve_triangular(call: Call) -> None:
    """The solution of a triangular system, from the left or from the right."""
    out = call.out
    lead = out.shape[:-2]
    names, loops = _loops(lead)
    factor = _Matrix(_stacked(call, call.value("self"), lead), names)
    right = _Matrix(_stacked(call, call.value("B"), lead), names)
    result, upper = _Matrix(out, names), bool(call["upper"])
    if not call["left"]:
        factor, right, result, upper = factor.turned(), right.turned(), result.turned(), not upper
    _require_small(factor.value.shape[-1])
    lines = _substituted(factor, right, result, upper, bool(call["unitriangular"]))
    call.writer.add([f"{loops} {{", *lines, "}"])


def _substituted(
    factor: _Matrix, right: _Matrix, result: _Matrix, upper: bool, unit: bool
) -> Iterator[str]:
    """Row by row: from the last where the factor is upper, and from the first where it is lower."""
    size, columns = factor.value.shape[-1], result.value.shape[-1]
    rows = f"m = {size} - 1; m >= 0; m--" if upper else f"m = 0; m < {size}; m++"
    known = f"k = m + 1; k < {size}; k++" if upper else "k = 0; k < m; k++"
    yield f"for (int64_t {rows}) for (int64_t n = 0; n < {columns}; n++) {{"
    yield f"double x = {right.at('m', 'n')};"
    yield f"for (int64_t {known}) x -= {factor.at('m', 'k')} * {result.at('k', 'n')};"
    yield f"{result.at('m', 'n')} = {'x' if unit else 'x / ' + factor.at('m', 'm')};"
    yield "}"


def cholesky_inverse(call: Call) -> None:
    """The inverse of a matrix, given its Cholesky factor L: column by column from L L' x = e."""
    out, size = call.out, call.out.shape[-1]
    _require_small(size)
    names, loops = _loops(out.shape[:-2])
    factor, result = _Matrix(call.value("self"), names), _Matrix(out, names)
    if call["upper"]:
        factor = factor.turned()
    # The right side is the identity, written into the result, which then is solved in place.
    identity = f"{result.at('m', 'n')} = m == n;"
    over = "for (int64_t {0} = 0; {0} < {1}; {0}++)".format
    call.writer.add(
        [
            f"{loops} {{",
            f"{over('m', size)} {over('n', size)} {identity}",
            *_substituted(factor, result, result, upper=False, unit=False),
            *_substituted(factor.turned(), result, result, upper=True, unit=False),
            "}",
        ]
    )


def cholesky_solve(call: Call) -> None:
    """The solution of L L' x = b, given L."""
    out = call.out
    lead = out.shape[:-2]
    names, loops = _loops(lead)
    factor = _Matrix(_stacked(call, call.value("input2"), lead), names)
    right = _Matrix(_stacked(call, call.value("self"), lead), names)
    if call["upper"]:
        factor = factor.turned()
    _require_small(factor.value.shape[-1])
    result = _Matrix(out, names)
    lines = [
        *_substituted(factor, right, result, upper=False, unit=False),
        *_substituted(factor.turned(), result, result, upper=True, unit=False),
    ]
    call.writer.add([f"{loops} {{", *lines, "}"])


def _require_small(size: int) -> None:
    if size > _LARGEST_FACTOR:
        raise RefusedError(f"a factorisation of a {size} x {size} matrix")


KERNELS: dict[str, Callable[[Call], None]] = {
    "mm.default": product,
    "bmm.default": product,
    "mv.default": vector_product,
    "dot.default": vector_product,
    "addmm.default": added_product,
    "addmv.default": added_product,
    "baddbmm.default": added_product,
    "linalg_cholesky_ex.default": cholesky,
    "linalg_solve_triangular.default": solve_triangular,
    "cholesky_inverse.default": cholesky_inverse,
    "cholesky_solve.default": cholesky_solve,
}
