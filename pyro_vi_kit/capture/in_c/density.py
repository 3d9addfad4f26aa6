"""What a sampler written in another language calls: a log density and its gradient at one point.

The two functions have the C signatures of PyMC's models in nutpie (`nutpie/compile_pymc.py`). Both are
given the address of a `State`, which counts what they do and can tell them to stop.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

ENTRIES = ("log_density", "keep_draw")
_TEXT = """
struct state { const void *const *tensors; int64_t evaluations, draws, stopped; };

/* 0: done. 1: the density or its gradient is not finite here, or an index computed from the point is out
   of range, and both are NaN. -1: a point of another length. -2: there is no memory. */
int64_t log_density(uint64_t dim, const double *x, double *gradient, double *value, void *given) {
  struct state *state = given;
  if (dim != %(dim)d) return -1;
  if (__atomic_load_n(&state->stopped, __ATOMIC_RELAXED)) {
    *value = 0;
    for (int d = 0; d < %(dim)d; d++) { *value -= x[d] * x[d] / 2; gradient[d] = -x[d]; }
    return 0;
  }
  __atomic_fetch_add(&state->evaluations, 1, __ATOMIC_RELAXED);
  const void *tensors[%(count)d];
  void *results[] = {value, gradient};
  memcpy(tensors, state->tensors, sizeof tensors);
  tensors[0] = x;
  int64_t status = run(tensors, results);
  if (status < 0) return -2;
  if (status) {
    *value = NAN;
    for (int d = 0; d < %(dim)d; d++) gradient[d] = NAN;
    return 1;
  }
  int finite = isfinite(*value);
  for (int d = 0; d < %(dim)d; d++) finite &= isfinite(gradient[d]);
  return finite ? 0 : 1;
}

int64_t keep_draw(uint64_t dim, uint64_t length, const double *x, double *draw, void *given) {
  struct state *state = given;
  if (dim != %(dim)d || length != dim) return -1;
  memcpy(draw, x, dim * sizeof(double));
  __atomic_fetch_add(&state->draws, 1, __ATOMIC_RELAXED);
  return 0;
}
"""


class Compiled(Protocol):
    """A library of compiled C, `library.CFunction`."""

    def arguments(self, held: Sequence[Tensor]) -> Any:
        """Pointers to what the function takes, a place for the point in front."""
        ...

    def address(self, name: str) -> int:
        """Where one of its functions lies."""
        ...


class State(ctypes.Structure):
    """What the functions share, in memory that must outlive their last call.

    Attributes:
        tensors: Pointers to all that the density reads; the first is left to the functions.
        evaluations: Points evaluated so far.
        draws: Draws kept so far.
        stopped: Whether every point is to be answered at once, as by a standard normal.
    """

    _fields_ = (
        ("tensors", ctypes.c_void_p),
        ("evaluations", ctypes.c_int64),
        ("draws", ctypes.c_int64),
        ("stopped", ctypes.c_int64),
    )


class CDensity:
    """A log density and its gradient at one point, in C, with all that it reads.

    Args:
        function: A graph of the form that `entry` knows.
        held: Its inputs behind the point, contiguous.

    Raises:
        AttributeError: If the graph is of another form.
    """

    def __init__(self, function: Compiled, held: Sequence[Tensor]) -> None:
        self.function, self._held = function, list(held)
        self._tensors = function.arguments(self._held)
        self.state = State(ctypes.addressof(self._tensors), 0, 0, 0)
        self.state_address = ctypes.addressof(self.state)
        self.log_density, self.keep_draw = map(function.address, ENTRIES)
        prototype = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_uint64, *[ctypes.c_void_p] * 4)
        self._call = prototype(self.log_density)

    @property
    def evaluations(self) -> int:
        """Points evaluated so far, whoever asked."""
        return self.state.evaluations

    @property
    def draws(self) -> int:
        """Draws that a sampler has handed over so far."""
        return self.state.draws

    def stop(self) -> None:
        """Answer at once from now on, as a standard normal would."""
        self.state.stopped = 1

    def stopped(self) -> CDensity:
        """Another, which has been told to stop and counts for itself."""
        other = CDensity(self.function, self._held)
        other.stop()
        return other

    def at(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """Log density in nats and its gradient `[D]` at a float64 point `[D]`, without Python's lock."""
        point = np.ascontiguousarray(point)
        gradient, value = np.empty_like(point), ctypes.c_double()
        status = self._call(
            point.size,
            point.ctypes.data,
            gradient.ctypes.data,
            ctypes.addressof(value),
            self.state_address,
        )
        if status < 0:
            raise RuntimeError(f"a density in C returned {status}")
        return value.value, gradient


def entry(inputs: Sequence[Tensor], results: Sequence[Tensor], count: int) -> str:
    """The functions in C, where a graph is a density at one point; otherwise nothing.

    Args:
        inputs: An example of the graph's inputs.
        results: And of its results.
        count: How many tensors it reads, constants among them.
    """
    if not inputs or len(results) != 2:
        return ""
    point, (value, gradient) = inputs[0], results
    fits = (
        all(tensor.dtype == torch.float64 for tensor in (point, value, gradient))
        and point.dim() == 2
        and value.shape == (1,)
        and point.shape == gradient.shape == (1, point.shape[1])
        and point.shape[1] > 0
    )
    return _TEXT % {"dim": point.shape[1], "count": count} if fits else ""
