"""Whether to believe a fit: one word, its reasons, and what to try next.

The question is whether means and sds of q are those of the posterior. Two corrections that fail in
different ways answer it.

- **Importance weights** (PSIS). Exact where q has draws, and blind elsewhere. They are trusted up to
  k-hat 0.7, or where they are nearly even: then there is no tail worth fitting, and a near-perfect fit
  can show a k-hat of 1.
- **Short Hamiltonian chains** from draws of q (`chains.py`). They go where the posterior has mass, and
  say something once they have forgotten where they began. They are run unless the weights are both even
  and of small k-hat: a q that is proportional to p where it goes has left out only what is not
  connected with that, and there chains do not go either.

Each number (an element of a site) is judged by the more precise of the two:

- **good**: no mean moves by over 0.1 sd and no sd by over 10 %, one standard error included.
- **resample**: something moves, but the weights are trusted and lead where the chains lead.
- **reject**: something moves and the weights cannot mend it, or the two contradict each other.

Where the two say different things, chains start again from draws under the weights: they may not have
come back from far out, or have stepped over a needle that the weights have seen.

What neither sees are modes that q leaves out. Those that the searches for a start have found are asked
about (`Status.missed`); one that nobody found is not known to anybody.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.posterior.diagnostics.findings import (
    EVEN_WEIGHTS,
    HARMLESS_SHIFT,
    MAX_KHAT,
    MAX_MISSED,
    MAX_SHIFT,
    Findings,
    noise_of,
)
from pyro_vi_kit.posterior.diagnostics.wording import (
    Cure,
    advice_of,
    advice_on_rows,
    reasons_of,
    reasons_of_rows,
)

Level = Literal["good", "resample", "reject"]

# Rows are not asked twice, nor by chains: of them the raw weights have to have a finite variance.
GOOD_KHAT = 0.5
# Of many rows this share may be badly approximated, which is said, and fails none of the others.
MAX_BAD_ROWS = 0.05
# Nats a latent: what a normal loses whose sd is 10 % off.
MAX_ROW_GAP = 0.01
LEVELS: tuple[Level, ...] = ("good", "resample", "reject")


@dataclass(frozen=True)
class Verdict:
    """Whether to believe a fit.

    Attributes:
        level: ``good``; ``resample``, usable after importance resampling; ``reject``, do not use.
        reasons: The numbers behind it, in words.
        advice: What to try next, empty when good.
        sites: Level of each latent and deterministic site: that of its worst number.
    """

    level: Level
    reasons: tuple[str, ...]
    advice: str
    sites: Mapping[str, Level] = field(default_factory=dict)

    def __str__(self) -> str:
        words = f"{self.level}: {'; '.join(self.reasons)}."
        return f"{words} {self.advice}" if self.advice else words


def judge(
    found: Findings, status: Status, guide: str, cures: Sequence[Cure] = ()
) -> tuple[Verdict, np.ndarray]:
    """Judge a fit, and each of its numbers.

    Args:
        found: What is known about it.
        status: How the fit ended.
        guide: The guide's name, for the advice.
        cures: Sites of the model that could be written another way.

    Returns:
        The verdict, and the level of each number, `[n]`.
    """
    ruined = bool(found.overflowing) or status.reason == "diverged"
    levels, measured = _levels(found), found.measured
    if found.moves is None:
        levels[~measured] = _worst(levels[measured])
    if ruined:
        levels[:] = "reject"
    missed = status.missed or 0.0
    level = _worst(levels) if found.moves is not None and not ruined else "reject"
    if missed > MAX_MISSED:
        level = "reject"
    if not status.converged and level == "good":
        level = "resample"
    sites: dict[str, Level] = {
        name: _worst(levels[np.array(found.sites) == name]) for name in dict.fromkeys(found.sites)
    }
    wrong = [name for name, site in sites.items() if site != "good"]
    said = advice_of(level, guide, status, wrong, cures, missed > MAX_MISSED)
    reasons = reasons_of(found, status) + ([] if level == "good" else list(found.unbounded))
    return Verdict(level, tuple(reasons), said, sites), levels


def _levels(found: Findings) -> np.ndarray:
    """The level of each number, `[n]`."""
    moves = found.moves
    if moves is None:
        # Nothing can be relied on; the smoothed weights tell where at least no harm shows.
        khats = np.full(len(found.labels), np.inf) if found.khats is None else found.khats()
        well = (khats <= MAX_KHAT) & (found.weights.at_most(1.0) <= MAX_SHIFT)
        return np.where(well, "good", "reject").astype(object)
    good = moves.at_most(1.0) <= MAX_SHIFT
    good |= ~found.measured & (moves.at_least(noise_of(good.size)) <= MAX_SHIFT)
    if found.trusted:
        rest = np.where(found.contradicted, "reject", "resample")
        return np.where(good & ~found.contradicted, "good", rest).astype(object)
    # By chains alone. What may be their noise is no reason to reject.
    moved = moves.at_least(noise_of(good.size)) > HARMLESS_SHIFT
    return np.where(good, "good", np.where(moved, "reject", "resample")).astype(object)


def _worst(levels: np.ndarray) -> Level:
    return max(levels.tolist(), key=LEVELS.index, default="good")


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
    finite = np.isfinite(gap) and all(np.isfinite(draws).all() for draws in sites.values())
    if bad > MAX_BAD_ROWS or not finite or status.reason == "diverged":
        level: Level = "reject"
    else:
        close = unsure <= MAX_BAD_ROWS and gap <= MAX_ROW_GAP * latents
        level = "good" if close else "resample"
    if not status.converged and level == "good":
        level = "resample"
    reasons = reasons_of_rows(khat, rows, bad, gap, status)
    said = advice_on_rows(level, guide, status)
    return Verdict(level, tuple(reasons), said, dict.fromkeys(sites, level))
