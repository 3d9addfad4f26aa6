"""Objectives by name. Each is a bound on the log evidence and a pure function of log weights."""

from __future__ import annotations

from typing import Any

from pyro_vi_kit.core.contracts import LogWeights
from pyro_vi_kit.core.registry import About, Registry
from pyro_vi_kit.objectives.annealed import SCHEDULES, Annealed
from pyro_vi_kit.objectives.base import Bound, Objective, evaluate
from pyro_vi_kit.objectives.beta import Beta
from pyro_vi_kit.objectives.elbo import Elbo
from pyro_vi_kit.objectives.elbo_analytic import ElboAnalytic
from pyro_vi_kit.objectives.estimators import ABOUT as _ABOUT_ESTIMATORS
from pyro_vi_kit.objectives.estimators import NAMES as ESTIMATORS
from pyro_vi_kit.objectives.estimators import surrogate
from pyro_vi_kit.objectives.iwae import Iwae
from pyro_vi_kit.objectives.renyi import Renyi
from pyro_vi_kit.objectives.tail_adaptive import TailAdaptive
from pyro_vi_kit.objectives.upper import ChiSquare, ForwardKl

REGISTRY = Registry("objective", Objective, example="vi.objectives.Renyi(alpha=0.5)")
REGISTRY.add(
    Elbo,
    ElboAnalytic,
    Iwae,
    Renyi,
    ForwardKl,
    ChiSquare,
    TailAdaptive,
    Beta,
    Annealed,
)

__all__ = [
    "ESTIMATORS",
    "REGISTRY",
    "SCHEDULES",
    "About",
    "Annealed",
    "Beta",
    "Bound",
    "ChiSquare",
    "Elbo",
    "ElboAnalytic",
    "ForwardKl",
    "Iwae",
    "LogWeights",
    "Objective",
    "Renyi",
    "TailAdaptive",
    "about",
    "about_estimators",
    "describe",
    "estimators_of",
    "evaluate",
    "make",
    "names",
    "register",
    "surrogate",
]


def register(objective: type[Objective]) -> type[Objective]:
    """Make an objective of your own known by its name, as the package's are; see docs/EXTENDING.md.

    Args:
        objective: A frozen dataclass and subclass of `Objective`. Also a decorator of it.

    Raises:
        OptionError: If it is none, lacks something, or its name is taken.
    """
    return REGISTRY.register(objective)


def names() -> list[str]:
    """What can be named as ``objective=``."""
    return list(REGISTRY)


def describe() -> dict[str, str]:
    """One line for each objective."""
    return REGISTRY.describe()


def about() -> dict[str, About]:
    """What each objective bounds, what it costs, when to use it, and its paper."""
    return {name: cls.about for name, cls in REGISTRY.items()}


def estimators_of() -> dict[str, tuple[str, ...]]:
    """The gradient estimators of each objective, as ``estimator=`` names them."""
    return {name: cls().estimators for name, cls in REGISTRY.items()}


def about_estimators() -> dict[str, About]:
    """What each estimator of the gradient does, what it costs, when to use it, and its paper."""
    return dict(_ABOUT_ESTIMATORS)


def make(objective: str | Objective, **options: Any) -> Objective:
    """A configured objective from its name, or the instance itself.

    Raises:
        UnknownNameError: If the name is not known.
        OptionError: If an option is wrong, or options come with an instance.
    """
    return REGISTRY.resolve(objective, options)
