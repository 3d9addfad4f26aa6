"""What a model computes, in a few numbers: whether a file is of this model and these data.

A model's text says little: a prior may come from a global, data from a closure. Its log density at fixed
points says what a posterior depends on. It is kept site by site, so that what has changed has a name.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model

Fingerprint = Mapping[str, Any]
"""``data``, a digest of the tensors among the arguments; ``observed``, one of each observed site;
``sites``, log densities of each site at the points, None where the model has no density; ``dtype``,
their precision."""

_POINTS = 2
# Relative: what other machines and numbers of threads round otherwise stays far below, also behind a
# Cholesky factor of condition 1e6.
_TOLERANCE = {"float64": 1e-8, "float32": 1e-3}


class Difference(NamedTuple):
    """How two fingerprints differ.

    Attributes:
        data: Whether it is by other data, as far as one can tell.
        words: What differs.
    """

    data: bool
    words: str


def of(density: Density) -> dict[str, Any]:
    """The fingerprint of a model and its data, in what JSON holds."""
    sites: dict[str, list[float]] = {}
    observed = {}
    fixed = {name: _pattern(value, 1) for name, value in density.params.items()}
    held = density.holding(fixed)
    for point in range(_POINTS):
        z = density.cast(_pattern(torch.empty(1, density.dim, dtype=torch.float64), point))
        visits, _ = held.visits(density.within(density.block.unpack(z)))
        for visit in visits.values():
            # A shuffled stream begins with another batch each time.
            if visit.kind == "deterministic" or visit.name in density.inside:
                continue
            with torch.no_grad(), density.casting():
                total = float(visit.log_prob().sum())
                total += 0.0 if visit.log_det is None else float(visit.log_det.sum())
            sites.setdefault(visit.name, []).append(total)
            if visit.kind == "observed":
                observed[visit.name] = digest([visit.value])
    return {
        "data": data_of(density.model),
        "observed": observed,
        "sites": sites,
        "dtype": str(density.dtype).removeprefix("torch."),
    }


def of_data(model: Model) -> dict[str, Any]:
    """The same of a model that has no density: all that is known of it are its data."""
    return {"data": data_of(model), "observed": {}, "sites": None, "dtype": "float64"}


def data_of(model: Model) -> str | None:
    """A digest of the tensors and arrays among a model's arguments; None where they are streamed."""
    if model.stream is not None:
        return None
    leaves = tree_flatten((model.args, dict(model.kwargs)))[0]
    return digest(leaf for leaf in leaves if isinstance(leaf, Tensor | np.ndarray))


def digest(tensors: Iterable[Tensor | np.ndarray]) -> str:
    """A checksum of data, with their shapes."""
    found = 0
    for each in tensors:
        tensor = torch.from_numpy(each) if _is_plain(each) else each
        if isinstance(tensor, np.ndarray):  # of text or objects
            found = zlib.crc32(repr(tensor.tolist()).encode(), found)
            continue
        found = zlib.crc32(repr((tuple(tensor.shape), str(tensor.dtype))).encode(), found)
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found = zlib.crc32(flat.numpy().data, found)
    return f"{found:08x}"


def difference(before: Fingerprint, now: Fingerprint) -> Difference | None:
    """How a model differs from what it was, or None."""
    if before["data"] != now["data"]:
        return Difference(True, f"data {before['data']!r}, now {now['data']!r}")
    old, new = before["sites"], now["sites"]
    if old is None or new is None:
        return None
    unequal = [name for name in {**old, **new} if not _agree(before, now, name)]
    if not unequal:
        return None
    seen = {**before["observed"], **now["observed"]}
    closed_over = all(
        name in seen and before["observed"].get(name) != now["observed"].get(name)
        for name in unequal
    )
    what = "the data observed at" if closed_over else "the log density of"
    return Difference(closed_over, f"{what} {', '.join(map(repr, unequal))} is not what it was")


def _agree(before: Fingerprint, now: Fingerprint, name: str) -> bool:
    old, new = before["sites"].get(name), now["sites"].get(name)
    if old is None or new is None or len(old) != len(new):
        return False
    tolerance = max(_TOLERANCE[each["dtype"]] for each in (before, now))
    size = np.abs(np.nan_to_num([*old, *new, 1.0], posinf=1.0, neginf=1.0)).max()
    return np.allclose(old, new, rtol=0.0, atol=tolerance * size, equal_nan=True)


def _pattern(like: Tensor, number: int) -> Tensor:
    """Fixed numbers between -1 and 1 in the shape of a tensor, the same on every machine."""
    if not like.is_floating_point():
        return like
    places = torch.arange(1.0, like.numel() + 1.0, dtype=torch.float64)
    # The golden ratio leaves no period that a model's dimensions could share.
    values = torch.frac(0.618033988749895 * places + 0.31 * number) - 0.5
    return (2.0 * values / (1.0 + number)).reshape(like.shape).to(like)


def _is_plain(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind in "biufc" and array.dtype.isnative
