"""The variational Rényi bound (Li & Turner 2016, eq. 8)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from pyro.infer import ELBO, RenyiELBO, Trace_ELBO
from torch import Tensor

from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.options import is_finite, is_number
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.objectives.base import (
    Objective,
    leave_one_out_mean,
    log_mean_exp,
    no_stock_loss,
)


@dataclass(frozen=True)
class Renyi(Objective):
    """Rényi bound of order alpha: between the ELBO (1) and the importance-weighted bound (0).

    1 / (1 - alpha) E[log 1/K sum_k (p(x, z_k) / q(z_k))^(1 - alpha)], z_k drawn from q. The smaller
    alpha, the more mass the guide covers. A negative order gives an upper bound as K grows; at -inf only
    the largest weight counts (VR-max).

    Args:
        alpha: The order; ``-math.inf`` for VR-max.
        particles: K.

    Raises:
        OptionError: If alpha is no number below infinity, or `particles` not positive.
    """

    name = "renyi"
    about = About(
        does="between elbo (alpha 1) and iwae (alpha 0); from above for alpha < 0: q covers more",
        cost="K; needs many",
        use="a choice between narrow and wide q",
        paper="Li & Turner 2016",
    )

    alpha: float = 0.5
    particles: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (is_finite(self.alpha) or (is_number(self.alpha) and self.alpha == -inf)):
            raise OptionError(
                f"renyi: alpha must be a finite number, or -inf for VR-max, got {told(self.alpha)}"
            )

    @property
    def is_elbo(self) -> bool:
        """Whether it is the ELBO: for order 1."""
        return not self.multi_sample

    @property
    def order(self) -> float | None:
        """Alpha; None for VR-max, for which ``dreg`` has no limit, as equal weights change places."""
        return None if self.alpha == -inf else float(self.alpha)

    def bound(self, log_w: Tensor) -> Tensor:
        """The Rényi bound over the first dimension, `[K, ...] -> [...]`, nats."""
        if not self.multi_sample:
            return log_w.mean(0)
        if self.order is None:
            return log_w.amax(0)
        order = 1.0 - self.alpha
        return log_mean_exp(order * log_w) / order

    def score(self, log_w: Tensor) -> Tensor:
        """VIMCO's signal; for order 1 that of the ELBO, `[K, ...]`."""
        return super().score(log_w) if self.multi_sample else leave_one_out_mean(log_w)

    def stock_loss(self, *, vectorize: bool = False) -> ELBO:
        """`RenyiELBO` of this order; `Trace_ELBO` for order 1, which `RenyiELBO` does not take.

        Raises:
            OptionError: For VR-max, which stock Pyro does not have.
        """
        if self.order is None:
            raise no_stock_loss("renyi with alpha=-inf", "a finite alpha")
        if not self.multi_sample:
            return Trace_ELBO(num_particles=self.particles, vectorize_particles=vectorize)
        return RenyiELBO(
            alpha=self.alpha,  # pyright: ignore[reportArgumentType]  # Pyro's default is an int
            num_particles=self.particles,
            vectorize_particles=vectorize,
        )
