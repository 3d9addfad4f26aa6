"""From the posterior of some rows to that of all: Newton's method in the metric of the former."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian

# Passes over all data that bring the mean of a Gaussian from the sample's to that of all data.
_PASSES = 6


def moved(
    gaussian: Gaussian, evaluate: Callable[[Tensor], tuple[float, Tensor] | None], tolerance: float
) -> Gaussian:
    """A Gaussian fitted to M of N rows, moved to the mode of all of them.

    The sample's mode is sqrt(N / M) posterior sds away. Each pass leaves about sqrt(D / M) of what was
    missing. A step after which the density is lower is taken back, and ends it.

    Args:
        gaussian: From M rows.
        evaluate: The log density of all data at `[D]`, nats, and its gradient; None once time ran out.
        tolerance: Nats that may be missing.
    """
    best, value = gaussian, -torch.inf
    at = gaussian.loc
    for _ in range(_PASSES):
        found = evaluate(at)
        if found is None or not found[0] > value:
            break
        value, gradient = found
        best = Gaussian(at, gaussian.scale_tril)
        pulled = gaussian.scale_tril.T @ gradient
        at = at + gaussian.scale_tril @ pulled
        if 0.5 * float(pulled @ pulled) <= tolerance:
            # So short a step needs no pass to see that it was right.
            return Gaussian(at, gaussian.scale_tril)
    return best
