"""The evidence lower bound (Jordan et al. 1999; Kucukelbir et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_vi_kit.errors import OptionError
from pyro_vi_kit.registry import About


@dataclass(frozen=True)
class Elbo:
    """Evidence lower bound: E_q[log p(x, z) - log q(z)].

    Args:
        particles: K, draws per step; their mean is taken, so K changes the noise and not the bound.

    Raises:
        OptionError: If `particles` is not positive.
    """

    name: ClassVar[str] = "elbo"
    about: ClassVar[About] = About(
        does="log evidence minus KL(q || p): q covers one mode, too narrow",
        cost="K",
        use="the default",
        paper="Jordan et al. 1999",
    )

    particles: int = 10

    def __post_init__(self) -> None:
        require_particles(self.name, self.particles)

    @property
    def multi_sample(self) -> bool:
        """Whether the bound depends on K: its mean over particles does not."""
        return False

    @property
    def order(self) -> float:
        """1 among the Rényi bounds."""
        return 1.0

    def bound(self, log_w: Tensor) -> Tensor:
        """Mean log weight, `[K, ...] -> [...]`, nats."""
        return log_w.mean(0)

    def stock_loss(self, *, vectorize: bool = False) -> ELBO:
        """`Trace_ELBO` with as many particles."""
        return Trace_ELBO(num_particles=self.particles, vectorize_particles=vectorize)


def require_particles(name: str, particles: object) -> None:
    """Refuse a number of particles that is no positive integer."""
    if not isinstance(particles, int) or isinstance(particles, bool) or particles < 1:
        raise OptionError(f"{name}: particles must be a positive integer, got {particles!r}")
