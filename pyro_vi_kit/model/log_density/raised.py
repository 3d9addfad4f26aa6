"""What to say of a fault of a model: where it is, which argument is to blame, what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_vi_kit.core.errors import ModelError, first_line
from pyro_vi_kit.model.log_density.visits import is_constant
from pyro_vi_kit.model.model import Model

_INVALID = re.compile(
    r"Expected parameter (\w+) \(.*?\) of distribution (\w+)\(.*to satisfy the constraint (.+?), but",
    re.DOTALL,
)
_ON_THE_DIAGONAL = (
    "all eigenvalues of a covariance have to be positive: add a little to the diagonal of one that is "
    "singular, C + 1e-6 * torch.eye(len(C))"
)
# What keeps an argument inside, by how torch's constraint begins.
_REMEDIES = {
    "PositiveDefinite": _ON_THE_DIAGONAL,
    "GreaterThan": "write it as exp or softplus of latents, which keep it above 0",
    "Interval": "write it as a sigmoid of latents, or give logits= in its place",
    "Simplex": "write it as a softmax of latents, or give logits= in its place",
}
_ROWS = 5
_OF_NAN = re.compile(r"\b(nan|inf|infinite|finite|cholesky|singular)\b|linalg", re.IGNORECASE)


class Problem(NamedTuple):
    """What is wrong, what to do about it, and what it is raised as."""

    what: str
    remedy: str
    error: type[ModelError] = ModelError

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"

    @classmethod
    def of(cls, error: ModelError) -> Problem:
        """What an error says, whose remedy stands behind the last colon."""
        what, _, remedy = str(error).rpartition(": ")
        return cls(what, remedy)


def told(error: Exception, model: Model, met: Mapping[str, Any]) -> str:
    """The error in words, with what is known of its cause and cure.

    Args:
        error: It.
        model: The model and its arguments.
        met: The sites that were met before.
    """
    last = next(reversed(list(met)), None)
    where = "before its first site" if last is None else f"after site {last!r}"
    invalid = _INVALID.search(str(error))
    bad = list(not_finite(model))
    known = bool(bad) and (invalid is not None or _OF_NAN.search(str(error)) is not None)
    hints = list(_hints(error, model, invalid, known=known))
    if invalid is None:
        said = f"the model raised {type(error).__name__}: {first_line(error)} ({where})"
    else:
        name, distribution, constraint = invalid.groups()
        said = (
            f"the model raised {type(error).__name__}: {name!r} of a {distribution} ({where}) does not "
            f"satisfy {constraint}"
        )
    if hints:
        said = f"{said}: {'; '.join(hints)}"
    if known:
        # Before anything else: what follows from it may be long and look like another fault.
        return f"{'; '.join(bad)}: drop the rows, or fill the values. So {said}"
    return f"{said} ({'; '.join(bad)})" if bad else said


def _hints(
    error: Exception, model: Model, invalid: re.Match[str] | None, *, known: bool
) -> Iterator[str]:
    """What may be to blame, with the remedy; little where it is ``known`` that data are no numbers."""
    text = str(error)
    for name, argument in arguments(model).items():
        if type(argument).__module__ == "numpy":
            yield f"argument {name!r} is a NumPy array, and Pyro takes tensors: torch.as_tensor({name})"
        if "dtype" in text and _is_whole(argument):
            yield f"argument {name!r} holds whole numbers ({argument.dtype}): pass {name}.float()"
    if known:
        return
    if "cholesky" in text:
        yield _ON_THE_DIAGONAL
    if invalid is None:
        return
    constraint = invalid.group(3)
    if constraint.startswith("GreaterThan"):
        for name, argument in arguments(model).items():
            if is_constant(argument):
                yield f"all numbers of argument {name!r} are one, and a scale made of them is 0"
    yield from (remedy for start, remedy in _REMEDIES.items() if constraint.startswith(start))


def arguments(model: Model) -> dict[str, Any]:
    """A model's arguments by name."""
    return dict(zip(model.argument_names, model.args, strict=True)) | dict(model.kwargs)


def sparse(model: Model) -> str:
    """What to say of sparse tensors, which cannot be recorded and have no NumPy."""
    name, leaf = next(
        (name, leaf)
        for name, argument in arguments(model).items()
        for leaf in tree_flatten(argument)[0]
        if isinstance(leaf, Tensor) and leaf.layout != torch.strided
    )
    return f"argument {name!r} holds a sparse tensor ({leaf.layout}): pass {name}.to_dense()"


def not_finite(model: Model) -> Iterator[str]:
    """Each argument that holds NaN or infinite numbers, with how many and in which rows."""
    for name, argument in arguments(model).items():
        wrong = [~array.isfinite() for array in _arrays(argument)]
        count = sum(int(where.sum()) for where in wrong)
        if not count:
            continue
        where = next(where for where in wrong if where.any())
        yield f"argument {name!r} holds {count} NaN or infinite value(s), {rows(where)}"


def rows(where: Tensor) -> str:
    """The first rows in which something is true, in words."""
    whole = torch.atleast_1d(where).flatten(1).any(1) if where.dim() > 1 else where
    places = torch.atleast_1d(whole).nonzero()[:, 0].tolist()
    more = ", ..." if len(places) > _ROWS else ""
    return f"in row(s) {', '.join(map(str, places[:_ROWS]))}{more}"


def _arrays(argument: Any) -> Iterator[Tensor]:
    """The numbers of an argument: tensors, arrays, lists of numbers, and what holds these."""
    if isinstance(argument, Tensor):
        if argument.layout == torch.strided:
            yield argument
        return
    inner = list(argument.values()) if isinstance(argument, Mapping) else argument
    parts = inner if isinstance(inner, list | tuple) else []
    if not any(isinstance(leaf, Tensor) for leaf in tree_flatten(parts)[0]):
        with contextlib.suppress(Exception):  # lists of unequal length, and whatever is no number
            array = np.asarray(inner)
            if array.dtype.kind == "f":
                yield torch.as_tensor(array)
                return
    if parts and all(isinstance(part, Tensor) and part.dim() == 0 for part in parts):
        yield torch.stack([part.detach().cpu().double() for part in parts])
        return
    for part in parts:
        yield from _arrays(part)


def _is_whole(value: Any) -> bool:
    whole = isinstance(value, Tensor) and value.dim() > 0
    return bool(whole and not value.is_floating_point() and value.dtype != torch.bool)
