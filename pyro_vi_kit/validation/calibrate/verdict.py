"""From probabilities of the truth to words: what is wrong with which site, if anything is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from pyro_vi_kit.validation.calibrate.calibration_tests import Tested, holm
from pyro_vi_kit.validation.calibrate.simulation import LOG_LIKELIHOOD, TARP

# A calibrated guide is called uncalibrated this often.
LEVEL = 0.01
# Fits that fail are not a random part of the data sets: beyond this share the others say too little.
MAX_FAILED = 0.01
JOINT = (LOG_LIKELIHOOD, TARP)
# More sites than these are counted and not named.
_NAMED = 8
_JOINT_WORDS = {
    LOG_LIKELIHOOD: "draws do not fit the data as the truth does",
    TARP: "regions of all latents jointly do not hold the truth as often as they say",
}
CALIBRATED = "calibrated"


@dataclass(frozen=True)
class CalibrationVerdict:
    """Whether a guide is calibrated on data such as the model makes.

    Attributes:
        calibrated: Whether nothing speaks against it.
        reasons: What is wrong, site by site, or what was looked at.
        advice: What to try next; empty where it is calibrated.
        sites: ``calibrated``, or what is wrong, by site.
    """

    calibrated: bool
    reasons: tuple[str, ...]
    advice: str
    sites: Mapping[str, str] = field(default_factory=dict)

    @property
    def level(self) -> str:
        """``calibrated`` or ``not calibrated``."""
        return CALIBRATED if self.calibrated else f"not {CALIBRATED}"

    def __str__(self) -> str:
        words = f"{self.level}: {'; '.join(self.reasons)}."
        return f"{words} {self.advice}" if self.advice else words


def adjusted(numbers: Mapping[str, Mapping[str, Tested]]) -> dict[str, float]:
    """p-value of each site: Bonferroni over its numbers, then Holm over the sites."""
    least = [min(1.0, len(own) * min(n.p for n in own.values())) for own in numbers.values()]
    return dict(zip(numbers, holm(np.array(least)).tolist(), strict=True))


def judge(
    numbers: Mapping[str, Mapping[str, Tested]],
    coverage: Mapping[str, float],
    done: int,
    failed: int,
    first_error: str,
    not_converged: int,
) -> CalibrationVerdict:
    """The verdict.

    Args:
        numbers: What was found of each number, by label, by site; joint quantities among the sites.
        coverage: Share of truths inside the central 90 % interval, by label.
        done: Simulations that could be ranked.
        failed: Simulations that could not.
        first_error: Why the first of these could not.
        not_converged: Fits that did not meet their stopping rule.
    """
    p = adjusted(numbers)
    sites = dict.fromkeys(numbers, CALIBRATED)
    reasons = []
    for name in sorted((n for n in numbers if p[n] <= LEVEL), key=p.__getitem__):
        label, worst = min(numbers[name].items(), key=lambda item: item[1].p)
        sites[name] = _directions(name, worst)
        if name in JOINT:
            reasons.append(f"{label}: {_JOINT_WORDS[name]} (p = {p[name]:.1g})")
        else:
            reasons.append(_reason(label, worst, coverage[label], sites[name]))
    many_failed = failed > MAX_FAILED * (done + failed)
    if failed:
        reasons.append(f"{failed} of {done + failed} fits failed (the first: {first_error})")
    if not_converged:
        reasons.append(f"{not_converged} of {done + failed} fits did not converge")
    calibrated = all(words == CALIBRATED for words in sites.values()) and not many_failed
    if calibrated:
        names = ", ".join(sites) if len(sites) <= _NAMED else f"{len(sites)} sites"
        reasons.insert(0, f"{done} simulations say nothing against {names}")
        return CalibrationVerdict(True, tuple(reasons), "", sites)
    return CalibrationVerdict(False, tuple(reasons), _advice(sites, many_failed), sites)


def in_words(site: str, number: Tested, count: int, p_site: float) -> str:
    """``calibrated``, or what is wrong with one of the ``count`` numbers of a site."""
    wrong = p_site <= LEVEL and count * number.p <= LEVEL
    return _directions(site, number) if wrong else CALIBRATED


def _directions(site: str, number: Tested) -> str:
    # Up and down mean nothing for a joint quantity.
    return "not uniform" if site in JOINT else ", ".join(number.directions(LEVEL))


def _reason(label: str, number: Tested, covered: float, directions: str) -> str:
    details = []
    if "narrow" in directions or "wide" in directions:
        factor = number.dispersion
        much = f"{1 / factor:.2f} of" if factor > 1 else f"{1 / max(factor, 1e-9):.1f} times"
        details.append(f"its sd is about {much} what it should be")
    if "biased" in directions:
        details.append(
            f"{abs(number.bias):.2f} sd too {'high' if number.bias > 0 else 'low'} on average"
        )
    details.append(f"90 % intervals cover {100 * covered:.0f} %")
    return f"{label}: {directions} ({', '.join(details)})"


def _advice(sites: Mapping[str, str], many_failed: bool) -> str:
    found = " ".join(sites.values())
    steps = []
    if "narrow" in found:
        steps.append(
            "Intervals are too narrow where a guide leaves out correlations or tails: try a richer "
            "guide ('full_rank', 'affine_coupling'), or posterior.resample()."
        )
    elif not set(sites.values()) <= {CALIBRATED}:
        steps.append(
            "Try a richer guide ('affine_coupling'), another parameterisation, or a smaller tol=."
        )
    if many_failed:
        steps.append(
            "Look at data drawn from the prior: a prior that is too wide makes data that nothing can be "
            "fitted to."
        )
    return " ".join(steps)
