"""Operations that put elements elsewhere: joins, padding, picking and scattering by index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from pyro_vi_kit.capture.graph import Ref
from pyro_vi_kit.capture.in_c.expressions import Expr, Nest, RefusedError, Value, element, number
from pyro_vi_kit.capture.in_c.writer import Call, numel


def _part(value: Value, dim: int, start: int, size: int, step: int = 1) -> Value:
    """A slice of a tensor."""
    shape, stride = list(value.shape), list(value.stride)
    offset = value.offset + start * stride[dim]
    shape[dim], stride[dim] = size, stride[dim] * step
    return replace(value, shape=tuple(shape), stride=tuple(stride), offset=offset)


def _chosen(value: Value, dim: int, index: int) -> Value:
    """One of a tensor's rows."""
    shape, stride = value.shape, value.stride
    return replace(
        value,
        shape=shape[:dim] + shape[dim + 1 :],
        stride=stride[:dim] + stride[dim + 1 :],
        offset=value.offset + index * stride[dim],
    )


def _zero(call: Call) -> None:
    call.writer.store(call.out, number(0))


def _tensors(call: Call) -> list[Ref]:
    listed = call["tensors"]
    if not all(isinstance(part, Ref) for part in listed):
        raise RefusedError(f"{call.name} of {listed!r}")
    return list(listed)


def cat(call: Call) -> None:
    """Tensors one behind another."""
    dim, start = call["dim"] % max(len(call.out.shape), 1), 0
    for part in _tensors(call):
        value = call.writer.value(part.name)
        if value.shape == (0,) and len(call.out.shape) != 1:
            continue  # torch's empty tensor of old, which fits anything
        target = _part(call.out, dim, start, value.shape[dim])
        call.writer.store(target, call.writer.expression(part.name, value.shape))
        start += value.shape[dim]


def stack(call: Call) -> None:
    """Tensors side by side, along a new dimension."""
    dim = call["dim"] % len(call.out.shape)
    for position, part in enumerate(_tensors(call)):
        value = call.writer.value(part.name)
        expression = call.writer.expression(part.name, value.shape)
        call.writer.store(_chosen(call.out, dim, position), expression)


def select_backward(call: Call) -> None:
    """One row of a tensor of zeros."""
    dim = call["dim"] % len(call.out.shape)
    target = _chosen(call.out, dim, call["index"] % call.out.shape[dim])
    _zero(call)
    call.writer.store(target, call.expression("grad_output"))


def slice_backward(call: Call) -> None:
    """Some rows of a tensor of zeros."""
    _zero(call)
    _store_slice(call, "grad_output")


def slice_scatter(call: Call) -> None:
    """A tensor with other values in some of its rows."""
    call.writer.store(call.out, call.expression("self"))
    _store_slice(call, "src")


def select_scatter(call: Call) -> None:
    """A tensor with other values in one of its rows."""
    dim = call["dim"] % len(call.out.shape)
    call.writer.store(call.out, call.expression("self"))
    target = _chosen(call.out, dim, call["index"] % call.out.shape[dim])
    call.writer.store(target, call.expression("src"))


def _store_slice(call: Call, source: str) -> None:
    out = call.out
    dim = call["dim"] % len(out.shape)
    size = out.shape[dim]
    start, _, step = slice(call["start"], call["end"], call["step"]).indices(size)
    length = call.shape(source)[dim]
    call.writer.store(_part(out, dim, start, length, step), call.expression(source))


