"""What a fit by epochs is asked for: how many, at what rate, and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.options import one_of, optional

_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
    "linear": lambda share: 1.0 - share,
}
_PRECISIONS = ("float32", "bfloat16")
_PATIENCE = 5


@dataclass(frozen=True, eq=False)
class Epochs:
    """Training by passes over the data, with a schedule instead of an automatic rate.

    An epoch sees each row of the data plate once, ``batch_size`` at a time (rows that do not fill a
    minibatch wait for another epoch). Without minibatches it is 100 steps on the full data.

    Args:
        epochs: How many, at the most.
        rate: Learning rate at its highest. By default 0.005 for encoders and 0.01 to 0.02 for others;
            with an ``optimizer=`` of your own, its rate.
        schedule: How the rate goes on: ``"cosine"`` and ``"linear"`` fall to zero, ``"constant"``
            stays, or a function from the share of the training that is done (0 to 1) to a factor.
        warmup: Share of the training in which the rate rises from zero.
        clip: Euclidean length that a gradient has at the most.
        validation: The model's positional arguments on data held out, ``(x, y)``. Their bound is taken
            behind every epoch, and the parameters of the best epoch are kept.
        patience: Epochs without a better validation bound after which to stop; 5 by default.
        precision: ``"bfloat16"`` evaluates model and guide in mixed precision (`torch.autocast`).

    Raises:
        OptionError: If an option is out of its range.
    """

    epochs: int = 100
    rate: float | None = None
    schedule: str | Callable[[float], float] = "cosine"
    warmup: float = 0.0
    clip: float | None = None
    validation: tuple[Any, ...] | None = field(default=None, repr=False)
    patience: int | None = None
    precision: str | None = None

    def __post_init__(self) -> None:
        _require_count("epochs", self.epochs)
        for name in ("rate", "clip"):
            _require_positive(name, getattr(self, name))
        if not callable(self.schedule):
            one_of("schedule", _SCHEDULES)("schedule", self.schedule)
        if not _is_number(self.warmup) or not 0.0 <= self.warmup < 1.0:
            raise OptionError(
                f"Epochs: warmup must be a share from 0 to 1, got {told(self.warmup)}"
            )
        if self.validation is not None and not isinstance(self.validation, tuple | list):
            raise OptionError(
                "Epochs: validation must be a tuple of the model's arguments, (x_test, y_test) or "
                f"(x_test,), got {type(self.validation).__name__}"
            )
        if self.patience is not None:
            _require_count("patience", self.patience)
            if self.validation is None:
                raise OptionError(
                    "Epochs: patience waits for a better validation bound: give validation=(...) too"
                )
        optional(one_of("precision", _PRECISIONS))("precision", self.precision)

    @property
    def waits(self) -> int:
        """Epochs to wait for a better validation bound."""
        return _PATIENCE if self.patience is None else self.patience

    @property
    def autocast(self) -> str | None:
        """The dtype of mixed precision; None where there is none."""
        return "bfloat16" if self.precision == "bfloat16" else None

    def factor(self, share: float) -> float:
        """What the rate is multiplied with.

        Args:
            share: Of the training that is done, from 0 to 1.

        Raises:
            OptionError: If a schedule of the user's gives no factor.
        """
        schedule = self.schedule if callable(self.schedule) else _SCHEDULES[self.schedule]
        factor = schedule(share)
        if not _is_number(factor) or not 0.0 <= factor < math.inf:
            raise OptionError(
                f"Epochs: schedule must give a factor of at least 0, got {told(factor)} at {share:.3g}"
            )
        return float(factor) * (share / self.warmup if share < self.warmup else 1.0)

    def described(self) -> dict[str, Any]:
        """Its options in plain words and numbers; of a function, its name."""
        schedule = self.schedule
        if callable(schedule):
            schedule = getattr(schedule, "__qualname__", type(schedule).__qualname__)
        return {
            "epochs": self.epochs,
            "rate": self.rate,
            "schedule": schedule,
            "warmup": self.warmup,
            "clip": self.clip,
            "validation": self.validation is not None,
            "patience": self.patience,
            "precision": self.precision,
        }


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise OptionError(f"Epochs: {name} must be an integer of at least 1, got {told(value)}")


def _require_positive(name: str, value: Any) -> None:
    if value is not None and not (_is_number(value) and 0.0 < value < math.inf):
        raise OptionError(f"Epochs: {name} must be a positive number, got {told(value)}")
