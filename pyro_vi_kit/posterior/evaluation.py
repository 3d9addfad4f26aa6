"""Draws from q with their importance weights, made once and read by every diagnostic."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from pyro_vi_kit.core.psis import Psis, psis, usable
from pyro_vi_kit.core.runtime import seed_of
from pyro_vi_kit.core.work import marginal_work, work_of
from pyro_vi_kit.posterior.approximation import Approximation
from pyro_vi_kit.posterior.diagnostics.findings import is_close

_MAX_DRAWS = 4000
# Where the call is close, and the draws all together put out no more numbers than a second's worth.
_MORE_DRAWS = (16_000, 64_000)
_WORK = 300_000_000
# The first draws of a slow density: some twenty seconds (2.4 ns a number on Pyro's HMM examples).
_FIRST_WORK = 10_000_000_000
_MAY_BE_SLOW = 10_000
_MIN_DRAWS = 200
_NUMBERS = 200_000_000

Named = Callable[[Mapping[str, Tensor]], dict[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What draws of q say about it.

    Attributes:
        values: Latent and deterministic sites, `{site: [S, *shape]}`.
        log_weights: log p(x, z) - log q(z), `[S]`, nats; None for a point estimate.
        smoothed: The Pareto-smoothed weights; None for a point estimate.
        outside: Shares of draws that leave the domain of a distribution, by what leaves it, in words.
    """

    values: dict[str, np.ndarray]
    log_weights: np.ndarray | None
    smoothed: Psis | None
    outside: Mapping[str, float] = field(default_factory=dict)

    @property
    def elbo(self) -> float | None:
        """Mean log weight, nats."""
        return None if self.log_weights is None else float(self.log_weights.mean())

    @property
    def elbo_se(self) -> float | None:
        """Standard error of the mean log weight, nats."""
        if self.log_weights is None:
            return None
        with np.errstate(invalid="ignore"):  # a draw without weight has no finite error
            return float(self.log_weights.std(ddof=1) / np.sqrt(len(self.log_weights)))

    @property
    def gap(self) -> float:
        """Nats by which the ELBO falls short of the importance-weighted evidence: KL(q || p)."""
        return gap_of(self.log_weights, self.smoothed)

    def attrs(self) -> dict[str, float]:
        """What an exported file says of it; nothing for a point estimate."""
        smoothed = self.smoothed
        if self.elbo is None or self.elbo_se is None or smoothed is None:
            return {}
        return {
            "khat": smoothed.khat,
            "khat_se": smoothed.khat_se,
            "ess": smoothed.ess,
            "ess_of_draws": len(smoothed.log_weights),
            "elbo": self.elbo,
            "elbo_se": self.elbo_se,
            "log_evidence": smoothed.log_mean_weight,
            "log_evidence_se": smoothed.log_mean_weight_se,
        }


def evaluate(approximation: Approximation, named: Named) -> Evaluation:
    """Draw from q and weigh: 4,000 draws, fewer of large or slow ones, more where the call is close.

    More are 16,000 and then 64,000, while k-hat is within two standard errors of where it matters, and
    where the density is cheap.

    Args:
        approximation: The trained guide.
        named: Brings values into each site's own shape.
    """
    draws = _first(approximation)
    if approximation.point:
        return Evaluation(named(approximation.draw(draws, _seed(0))), None, None)
    values, log_w = _weighed(approximation, named, draws, _seed(0))
    smoothed = smooth(log_w)
    for total in _MORE_DRAWS:
        if not is_close(smoothed, gap_of(log_w, smoothed)) or total > _affordable(approximation):
            break
        more, more_log_w = _weighed(approximation, named, total - len(log_w), _seed(total))
        values = {name: np.concatenate([part, more[name]]) for name, part in values.items()}
        log_w = np.concatenate([log_w, more_log_w])
        smoothed = smooth(log_w)
    outside = {} if np.isfinite(log_w).all() else approximation.outside(len(log_w), _seed(0))
    return Evaluation(values, log_w, smoothed, outside)


def _seed(number: int) -> int:
    """Of draws that no fit was trained on, and that `sample` gives for no seed."""
    return seed_of(0, "evaluation", number)


def gap_of(log_w: np.ndarray | None, smoothed: Psis | None) -> float:
    """Nats between the importance-weighted evidence and the ELBO; infinite where either is not known."""
    if log_w is None or smoothed is None or not np.isfinite(log_w).all():
        return np.inf
    return float(smoothed.log_mean_weight - log_w.mean())


def _weighed(
    approximation: Approximation, named: Named, draws: int, seed: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Draws by site, and their log weights."""
    values, weighed = approximation.draw_and_weigh(draws, seed)
    return named(values), weighed.log_weights


def _first(approximation: Approximation) -> int:
    """How many draws are made in any case."""
    numbers = max(approximation.cost, 1)
    draws = min(_MAX_DRAWS, max(_MIN_DRAWS, _NUMBERS // numbers))
    if approximation.point or numbers <= _MAY_BE_SLOW:
        return draws
    work = marginal_work(lambda points: approximation.draw_and_weigh(points, _seed(0)))
    return min(draws, max(_MIN_DRAWS, _FIRST_WORK // work))


def _affordable(approximation: Approximation) -> int:
    """How many draws there is time for."""
    few = 4
    if approximation.cost > _NUMBERS // _MORE_DRAWS[0]:
        return 0
    return int(few * _WORK / work_of(lambda: approximation.draw_and_weigh(few, _seed(0))))


def smooth(log_w: np.ndarray) -> Psis:
    """Pareto-smoothed weights, also where the fit went wrong.

    With no weight left there is nothing to smooth: k-hat is infinite, and the draws are worth nothing.

    Args:
        log_w: Raw log weights, `[S]`, nats.
    """
    weights = usable(log_w)
    if np.isfinite(weights).any():
        return psis(weights)
    nothing = np.full(len(log_w), -np.log(len(log_w)))
    return Psis(nothing, khat=np.inf, ess=0.0, log_mean_weight=-np.inf, log_mean_weight_se=np.inf)
