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
# Of many rows this share may be badly approximated, which is said, and fails none of the others.
MAX_BAD_ROWS = 0.05
# Nats a latent: what a normal loses whose sd is 10 % off.
MAX_ROW_GAP = 0.01

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


def judge_rows(
    quality: Mapping[str, np.ndarray],
    rows: int,
    latents: float,
    sites: Mapping[str, np.ndarray],
    status: Status,
    guide: str,
) -> Verdict:
    """Judge a fit by the importance weights of each row, where rows have nothing in common.

    The weights of many rows jointly are uneven however well each row is approximated.

    Args:
        quality: ``elbo`` and ``log_evidence`` (nats), ``khat`` and ``ess`` (a share of the draws) of the
            rows that were looked at, `[B]` each.
        rows: How many there are.
        latents: Of each row.
        sites: Draws of the latent and deterministic sites.
        status: How the fit ended.
        guide: The guide's name, for the advice.
    """
    khat, uneven = quality["khat"], quality["ess"] < EVEN_WEIGHTS
    bad = float(np.mean((khat > MAX_KHAT) & uneven))
    unsure = float(np.mean((khat > GOOD_KHAT) & uneven))
    gap = float(np.mean(quality["log_evidence"] - quality["elbo"]))
    seen = f"{rows:,} rows" if len(khat) == rows else f"{len(khat):,} of {rows:,} rows"
    reasons = [
        f"k-hat of {seen}: median {np.median(khat):.2f}, {100 * bad:.1f} % above {MAX_KHAT} "
        "with uneven weights",
        f"rows lose {gap:.2g} nats each on average",
    ]
    finite = np.isfinite(gap) and all(np.isfinite(draws).all() for draws in sites.values())
    if bad > MAX_BAD_ROWS or not finite or status.reason == "diverged":
        level: Level = "reject"
    else:
        close = unsure <= MAX_BAD_ROWS and gap <= MAX_ROW_GAP * latents
        level = "good" if close else "resample"
    if not status.converged:
        reasons.append(f"the fit has not converged ({status.reason})")
        level = "resample" if level == "good" else level
    return Verdict(
        level, tuple(reasons), _advice_on_rows(level, guide, status), dict.fromkeys(sites, level)
    )


def _advice_on_rows(level: Level, guide: str, status: Status) -> str:
    if level == "good":
        return ""
    steps = [] if status.converged else [status.advice]
    steps.append("posterior.per_datum() says which rows.")
    if guide == "amortized":
        steps.append(
            "Try posterior.refine(), which gives each row numbers of its own, a larger encoder, or a "
            "richer local=."
        )
    elif guide in _RICHER:
        steps.append(f"Try guide={_RICHER[guide]!r}.")
    return " ".join(steps)


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
            "posterior.per_datum() for single rows, or try a larger encoder."
        )
    else:
        steps.append("Do not use it. Try a reparameterisation of the model, or vi.nuts(model).")
    return " ".join(steps)
