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

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.psis import Psis
from pyro_vi_kit.posterior.diagnostics.advice import Cure, advice, advice_on_rows
from pyro_vi_kit.posterior.diagnostics.shifts import Shifts

Level = Literal["good", "resample", "reject"]

# Vehtari et al. 2024: up to here the smoothed weights of feasible numbers of draws can be trusted.
MAX_KHAT = 0.7
# Rows are not asked twice, nor by chains: of them the raw weights have to have a finite variance.
GOOD_KHAT = 0.5
# The draws are worth this share of as many of p: the weights' relative sd is 0.23, and what one draw in
# a thousand might weigh too much moves no mean by 0.1 sd.
EVEN_WEIGHTS = 0.95
# And log weights are no lower than that on average, in nats: a share of q where p has nothing makes a
# hole in the weights that the effective draws do not show.
EVEN_GAP = 0.1
# Fewer draws give a mean to no better than 0.1 sd.
MIN_ESS = 100.0
# A tenth of an sd or ten per cent is what a plot of two densities just about shows.
MAX_SHIFT = 0.1
# Half of it is no harm: where only chains can be asked, a rejection takes more than that, beyond noise.
HARMLESS_SHIFT = 0.05
# Correlation with their starts up to which chains have forgotten them: what they would still hide of a
# move is then less than half of it.
MAX_MEMORY = 0.5
# Moves are told from noise at about three standard errors where there are ten numbers or a hundred.
_FALSE_ALARM = 0.01
# Mass that searches have seen in modes that q leaves out, or weights where chains do not get away: twice
# as much moves a mean by 0.1 sd where they are two sds apart, and by more where they are further.
MAX_MISSED = 0.02
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


@dataclass(frozen=True, eq=False)
class Findings:
    """What is known about a fit, n numbers of all sites side by side.

    Attributes:
        labels: What each number is called, n of them, as ``theta[2]``.
        sites: The site of each.
        smoothed: The joint importance weights.
        gap: Nats by which the ELBO falls short of the importance-weighted evidence: KL(q || p).
        weights: How far the weights move each number.
        chains: How far the chains do; None where none were run.
        given_up: Why none were run that were asked for, one line each.
        memory: Largest correlation of the chains' ends with their starts.
        stuck: Share of the weight that is held by draws which chains could not leave.
        restarted: Whether the chains started from draws under the weights, not from draws of q.
        overflowing: Sites with draws that are not finite.
        unbounded: Why the density may have no bound, in words, where the fit is not good.
        outside: Shares of the draws that leave the domain of a distribution, by what leaves it.
        khats: Makes the k-hat of each number, `[n]`: asked where nothing else is known.
        given: Which numbers follow from the others, `[n]`: discrete ones, drawn exactly given these or
            computed of them. What may be noise is no fault of theirs.
        units: Sds that probabilities are told in, `[n]`, of indicators of states; else NaN.
    """

    labels: Sequence[str]
    sites: Sequence[str]
    smoothed: Psis
    gap: float
    weights: Shifts
    chains: Shifts | None = None
    given_up: tuple[str, ...] = ()
    memory: float = 0.0
    stuck: float = 0.0
    restarted: bool = False
    overflowing: tuple[str, ...] = ()
    unbounded: tuple[str, ...] = ()
    outside: Mapping[str, float] = field(default_factory=dict)
    khats: Callable[[], np.ndarray] | None = None
    given: np.ndarray | None = None
    units: np.ndarray | None = None

    @property
    def measured(self) -> np.ndarray:
        """Which numbers have to be shown to be right, `[n]`: all where all follow from others."""
        every = np.ones(len(self.labels), dtype=bool)
        return every if self.given is None or self.given.all() else ~self.given

    @property
    def evenness(self) -> float:
        """What the draws are worth, as a share of as many of p."""
        return self.smoothed.ess / len(self.smoothed.log_weights)

    @property
    def even(self) -> bool:
        """Whether hardly any draw carries more or less weight than the others."""
        return self.evenness >= EVEN_WEIGHTS and self.gap <= EVEN_GAP

    @property
    def trusted(self) -> bool:
        """Whether the weights can be used: beyond doubt, where no chains vouch for them."""
        khat = self.smoothed.khat + (0.0 if self.mixed else 2.0 * self.smoothed.khat_se)
        return self.smoothed.ess >= MIN_ESS and (khat <= MAX_KHAT or self.even)

    @property
    def mixed(self) -> bool:
        """Whether there are chains that have forgotten where they began, wherever there is mass."""
        forgot = self.memory <= MAX_MEMORY and self.stuck <= MAX_MISSED
        return self.chains is not None and forgot

    @property
    def contradicted(self) -> np.ndarray:
        """Of which numbers chains and weights say different things, beyond noise, `[n]`.

        Weights that are not trusted may be right where chains are wrong: these step over a needle.
        """
        if self.chains is None or not self.mixed or self.smoothed.ess < MIN_ESS:
            return np.zeros(len(self.labels), dtype=bool)
        apart = self.weights.apart(self.chains, _z(len(self.labels)))
        return apart > (MAX_SHIFT if self.trusted else HARMLESS_SHIFT)

    @property
    def moves(self) -> Shifts | None:
        """How far each number moves, by the more precise correction; None where there is none."""
        chains = self.chains if self.mixed else None
        if not self.trusted or chains is None:
            return self.weights if self.trusted else chains
        finer = self.weights.at_most(1.0) - self.weights.worst() <= (
            chains.at_most(1.0) - chains.worst()
        )
        pairs = zip(self.weights, chains, strict=True)
        return Shifts(*(np.where(finer, a, b) for a, b in pairs))


