"""The options of a fit, checked before any model is run, and one guide to be trained as they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from pyro_vi_kit import objectives
from pyro_vi_kit.core import device as device_module
from pyro_vi_kit.core.checkpoint import Checkpoint
from pyro_vi_kit.core.device import Device, device_of
from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.options import (
    COUNT,
    SEED,
    Rule,
    flag,
    mapping,
    one_of,
    optional,
    path,
    positive,
)
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.runtime import RandomStream, fresh_seed
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.initial import InitFunction
from pyro_vi_kit.model.log_density.initial import checked as checked_init
from pyro_vi_kit.model.model import Model, a_model
from pyro_vi_kit.objectives import Objective
from pyro_vi_kit.optimize import NAMES as METHODS
from pyro_vi_kit.optimize.deterministic.modes import Found
from pyro_vi_kit.optimize.deterministic.search import Search
from pyro_vi_kit.optimize.engines import NAMES as ENGINES
from pyro_vi_kit.optimize.engines import OptimizerFactory
from pyro_vi_kit.optimize.result import Budget
from pyro_vi_kit.optimize.stochastic.epochs import Epochs

_TOLERANCE = 0.01


class Options(TypedDict, total=False):
    """What `fit` is asked for beside the model and the guide; see there."""

    objective: str | Objective | None
    method: str
    engine: str
    estimator: str
    tol: float | None
    budget: float | None
    steps: int | None
    init: str | Mapping[str, Any] | InitFunction
    optimizer: OptimizerFactory | None
    batch_size: int | Mapping[str, int] | None
    device: Device | None
    epochs: int | Epochs | None
    checkpoint: str | Path | None
    seed: int | None
    progress: bool | None


@dataclass(frozen=True)
class Request:
    """A fit's options, checked; see `fitting.fit`.

    Attributes:
        named_objective: Whether the objective was named, so that its particles are ours to choose.
        tolerance: Nats.
        own_tolerance: Whether the user gave it, so that it is absolute.
        budget: Seconds.
        steps: The most stochastic steps.
        resumed: Whether the guide is trained already.
        epochs: How to train by epochs; None where steps stop by themselves.
        device: Where everything is; where the model's data are when None.
    """

    model: Model
    objective: Objective
    named_objective: bool
    method: str
    engine: str
    tolerance: float
    own_tolerance: bool
    budget: float | None
    steps: int | None
    estimator: str
    init: str | Mapping[str, Any] | InitFunction
    optimizer: OptimizerFactory | None
    batch_size: int | Mapping[str, int] | None
    seed: int
    progress: bool | None
    resumed: bool
    epochs: Epochs | None
    device: torch.device | None
    checkpoint: Path | None

    @property
    def without_steps(self) -> bool:
        """Whether nothing is asked for that only stochastic steps have."""
        return (
            self.engine != "pyro"
            and self.estimator == "auto"
            and (self.optimizer, self.steps, self.batch_size, self.epochs) == (None,) * 4
        )


class InitValues(dict[str, Any]):
    """Values of all latents, from a function: a guide takes those that it can start from."""


@dataclass(frozen=True)
class Training:
    """One guide to be trained on one model.

    Attributes:
        request: How.
        guide: Changed in place.
        budget: What may be spent.
        init: Values by site, ``"auto"`` or ``"origin"``.
        checkpoint: Where to keep the state of the fit, and to go on from.
        found: What searches for modes came to, where they are done already.
        warm_start: A simpler guide of the same latents, trained, to start from.
    """

    request: Request
    guide: Guide
    budget: Budget
    init: str | Mapping[str, Any] = "auto"
    checkpoint: Checkpoint | None = None
    found: Found | None = None
    warm_start: Guide | None = None

    @property
    def density(self) -> Density:
        """The model."""
        return self.guide.density

    @property
    def point(self) -> Tensor | None:
        """The unconstrained point that ``init=`` names, `[D]`."""
        return starting_point(self.init, self.density)

    def search(self, progress: Progress | None = None, tolerance: float | None = None) -> Search:
        """A deterministic fit, or a part of one, within the budget.

        Args:
            progress: Told each evaluation.
            tolerance: Nats; the request's when None.
        """
        request = self.request
        return Search(
            self.density,
            request.seed,
            self.budget,
            progress or Progress("start", enabled=False),
            request.tolerance if tolerance is None else tolerance,
        )


def site_values(request: Request) -> Mapping[str, Any] | InitFunction | None:
    """Values by site, or the function that gives them; None where ``init=`` is a word."""
    return None if isinstance(request.init, str) else request.init


def located(request: Request, density: Density) -> str | Mapping[str, Any]:
    """What ``init=`` says, or the values that it gives where it is a function: called once."""
    if isinstance(request.init, str | Mapping):
        return request.init
    with RandomStream(request.seed, "initial values"):
        point = density.unconstrain(request.init) if density.start is None else density.start
        values = density.constrain(point.unsqueeze(0))
    return InitValues({s.name: values[s.name][0] for s in density.latents if not s.states})


def starting_point(init: str | Mapping[str, Any], density: Density) -> Tensor | None:
    """The unconstrained point `[D]` that ``init`` names; None for ``"auto"``."""
    if isinstance(init, Mapping):
        return density.unconstrain(init)
    if init == "origin":
        return torch.zeros(density.dim, dtype=density.dtype, device=density.device)
    return None


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


_RULES: Mapping[str, Rule] = {
    "method": one_of("method", METHODS),
    "engine": one_of("engine", ENGINES),
    "tol": optional(positive),
    "budget": optional(positive),
    "steps": optional(COUNT),
    "estimator": one_of("estimator", objectives.ESTIMATORS),
    "optimizer": optional(_optimizer),
    "batch_size": optional(_rows),
    "checkpoint": optional(path),
    "seed": optional(SEED),
    "progress": optional(flag),
}


def checked(model: Model, *, resumed: bool = False, **options: Unpack[Options]) -> Request:
    """The request for these options.

    Args:
        model: The model.
        resumed: Whether the guide is trained already.
        **options: Those that are given.

    Raises:
        OptionError: If one of them cannot work, whatever the model.
    """
    model = a_model("model", model)
    given: dict[str, Any] = dict(options)
    for option in given.keys() & _RULES.keys():
        given[option] = _RULES[option](option, given[option])
    init, objective = given.get("init", "auto"), given.get("objective")
    engine, method = given.get("engine", "auto"), given.get("method", "auto")
    if resumed and init != "auto":
        raise OptionError(
            "init= does not go with resume=, which starts where the earlier fit ended"
        )
    tol, seed, checkpoint = (given.get(option) for option in ("tol", "seed", "checkpoint"))
    return Request(
        model=model,
        objective=objectives.make("elbo" if objective is None else objective),
        named_objective=objective is None or isinstance(objective, str),
        method=method,
        engine=engine,
        tolerance=_TOLERANCE if tol is None else float(tol),
        own_tolerance=tol is not None,
        budget=given.get("budget"),
        steps=given.get("steps"),
        estimator=given.get("estimator", "auto"),
        init=checked_init(init, ("auto", "origin")),
        optimizer=given.get("optimizer"),
        batch_size=_batch_size(model, given.get("batch_size")),
        seed=fresh_seed() if seed is None else seed,
        progress=given.get("progress"),
        resumed=resumed,
        epochs=_epochs(given.get("epochs"), method, engine, given.get("optimizer")),
        device=_usable(given.get("device"), model, engine),
        checkpoint=None if checkpoint is None else Path(checkpoint),
    )


def _batch_size(
    model: Model, batch_size: int | Mapping[str, int] | None
) -> int | Mapping[str, int] | None:
    """Rows of a batch; of a stream the user's, the loader's, or as many as are cheap."""
    if model.stream is None:
        return batch_size
    if isinstance(batch_size, Mapping):
        raise OptionError("batch_size= of streamed data is one number: they have one data plate")
    return model.stream.size_for(batch_size)


def _usable(device: Device | None, model: Model, engine: str) -> torch.device | None:
    found = device_module.checked(device)
    where = device_of((model.args, dict(model.kwargs))) if found is None else found
    if engine == "compiled" and where.type != "cpu":
        raise OptionError(
            f"engine='compiled' compiles for the CPU, and this fit is on {str(where)!r}: leave engine= "
            "out, and steps are recorded as a CUDA graph"
        )
    return found


def _epochs(epochs: object, method: str, engine: str, optimizer: object) -> Epochs | None:
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
    if plan is not None and plan.rate is not None and optimizer is not None:
        raise OptionError(
            "Epochs(rate=) is that of the Adam of this package; optimizer= has a rate of its own, which "
            "the schedule multiplies: leave rate= out"
        )
    return plan
