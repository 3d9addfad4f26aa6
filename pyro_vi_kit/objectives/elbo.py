"""The evidence lower bound (Jordan et al. 1999; Kucukelbir et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_vi_kit.core.registry import About
from pyro_vi_kit.objectives.base import Objective, leave_one_out_mean


@dataclass(frozen=True)
class Elbo(Objective):
    """Evidence lower bound: E_q[log p(x, z) - log q(z)].

    Args:
        particles: K, draws per step; their mean is taken, so K changes the noise and not the bound.

    Raises:
        OptionError: If `particles` is not positive.
    """

    name = "elbo"
    about = About(
        does="log evidence from below, by KL(q || p): q covers one mode, too narrow",
        cost="K",
        use="the default",
        paper="Jordan et al. 1999",
    )

    particles: int = 10

    @property
    def is_elbo(self) -> bool:
        """It is."""
        return True

    @property
    def order(self) -> float:
        """1 among the Rényi bounds."""
        return 1.0

    def bound(self, log_w: Tensor) -> Tensor:
        """Mean log weight, `[K, ...] -> [...]`, nats."""
        return log_w.mean(0)

    def score(self, log_w: Tensor) -> Tensor:
        """Each log weight less the mean of the others, over K: `[K, ...]`, the first of two terms.

        The second has mean zero, and is noise.
        """
        return leave_one_out_mean(log_w)

    def stock_loss(self, *, vectorize: bool = False) -> ELBO:
        """`Trace_ELBO` with as many particles."""
        return Trace_ELBO(num_particles=self.particles, vectorize_particles=vectorize)
