"""The variational Rényi bound (Li & Turner 2016, eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import ClassVar

from pyro.infer import ELBO, RenyiELBO, Trace_ELBO
from torch import Tensor

from pyro_vi_kit.errors import OptionError
from pyro_vi_kit.objectives.bounds import log_mean_exp
from pyro_vi_kit.objectives.elbo import require_particles
from pyro_vi_kit.registry import About


@dataclass(frozen=True)
class Renyi:
    """Rényi bound of order alpha: between the ELBO (1) and the importance-weighted bound (0).

    1 / (1 - alpha) E[log 1/K sum_k (p(x, z_k) / q(z_k))^(1 - alpha)], z_k drawn from q. The smaller
    alpha, the more mass the guide covers. A negative order gives an upper bound as K grows.

    Args:
        alpha: The order.
        particles: K.

    Raises:
        OptionError: If alpha is not finite or `particles` not positive.
    """

    name: ClassVar[str] = "renyi"
    about: ClassVar[About] = About(
        does="between ELBO (alpha 1) and IWAE (alpha 0); below 0 q covers more mass",
        cost="K; needs many",
        use="a choice between narrow and wide q",
        paper="Li & Turner 2016",
    )

    alpha: float = 0.5
    particles: int = 10

    def __post_init__(self) -> None:
        require_particles(self.name, self.particles)
        number = isinstance(self.alpha, int | float) and not isinstance(self.alpha, bool)
        if not number or not isfinite(self.alpha):
            raise OptionError(f"renyi: alpha must be a finite number, got {self.alpha!r}")

    @property
    def multi_sample(self) -> bool:
        """Whether particles meet inside a logsumexp: for every order but 1."""
        return self.alpha != 1.0

    @property
    def order(self) -> float:
        """Alpha."""
        return float(self.alpha)

    def bound(self, log_w: Tensor) -> Tensor:
        """The Rényi bound over the first dimension, `[K, ...] -> [...]`, nats."""
        if not self.multi_sample:
            return log_w.mean(0)
        order = 1.0 - self.alpha
        return log_mean_exp(order * log_w) / order

    def stock_loss(self, *, vectorize: bool = False) -> ELBO:
        """`RenyiELBO` of this order; `Trace_ELBO` for order 1, which `RenyiELBO` does not take."""
        if not self.multi_sample:
            return Trace_ELBO(num_particles=self.particles, vectorize_particles=vectorize)
        return RenyiELBO(
            alpha=self.alpha,  # pyright: ignore[reportArgumentType]  # Pyro's default is an int
            num_particles=self.particles,
            vectorize_particles=vectorize,
        )
