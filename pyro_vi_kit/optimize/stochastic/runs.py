"""Steps in short runs, and how a fit of such runs is carried out and kept in a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_vi_kit.core.checkpoint import Checkpoint, cloned
from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.errors import ViError
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.optimize.engines import Engine
from pyro_vi_kit.optimize.result import Budget, Outcome, cut_short

NAME = "stochastic"
_RUN_STEPS = 64


@dataclass
class Runs:
    """A window of steps under way, and the losses of all steps so far.

    In short runs, so that a budget is kept and an interrupt loses little. Their lengths do not depend
    on time, which would show in the last bits of the average, until the user's seconds run out.
    Between two runs the fit can be stopped, and go on from `state` with the same numbers.

    Attributes:
        engine: What executes steps.
        budget: What may be spent.
        progress: Told each run.
        losses: Minus the bound at each step, nats.
        length: Steps that the window under way is to have; 0 where none is.
        done: Steps that it has.
        average: Mean of each parameter behind every step of it, by name.
        skipped: Steps that the engine had skipped when it began.
    """

    engine: Engine
    budget: Budget
    progress: Progress
    losses: list[float] = field(default_factory=list)
    length: int = 0
    done: int = 0
    average: dict[str, Tensor] = field(default_factory=dict)
    skipped: int = 0
    _next: int = 1
    _pace: float = 0.0

    @property
    def late(self) -> bool:
        """Whether the budget is spent."""
        return self.budget.over

    @property
    def ahead(self) -> int:
        """Steps of the next run, as long as no end of the budget is near."""
        return min(self._next, self.length - self.done)

    @property
    def failed(self) -> bool:
        """Whether more than half the steps of the window were skipped."""
        return self.engine.skipped - self.skipped > self.done // 2

    def begin(self, length: int) -> None:
        """A new window of so many steps."""
        self.length, self.done, self.average = length, 0, {}
        self.skipped, self._pace = self.engine.skipped, 0.0

    def advance(self, rate: float, words: str | None = None) -> bool:
        """One run at this learning rate; whether the window goes on behind it.

        Args:
            rate: The learning rate.
            words: What the progress bar says in the place of the bound.
        """
        steps = self.ahead
        self._next = min(2 * self._next, _RUN_STEPS)
        budget, each = self.budget, self.engine.particles
        if budget.evaluations is not None:
            steps = max(1, min(steps, int(budget.evaluations_left / each)))
        if budget.deadline is not None and self._pace > 0.0:
            steps = max(1, min(steps, int(budget.seconds_left / self._pace)))
        started = time.monotonic()
        run = self.engine.run(steps, rate)
        self._pace = (time.monotonic() - started) / steps
        budget.spent += steps * each
        self.done += steps
        self.losses.extend((-run.bounds).tolist())
        self.progress.step(float(run.bounds[-1]), steps, words)
        for name, value in run.average.items():
            if name not in self.average or not value.is_floating_point():
                self.average[name] = value
            else:
                self.average[name] += (value - self.average[name]) * (steps / self.done)
        return self.done < self.length and not budget.over

    def end(self) -> tuple[dict[str, Tensor], int]:
        """Close the window: the average of its iterates, and how many steps it had."""
        self.length = 0
        return self.average, self.done

    def outcome(self, status: Status, error: BaseException | None) -> Outcome:
        """What the fit hands back."""
        evaluations = len(self.losses) * self.engine.particles
        return Outcome(NAME, status, self.losses, evaluations, self.engine.skipped, error=error)

    def state(self) -> dict[str, Any]:
        """Where it stands, but for the losses."""
        return {
            "next": self._next,
            "length": self.length,
            "done": self.done,
            "skipped": self.skipped,
            "average": cloned(self.average),
        }

    def restore(self, state: dict[str, Any], losses: Tensor) -> None:
        """Go on from `state`, with the losses until then."""
        self._next, self.length, self.done = state["next"], state["length"], state["done"]
        self.skipped, own = state["skipped"], self.engine.parameters()
        self.average = {n: v.to(own[n].device) for n, v in cloned(state["average"]).items()}
        self.losses = losses.tolist()
        self.progress.step(steps=len(self.losses))


class Resumable(Protocol):
    """A fit whose whole state can be written between two runs."""

    runs: Runs
    status: Status | None

    @property
    def out_of_steps(self) -> bool:
        """Whether no steps are left, which time would not change."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that what follows depends on, but for the losses."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`."""


def carry_out(
    fit: Resumable,
    checkpoint: Checkpoint | None,
    loop: Callable[[], Status],
    kept: Callable[[], str],
) -> tuple[Status, BaseException | None]:
    """Go on from where a checkpoint is, and catch what is raised.

    Args:
        fit: The fit.
        checkpoint: Where its state is kept.
        loop: Runs it until it ends.
        kept: What there is where something is raised, the rest of a sentence.

    Returns:
        How it ended, and what was raised.
    """
    if checkpoint is not None and checkpoint.state is not None:
        with checkpoint.restoring():
            fit.restore(checkpoint.state)
    try:
        return fit.status or loop(), None
    except ViError:
        raise
    except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001  told by `fit`
        on = "" if checkpoint is None else f" The same call goes on from {checkpoint.path}."
        return cut_short(error, kept() + on), error


def keep(fit: Resumable, status: Status, checkpoint: Checkpoint | None) -> None:
    """Write how a fit ended, or, where it was cut short, how it stood before its last run."""
    if checkpoint is None:
        return
    out_of_time = status.reason == "budget" and not fit.out_of_steps
    if status.reason in ("interrupted", "failed") or out_of_time:
        checkpoint.write()
        return
    fit.status = status
    checkpoint.mark(fit.state, fit.runs.losses, now=True)


def read(engine: Engine) -> dict[str, Tensor]:
    """Copies of the engine's parameters, by name."""
    return {name: value.detach().clone() for name, value in engine.parameters().items()}


@torch.no_grad()
def write(engine: Engine, values: dict[str, Tensor]) -> None:
    """Give the engine's parameters these values."""
    for name, parameter in engine.parameters().items():
        if name in values:
            parameter.copy_(values[name])
