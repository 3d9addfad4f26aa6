"""Ways to run a graph. Nothing else in the package knows how a replay is executed.

`python` interprets it, at some 4 microseconds an operation; `script` has TorchScript do it, at about 1,
without Python's lock. `native` (a module of its own) is compiled by Inductor, and costs next to nothing.
`on_cuda` has a GPU launch all of the graph's kernels at once.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.capture.graph import Graph
from pyro_vi_kit.core import work

Run = Callable[..., Sequence[Tensor]]

_WARM_UP = 3


def python(graph: Graph) -> Run:
    """One Python statement for each operation; takes no time to make."""
    source, names = graph.source()
    # TorchScript wants to know the module that a function comes from.
    names["__name__"] = __name__
    exec(compile(source, "<captured graph>", "exec"), names)
    return names["replay"]


def bytes_of(function: Run, inputs: Sequence[Tensor]) -> int:
    """Bytes of all that a graph computes on its way, as `python` has it: found by running it once.

    Args:
        function: The graph.
        inputs: An example of its inputs, noise included.
    """
    with torch.no_grad():
        return work.bytes_of(lambda: function(*inputs))


def script(function: Run, inputs: Sequence[Tensor]) -> Run:
    """A graph in TorchScript's interpreter.

    Args:
        function: The graph as `python` has it.
        inputs: An example of its inputs, noise included.

    Raises:
        RuntimeError: If TorchScript does not take one of its operations.
    """
    with warnings.catch_warnings():
        # TorchScript is deprecated in favour of torch.compile, whose start costs more than most fits.
        warnings.simplefilter("ignore")
        scripted = _unshared(lambda *tensors: tuple(function(*tensors)), tuple(inputs))
    for _ in range(2):
        # TorchScript plans in its first two calls.
        scripted(*inputs)
    return scripted


def _unshared(function: Run, inputs: tuple[Tensor, ...]) -> Run:
    """What `torch.jit.trace` makes of a function, in memory that goes with it.

    What `trace` itself makes is held by a register of the process for good: 4 MB for a graph of 340
    operations, 370 MB in 50 fits of a flow.
    """
    compiler: Any = torch._C
    graph, _ = compiler._create_graph_by_tracing(function, inputs, lambda tensor: "", False, False)
    return compiler._create_function_from_graph("replay", graph)


def on_cuda(function: Run, inputs: Sequence[Tensor]) -> Run:
    """A graph as a CUDA graph: one launch for all of its kernels.

    Inputs are copied into memory of the graph's own, and results out of it. Noise is among the inputs,
    so that it follows the random state that it is drawn from.

    Args:
        function: The graph as `python` has it.
        inputs: An example of its inputs, noise included, all on one CUDA device.

    Raises:
        RuntimeError: If one of its operations cannot be part of a CUDA graph, since it waits for the
            device or takes memory of the host.
    """
    device = inputs[0].device
    static = [tensor.detach().clone() for tensor in inputs]
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.device(device), torch.no_grad():
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            # Libraries plan and take their workspaces in the first calls, which no recording may.
            for _ in range(_WARM_UP):
                function(*static)
        torch.cuda.current_stream(device).wait_stream(side)
        # Other threads may use the device meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            results = function(*static)
    lock = threading.Lock()

    def replay(*tensors: Tensor) -> Sequence[Tensor]:
        with lock, torch.cuda.device(device), torch.no_grad():
            for own, given in zip(static, tensors, strict=True):
                own.copy_(given, non_blocking=True)
            graph.replay()
            return tuple(result.clone() for result in results)

    return replay
