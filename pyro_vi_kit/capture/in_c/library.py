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
import subprocess
import tempfile
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
_SECONDS = 60.0
# Loops of vectors take up to half the time; to find them takes long in a graph of many loops.
_VECTORS, _PLAIN = "-O3", "-O2"
_MAX_VECTORS = 100


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
        RefusedError: If the graph is not written in C, or there is no compiler that takes it.
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
        except OSError as error:
            self.discard()
            raise RefusedError(f"the compiled library does not load: {error}") from error
        self._replay = self._library.replay
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


def library(text: str, with_compiler: str, level: str) -> Path:
    """The shared library of a source, optimised to a level, made unless it is there.

    Raises:
        RefusedError: If the compiler fails, with what it said.
    """
    path = cache.folder() / f"{_key(text, with_compiler, level)}.so"
    if path.exists():
        with contextlib.suppress(OSError):
            os.utime(path)  # the libraries that go first are those not used for longest
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix="pyro_vi_kit_") as scratch:
            made = Path(scratch) / "made.so"
            command = [with_compiler, level, *FLAGS, "-x", "c", "-", "-o", str(made), "-lm"]
            done = subprocess.run(
                command, input=text, capture_output=True, text=True, timeout=_SECONDS, check=False
            )
            if done.returncode:
                said = done.stderr.strip().splitlines() or ["no reason given"]
                raise RefusedError(f"the C compiler failed: {said[0]}")
            cache.place(made, path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RefusedError(f"the C compiler failed: {error}") from error
    cache.forget_oldest(path.parent)
    return path


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
