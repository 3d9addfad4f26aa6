"""Capture a function, check the recording against it, and replay it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from pyro_vi_kit.capture import replay
from pyro_vi_kit.capture.graph import Graph, computes_indices
from pyro_vi_kit.capture.hoist import hoisted
from pyro_vi_kit.capture.in_c import CFunction, RefusedError
from pyro_vi_kit.capture.native import Library, impossible
from pyro_vi_kit.capture.recorder import CaptureError, record
from pyro_vi_kit.core.errors import first_line
from pyro_vi_kit.core.runtime import LOCK, RandomStream

# TorchScript's set-up grows faster than the graph: 7,000 operations take 5 seconds.
_MAX_SCRIPT = 4000
# While it is set up TorchScript holds all results at once, three times what Python does. Where tensors
# are that large, Python's time does not count.
_MAX_SCRIPT_BYTES = 2**26
# Seconds of replay after which a compiler is started: as long again is likely to follow, and it takes
# no time of the fit's own.
_PATIENCE = 5.0
_BETWEEN_LOOKS = 0.2
# Seconds of replay to come for which a compiler is started at once, where it is known how many.
_WORTHWHILE = 8.0
_SAMPLE = 5
# Seconds that an operation takes in TorchScript; that the C compiler takes for it, and at the least.
_SCRIPT_SECONDS = 1e-6
_C_SECONDS, _C_LEAST = 2e-3, 0.15

Function = Callable[..., Sequence[Tensor]]


class Program:
    """A captured function, for inputs of the shapes that it was captured on.

    It begins in TorchScript. Once it has run for five seconds it has itself compiled, beside what goes
    on, where the machine has time for that (`turns`), and is faster when that is done; a graph that was
    compiled before is compiled from the start. On a GPU it is a CUDA graph instead, and is not compiled.
    Who has many calls to come may have it written in C, which takes some tenths of a second and is for
    small work.

    Args:
        graph: The recording.
        inputs: An example of its inputs, noise included.
        compiles: Whether it may be compiled.

    Attributes:
        graph: The recording.
        how: ``c``, ``native``, ``cuda``, ``script`` or ``python``: what replays it now.
        note: Why it is not compiled, where it cannot be.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Tensor], *, compiles: bool = True) -> None:
        self.graph = graph
        self._lock = threading.Lock()
        self._spent, self._next_look = 0.0, _PATIENCE
        self._run: replay.Run = replay.python(graph)
        self.how = "python"
        self._library: Library | None = None
        self._compiles = compiles
        self._function: CFunction | None = None
        where = _elsewhere(inputs)
        if where is not None:
            compiles, self.note = False, self._launch_at_once(where, inputs)
        else:
            self.note = impossible(graph) if compiles else ""
        if compiles and not self.note and not _mixed(graph):
            self._library = Library(graph, inputs)
            self._adopt(inputs)
        # TorchScript leaves out casts to half precision and back, and so rounds differently.
        if self.how == "python" and len(graph.nodes) <= _MAX_SCRIPT and not _mixed(graph):
            try:
                if replay.bytes_of(self._run, inputs) <= _MAX_SCRIPT_BYTES:
                    self._run, self.how = replay.script(self._run, inputs), "script"
            except RuntimeError as error:  # an operation that TorchScript does not know
                reasons = [self.note, f"no TorchScript: {first_line(error)}"]
                self.note = "; ".join(reason for reason in reasons if reason)

    def _launch_at_once(self, where: torch.device, inputs: Sequence[Tensor]) -> str:
        """Make it a CUDA graph; why it is none, where that is not possible."""
        if where.type != "cuda" or any(tensor.device != where for tensor in inputs):
            return f"only what is on one CUDA device becomes a CUDA graph, and this is on {where}"
        if computes_indices(self.graph):
            # A replay that fails on the device takes all that is there with it.
            return "no CUDA graph: an index is computed from floating-point numbers"
        try:
            self._run, self.how = replay.on_cuda(self._run, inputs), "cuda"
        except RuntimeError as error:
            return f"no CUDA graph: {first_line(error)}"
        return ""

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        """The function's results; noise is drawn from torch's global random state."""
        everything = [*inputs, *self.graph.draw_noise()] if self.graph.noise else inputs
        if self._library is None:
            return self._run(*everything)
        began = time.perf_counter()
        results = self._run(*everything)
        if self._library is not None:
            self._spent += time.perf_counter() - began
            if self._spent > self._next_look:
                self._look(everything)
        return results

    def expect(self, calls: int, inputs: Sequence[Tensor]) -> bool:
        """Start the compiler now if so many calls take as long as it does; else do without.

        Returns:
            Whether the compiler is at work.
        """
        if self._library is None:
            return False
        everything = [*inputs, *self.graph.draw_noise()]
        began = time.perf_counter()
        for _ in range(_SAMPLE):
            self._run(*everything)
        each = (time.perf_counter() - began) / _SAMPLE
        if calls * each < _WORTHWHILE:
            self._library, self.note = None, "too short a run to compile"
            return False
        self._library.start()
        self._next_look = 0.0
        return self._library.at_work

    def worth_c(self, calls: int) -> bool:
        """Whether so many calls take longer than it takes to compile C.

        A count of operations says so, and no clock: who samples twice does so by the same means.
        """
        size = len(self.graph.nodes)
        return calls * size * _SCRIPT_SECONDS > 2 * (_C_LEAST + size * _C_SECONDS)

    def to_c(self, checks: Sequence[Sequence[Tensor]]) -> CFunction | None:
        """Have it written in C and compiled, wait for that, and replay it so from now on.

        Args:
            checks: Inputs at which the results in C are compared with those of now; the first are an
                example of all inputs to come.

        Returns:
            It in C; None where it is replayed as before, and then ``note`` says why.
        """
        if self._function is not None or not self._compiles:
            return self._function
        points = [[*inputs, *self.graph.draw_noise()] for inputs in checks]
        try:
            function = CFunction(self.graph, points[0])
            for inputs in points:
                pairs = zip(self._run(*inputs), function(*inputs), strict=True)
                if not all(same(a, b) for a, b in pairs):
                    function.discard()
                    raise RefusedError("it computes something else")
        except (RefusedError, IndexError, RuntimeError) as error:
            reasons = [self.note, f"not in C: {first_line(error)}"]
            self.note = "; ".join(reason for reason in reasons if reason)
            return None
        self._run, self.how, self._function = function, "c", function
        self._library, self.note = None, ""
        return function

    def compile(self, inputs: Sequence[Tensor], seconds: float = 600.0) -> bool:
        """Have it compiled now and wait for that; whether it is.

        Args:
            inputs: An example of its inputs.
            seconds: How long to wait at the most.
        """
        if self._library is not None:
            self._library.wait(seconds)
            self._adopt([*inputs, *self.graph.draw_noise()])
        return self.how == "native"

    def stop(self) -> None:
        """Have no compiler at work any more."""
        if self._library is not None:
            self._library.stop()

    def _look(self, inputs: Sequence[Tensor]) -> None:
        """Start the compiler, or see how far it is; one thread at a time."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            self._next_look = self._spent + _BETWEEN_LOOKS
            if self._library is not None:
                self._library.start()
                self._adopt(inputs)
        finally:
            self._lock.release()

    def _adopt(self, inputs: Sequence[Tensor]) -> None:
        """Replay by the compiled library from now on, if it is there and computes the same."""
        library = self._library
        if library is None or not (library.poll() or library.problem):
            return
        self._library = None
        if library.problem:
            self.note = library.problem
            return
        try:
            run = library.load()
            pairs = zip(self._run(*inputs), run(*inputs), strict=True)
            if all(same(a, b) for a, b in pairs):
                self._run, self.how = run, "native"
                return
            self.note = "the compiled graph computes something else"
        except RuntimeError as error:
            self.note = f"the compiled graph does not run: {first_line(error)}"
        library.discard()


def _elsewhere(inputs: Sequence[Tensor]) -> torch.device | None:
    """The device that these are on, where that is not the CPU."""
    return next((tensor.device for tensor in inputs if tensor.device.type != "cpu"), None)


def _mixed(graph: Graph) -> bool:
    """Whether it casts to half precision."""
    half = (torch.bfloat16, torch.float16)
    return any(value in half for node in graph.nodes for value in node.kwargs.values())


def capture(
    function: Function,
    inputs: Sequence[Tensor],
    checks: Iterable[Sequence[Tensor]],
    *,
    compiles: bool = True,
) -> Program:
    """Record ``function(*inputs)``, and replay it on other inputs to see that it is the same.

    Args:
        function: From tensors to a sequence of tensors. Results are compared, not gradients: a
            function of interest has its gradient among its results.
        inputs: What to record on; contiguous tensors, none of which shares memory with another.
        checks: Other inputs of the same shapes. Each also has other noise.
        compiles: Whether the program may be compiled, now or later.

    Raises:
        CaptureError: If the function cannot be recorded, or a replay differs.
    """
    return _captured(function, inputs, (), checks, compiles)[0]


def capture_holding(
    function: Function,
    inputs: Sequence[Tensor],
    held: Sequence[Tensor],
    checks: Iterable[Sequence[Tensor]],
    *,
    compiles: bool = True,
) -> tuple[Program, list[Tensor]]:
    """Capture ``function(*inputs, *held)`` with ``held`` as inputs, or as constants if it must be.

    Python may look at data (a mask, a number of rows) where it does not look at latents. What depends on
    held tensors alone is computed here, once.

    Args:
        function: As for `capture`.
        inputs: What changes from call to call.
        held: What does not: data, learned parameters.
        checks: Other values of ``inputs``.
        compiles: As for `capture`.

    Returns:
        The program, and what it takes behind its inputs: what it reads of ``held`` and of what was
        computed from them, or nothing.

    Raises:
        CaptureError: As for `capture`.
    """
    held, checks = list(held), list(checks)
    try:
        return _captured(function, inputs, held, checks, compiles)
    except CaptureError:
        if not held:
            raise
    return capture(lambda *points: function(*points, *held), inputs, checks, compiles=compiles), []


def _captured(
    function: Function,
    inputs: Sequence[Tensor],
    held: Sequence[Tensor],
    checks: Iterable[Sequence[Tensor]],
    compiles: bool,
) -> tuple[Program, list[Tensor]]:
    """See `capture_holding`; ``held`` are inputs."""
    with LOCK, torch.enable_grad():
        with RandomStream(0):
            graph = record(function, [*inputs, *held])
        graph, rest = hoisted(graph, len(inputs), held)
        with RandomStream(0), torch.no_grad():
            program = Program(graph, [*inputs, *rest, *graph.draw_noise()], compiles=compiles)
        for seed, other in enumerate(checks, start=1):
            with RandomStream(seed):
                expected = function(*other, *held)
            with RandomStream(seed), torch.no_grad():
                found = program(*other, *rest)
            _require_same(expected, found)
    return program, rest


def _require_same(expected: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    for a, b in zip(expected, found, strict=True):
        if not same(a, b):
            raise CaptureError(
                "a replay of the recording differs from the model: it holds a value that Python "
                "computed from latents (NumPy, torch.tensor([latent]), a branch)"
            )


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two results are equal up to rounding, NaN where the other is NaN."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    tolerance = 1e-8 if a.dtype == torch.float64 else 1e-3
    if not a.is_floating_point():
        return bool((a == b).all())
    size = float(a.detach().abs().nan_to_num(0.0, 0.0, 0.0).amax()) if a.numel() else 0.0
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * (1.0 + size), equal_nan=True)
