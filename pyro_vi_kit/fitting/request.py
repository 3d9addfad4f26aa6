"""The options of a fit, checked before any model is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pyro_vi_kit import objectives
from pyro_vi_kit.core import device as device_module
from pyro_vi_kit.core.device import Device, device_of
from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.options import COUNT, SEED, checks, flag, mapping, one_of, optional, positive
from pyro_vi_kit.core.runtime import fresh_seed
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.model.log_density.initial import InitFunction
from pyro_vi_kit.model.log_density.initial import checked as checked_init
from pyro_vi_kit.model.model import Model, a_model
from pyro_vi_kit.objectives import Objective
from pyro_vi_kit.optimize import NAMES as METHODS
from pyro_vi_kit.optimize.deterministic.starts import Found
from pyro_vi_kit.optimize.engines import NAMES as ENGINES
from pyro_vi_kit.optimize.engines import OptimizerFactory
from pyro_vi_kit.optimize.result import Budget
from pyro_vi_kit.optimize.stochastic.epochs import Epochs

_TOLERANCE = 0.01


class InitValues(dict[str, Any]):
    """Values of all latents, from a function: a guide takes those that it can start from."""


@dataclass(frozen=True)
class Request:
    """A fit's options; see `fitting.fit`.

    Attributes:
        named_objective: Whether the objective was named, so that its particles are ours to choose.
        tolerance: Nats.
        own_tolerance: Whether the user gave it, so that it is absolute.
        steps: The most stochastic steps.
        resumed: Whether the guide is trained already.
        epochs: How to train by epochs; None where steps stop by themselves.
        device: Where everything is; where the model's data are when None.
        budget: What may be spent.
        found: What searches for modes came to, where they are done already.
        below: A simpler guide of the same latents, trained, to start from.
    """

    model: Model
    objective: Objective
    named_objective: bool
    method: str
    engine: str
    tolerance: float
    own_tolerance: bool
    budget: Budget
    steps: int | None
    estimator: str
    init: str | Mapping[str, Any] | InitFunction
    optimizer: OptimizerFactory | None
    batch_size: int | Mapping[str, int] | None
    seed: int
    progress: bool | None
    resumed: bool
    epochs: Epochs | None = None
    device: torch.device | None = None
    found: Found | None = None
    below: Guide | None = None


def _optimizer(option: str, value: Any) -> Any:
    if not callable(value):
        raise OptionError(
            f"{option}= must make an optimiser from parameters, e.g. "
            f"functools.partial(torch.optim.Adam, lr=1e-3), got {told(value)}"
        )
    return value


def _rows(option: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {plate: COUNT(option, rows) for plate, rows in mapping(option, value).items()}
    return COUNT(option, value)


@checks(
    model=a_model,
    method=one_of("method", METHODS),
    engine=one_of("engine", ENGINES),
    tol=optional(positive),
    budget=optional(positive),
    steps=optional(COUNT),
    estimator=one_of("estimator", objectives.ESTIMATORS),
    optimizer=optional(_optimizer),
    batch_size=optional(_rows),
    seed=optional(SEED),
    progress=optional(flag),
)
def checked(
    model: Model,
    objective: str | Objective,
    method: str = "auto",
    engine: str = "auto",
    tol: float | None = None,
    budget: float | None = None,
    steps: int | None = None,
    estimator: str = "auto",
    init: str | Mapping[str, Any] | InitFunction = "auto",
    optimizer: OptimizerFactory | None = None,
    batch_size: int | Mapping[str, int] | None = None,
    seed: int | None = None,
    progress: bool | None = None,
    resumed: bool = False,
    epochs: int | Epochs | None = None,
    device: Device | None = None,
) -> Request:
    """The request for these options.

    Raises:
        OptionError: If one of them cannot work, whatever the model.
    """
    if resumed and init != "auto":
        raise OptionError(
            "init= does not go with resume=, which starts where the earlier fit ended"
        )
    init = checked_init(init, ("auto", "origin"))
    plan = _plan(epochs, method, engine)
    if plan is not None and plan.rate is not None and optimizer is not None:
        raise OptionError(
            "Epochs(rate=) is that of the Adam of this package; optimizer= has a rate of its own, which "
            "the schedule multiplies: leave rate= out"
        )
    return Request(
        model=model,
        objective=objectives.make(objective),
        named_objective=isinstance(objective, str),
        method=method,
        engine=engine,
        tolerance=_TOLERANCE if tol is None else float(tol),
        own_tolerance=tol is not None,
        steps=steps,
        estimator=estimator,
        budget=Budget.of_seconds(budget),
        init=init,
        optimizer=optimizer,
        batch_size=batch_size,
        seed=fresh_seed() if seed is None else seed,
        progress=progress,
        resumed=resumed,
        epochs=plan,
        device=_usable(device, model, engine),
    )


def _usable(device: Device | None, model: Model, engine: str) -> torch.device | None:
    found = device_module.checked(device)
    where = device_of((model.args, dict(model.kwargs))) if found is None else found
    if engine == "compiled" and where.type != "cpu":
        raise OptionError(
            f"engine='compiled' compiles for the CPU, and this fit is on {str(where)!r}: leave engine= "
            "out, and steps are recorded as a CUDA graph"
        )
    return found


def _plan(epochs: object, method: str, engine: str) -> Epochs | None:
    """What ``epochs=`` stands for."""
    if epochs is None or isinstance(epochs, Epochs):
        plan = epochs
    else:
        plan = Epochs(COUNT("epochs", epochs))
    wrong = "engine='pyro'" if engine == "pyro" else ""
    if method in ("cavi", "lbfgs"):
        wrong = f"method={method!r}"
    if plan is not None and wrong:
        raise OptionError(
            f"epochs= are of stochastic steps on the engines of this package: leave out {wrong}"
        )
    return plan
