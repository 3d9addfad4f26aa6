"""Whether data, distributions and plates agree: what broadcasts by mistake counts data repeatedly."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin

from pyro_vi_kit.core.runtime import broadcast_shapes, validation
from pyro_vi_kit.model.log_density.handlers import Visit
from pyro_vi_kit.model.log_density.problems import Problem

Shape = tuple[int, ...]


def shape_problem(visit: Visit) -> Problem | None:
    """Data that do not fit or count more than once, or batch dims beyond the plates around a site.

    The latter is what Pyro's own SVI refuses, and a site in no plate is left to `plateless_problem`:
    whatever its batch dims mean, each of its numbers counts once.
    """
    if visit.kind not in ("latent", "discrete", "observed"):
        return None
    if visit.kind != "observed":
        return _wide_problem(visit, tuple(visit.fn.batch_shape), tuple(visit.fn.shape()))
    try:
        with validation(False), torch.no_grad():
            terms = tuple(replace(visit, fn=unvalidated(visit.fn)).log_prob().shape)
    except (RuntimeError, ValueError, IndexError):
        return _unequal_problem(visit)
    return _repeated_problem(visit, terms) or _wide_problem(
        visit, terms, broadcast_shapes(terms, visit.fn.batch_shape)
    )


def plateless_problem(visit: Visit) -> Problem | None:
    """Batch dims that no plate made."""
    batch = tuple(visit.fn.batch_shape)
    stray = _stray(visit, batch)
    if not stray:
        return None
    sizes = ", ".join(f"dim {d} of size {batch[d]}" for d in stray)
    return Problem(
        f"site {visit.name!r} has batch dims that no plate made ({sizes})",
        "put the site into a pyro.plate if they are independent, or declare them .to_event(1)",
    )


def _stray(visit: Visit, shape: Shape) -> list[int]:
    """Dims of a batch that hold something and are no plate's, counted from the right."""
    plates = {frame.dim for frame in visit.frames}
    return [d for d in range(-len(shape), 0) if shape[d] != 1 and d not in plates]


def _unequal_problem(visit: Visit) -> Problem | None:
    """Data and distribution that do not broadcast; another error of a density is another problem's."""
    data, own = tuple(visit.value.shape), tuple(visit.fn.shape())
    try:
        broadcast_shapes(data, own)
    except RuntimeError:
        return Problem(
            f"{_told(visit)}, and they do not fit",
            "make the plate as long as the data, pyro.plate(name, len(y)), and check event dims",
        )
    return None


def _repeated_problem(visit: Visit, terms: Shape) -> Problem | None:
    """Whether there are more terms in the likelihood than numbers in the data.

    One number for all rows of a plate is meant: ``obs=torch.tensor(1.0)`` says that all were one.
    """
    used = math.prod(terms) * math.prod(visit.fn.event_shape)
    data = visit.value.numel()
    meant = data == 1 and not _stray(visit, terms) and used == math.prod(terms)
    if used <= data or meant:
        return None
    shape = (*terms, *visit.fn.event_shape)
    return Problem(
        f"{_told(visit)}: they broadcast to {shape}, and data count more than once",
        f"{_SQUEEZE}; .expand() the data where each number was observed that often",
    )


def _wide_problem(visit: Visit, terms: Shape, shape: Sequence[int]) -> Problem | None:
    """Whether a site in plates has dims left of all of them, as Pyro's `check_site_shape` asks."""
    outermost = min((int(frame.dim or 0) for frame in visit.frames), default=0)
    if not outermost or all(dim >= outermost for dim in _stray(visit, terms)):
        return None
    kind = "data" if visit.kind == "observed" else "latents"
    return Problem(
        f"site {visit.name!r} ({_plates(visit)}) has {kind} of shape {tuple(shape)}, with batch dims "
        "that its plates do not make",
        f"{_SQUEEZE}; or put a pyro.plate around those that are independent",
    )


_SQUEEZE = (
    "give data, predictors and plates one shape: y.squeeze(-1) or x.squeeze(-1) for what has a last "
    "dim of size 1, .to_event(1) for dims of one observation"
)


def _told(visit: Visit) -> str:
    data, own = tuple(visit.value.shape), tuple(visit.fn.shape())
    return (
        f"site {visit.name!r} ({_plates(visit)}) has data of shape {data} for a distribution of shape "
        f"{own}"
    )


def _plates(visit: Visit) -> str:
    return ", ".join(f"{f.name!r} of size {f.size}" for f in visit.frames) or "no plate"


def unvalidated(fn: Any) -> Any:
    """A copy of a distribution that checks no value; what was expanded while checks were on does."""
    fn = copy.copy(fn)
    # First: an Independent hands the switch on to its base, which would be the original's.
    if isinstance(fn, TorchDistributionMixin) and hasattr(fn, "base_dist"):
        fn.base_dist = unvalidated(fn.base_dist)
    fn._validate_args = False
    return fn
