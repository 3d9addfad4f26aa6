"""Deterministic minimisation of a torch function by SciPy's L-BFGS-B."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Minimum:
    """Where a minimisation stopped: the best point it met.

    Attributes:
        x: The point, `[P]`.
        value: The function there.
        slope: Norm of its gradient there.
        evaluations: Calls of the function, each with its gradient.
        converged: Whether the optimiser says so.
        stopped: ``""``, ``"budget"`` or ``"interrupted"``.
        message: The optimiser's own words.
    """

    x: Tensor
    value: float
    slope: float
    evaluations: int
    converged: bool
    stopped: str
    message: str


class _OutOfTimeError(Exception):
    pass


def minimise(
    function: Objective,
    start: Tensor,
    *,
    max_iterations: int = 1000,
    gradient_tolerance: float = 1e-5,
    deadline: float | None = None,
    on_value: Callable[[float], None] | None = None,
) -> Minimum:
    """Minimise from ``start`` with L-BFGS (Byrd et al. 1995), never losing the best point.

    Points where the function or its gradient is not finite count as high ground, so that the line
    search turns back.

    Args:
        function: From `[P]` to a scalar, differentiable.
        start: `[P]`.
        max_iterations: The most iterations.
        gradient_tolerance: Largest gradient entry at which to stop.
        deadline: `time.monotonic` second at which to stop.
        on_value: Called with each finite value.
    """
    best_x, best_value, slope, evaluations = start.detach().clone(), float("inf"), 0.0, 0

    def value_and_gradient(x: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal best_x, best_value, slope, evaluations
        if deadline is not None and time.monotonic() > deadline and np.isfinite(best_value):
            raise _OutOfTimeError
        point = torch.as_tensor(x.copy(), dtype=start.dtype).requires_grad_()
        loss = function(point)
        (gradient,) = torch.autograd.grad(loss, point)
        evaluations += 1
        value = float(loss.detach())
        if not np.isfinite(value) or not bool(torch.isfinite(gradient).all()):
            # Above all that was seen, yet on its scale: an infinite value would shrink the next
            # step to nothing.
            high = 10.0 * abs(best_value) + 1e3 if np.isfinite(best_value) else 1e10
            return high, np.zeros_like(x)
        if value < best_value:
            best_x, best_value = point.detach().clone(), value
            slope = float(gradient.norm())
        if on_value is not None:
            on_value(value)
        return value, gradient.numpy()

    converged, stopped, message = False, "", ""
    try:
        result = optimize.minimize(
            value_and_gradient,
            start.detach().numpy(),
            jac=True,
            method="L-BFGS-B",
            options={
                "maxiter": max_iterations,
                "maxfun": 3 * max_iterations,
                "maxcor": 20,
                "gtol": gradient_tolerance,
                "ftol": 1e-12,
            },
        )
        converged, message = bool(result.success), str(result.message)
    except _OutOfTimeError:
        stopped = "budget"
    except KeyboardInterrupt:
        stopped = "interrupted"
    return Minimum(best_x, best_value, slope, evaluations, converged, stopped, message)
