"""How much computing a function of tensors is, counted and not timed: the same on every run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class _Counter(TorchDispatchMode):
    """Adds up the numbers that operations put out."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise torch imports its compiler, which takes a second or two.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = tree_flatten(out)[0]
        self.numbers += sum(leaf.numel() for leaf in leaves if isinstance(leaf, Tensor))
        return out


def work_of(function: Callable[[], Any]) -> int:
    """Numbers that a call puts out in all its operations, a gradient's included.

    About a nanosecond each on one core, where there are many in an operation. A decision about how
    much to spend that is based on a clock would not be the same twice.
    """
    with _Counter() as counter:
        function()
    return counter.numbers
