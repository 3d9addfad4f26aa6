"""The tail-adaptive f-divergence (Wang, Liu & Liu 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.options import is_finite
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.pyro_guide import Guide
from pyro_vi_kit.objectives.base import Objective, log_mean_exp
from pyro_vi_kit.objectives.upper import require_apart, require_several


@dataclass(frozen=True)
class TailAdaptive(Objective):
    """Divergence that weighs draws by the ranks of their weights: wide guides, at any tail.

    Of each draw the slope d log w_k / dz_k counts gamma_k = F_k^beta, normalised over the draws, where
    F_k is the share of draws whose weight is at least w_k (Algorithm 1). With beta = -1 the largest of K
    weights counts K times as much as the smallest, however large it is: q covers the tails of p, and no
    moment of the weights has to exist, as it has for `forward_kl` and `chi_square`.

    The divergence is that of the f with f''(t) t^2 = gamma at weight t, which changes with q. What is
    reported, and compared, is the log evidence by importance weights less the divergence with the
    guide's own f; for beta = 0 that is the ELBO. The model's own parameters go up the ELBO.

    Args:
        beta: The power of the tail's probability, at most 0: at 0 the ELBO, and the lower, the wider q.
        particles: K, at least 2.

    Raises:
        OptionError: If beta is no finite number up to 0, or `particles` below 2.
    """

    name = "tail_adaptive"
    about = About(
        does="log evidence from below, by a divergence that ranks the weights: q covers tails",
        cost="K, and a sort",
        use="a wide q where the tails of weights are too heavy for forward_kl and chi_square",
        paper="Wang, Liu & Liu 2018",
    )

    beta: float = -1.0
    particles: int = 100

    def __post_init__(self) -> None:
        require_several(self.name, self.particles)
        if not is_finite(self.beta) or self.beta > 0.0:
            raise OptionError(
                f"tail_adaptive: beta must be a finite number of at most 0, got {told(self.beta)}; "
                "that of the paper is -1"
            )

    @property
    def has_surrogate(self) -> bool:
        """The loss differentiates the mean log weight."""
        return True

    @property
    def estimators(self) -> tuple[str, ...]:
        """Only ``dreg``: gradients are those of log w in the draws alone, at constant parameters."""
        return ("dreg",)

    def bound(self, log_w: Tensor) -> Tensor:
        """Log mean weight less the divergence of these draws, `[K, ...] -> [...]`, nats."""
        level = log_mean_exp(log_w)
        found = level - self.divergence(log_w - level)
        # As of the ELBO: a draw where the posterior has no density.
        return torch.where(log_w.amin(0) == -inf, -inf, found)

    def surrogate_bound(self, log_w: Tensor) -> Tensor:
        """Mean log weight, `[K, ...] -> [...]`, nats."""
        return log_w.mean(0)

    def path(self, log_w: Tensor) -> Tensor:
        """K gamma_k, normalised, `[K, ...]`: the surrogate bound has 1 / K for each draw."""
        rows = log_w.movedim(0, -1).contiguous()
        below = torch.searchsorted(rows.sort(-1).values, rows).movedim(-1, 0)
        gamma = (1.0 - below.to(log_w) / len(log_w)) ** self.beta
        return gamma / gamma.mean(0)

    def divergence(self, log_t: Tensor) -> Tensor:
        """Mean of f(t) for the f that goes with these draws, `[K, ...] -> [...]`, nats.

        With f(1) = f'(1) = 0 it is the integral over u of gamma(u) / u^2 times E (u - t)_+ below 1 and
        E (t - u)_+ above, and gamma is constant between neighbours.

        Args:
            log_t: Logs of weights whose mean is 1.
        """
        s, count = log_t.sort(0).values, len(log_t)
        ranks = torch.arange(1, count, dtype=s.dtype, device=s.device)
        ranks = ranks.reshape(-1, *(1,) * (s.dim() - 1))
        # Behind so many draws, of the interval up to the next one.
        gamma = (1.0 - ranks / count) ** self.beta
        scale = (gamma.sum(0) + 1.0) / count
        log_sum = torch.logcumsumexp(s, 0)[:-1]
        rest = (count - log_sum.exp()).clamp_min(0.0)
        low, high = s[:-1].clamp_max(0.0), s[1:].clamp_max(0.0)
        below = ranks * (high - low) + (log_sum - high).exp() - (log_sum - low).exp()
        low, high = s[:-1].clamp_min(0.0), s[1:].clamp_min(0.0)
        above = rest * ((-low).exp() - (-high).exp()) - (count - ranks) * (high - low)
        return (gamma * (below + above)).sum(0) / (count * scale)

    def require(self, guide: Guide) -> None:
        """Refuse draws without a derivative, and globals that meet local latents."""
        if not guide.reparameterised or guide.scored or guide.relaxed:
            raise OptionError(
                "objective 'tail_adaptive' goes along the derivatives of draws, which some of this "
                "guide's do not have: use objective='forward_kl', or leave discrete= out"
            )
        require_apart(self.name, guide)

    def stock_loss(self, *, vectorize: bool = False) -> ELBO:
        """There is none: `TraceTailAdaptive_ELBO` weighs by the order that sorts draws, not by ranks.

        Raises:
            OptionError: Always.
        """
        raise OptionError(
            "objective 'tail_adaptive' has no right loss in stock Pyro, whose TraceTailAdaptive_ELBO "
            "takes the order that sorts the weights for their ranks: leave engine= out with a guide of "
            "this package, or use objective='iwae'"
        )
