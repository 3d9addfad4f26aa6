"""KL(p || q) by self-normalised importance weights (Bornschein & Bengio 2015; Gu et al. 2015)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_kit.core.registry import About
from pyro_vi_kit.objectives.upper import UpperBound, require_several


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
