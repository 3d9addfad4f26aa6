"""How much computing a function of tensors is, counted and not timed: the same on every run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

# What an operation costs beside the numbers that it puts out: 5 to 20 us in an eager run of a model
# (eight schools, a mixture, a Wishart in a loop; torch 2.13, one core).
_OPERATION = 10_000


class Watcher(TorchDispatchMode):
    """A dispatch mode that may be entered without the compiler."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Asked, torch would import all of torch.compile, which takes a second or two.
        return False


class _Counter(Watcher):
    """Adds up operations, the numbers that they put out, views among them, and their bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.numbers = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        for leaf in tree_flatten(out)[0]:
            if isinstance(leaf, Tensor):
                self.numbers += leaf.numel()
                self.bytes += leaf.numel() * leaf.element_size()
        return out


def work_of(function: Callable[[], Any]) -> int:
    """Numbers that a call puts out in all its operations, a gradient's included.

    About a nanosecond each on one core, where there are many in an operation. A decision about how
    much to spend that is based on a clock would not be the same twice.
    """
    with _Counter() as counter:
        function()
    return counter.numbers


def bytes_of(function: Callable[[], Any]) -> int:
    """Bytes that a call puts out in all its operations."""
    with _Counter() as counter:
        function()
    return counter.bytes


def marginal_work(function: Callable[[int], Any]) -> int:
    """What one more point costs, in the unit of `work_of`.

    Args:
        function: Evaluates so many points. What it does once for all of them does not count; what it
            does point by point counts with an operation's own cost.
    """
    found = []
    for points in (1, 3):
        with _Counter() as counter:
            function(points)
        found.append(counter.numbers + _OPERATION * counter.operations)
    return max(1, (found[1] - found[0]) // 2)
