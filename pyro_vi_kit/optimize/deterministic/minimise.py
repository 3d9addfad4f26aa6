"""Limited-memory BFGS that asks for one evaluation at a time, so that several searches share a batch.

Nocedal & Wright 2006, algorithms 7.4 and 7.5, with a line search that brackets a weak Wolfe point
(Lewis & Overton 2013). It stops by what is left to gain, in units of the function, which for a log
density is nats whatever the units of its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pyro_vi_kit.optimize.result import Budget, stopped_by

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From points `[M, P]` to values `[M]` and gradients `[M, P]`, both detached."""

_ARMIJO, _WOLFE = 1e-4, 0.9
_MAX_TRIES = 25
_MEMORY = 30
# Once could be chance: the inverse Hessian of the first iterations is a guess.
_QUIET = 2


@dataclass(frozen=True)
class Minimum:
    """Where a minimisation stopped: the best point it met.

    Attributes:
        x: The point, `[P]`.
        value: The function there; infinite if it was finite nowhere.
        gradient: The function's gradient there, `[P]`.
        path: The point after each step, the start first, `[T, P]`.
        evaluations: Values with their gradients.
        converged: Whether less than the tolerance was left to gain.
        stopped: ``""``, ``"budget"``, ``"interrupted"`` or ``"failed"``.
        message: How it ended, in words.
        error: What was raised, where it was interrupted or failed.
    """

    x: Tensor
    value: float
    gradient: Tensor
    path: Tensor
    evaluations: int
    converged: bool
    stopped: str
    message: str
    error: BaseException | None = None


@dataclass
class _State:
    """A search under way: the best point so far and how it ended."""

    x: np.ndarray
    value: float
    gradient: np.ndarray
    path: list[np.ndarray] = field(default_factory=list)
    evaluations: int = 0
    converged: bool = False
    message: str = "given up"

    @classmethod
    def at(cls, start: Tensor) -> _State:
        """A search that begins at `[P]`."""
        x = start.detach().double().cpu().numpy()
        return cls(x, math.inf, np.zeros(len(x)))


_Ask = Generator[np.ndarray, tuple[float, np.ndarray], None]


def minimise(
    function: Objective,
    start: Tensor,
    *,
    tolerance: float = 1e-9,
    curvature: Tensor | None = None,
    max_evaluations: int = 1000,
    budget: Budget | None = None,
    on_value: Callable[[float], None] | None = None,
) -> Minimum:
    """Minimise from ``start``, never losing the best point.

    Points where the function or its gradient is not finite count as infinitely high, so that the line
    search turns back.

    Args:
        function: Values and gradients at `[1, P]`.
        start: `[P]`.
        tolerance: Units of the function: stop when two steps in a row promise less.
        curvature: A guess of the Hessian's diagonal, `[P]`: the first step is then a Newton step. When
            None the first step is of length 1 or shorter.
        max_evaluations: The most evaluations.
        budget: What may be spent.
        on_value: Called with each finite value.
    """
    found = minimise_several(
        function,
        [start],
        tolerance=tolerance,
        curvature=curvature,
        max_evaluations=max_evaluations,
        budget=budget,
        on_value=on_value,
    )[0]
    if isinstance(found.error, Exception):
        raise found.error
    return found


def minimise_several(
    function: Objective,
    starts: Sequence[Tensor],
    *,
    tolerance: float = 1e-9,
    curvature: Tensor | None = None,
    max_evaluations: int = 1000,
    budget: Budget | None = None,
    on_value: Callable[[float], None] | None = None,
    patience: float = math.inf,
) -> list[Minimum]:
    """Minimise from each start, `M` of `[P]`; what the searches ask for is evaluated in one batch.

    The arguments are those of `minimise`; ``max_evaluations`` is for each search. Once two searches
    have converged, the others are given up after ``patience`` times as many evaluations as those took.
    What the function raises ends all searches with the best points that they met.
    """
    # The searches' own arithmetic is on the CPU, the function where the starts are.
    tensor = starts[0].new_tensor
    guess = None if curvature is None else curvature.cpu().numpy().astype(np.float64)
    states = [_State.at(start) for start in starts]
    running = _Running([_lbfgs(state, tolerance, guess, max_evaluations) for state in states])
    stopped, rounds, last = "", 0, math.inf
    raised: BaseException | None = None
    try:
        while running.points and not stopped and rounds < last:
            # A copy: results differ in their last bits with where NumPy's arrays happen to lie.
            values, gradients = function(tensor(np.stack(list(running.points.values()))))
            running.answer(values.tolist(), gradients.double().cpu().numpy(), on_value)
            rounds += 1
            if math.isinf(last) and sum(state.converged for state in states) > 1:
                last = patience * rounds
            stopped = "budget" if budget is not None and budget.over else ""
    except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001  told by `fit`
        stopped, raised = stopped_by(error), error
    return [
        _minimum(state, tensor, stopped, raised, i in running.points)
        for i, state in enumerate(states)
    ]


def _minimum(
    state: _State,
    tensor: Callable[..., Tensor],
    stopped: str,
    error: BaseException | None,
    cut_short: bool,
) -> Minimum:
    """What a search has come to, on the device of the function."""
    path = np.stack(state.path or [state.x])
    return Minimum(
        x=tensor(state.x),
        value=state.value,
        gradient=tensor(state.gradient),
        path=tensor(path),
        evaluations=state.evaluations,
        converged=state.converged,
        stopped=stopped if cut_short else "",
        message=state.message,
        error=error if cut_short else None,
    )


