"""How many numbers a run makes at once, and a stop before they are more than memory holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyro_vi_kit.core.errors import ModelError

# Of one point where discrete latents hold all their values; of some thousand, as a fit has, 2 GB.
_MOST = 250_000
# Or so many for each number of data and latents: long data are no reason to refuse.
_EACH = 1000


class StatesError(ModelError):
    """Discrete latents have too many joint values to hold at once."""


class Sizes(TorchFunctionMode):
    """Watches a run of a model whose discrete latents are summed out.

    Args:
        numbers: Of data and latents.
        sites: The discrete latents.

    Attributes:
        largest: Of the largest tensor so far.
    """

    def __init__(self, numbers: int, sites: list[str]) -> None:
        super().__init__()
        self._limit = max(_MOST, _EACH * numbers)
        self._sites = sites
        self.largest = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # What tensors of different shapes broadcast to, before it is made.
        shapes = [tuple(value.shape) for value in args if isinstance(value, Tensor)]
        self._note(_broadcast(shapes))
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._note(result.numel())
        return result

    def _note(self, numbers: int) -> None:
        self.largest = max(self.largest, numbers)
        if numbers > self._limit:
            names = ", ".join(self._sites[:5]) + (", ..." if len(self._sites) > 5 else "")
            raise StatesError(
                f"summing out the {len(self._sites)} discrete latent site(s) {names} needs more than "
                f"{self._limit:,} numbers at once, since one site depends on all of them: let each "
                "observation depend on few, put independent sites into a pyro.plate and chains into "
                "pyro.markov"
            )


def _broadcast(shapes: list[tuple[int, ...]]) -> int:
    """Numbers of the shape that these make together; 0 where they make none."""
    if len(shapes) < 2:
        return 0
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    sizes = [{size for size in column if size != 1} for column in zip(*padded, strict=True)]
    if any(len(size) > 1 for size in sizes):
        return 0
    return math.prod(size.pop() for size in sizes if size)