def pad(call: Call) -> None:
    """A tensor within more elements of one number, or without some of its own."""
    call.writer.store(call.out, call.expression("value"))
    value, target = call.value("self"), call.out
    for position in range(len(call["pad"]) // 2):
        before, after = call["pad"][2 * position : 2 * position + 2]
        dim = len(value.shape) - 1 - position
        size = value.shape[dim] + min(before, 0) + min(after, 0)
        value = _part(value, dim, max(-before, 0), size)
        target = _part(target, dim, max(before, 0), size)
    call.writer.store(target, Expr(value.ctype, value=value))


def flip(call: Call) -> None:
    """Some dimensions from back to front."""
    value = call.value("self")
    for dim in call.dims("dims"):
        if value.shape[dim]:
            value = _part(value, dim, value.shape[dim] - 1, value.shape[dim], -1)
    call.writer.store(call.out, Expr(value.ctype, value=value))


def repeat(call: Call) -> None:
    """A tensor several times over."""
    out, value = call.out, call.value("self")
    inner = (1,) * (len(out.shape) - len(value.shape)) + value.shape
    # Each dimension as two, the outer of which counts the copies.
    shape = tuple(
        n for times, size in zip(call["repeats"], inner, strict=True) for n in (times, size)
    )
    stride = tuple(
        n for step, size in zip(out.stride, inner, strict=True) for n in (step * size, step)
    )
    target = replace(out, shape=shape, stride=stride)
    steps = value.expanded(inner).stride
    source = replace(value, shape=shape, stride=tuple(n for step in steps for n in (0, step)))
    call.writer.store(target, Expr(value.ctype, value=source))


def reshaped(call: Call) -> None:
    """The elements in their order, in another shape, where that is a copy."""
    value, out = call.value("self"), call.out
    nest = Nest(value.shape, [value])
    step = f"{out.buffer}[{out.offset} + at++] = {nest.place(value)};"
    if out.scalar:
        step = f"{out.buffer} = {nest.place(value)};"
    call.writer.add(["{ int64_t at = 0; (void)at;", *nest.lines([step]), "}"])


def triangle(call: Call) -> None:
    """The lower or the upper triangle of matrices."""
    out, expression = call.out, call.expression("self")
    sign = "<=" if call.name.startswith("tril") else ">="
    nest = Nest(out.shape, [out, *expression.leaves()], whole=True)
    row, column = nest.indices[-2:]
    kept = f"{column} - {row} {sign} {call['diagonal']}"
    load = expression.cast(out.ctype).code(nest.place)
    call.writer.add(nest.lines([f"{nest.place(out)} = {kept} ? {load} : 0;"]))


def diagonal_backward(call: Call) -> None:
    """Zeros with these numbers on the diagonal."""
    out, offset = call.out, call["offset"]
    one, two = call["dim1"] % len(out.shape), call["dim2"] % len(out.shape)
    gradient = call.expression("grad_output")
    start = out.offset + (offset * out.stride[two] if offset >= 0 else -offset * out.stride[one])
    rest = [dim for dim in range(len(out.shape)) if dim not in (one, two)]
    stride = (*(out.stride[dim] for dim in rest), out.stride[one] + out.stride[two])
    target = replace(out, shape=call.shape("grad_output"), stride=stride, offset=start)
    _zero(call)
    call.writer.store(target, gradient)


def _picked(name: str, value: Value, indices: Sequence[str], size: int, *, wraps: bool) -> str:
    """A statement: the place that a number picks, which is 0, and said, where there is none.

    Args:
        name: Of the C variable that it makes.
        value: The numbers.
        indices: Which of them.
        size: Of the dimension that it picks from.
        wraps: Whether a negative number counts from the end; not all of torch's operations have it so.
    """
    kind = "from_end_" if wraps else "from_start_"
    return f"int64_t {name} = {kind}({element(value, indices)}, {size}, &outside);"


def _addressed(
    call: Call, array: Value, broadcast: Sequence[int]
) -> tuple[tuple[int, ...], Callable[[Sequence[str]], tuple[list[str], str]]]:
    """The shape of `array[indices]`; statements behind which an element of it is reached, and how.

    Where the indexed dimensions stand together they are replaced in their place; otherwise by leading
    ones, as in NumPy.
    """
    picked = [dim for dim, index in enumerate(call["indices"]) if index is not None]
    indices = [call.writer.value(call["indices"][dim].name) for dim in picked]
    if any(index.ctype != "int64_t" for index in indices):
        raise RefusedError(f"{call.name} by a mask")
    together = picked == list(range(picked[0], picked[0] + len(picked)))
    first = picked[0] if together else 0
    rest = [dim for dim in range(len(array.shape)) if dim not in picked]
    before = [dim for dim in rest if dim < first]
    after = [dim for dim in rest if dim not in before]
    shape = (
        *(array.shape[dim] for dim in before),
        *broadcast,
        *(array.shape[dim] for dim in after),
    )
    expanded = [index.expanded(broadcast) for index in indices]

    def place(names: Sequence[str]) -> tuple[list[str], str]:
        middle = names[len(before) : len(before) + len(broadcast)]
        own = dict(zip(before, names, strict=False))
        own |= dict(zip(after, names[len(before) + len(broadcast) :], strict=True))
        opening = []
        for dim, index in zip(picked, expanded, strict=True):
            own[dim] = f"p{dim}"
            opening.append(_picked(own[dim], index, middle, array.shape[dim], wraps=True))
        return opening, element(array, [own[dim] for dim in range(len(array.shape))])

    return shape, place


def _broadcast(call: Call) -> tuple[int, ...]:
    import torch

    shapes = [call.writer.value(i.name).shape for i in call["indices"] if i is not None]
    return tuple(torch.broadcast_shapes(*shapes))


def index(call: Call) -> None:
    """`x[indices]`, by tensors of integers."""
    array, out = call.value("self"), call.out
    shape, place = _addressed(call, array, _broadcast(call))
    if shape != out.shape:
        raise RefusedError("an index of another form")
    nest = Nest(out.shape, [out], whole=True)
    opening, picked = place(nest.indices)
    call.writer.add(nest.lines([*opening, f"{nest.place(out)} = {picked};"]))


def index_put(call: Call) -> None:
    """`x[indices] = values`, or `+= values`; elements that come twice are set in their order."""
    out = call.out
    call.writer.store(out, call.expression("self"))
    if len(call["indices"]) == 1 and call.writer.value(call["indices"][0].name).ctype == "uint8_t":
        return _masked_put(call)
    shape, place = _addressed(call, out, _broadcast(call))
    values = call.expression("values", shape)
    nest = Nest(shape, list(values.leaves()), whole=True)
    sign = "+=" if call["accumulate"] else "="
    load = values.cast(out.ctype).code(nest.place)
    opening, picked = place(nest.indices)
    return call.writer.add(nest.lines([*opening, f"{picked} {sign} {load};"]))


def _masked_put(call: Call) -> None:
    """`x[mask] = number`."""
    out, mask = call.out, call.writer.value(call["indices"][0].name)
    if numel(call.shape("values")) != 1 or mask.shape != out.shape:
        raise RefusedError("several numbers are put where a mask says")
    leaves = (Expr(mask.ctype, value=mask), call.expression("values", out.shape).cast(out.ctype))
    other = "{2} + {1}" if call["accumulate"] else "{1}"
    own = Expr(out.ctype, value=out)
    call.writer.store(out, Expr(out.ctype, f"({{0}} ? {other} : {{2}})", (*leaves, own)))


def gather(call: Call) -> None:
    """`x[..., i, ...]`, an index for each element of the result."""
    array, rows, out = call.value("self"), call.value("index"), call.out
    nest = Nest(out.shape, [out, rows], whole=True)
    opening, picked = _at(nest, array, rows, call["dim"])
    call.writer.add(nest.lines([opening, f"{nest.place(out)} = {picked};"]))


def scatter(call: Call) -> None:
    """The other way round: a number or elements of a tensor to where the indices say."""
    out, rows = call.out, call.value("index")
    call.writer.store(out, call.expression("self"))
    source = call.expression("value" if call.name == "scatter.value" else "src")
    leaves = [replace(value, shape=rows.shape) for value in source.leaves()]
    nest = Nest(rows.shape, [rows, *leaves], whole=True)
    sign = "+=" if call.name.startswith("scatter_add") else "="
    load = source.cast(out.ctype).code(
        lambda v: element(replace(v, shape=rows.shape), nest.indices)
    )
    opening, picked = _at(nest, out, rows, call["dim"])
    call.writer.add(nest.lines([opening, f"{picked} {sign} {load};"]))


def index_select(call: Call) -> None:
    """Some rows."""
    array, rows, out = call.value("self"), call.value("index"), call.out
    nest = Nest(out.shape, [out], whole=True)
    dim = call["dim"] % max(len(array.shape), 1)
    indices = list(nest.indices)
    opening = _picked("p", rows, [nest.indices[dim]], array.shape[dim], wraps=False)
    indices[dim] = "p"
    call.writer.add(nest.lines([opening, f"{nest.place(out)} = {element(array, indices)};"]))


def _at(nest: Nest, array: Value, rows: Value, dim: int) -> tuple[str, str]:
    """A statement behind which an element of the array is reached, and how."""
    if not array.shape:
        raise RefusedError("an index into a number")
    dim = dim % len(array.shape)
    indices = list(nest.indices)
    opening = _picked("p", rows, nest.indices, array.shape[dim], wraps=False)
    indices[dim] = "p"
    return opening, element(array, indices)


KERNELS: dict[str, Callable[[Call], None]] = {
    "cat.default": cat,
    "stack.default": stack,
    "select_backward.default": select_backward,
    "slice_backward.default": slice_backward,
    "slice_scatter.default": slice_scatter,
    "select_scatter.default": select_scatter,
    "constant_pad_nd.default": pad,
    "flip.default": flip,
    "repeat.default": repeat,
    **{
        f"{name}.default": reshaped
        for name in ("reshape", "view", "_unsafe_view", "_reshape_alias")
    },
    "tril.default": triangle,
    "triu.default": triangle,
    "diagonal_backward.default": diagonal_backward,
    "index.Tensor": index,
    "index_put.default": index_put,
    "gather.default": gather,
    "scatter.value": scatter,
    "scatter.src": scatter,
    "scatter_add.default": scatter,
    "index_select.default": index_select,
}
