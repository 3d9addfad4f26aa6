"""Upper bounds, brought down by self-normalised importance weights.

KL(p || q) and the chi-square divergence are expectations under the posterior, of which there are only
weighted draws of q (Bornschein & Bengio 2015; Gu, Ghahramani & Turner 2015; Tucker et al. 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.options import is_finite
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.pyro_guide import Guide
from pyro_vi_kit.objectives.base import Objective, log_mean_exp, no_stock_loss, require_particles


class UpperBound(Objective):
    """An upper bound that is brought down along self-normalised weights v = softmax(n log w).

    The gradient is that of the divergence itself as K grows, and not that of the bound's estimate from K
    draws, which falls for ever as the guide collapses to a point. So there is no ``pathwise``.

    - ``score`` fits log q to the draws as weighted (the wake phase of reweighted wake-sleep): the
      mean of ``sum_k (v_k - 1 / K) grad log q(z_k)``, times (n - 1) / n for n > 1. The 1 / K has
      mean zero and takes all noise away where q is the posterior.
    - ``dreg`` has the same mean (Tucker et al. 2019, section 6), with ``n (v_k - v_k^2)`` at each draw.

    The model's own parameters go up the importance-weighted bound ("wake-wake").
    """

    @property
    def power(self) -> float:
        """N."""
        return 1.0

    @property
    def upper(self) -> bool:
        """An upper bound."""
        return True

    @property
    def estimators(self) -> tuple[str, ...]:
        """Those that are a reparameterisation of each other."""
        return ("dreg", "score")

    def surrogate_bound(self, log_w: Tensor) -> Tensor:
        """The importance-weighted bound, `[K, ...] -> [...]`, nats."""
        return log_mean_exp(log_w)

    def look(self, log_w: Tensor) -> Tensor:
        """The importance-weighted bound less the gap to the upper one, `[K, ...] -> [...]`, nats.

        The upper bound alone would find a guide good whose draws all miss the posterior.
        """
        return 2.0 * log_mean_exp(log_w) - self.bound(log_w)

    def path(self, log_w: Tensor) -> Tensor:
        """What the surrogate bound's gradient at each draw lacks, `[K, ...]`."""
        n = self.power
        rest = 1.0 - torch.softmax(n * log_w, 0)
        if n == 1.0:
            return rest
        # v_k / w~_k in logs: both may be too small for a number.
        ratio = (n - 1.0) * log_w + torch.logsumexp(log_w, 0) - torch.logsumexp(n * log_w, 0)
        return n * self._rate * ratio.exp() * rest

    def score(self, log_w: Tensor) -> Tensor:
        """Self-normalised weights less their mean, `[K, ...]`."""
        return self._rate * (torch.softmax(self.power * log_w, 0) - 1.0 / len(log_w))

    def require(self, guide: Guide) -> None:
        """Refuse a guide whose globals meet local latents."""
        require_apart(self.name, guide)

    def stock_loss(self, *, vectorize: bool = False) -> ELBO:
        """There is none.

        Raises:
            OptionError: Always.
        """
        raise no_stock_loss(self.name, "objective='iwae'")

    @property
    def _rate(self) -> float:
        """1, or (n - 1) / n where w^n is not the posterior's own weight."""
        n = self.power
        return 1.0 if n == 1.0 else (n - 1.0) / n


@dataclass(frozen=True)
class ForwardKl(UpperBound):
    """Forward KL(p || q): covers all mass of the posterior, where the ELBO seeks a mode.

    The bound is E_p[log p(x, z) - log q(z)], the log evidence plus KL(p || q), by importance weights.
    Gaussian guides of a model without learned parameters are fitted by matching weighted moments, all
    others by steps along ``sum_k w~_k grad log q(z_k)``.

    Args:
        particles: K, at least 2.

    Raises:
        OptionError: If `particles` is below 2.
    """

    name = "forward_kl"
    about = About(
        does="log evidence from above, by KL(p || q): q covers all of p",
        cost="K; weights must not be too uneven",
        use="a proposal for importance sampling; error bars that are never too short",
        paper="Bornschein & Bengio 2015",
    )

    matches_moments = True

    particles: int = 100

    def __post_init__(self) -> None:
        require_several(self.name, self.particles)

    def bound(self, log_w: Tensor) -> Tensor:
        """Mean log weight under self-normalised weights, `[K, ...] -> [...]`, nats."""
        shares = torch.softmax(log_w, 0)
        return torch.where(shares > 0.0, shares * log_w, torch.zeros_like(log_w)).sum(0)


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


def require_apart(name: str, guide: Guide) -> None:
    """Refuse a guide whose globals meet local latents: draws are weighed against each other."""
    local = [plate.name for _, plate in guide.local_blocks]
    if local and guide.shared_block is not None:
        raise OptionError(
            f"objective {name!r} weighs draws against each other, and all draws of plate "
            f"{local[0]!r} share one draw of the globals: use objective='iwae', or a guide with one "
            "block for all latents, such as 'full_rank'"
        )


def require_several(name: str, particles: object) -> None:
    """Refuse fewer than two particles, which have no weights against each other."""
    require_particles(name, particles)
    if particles == 1:
        raise OptionError(f"{name}: particles must be at least 2: one draw has no relative weight")
