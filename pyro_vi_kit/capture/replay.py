"""Ways to run a graph. Nothing else in the package knows how a replay is executed.

`python` interprets it, at some 4 microseconds an operation; `script` has TorchScript do it, at about 1,
without Python's lock. `native` (a module of its own) is compiled by Inductor, and costs next to nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vi_kit.capture.graph import Graph

Run = Callable[..., Sequence[Tensor]]


def python(graph: Graph) -> Run:
    """One Python statement for each operation; takes no time to make."""
    source, names = graph.source()
    # TorchScript wants to know the module that a function comes from.
    names["__name__"] = __name__
    exec(compile(source, "<captured graph>", "exec"), names)
    return names["replay"]


def script(function: Run, inputs: Sequence[Tensor]) -> Run:
    """A graph in TorchScript's interpreter.

    Args:
        function: The graph as `python` has it.
        inputs: An example of its inputs, noise included.

    Raises:
        RuntimeError: If TorchScript does not take one of its operations.
    """

    class Replay(nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return tuple(function(*tensors))

    with warnings.catch_warnings():
        # Deprecated in favour of torch.compile, whose start costs more than most fits.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(
            Replay().eval(), tuple(inputs), check_trace=False, check_inputs=None
        )
        frozen: Any = torch.jit.freeze(traced)
    for _ in range(2):
        # TorchScript plans in its first two calls.
        frozen(*inputs)
    # Without the hooks that a call of the module looks for.
    return frozen.forward
