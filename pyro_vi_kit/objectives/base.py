"""What an objective is made of beside its bound: how it is trained, and where it is defined.

A bound is a function of log weights. Its gradient need not be: the forward KL is trained along
``sum_k w~_k grad log q(z_k)``, which is the gradient of no such function. So an objective also says

- ``surrogate_bound``: what the loss differentiates: the bound, or for an upper bound the
  importance-weighted one, along which the model's own parameters are to move;
- ``path``: what `dreg` multiplies its gradient at each draw by;
- ``score``: what `score` multiplies ``grad log q(z_k)`` by;
- ``look``: what a comparison of two fits maximises: the bound, or for an upper bound minus its gap.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import ALL_DATA, Batch, LogWeights
from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.registry import Registered
from pyro_vi_kit.guides.pyro_guide import Draw, Guide

_MOST_PARTICLES = 10**6
# Estimators of the gradient; see `objectives.estimators`.
_ESTIMATORS = ("pathwise", "dreg", "score", "stratified")


class Objective(Registered):
    """A bound on the log evidence, a function of log weights, and how it is trained.

    Subclasses are frozen dataclasses, whose fields are the options; they have a `name`, an `about`,
    ``particles`` and a `bound`. All else has the values of a lower bound that is differentiated as it
    stands.

    Attributes:
        name: What ``objective=`` calls it.
        about: What listings say of it.
        matches_moments: Whether its best Gaussian has the posterior's own mean and covariance.
        particles: K, draws of the guide per step.
    """

    matches_moments: ClassVar[bool] = False

    particles: int

    def __post_init__(self) -> None:
        require_particles(self.name, self.particles)

    @property
    def order(self) -> float | None:
        """Its order alpha among the Rényi bounds (ELBO 1, importance-weighted 0); None for no such."""
        return None

    @property
    def multi_sample(self) -> bool:
        """Whether the bound depends on K, so that particles may not be averaged over."""
        return self.order != 1.0

    @property
    def upper(self) -> bool:
        """Whether it is an upper bound on the log evidence, and is brought down."""
        return False

    @property
    def is_elbo(self) -> bool:
        """Whether what is trained in the end is the ELBO."""
        return False

    @property
    def is_plain_elbo(self) -> bool:
        """Whether it is the ELBO from the first step on, of log weights as they are."""
        own = type(self).weights is not Objective.weights
        return self.is_elbo and self.warmup == 0 and not own

    @property
    def warmup(self) -> int:
        """Steps before what is trained is the bound itself."""
        return 0

    @property
    def first_power(self) -> float | None:
        """What the target is raised to at the first step of a warm-up; None where it is itself."""
        return None

    @property
    def has_surrogate(self) -> bool:
        """Whether the loss differentiates a `surrogate_bound` of its own, as for an upper one."""
        return self.upper

    @property
    def estimators(self) -> tuple[str, ...]:
        """Gradient estimators that are defined for it: two for any bound, all for a Rényi bound."""
        return ("pathwise", "score") if self.order is None else _ESTIMATORS

    @abstractmethod
    def bound(self, log_w: Tensor) -> Tensor:
        """The bound over the first dimension, `[K, ...] -> [...]`, nats."""

    def surrogate_bound(self, log_w: Tensor) -> Tensor:
        """What the loss is minus of, and differentiates: the bound, `[K, ...] -> [...]`."""
        return self.bound(log_w)

    def look(self, log_w: Tensor) -> Tensor:
        """What a comparison of two fits maximises: the bound, `[K, ...] -> [...]`, nats."""
        return self.bound(log_w)

    def path(self, log_w: Tensor) -> Tensor | None:
        """What ``dreg`` scales the gradient at each draw by, `[K, ...]`; None for 1.

        ``alpha + (1 - alpha) w~`` for the bound of order alpha (Tucker et al. 2019).
        """
        alpha = self.order
        if alpha is None or alpha == 1.0:
            return None
        return alpha + (1.0 - alpha) * torch.softmax((1.0 - alpha) * log_w, 0)

    def score(self, log_w: Tensor) -> Tensor:
        """What ``score`` multiplies the gradient of each log q by, `[K, ...]`.

        The bound less what it is without this draw (VIMCO, Mnih & Rezende 2016), and what log q is
        worth inside the bound.
        """
        return leave_one_out(self.bound, log_w) - slope_of(self.bound, log_w)

    def weights(self, guide: Guide, draw: Draw, batch: Batch = ALL_DATA) -> LogWeights:
        """The log weights that the bound is taken of, nats.

        Args:
            guide: The guide.
            draw: Draws of it.
            batch: What they are weighed on; without ``updates`` where the bound itself is asked for.
        """
        return guide.weigh(draw, batch.params, batch.index, data=batch.data)

    def require(self, guide: Guide) -> None:
        """Refuse a guide that this objective is not defined for.

        Raises:
            OptionError: With the remedy.
        """

    @classmethod
    def flaw(cls) -> str | None:
        """See `Registered.flaw`."""
        made = cls()
        if not isinstance(getattr(made, "particles", None), int):
            return f"{cls.__name__} needs an option particles: int, K, draws of the guide per step"
        unknown = sorted(set(made.estimators) - set(_ESTIMATORS))
        if unknown or not made.estimators:
            return (
                f"{cls.__name__}.estimators are some of {', '.join(_ESTIMATORS)}, got "
                f"{told(made.estimators)}"
            )
        return None

    def stock_loss(self, *, vectorize: bool = False) -> Any:
        """The `pyro.infer` loss that is minus this bound.

        Raises:
            OptionError: If stock Pyro has none, as is the default.
        """
        raise no_stock_loss(self.name, "objective='elbo'")


# What it was called before there was one class for all.
Bound = Objective


def require_particles(name: str, particles: object) -> None:
    """Refuse a number of particles that is no positive integer."""
    if not isinstance(particles, int) or isinstance(particles, bool) or particles < 1:
        raise OptionError(f"{name}: particles must be a positive integer, got {told(particles)}")
    if particles > _MOST_PARTICLES:
        raise OptionError(
            f"{name}: particles must be at most {_MOST_PARTICLES:,}, got {told(particles)}"
        )


def no_stock_loss(name: str, other: str) -> OptionError:
    """What engine='pyro' is told of an objective that stock Pyro has no loss for."""
    return OptionError(
        f"objective {name!r} has no loss in stock Pyro, which engine='pyro' and Pyro guides of your own "
        f"are trained with: leave engine= out with a guide of this package, or use {other}"
    )


def evaluate(objective: Objective, weights: LogWeights) -> Tensor:
    """The objective's bound, a scalar in nats.

    With local latents this is the multi-sample bound of each datum and the ELBO in what the data
    share. The factor N / B of a minibatch multiplies after the logsumexp: inside, it would put the
    bound above the evidence.
    """
    return reduced(objective.bound, weights)


def reduced(reduce: Callable[[Tensor], Tensor], weights: LogWeights) -> Tensor:
    """As `evaluate`, for any function `[K, ...] -> [...]` of an objective."""
    if not weights.local:
        return reduce(weights.shared)
    total = weights.shared.mean()
    for plate, rows in weights.local.items():
        total = total + weights.scale[plate] * reduce(rows).sum()
    return total


def log_mean_exp(log_w: Tensor) -> Tensor:
    """Log of the mean over the first dimension of what these are the logs of."""
    return torch.logsumexp(log_w, 0) - math.log(log_w.shape[0])


def slope_of(bound: Callable[[Tensor], Tensor], log_w: Tensor) -> Tensor:
    """Derivative of a bound in each log weight, `[K, ...]`, detached."""
    with torch.enable_grad():
        leaf = log_w.detach().requires_grad_()
        (slope,) = torch.autograd.grad(bound(leaf).sum(), leaf)
    return slope


def leave_one_out(bound: Callable[[Tensor], Tensor], log_w: Tensor) -> Tensor:
    """The bound, less what it is where one draw's log weight is the mean of the others', `[K, ...]`.

    For a mean over draws this is ``1 / K`` of each log weight less the mean of the others, the
    leave-one-out baseline (Kool, van Hoof & Welling 2019); for a multi-sample bound VIMCO's signal (Mnih
    & Rezende 2016, eq. 10).
    """
    count = len(log_w)
    others = (log_w.sum(0) - log_w) / (count - 1)
    own = torch.eye(count, dtype=torch.bool, device=log_w.device)
    own = own.reshape(count, count, *(1,) * (log_w.dim() - 1))
    return bound(log_w) - bound(torch.where(own, others, log_w.unsqueeze(1)))


def leave_one_out_mean(log_w: Tensor) -> Tensor:
    """`leave_one_out` of a mean, `[K, ...]`, without a table of K by K."""
    count = len(log_w)
    return (log_w - log_w.mean(0)) / (count - 1)
