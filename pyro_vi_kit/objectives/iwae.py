"""The importance-weighted bound (Burda, Grosse & Salakhutdinov 2016)."""

from __future__ import annotations

from dataclasses import dataclass

from pyro.infer import ELBO, RenyiELBO
from torch import Tensor

from pyro_vi_kit.core.registry import About
from pyro_vi_kit.objectives.base import Objective, log_mean_exp


@dataclass(frozen=True)
class Iwae(Objective):
    """Importance-weighted bound: rises with K from the ELBO towards the log evidence.

    E[log 1/K sum_k p(x, z_k) / q(z_k)], z_k drawn from q.

    Args:
        particles: K.

    Raises:
        OptionError: If `particles` is not positive.
    """

    name = "iwae"
    about = About(
        does="log evidence from below, the tighter the more particles",
        cost="K; needs many",
        use="a tight bound, learned models, q as a proposal",
        paper="Burda, Grosse & Salakhutdinov 2016",
    )

    particles: int = 10

    @property
    def order(self) -> float:
        """0 among the Rényi bounds."""
        return 0.0

    def bound(self, log_w: Tensor) -> Tensor:
        """Log mean weight, `[K, ...] -> [...]`, nats."""
        return log_mean_exp(log_w)

    def stock_loss(self, *, vectorize: bool = False) -> ELBO:
        """`RenyiELBO` of order 0."""
        return RenyiELBO(alpha=0, num_particles=self.particles, vectorize_particles=vectorize)
