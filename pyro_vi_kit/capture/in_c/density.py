"""What a sampler written in another language calls: a log density and its gradient at one point.

The two functions have the C signatures of PyMC's models in nutpie (`nutpie/compile_pymc.py`). Both are
given the address of a `State`, which counts what they do and can tell them to stop.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

_TEXT = """
struct state { const void *const *tensors; int64_t evaluations, draws, stopped; };

/* 0: done. 1: the density or its gradient is not finite here. -1: a point of another length. */
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
  if (run(tensors, results)) return -2;
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
