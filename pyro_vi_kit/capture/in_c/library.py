"""Compile a function in C, keep the library on disk, and call it.

The system's compiler takes some tenths of a second, where Inductor takes ten to sixty, so whoever has
enough to do waits for it. Libraries lie where Inductor's do, and go as they do.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.capture import cache
from pyro_vi_kit.capture.graph import Graph
from pyro_vi_kit.capture.in_c.expressions import RefusedError
from pyro_vi_kit.capture.in_c.source import Source, source_of

# Without -ffast-math: NaN and infinities mean something here.
FLAGS = ("-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-w")
# What a compiler is given: 0.15 s and some milliseconds a line are usual, on a machine that is not busy.
_SECONDS, _SECONDS_A_LINE, _MOST_SECONDS = 15.0, 0.01, 60.0
# Loops of vectors take up to half the time; to find them takes long in a graph of many loops.
_VECTORS, _PLAIN = "-O3", "-O2"
_MAX_VECTORS = 100

# Compilers that did not end, and what was said of them: not waited for again by this process.
_hang: dict[str, str] = {}


def compiler() -> str | None:
    """The path of the C compiler that would be used."""
    for name in (os.environ.get("CC"), "cc", "gcc", "clang"):
        if name and (found := shutil.which(name)):
            return found
    return None


class CFunction:
    """A graph in C: called like the graph, with tensors.

    Args:
        graph: The recording.
        inputs: An example of its inputs, noise included.

    Attributes:
        path: Where the library lies.

    Raises:
        RefusedError: If the graph is not written in C, or there is no compiler that takes it, or what it
            makes is no library.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Tensor]) -> None:
        if cache.turned_off():
            raise RefusedError("compilation is off (PYRO_VI_KIT_COMPILE)")
        found = compiler()
        if found is None:
            raise RefusedError("no C compiler was found")
        self._source: Source = source_of(graph, inputs)
        self._constants = list(graph.constants.values())
        self._behind = [_start(constant) for constant in self._constants]
        level = _VECTORS if len(graph.nodes) <= _MAX_VECTORS else _PLAIN
        self.path = library(self._source.text, found, level)
        try:
            self._library = ctypes.CDLL(str(self.path))
            weakref.finalize(self, _unload, self._library._handle)
            self._replay = self._library.replay
            for name in self._source.entries:
                self.address(name)
        except (OSError, AttributeError) as error:
            self.discard()
            raise RefusedError(f"the compiled library does not load: {error}") from error
        self._replay.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
        self._replay.restype = ctypes.c_int64
        self._count = len(graph.inputs) + len(self._constants)

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The results; Python's lock is free meanwhile.

        Raises:
            IndexError: If an index is out of range, as in torch.
            RuntimeError: If there is no memory.
        """
        lying = [tensor.contiguous() for tensor in inputs]
        tensors = (ctypes.c_void_p * self._count)(*(t.data_ptr() for t in lying), *self._behind)
        results = [
            torch.empty_strided(shape, stride, dtype=dtype)
            for shape, stride, dtype in self._source.results
        ]
        places = (ctypes.c_void_p * len(results))(*(result.data_ptr() for result in results))
        status = self._replay(tensors, places)
        if status < 0:
            raise RuntimeError("no memory for a replay in C")
        if status:
            raise IndexError("index out of range in compiled C")
        return results

    def discard(self) -> None:
        """Take the library off the disk, where it is of no use."""
        cache.discard(self.path)

    def address(self, name: str) -> int:
        """Where a function of the library lies.

        Raises:
            AttributeError: If it has none of that name.
        """
        return ctypes.cast(getattr(self._library, name), ctypes.c_void_p).value or 0

    def arguments(self, held: Sequence[Tensor]) -> Any:
        """Pointers to all that the function reads but its first input, which is left empty.

        Args:
            held: Its other inputs, contiguous; they have to outlive the array.
        """
        behind = [tensor.data_ptr() for tensor in held]
        return (ctypes.c_void_p * self._count)(None, *behind, *self._behind)


def _unload(handle: int) -> None:
    """Give a library's memory back: Python keeps all that it has loaded."""
    import _ctypes

    close = getattr(_ctypes, "dlclose", None)  # not on Windows
    if close is not None:
        close(handle)


def library(text: str, with_compiler: str, level: str) -> Path:
    """The shared library of a source, optimised to a level, made unless it is there.

    Raises:
        RefusedError: If the compiler fails, with what it said.
    """
    try:
        key = _key(text, with_compiler, level)
        kept = cache.find(key)
        if kept is not None:
            return kept
        with tempfile.TemporaryDirectory(prefix="pyro_vi_kit_") as scratch:
            made = Path(scratch) / "made.so"
            _compile(text, [with_compiler, level, *FLAGS, "-x", "c", "-", "-o", str(made), "-lm"])
            if not made.is_file() or not made.stat().st_size:
                raise RefusedError("the C compiler made no library")
            return cache.keep(key, made)
    except OSError as error:
        raise RefusedError(f"the C compiler failed: {error}") from error


def _compile(text: str, command: Sequence[str]) -> None:
    """Have a source compiled, by a process that ends with what it starts, and in time."""
    if command[0] in _hang:
        raise RefusedError(_hang[command[0]])
    seconds = min(_SECONDS + _SECONDS_A_LINE * text.count("\n"), _MOST_SECONDS)
    # A group of its own: compilers start others, which outlive them.
    worker = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        _, said = worker.communicate(text.encode(), timeout=seconds)
    except subprocess.TimeoutExpired as error:
        _hang[command[0]] = f"the C compiler {command[0]} had not ended after {seconds:.0f} s"
        raise RefusedError(_hang[command[0]]) from error
    finally:
        _end(worker)
    if worker.returncode:
        # Compilers speak the user's language, in whatever encoding.
        lines = said.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise RefusedError(f"the C compiler failed: {lines[0]}")


def _end(worker: subprocess.Popen[bytes]) -> None:
    """End a compiler that is still at work, and all that it started."""
    if worker.poll() is None:
        with contextlib.suppress(OSError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    for pipe in (worker.stdin, worker.stderr):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _start(tensor: Tensor) -> int:
    """Where a tensor's memory begins: constants may be looks at one another."""
    return tensor.untyped_storage().data_ptr()


def _key(text: str, with_compiler: str, level: str) -> str:
    """Other sources, compilers and processors have other libraries."""
    real = Path(with_compiler).resolve()
    stamp = real.stat()
    made_by = (str(real), str(stamp.st_mtime_ns), str(stamp.st_size), level, *FLAGS)
    parts = (text, *made_by, cache.processor())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
