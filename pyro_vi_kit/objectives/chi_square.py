"""The chi upper bound, CUBO (Dieng, Tran, Ranganath, Paisley & Blei 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.options import is_finite
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.objectives.base import log_mean_exp
from pyro_vi_kit.objectives.upper import UpperBound, require_several


@dataclass(frozen=True)
class ChiSquare(UpperBound):
    """Chi-square divergence from p to q: wide guides, whose importance weights have finite variance.

    The bound is CUBO, 1 / n log E_q[(p(x, z) / q(z))^n]: the log evidence plus log(1 + chi_n) / n,
    which is the Rényi bound of order 1 - n. It is brought down along ``sum_k v_k grad log q(z_k)``
    with weights v = softmax(n log w), its gradient as K grows.

    Args:
        n: The power of the weights, above 1: 2 for the chi-square divergence.
        particles: K, at least 2.

    Raises:
        OptionError: If n is not above 1, or `particles` below 2.
    """

    name = "chi_square"
    about = About(
        does="log evidence from above, by the chi-square divergence: q covers tails as well",
        cost="K; noisy in many dimensions",
        use="a bound on the evidence from the other side, a heavy-tailed q",
        paper="Dieng et al. 2017",
    )

    n: float = 2.0
    particles: int = 100

    def __post_init__(self) -> None:
        require_several(self.name, self.particles)
        if not is_finite(self.n) or not self.n > 1.0:
            raise OptionError(
                f"chi_square: n must be a finite number above 1, got {told(self.n)}; for n = 1 use "
                "objective='forward_kl'"
            )

    def bound(self, log_w: Tensor) -> Tensor:
        """1 / n log mean w^n, `[K, ...] -> [...]`, nats."""
        return log_mean_exp(self.n * log_w) / self.n

    @property
    def power(self) -> float:
        """N."""
        return float(self.n)