def needs_chains(smoothed: Psis, gap: float) -> bool:
    """Whether weights alone leave a doubt: they do unless they are even, and their tail is short.

    Args:
        smoothed: The joint importance weights.
        gap: Nats between evidence and ELBO.
    """
    even = smoothed.ess >= EVEN_WEIGHTS * len(smoothed.log_weights) and gap <= EVEN_GAP
    return not even or smoothed.khat > MAX_KHAT


def is_close(smoothed: Psis, gap: float) -> bool:
    """Whether more draws may decide otherwise: k-hat counts, and is within two errors of 0.7."""
    if smoothed.ess < MIN_ESS or not needs_chains(smoothed, gap):
        return False
    even = smoothed.ess >= EVEN_WEIGHTS * len(smoothed.log_weights)
    return not even and abs(smoothed.khat - MAX_KHAT) <= 2.0 * smoothed.khat_se


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
    said = advice(level, guide, status, wrong, cures, missed > MAX_MISSED)
    reasons = _reasons(found, status) + ([] if level == "good" else list(found.unbounded))
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
    good |= ~found.measured & (moves.at_least(_z(good.size)) <= MAX_SHIFT)
    if found.trusted:
        rest = np.where(found.contradicted, "reject", "resample")
        return np.where(good & ~found.contradicted, "good", rest).astype(object)
    # By chains alone. What may be their noise is no reason to reject.
    moved = moves.at_least(_z(good.size)) > HARMLESS_SHIFT
    return np.where(good, "good", np.where(moved, "reject", "resample")).astype(object)


def _z(numbers: int) -> float:
    """Standard errors that none of so many normals exceeds, but for one time in a hundred."""
    return math.sqrt(2.0 * math.log(2.0 * max(numbers, 1) / _FALSE_ALARM))


def _worst(levels: np.ndarray) -> Level:
    return max(levels.tolist(), key=LEVELS.index, default="good")


def _reasons(found: Findings, status: Status) -> list[str]:
    """The numbers, in words."""
    smoothed = found.smoothed
    error = f" (s.e. {smoothed.khat_se:.2f})" if math.isfinite(smoothed.khat) else ""
    reasons = [
        f"k-hat {smoothed.khat:.2f}{error}",
        f"importance sampling keeps {100 * found.evenness:.0f} % of the draws' worth",
        f"the ELBO is {found.gap:.2g} nats below the evidence",
    ]
    for what, share in found.outside.items():
        reasons.append(
            f"the density is zero at {100 * share:.3g} % of the draws ({what}; exp or softplus keep an "
            "argument above 0, sigmoid below 1)"
        )
    if found.overflowing:
        reasons.append(f"draws of site {found.overflowing[0]!r} are not finite")
    if found.labels and not found.overflowing:
        if found.trusted:
            reasons.append(_moves_words("resampling moves", found, found.weights))
        if found.chains is not None and found.mixed:
            which = "short chains from resampled draws" if found.restarted else "short chains"
            reasons.append(_moves_words(f"{which} move", found, found.chains))
        elif found.stuck > MAX_MISSED:
            reasons.append(
                f"short chains could not leave draws that hold {100 * found.stuck:.0f} % of the weight, "
                "so that they prove nothing"
            )
        elif found.chains is not None:
            reasons.append(
                "short chains did not forget where they began, so that they prove nothing"
            )
    if status.missed is not None and status.missed > MAX_MISSED:
        reasons.append(
            f"it leaves out modes that hold about {100 * status.missed:.0f} % of the mass by "
            "Laplace's estimate"
        )
    if not status.converged:
        reasons.append(f"the fit has not converged ({status.reason})")
    return reasons


def _moves_words(what: str, found: Findings, shifts: Shifts) -> str:
    noise = np.where(found.measured, 0.0, _z(len(found.labels)))
    i = int(shifts.at_least(noise).argmax())
    if found.units is not None and math.isfinite(found.units[i]):
        moved = abs(shifts.mean[i]) * found.units[i]
        return f"{what} the probability that {found.labels[i]} most: by {moved:.3f}"
    return (
        f"{what} {found.labels[i]!r} most: mean by {abs(shifts.mean[i]):.2f} sd, "
        f"sd by {100 * abs(math.expm1(shifts.sd[i])):.0f} %"
    )


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
        level, tuple(reasons), advice_on_rows(level, guide, status), dict.fromkeys(sites, level)
    )
