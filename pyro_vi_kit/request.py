"""The options of a fit, checked before any model is run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyro_vi_kit import objectives
from pyro_vi_kit.engines import NAMES as ENGINES
from pyro_vi_kit.engines import OptimizerFactory
from pyro_vi_kit.errors import OptionError, UnknownNameError
from pyro_vi_kit.methods import NAMES as METHODS
from pyro_vi_kit.model import Model
from pyro_vi_kit.runtime import fresh_seed
from pyro_vi_kit.types import Objective


@dataclass(frozen=True)
class Request:
    """A fit's options; see `fitting.fit`.

    Attributes:
        named_objective: Whether the objective was named, so that its particles are ours to choose.
        tolerance: Nats.
        deadline: `time.monotonic` second at which to stop.
    """

    model: Model
    objective: Objective
    named_objective: bool
    method: str
    engine: str
    tolerance: float
    deadline: float | None
    init: str | Mapping[str, Any]
    optimizer: OptimizerFactory | None
    batch_size: int | None
    seed: int
    progress: bool | None


def checked(
    model: Model,
    objective: str | Objective,
    method: str,
    engine: str,
    tol: float,
    budget: float | None,
    init: str | Mapping[str, Any],
    optimizer: OptimizerFactory | None,
    batch_size: int | None,
    seed: int | None,
    progress: bool | None,
) -> Request:
    """The request for these options.

    Raises:
        OptionError: If one of them cannot work, whatever the model.
    """
    if not isinstance(model, Model):
        raise OptionError(
            f"fit takes a vi.Model, got {type(model).__name__}: wrap the Pyro function and its "
            "arguments, vi.fit(vi.Model(fn, x, y))"
        )
    if method not in METHODS:
        raise UnknownNameError("method", method, METHODS)
    if engine not in ENGINES:
        raise UnknownNameError("engine", engine, ENGINES)
    _require_positive("tol", tol)
    if budget is not None:
        _require_positive("budget", budget)
    _require_integer("batch_size", batch_size, at_least=1)
    _require_integer("seed", seed, at_least=0)
    if not isinstance(init, Mapping) and init not in ("auto", "origin"):
        raise OptionError(f"init= must be 'auto', 'origin' or a dict of site values, got {init!r}")
    if optimizer is not None and not callable(optimizer):
        raise OptionError(
            "optimizer= must make an optimiser from parameters, e.g. "
            "functools.partial(torch.optim.Adam, lr=1e-3)"
        )
    return Request(
        model=model,
        objective=objectives.make(objective),
        named_objective=isinstance(objective, str),
        method=method,
        engine=engine,
        tolerance=float(tol),
        deadline=None if budget is None else time.monotonic() + budget,
        init=init,
        optimizer=optimizer,
        batch_size=batch_size,
        seed=fresh_seed() if seed is None else seed,
        progress=progress,
    )


def _require_positive(option: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise OptionError(f"{option}= must be a positive number, got {value!r}")


def _require_integer(option: str, value: object, *, at_least: int) -> None:
    integer = isinstance(value, int) and not isinstance(value, bool) and value >= at_least
    if value is not None and not integer:
        raise OptionError(f"{option}= must be an integer of at least {at_least}, got {value!r}")
