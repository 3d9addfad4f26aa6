"""Whether to believe a fit: one word, its reasons, and what to try next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pyro_vi_kit.psis import Psis, weighted_moments
from pyro_vi_kit.types import Status

Level = Literal["good", "resample", "reject"]

# Vehtari et al. 2024: up to here the smoothed weights of feasible numbers of draws can be trusted.
MAX_KHAT = 0.7
# Below this the raw weights have a finite variance: above, how far they move a site is itself unsure.
GOOD_KHAT = 0.5
# A k-hat above these means little where hardly any draw carries more weight than the others.
EVEN_WEIGHTS = 0.95
MIN_ESS = 100.0
MAX_MEAN_SHIFT = 0.1
MAX_SD_SHIFT = 0.1

_RICHER = {
    "delta": "mean_field",
    "mean_field": "full_rank",
    "full_rank": "affine_coupling",
}


@dataclass(frozen=True)
class Verdict:
    """Whether to believe a fit.

    Attributes:
        level: ``good``; ``resample``, usable after importance resampling; ``reject``, do not use.
        reasons: The numbers behind it, in words.
        advice: What to try next, empty when good.
        sites: Level of each latent and deterministic site.
    """

    level: Level
    reasons: tuple[str, ...]
    advice: str
    sites: Mapping[str, Level] = field(default_factory=dict)

    def __str__(self) -> str:
        words = f"{self.level}: {'; '.join(self.reasons)}."
        return f"{words} {self.advice}" if self.advice else words


def judge(values: Mapping[str, np.ndarray], smoothed: Psis, status: Status, guide: str) -> Verdict:
    """Judge a fit by its importance weights and by how far they move each site.

    Args:
        values: Draws of the latent and deterministic sites from q, `[S, *shape]` by site.
        smoothed: Their smoothed importance weights.
        status: How the fit ended.
        guide: The guide's name, for the advice.
    """
    even = smoothed.ess / len(smoothed.log_weights)
    reliable = smoothed.ess >= MIN_ESS and (smoothed.khat <= MAX_KHAT or even >= EVEN_WEIGHTS)
    reasons = [
        f"k-hat {smoothed.khat:.2f}",
        f"importance sampling keeps {100 * even:.0f} % of the draws' worth",
    ]
    overflowing = [name for name, draws in values.items() if not np.isfinite(draws).all()]
    if overflowing:
        reasons.append(f"draws of site {overflowing[0]!r} are not finite")
    if not reliable or overflowing or status.reason == "diverged":
        level: Level = "reject"
        sites: dict[str, Level] = dict.fromkeys(values, level)
    else:
        shifts = {name: site_shift(draws, smoothed) for name, draws in values.items()}
        sites = {name: _site_level(*shift, smoothed.ess) for name, shift in shifts.items()}
        sure = smoothed.khat <= GOOD_KHAT or even >= EVEN_WEIGHTS
        level = "good" if sure and all(s == "good" for s in sites.values()) else "resample"
        worst = max(shifts, key=lambda name: max(shifts[name]))
        mean, sd = shifts[worst]
        reasons.append(
            f"resampling moves site {worst!r} most: mean by {mean:.2f} sd, sd by {100 * sd:.0f} %"
        )
    if not status.converged:
        reasons.append(f"the fit has not converged ({status.reason})")
        level = "resample" if level == "good" else level
    return Verdict(level, tuple(reasons), _advice(level, guide, status), sites)


def _site_level(mean_shift: float, sd_shift: float, ess: float) -> Level:
    # Two standard errors of a weighted mean, in sds; about those of a log sd as well.
    slack = 2.0 / np.sqrt(ess)
    good = mean_shift <= MAX_MEAN_SHIFT + slack and sd_shift <= MAX_SD_SHIFT + slack
    return "good" if good else "resample"


def site_shift(draws: np.ndarray, smoothed: Psis) -> tuple[float, float]:
    """How far the weights move a site: the largest move of a mean, in sds, and of an sd, relative."""
    flat = draws.reshape(len(draws), -1)
    mean, sd = weighted_moments(flat, smoothed.log_weights)
    plain_sd = flat.std(0)
    moving = plain_sd > 0
    if not moving.any():
        return 0.0, 0.0
    mean_shift = np.abs(mean - flat.mean(0))[moving] / np.maximum(sd, plain_sd)[moving]
    sd_shift = np.abs(np.log(np.maximum(sd[moving], 1e-300) / plain_sd[moving]))
    return float(mean_shift.max()), float(sd_shift.max())


def _advice(level: Level, guide: str, status: Status) -> str:
    if level == "good":
        return ""
    steps = [] if status.converged else [status.advice]
    richer = _RICHER.get(guide)
    if level == "resample":
        steps.append(
            "Use posterior.resample() instead of posterior.sample()"
            + (f", or try guide={richer!r}." if richer else ".")
        )
    elif richer:
        steps.append(
            f"Do not use it. Try guide={richer!r}, a non-centred parameterisation, or vi.nuts(model)."
        )
    elif guide == "amortized":
        steps.append(
            "The weights are of all rows jointly, and many rows make them uneven: look at "
            "posterior.infer(row) for single rows, or try a larger encoder."
        )
    else:
        steps.append("Do not use it. Try a reparameterisation of the model, or vi.nuts(model).")
    return " ".join(steps)
