"""Plates whose rows are in the model's arguments, where no index selects them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_vi_kit.core.errors import ModelError


@dataclass(eq=False)  # a stack of handlers asks which of them it holds
class ArgumentRows(Messenger):
    """Gives plates the sizes that Pyro does not know, and sites in them the scale that follows.

    ``pyro.plate("data")`` has no size: a site in it has as many rows as its distribution or its data
    have there, and one that has a single row is outside of it, as Pyro's broadcasting leaves it. Call it
    inside of the handler that reads the sites.

    Args:
        sizes: N of plates of which the model's arguments hold some rows, by name.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self._found: dict[str, int] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], _Subsample):
            return
        frames = (self._sized(frame, msg) for frame in msg["cond_indep_stack"])
        msg["cond_indep_stack"] = tuple(frame for frame in frames if frame is not None)

    def _sized(self, frame: CondIndepStackFrame, msg: Any) -> CondIndepStackFrame | None:
        """The plate with its sizes; None where the site is outside of it."""
        if frame.dim is not None and frame.size == -1:
            length = _length(msg, frame.dim)
            if length == 1:
                return None
            known = self._found.setdefault(frame.name, length)
            if known != length:
                raise ModelError(
                    f"plate {frame.name!r} has no size of its own, and its sites have {known} and "
                    f"{length} rows (site {msg['name']!r}): give it one, "
                    f"pyro.plate({frame.name!r}, size)"
                )
            frame = frame._replace(size=length, full_size=length)
        total = self.sizes.get(frame.name)
        if total is None or frame.full_size not in (None, frame.size):
            return frame
        msg["scale"] = msg["scale"] * (total / frame.size)
        return frame._replace(full_size=total)


def _length(msg: Any, dim: int) -> int:
    """How many rows a site has along a batch dim."""
    shapes = [tuple(msg["fn"].batch_shape)]
    value = msg["value"]
    if msg["is_observed"] and isinstance(value, Tensor):
        shapes.append(tuple(value.shape[: value.dim() - msg["fn"].event_dim]))
    return max((shape[dim] for shape in shapes if len(shape) >= -dim), default=1)


def misfits(visits: Mapping[str, Any], declared: Mapping[str, int]) -> bool:
    """Whether data are as long as the subsample that their plate declares, and the plate is not."""
    for visit in visits.values():
        if visit.kind != "observed" or not isinstance(visit.value, Tensor):
            continue
        shape = visit.value.shape[: visit.value.dim() - visit.fn.event_dim]
        for frame in visit.frames:
            length = shape[frame.dim] if len(shape) >= -frame.dim else 1
            if length == declared.get(frame.name) != frame.size:
                return True
    return False


def rows_among(
    data: Sequence[Tensor], sizes: Mapping[str, int], index: Mapping[str, Tensor]
) -> list[Tensor]:
    """The data, of each tensor as long as a plate the rows of its minibatch alone.

    Args:
        data: Tensors among a model's arguments.
        sizes: N by plate, no two alike.
        index: Rows `[B]` by plate.
    """
    rows = {size: index[name] for name, size in sizes.items()}
    return [
        tensor.index_select(0, rows[len(tensor)])
        if tensor.dim() and len(tensor) in rows
        else tensor
        for tensor in data
    ]
