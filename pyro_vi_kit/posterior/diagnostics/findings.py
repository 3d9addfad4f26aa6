"""What is known about a fit: the signals that a verdict is read off, and which of them are valid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pyro_vi_kit.core.psis import Psis
from pyro_vi_kit.posterior.diagnostics.shifts import Shifts

# Vehtari et al. 2024: up to here the smoothed weights of feasible numbers of draws can be trusted.
MAX_KHAT = 0.7
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
        apart = self.weights.apart(self.chains, noise_of(len(self.labels)))
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


def noise_of(numbers: int) -> float:
    """Standard errors that none of so many normals exceeds, but for one time in a hundred."""
    return math.sqrt(2.0 * math.log(2.0 * max(numbers, 1) / _FALSE_ALARM))
