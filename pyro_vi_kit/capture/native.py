"""Graphs compiled to machine code by Inductor, in a process of their own.

Compiling takes 10 to 60 seconds and imports all of `torch.compile`, so it runs beside the fit and the
result is swapped in when it is there. What comes out is a shared library, kept on disk: the next
process that captures the same graph loads it in a millisecond.

`PYRO_VI_KIT_COMPILE=off` in the environment turns this off; `PYRO_VI_KIT_CACHE` says where libraries are
kept (``~/.cache/pyro_vi_kit`` by default).
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.capture import cache, turns
from pyro_vi_kit.capture.graph import Graph, computes_indices

_WORKER, _LOWERINGS = (Path(__file__).with_name(name) for name in ("worker.py", "lowerings.py"))
# Beyond this many operations the compiler takes minutes.
MAX_NODES = 3000
# How many threads can be inside a library at once; another waits.
_MODELS = min(8, os.cpu_count() or 1)


def impossible(graph: Graph) -> str:
    """Why a graph cannot be compiled here; empty if it can."""
    if cache.turned_off():
        return "compilation is off (PYRO_VI_KIT_COMPILE)"
    if len(graph.nodes) > MAX_NODES:
        return f"{len(graph.nodes):,} operations are too many to compile (at most {MAX_NODES:,})"
    if any(torch.Tag.nondeterministic_seeded in node.op.tags for node in graph.nodes):
        return "it draws random numbers whose distribution depends on parameters"
    if computes_indices(graph):
        # Its check runs in threads, out of which no exception leads: the process would end.
        return "an index is computed from floating-point numbers, and may be out of range"
    if shutil.which(os.environ.get("CXX", "g++")) is None and shutil.which("clang++") is None:
        return "no C++ compiler was found"
    return ""


class Library:
    """A compiled graph, perhaps still being made.

    Args:
        graph: What to compile; one that is not `impossible`.
        inputs: An example of its inputs, noise included.

    Attributes:
        path: Where the library is, or None.
        problem: Why there will be none, or empty.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Tensor]) -> None:
        # Constants are inputs here: data do not land in the library, and other data give the same one.
        self._constants = list(graph.constants.values())
        self._job = json.dumps(_job(graph, [*inputs, *self._constants]), sort_keys=True)
        self._key = _key(self._job)
        self.path = cache.find(self._key)
        self.problem = ""
        self._worker: subprocess.Popen[bytes] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    @property
    def ready(self) -> bool:
        """Whether the library is on disk."""
        return self.path is not None

    @property
    def at_work(self) -> bool:
        """Whether a compiler is."""
        return self._worker is not None

    def start(self, *, asked: bool = False) -> None:
        """Begin to compile in another process, unless that is done or has failed.

        One compiler is at work on a machine at a time: where another is, nothing happens, and it may be
        tried again.

        Args:
            asked: Whether somebody waits for it; otherwise it is not begun on a machine that is busy.
        """
        if self.ready or self.problem or self.at_work or (not asked and turns.busy()):
            return
        try:
            turn = turns.take()
            if turn is None:
                return
            try:
                self._worker = self._started(turn)
            finally:
                os.close(turn)  # the worker has it, and gives it back by ending
        except OSError as error:
            self.problem = f"the compiler could not be started: {error}"
            return
        atexit.register(self.stop)
        turns.note_started(self)

    def _started(self, turn: int) -> subprocess.Popen[bytes]:
        self._scratch = tempfile.TemporaryDirectory(prefix="pyro_vi_kit_")
        (Path(self._scratch.name) / "job.json").write_text(self._job)
        return subprocess.Popen(
            [sys.executable, str(_WORKER), self._scratch.name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
            pass_fds=(turn,) if os.name == "posix" else (),
            # Of a group of its own: it starts others, which would outlive it.
            start_new_session=True,
        )

    def poll(self) -> bool:
        """Whether the library is there; notes the problem once the compiler has failed."""
        if self._worker is not None and self._worker.poll() is not None:
            made = Path(self._scratch.name) / "made.so" if self._scratch is not None else Path()
            if self._worker.returncode == 0 and made.is_file():
                try:
                    self.path = cache.keep(self._key, made)
                except OSError as error:
                    self.problem = f"the compiled library could not be kept: {error}"
            else:
                self.problem = _said(self._scratch)
            self.stop()
        return self.ready

    def wait(self, seconds: float) -> bool:
        """Have it compiled, for so long at the most; whether the library is there."""
        end = time.monotonic() + seconds
        while not self.poll() and not self.problem and time.monotonic() < end:
            self.start(asked=True)
            time.sleep(0.05)
        return self.ready

    def load(self) -> Any:
        """A function of inputs and noise.

        Raises:
            RuntimeError: If the library does not load here.
        """
        aoti: Any = torch._C._aoti  # pyright: ignore[reportAttributeAccessIssue]
        runner = aoti.AOTIModelContainerRunnerCpu(str(self.path), _MODELS)
        run, constants = runner.run, self._constants

        def replay(*inputs: Tensor) -> Sequence[Tensor]:
            return run([*inputs, *constants])

        return replay

    def discard(self) -> None:
        """Take a library that is of no use off the disk."""
        if self.path is not None:
            cache.discard(self.path)

    def stop(self) -> None:
        """End the compiler if it is still at work, and what it has started."""
        worker, self._worker = self._worker, None
        if worker is not None:
            with contextlib.suppress(OSError):
                os.killpg(worker.pid, signal.SIGKILL) if os.name == "posix" else worker.kill()
            worker.wait()
            atexit.unregister(self.stop)
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None


def _job(graph: Graph, tensors: Sequence[Tensor]) -> dict[str, Any]:
    """What the worker needs to know, as JSON; it imports nothing of this package."""
    flat = Graph(graph.inputs + list(graph.constants), graph.outputs, graph.nodes, {})
    source, names = flat.source()
    return {
        "source": source,
        "names": {name: _spelled(value) for name, value in names.items()},
        "inputs": [
            [list(t.shape), list(t.stride()), str(t.dtype).removeprefix("torch.")] for t in tensors
        ],
        "threads": torch.get_num_threads(),
    }


def _spelled(value: Any) -> list[str]:
    if isinstance(value, torch._ops.OpOverload):
        return ["op", str(value)]
    if isinstance(value, torch.device):
        return ["device", str(value)]
    return ["torch", str(value).removeprefix("torch.")]


def _key(job: str) -> str:
    """Other graphs, shapes, torch versions, processors and ways to compile have other libraries."""
    how = [path.read_text() for path in (_WORKER, _LOWERINGS)]
    capability = torch.backends.cpu.get_cpu_capability()
    parts = (job, *how, torch.__version__, capability, cache.processor())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _said(scratch: tempfile.TemporaryDirectory[str] | None) -> str:
    """The last line of what the compiler said."""
    said = ""
    if scratch is not None:
        with contextlib.suppress(OSError):
            said = (Path(scratch.name) / "error.txt").read_text().strip()
    return f"the compiler failed: {said.splitlines()[-1] if said else 'no reason given'}"