class _Running:
    """The searches that have not ended.

    Attributes:
        points: What each of them asks for next, by its number.
    """

    def __init__(self, searches: Sequence[_Ask]) -> None:
        self._searches = searches
        self.points = {i: next(search) for i, search in enumerate(searches)}

    def answer(
        self, values: list[float], gradients: np.ndarray, on_value: Callable[[float], None] | None
    ) -> None:
        """Send each search what it has asked for."""
        for i, value, gradient in zip(list(self.points), values, gradients, strict=True):
            try:
                with np.errstate(over="ignore", invalid="ignore"):
                    self.points[i] = self._searches[i].send((value, gradient))
            except StopIteration:
                del self.points[i]
            if on_value is not None and math.isfinite(value):
                on_value(value)


def _lbfgs(state: _State, tolerance: float, guess: np.ndarray | None, limit: int) -> _Ask:
    """One search: yields points, is sent values and gradients, writes what it finds in ``state``."""
    yield from _ask(state, state.x)
    if not math.isfinite(state.value):
        state.message = "not finite at the start"
        return
    state.path.append(state.x)
    pairs: list[tuple[np.ndarray, np.ndarray, float]] = []
    quiet = 0
    while state.evaluations < limit:
        direction = -_inverse_hessian_times(state.gradient, pairs, guess)
        promise = -0.5 * _dot(direction, state.gradient)
        # With no pairs and no guess the direction has no units, and promises nothing.
        known = bool(pairs) or guess is not None
        quiet = quiet + 1 if known and promise < tolerance else 0
        if quiet == _QUIET or (quiet and promise < 1e-3 * tolerance) or not state.gradient.any():
            state.converged, state.message = True, "nothing left to gain"
            return
        size = 1.0 if known else min(1.0, 1.0 / _norm(state.gradient))
        x, gradient = state.x, state.gradient
        if (yield from _line_search(state, direction, size, limit)):
            state.path.append(state.x)
            _remember(pairs, state.x - x, state.gradient - gradient)
        elif pairs:
            pairs.clear()
        else:
            # Converged if what is left to gain is lost in the rounding of the values.
            reach = promise if known else (_norm(x) + 1.0) * promise**0.5
            state.converged = reach < 1e-8 * max(1.0, abs(state.value))
            state.message = "no lower point along the gradient"
            return
    state.message = f"{limit} evaluations did not end it"


def _remember(
    pairs: list[tuple[np.ndarray, np.ndarray, float]], step: np.ndarray, change: np.ndarray
) -> None:
    """Keep a step and the gradient's change along it, where that says something of the curvature."""
    bend = _dot(step, change)
    if bend > 1e-10 * _norm(step) * _norm(change):
        pairs.append((step, change, bend))
        del pairs[:-_MEMORY]


def _ask(
    state: _State, x: np.ndarray
) -> Generator[np.ndarray, tuple[float, np.ndarray], tuple[float, np.ndarray]]:
    """Value and gradient at x, infinite where either is not finite; the best is kept."""
    value, gradient = yield x
    state.evaluations += 1
    if not math.isfinite(value) or not np.isfinite(gradient).all():
        return math.inf, gradient
    if value < state.value:
        state.x, state.value, state.gradient = x, value, gradient
    return value, gradient


def _line_search(
    state: _State, direction: np.ndarray, size: float, limit: int
) -> Generator[np.ndarray, tuple[float, np.ndarray], bool]:
    """Move ``state`` along the direction, to where it has gained and the slope has flattened."""
    origin, value, slope = state.x, state.value, _dot(direction, state.gradient)
    if not slope < 0:
        return False
    low, high, moved = 0.0, math.inf, False
    for _ in range(_MAX_TRIES):
        here, gradient = yield from _ask(state, origin + size * direction)
        moved = state.value < value
        if not here <= value + _ARMIJO * size * slope:
            high = size
            if math.isfinite(here):
                # The minimum of the parabola through what is known, within the bracket.
                vertex = -0.5 * slope * size**2 / (here - value - slope * size)
                size = min(max(vertex, low + 0.1 * (high - low)), low + 0.5 * (high - low))
            else:
                size = low + 0.1 * (high - low)
        elif _dot(gradient, direction) < _WOLFE * slope:
            low = size
            size = 0.5 * (low + high) if math.isfinite(high) else 3.0 * size
        else:
            return True
        if state.evaluations >= limit:
            break
    return moved


def _inverse_hessian_times(
    gradient: np.ndarray,
    pairs: list[tuple[np.ndarray, np.ndarray, float]],
    guess: np.ndarray | None,
) -> np.ndarray:
    """The two-loop recursion."""
    result, weights = gradient.copy(), []
    for step, change, bend in reversed(pairs):
        weight = _dot(step, result) / bend
        weights.append(weight)
        result -= weight * change
    if guess is not None:
        result /= guess
    elif pairs:
        _, change, bend = pairs[-1]
        result *= bend / _dot(change, change)
    for (step, change, bend), weight in zip(pairs, reversed(weights), strict=True):
        result += (weight - _dot(change, result) / bend) * step
    return result


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    # Not a BLAS product, whose last bits depend on where in memory the arrays happen to lie.
    return float((a * b).sum())


def _norm(a: np.ndarray) -> float:
    return math.sqrt(_dot(a, a))
