"""Time per step over a while: what the first steps take, and what they take in the long run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Pace:
    """How fast steps went.

    Attributes:
        first: Seconds before the second step: setting up, tracing, capturing, compiling, one step.
        early: Microseconds a step in the first stretches behind it, the median.
        late: The same in the last fifth of the time.
        steps: Steps made.
    """

    first: float
    early: float
    late: float
    steps: int


def pace(
    set_up: Callable[[], Callable[[int], object]], *, seconds: float, stretch: int
) -> dict[str, Any]:
    """Set up, then step for some seconds.

    Args:
        set_up: Makes what makes so many steps.
        seconds: How long to go on.
        stretch: Steps between two looks at the clock; fewer where they take long.

    Returns:
        `Pace`, as a dict.
    """
    started = time.perf_counter()
    advance = set_up()
    advance(1)
    first = time.perf_counter() - started
    begun = time.perf_counter()
    advance(1)
    once = time.perf_counter() - begun
    count = max(1, min(stretch, int(0.05 * seconds / max(once, 1e-9))))
    ends, micros = [], []
    begun = time.perf_counter()
    while not ends or ends[-1] - begun < seconds or len(ends) < 5:
        before = time.perf_counter()
        advance(count)
        ends.append(time.perf_counter())
        micros.append(1e6 * (ends[-1] - before) / count)
    late = [m for m, end in zip(micros, ends, strict=True) if end - begun >= 0.8 * seconds]
    # A fifth of the first second or so: a dozen stretches smooth out the machine's other work.
    return asdict(
        Pace(first, median(micros[:12]), median(late or micros[-1:]), 2 + count * len(ends))
    )
