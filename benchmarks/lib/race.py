"""A race of stochastic steps to a target: how long until the guide is there for the first time.

The clock runs while steps are made, and stands still while somebody looks how good the guide is: the
peer is told for free when to stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from benchmarks.lib.oracle import Oracle

# Looks are this fraction of the steps so far apart, so that times are that precise.
_APART = 0.02


@dataclass(frozen=True)
class Finish:
    """How a race ended.

    Attributes:
        reached: Whether the guide came within the margin before the cap.
        seconds: Time on the clock then.
        setup: How much of it went by before the second step: starting, tracing, compiling.
        steps: Steps made.
        elbo: The last ELBO looked up, nats.
        best: The best one, nats.
    """

    reached: bool
    seconds: float
    setup: float
    steps: int
    elbo: float
    best: float


def run(
    advance: Callable[[int], None],
    read: Callable[[], tuple[Tensor, Tensor]],
    oracle: Oracle,
    target: float,
    *,
    cap: float,
    least: int,
    head_start: float,
) -> dict[str, Any]:
    """Make steps until the ELBO is at least ``target``, or the cap is over.

    Args:
        advance: Makes so many steps.
        read: Mean `[D]` and Cholesky factor `[D, D]` of the guide now.
        oracle: Looks up the ELBO.
        target: Nats.
        cap: Seconds on the clock.
        least: The fewest steps between two looks.
        head_start: Seconds on the clock already, from setting up.

    Returns:
        `Finish`, as a dict.
    """
    seconds, steps, best = head_start, 0, float("-inf")
    while True:
        count = max(least, int(steps * _APART))
        started = time.perf_counter()
        advance(count)
        seconds += time.perf_counter() - started
        steps += count
        elbo = oracle.look(*read(), target)
        best = max(best, elbo)
        if elbo >= target or seconds >= cap:
            return asdict(Finish(elbo >= target, seconds, head_start, steps, elbo, best))
