"""A verdict in words: its reasons, and what to try next: a richer guide, another prior form, NUTS."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.guides import REGISTRY, GuideSpec
from pyro_vi_kit.posterior.diagnostics.findings import MAX_KHAT, MAX_MISSED, Findings, noise_of
from pyro_vi_kit.posterior.diagnostics.shifts import Shifts


class Cure(NamedTuple):
    """A site that could be written another way.

    Attributes:
        site: It.
        parents: Latents that its prior depends on.
        through: ``"scale"`` or ``"location"``: the parameter of the prior that does.
    """

    site: str
    parents: tuple[str, ...]
    through: str

    def __str__(self) -> str:
        names = " and ".join(repr(name) for name in self.parents)
        return (
            f"site {self.site!r} depends on {names} through its prior {self.through}: write it "
            f"non-centred, poutine.reparam(model, {{{self.site!r}: LocScaleReparam(0.0)}}) with "
            "pyro.infer.reparam"
        )


def advice_of(
    level: str,
    guide: str,
    status: Status,
    wrong: Sequence[str],
    cures: Sequence[Cure],
    missed: bool,
) -> str:
    """One to four sentences; none for a good fit.

    Args:
        level: The verdict's.
        guide: The guide's name.
        status: How the fit ended.
        wrong: Sites that are not good.
        cures: Sites that could be written another way.
        missed: Whether the guide leaves out modes that are known.
    """
    if level == "good":
        return ""
    spec = REGISTRY.get(guide)  # None for a Pyro guide of the user's
    steps = [] if status.converged else [status.advice]
    if level == "resample":
        steps.append("Use posterior.resample() instead of posterior.sample().")
    else:
        steps.append("Do not use it.")
    if missed:
        richer = "more components=" if spec and spec.covers_modes else "guide='mixture'"
        steps.append(
            f"A guide with one mode cannot cover several: try {richer}, or a prior that says which mode "
            "is meant."
        )
        return " ".join(steps)
    # A wrong child shows in its parent as often as in itself.
    named = [cure for cure in cures if {cure.site, *cure.parents} & set(wrong)]
    if named:
        words = str(named[0])
        steps.append(f"{words[0].upper()}{words[1:]}.")
    return " ".join([*steps, *_of_other_guides(level, spec, cured=bool(named))])


def _of_other_guides(level: str, spec: type[GuideSpec] | None, *, cured: bool) -> Iterator[str]:
    """What to fit in its place; ``cured`` is whether another way to write a site was named."""
    if spec and spec.encodes:
        yield (
            "The weights are of all rows jointly, and many rows make them uneven: look at "
            "posterior.per_datum() for single rows, or try a larger encoder."
        )
    elif spec and spec.richer:
        nuts = "" if level == "resample" else ", or vi.nuts(model)"
        yield f"Try guide={spec.richer!r}{nuts}."
    elif level == "reject":
        other = "" if cured else "a reparameterisation of the model, or "
        yield f"Try {other}vi.nuts(model)."


def advice_on_rows(level: str, guide: str, status: Status) -> str:
    """What to try where rows were judged one by one."""
    if level == "good":
        return ""
    steps = [] if status.converged else [status.advice]
    steps.append("posterior.per_datum() says which rows.")
    spec = REGISTRY.get(guide)
    if spec and spec.encodes:
        steps.append(
            "Try posterior.refine(), which gives each row numbers of its own, a larger encoder, or a "
            "richer local=."
        )
    elif spec and spec.richer:
        steps.append(f"Try guide={spec.richer!r}.")
    return " ".join(steps)


def reasons_of(found: Findings, status: Status) -> list[str]:
    """The numbers behind a verdict."""
    return [*_of_weights(found), *_of_moves(found), *_of_fit(status)]


def reasons_of_rows(
    khat: np.ndarray, rows: int, bad: float, gap: float, status: Status
) -> list[str]:
    """The numbers behind a verdict on rows, one by one.

    Args:
        khat: Of the rows that were looked at, `[B]`.
        rows: How many there are.
        bad: Share of them that are badly approximated.
        gap: Nats that a row loses on average.
        status: How the fit ended.
    """
    seen = f"{rows:,} rows" if len(khat) == rows else f"{len(khat):,} of {rows:,} rows"
    return [
        f"k-hat of {seen}: median {np.median(khat):.2f}, {100 * bad:.1f} % above {MAX_KHAT} "
        "with uneven weights",
        f"rows lose {gap:.2g} nats each on average",
        *([] if status.converged else [f"the fit has not converged ({status.reason})"]),
    ]


def _of_weights(found: Findings) -> Iterator[str]:
    smoothed = found.smoothed
    error = f" (s.e. {smoothed.khat_se:.2f})" if math.isfinite(smoothed.khat) else ""
    yield f"k-hat {smoothed.khat:.2f}{error}"
    yield f"importance sampling keeps {100 * found.evenness:.0f} % of the draws' worth"
    yield f"the ELBO is {found.gap:.2g} nats below the evidence"
    for what, share in found.outside.items():
        yield (
            f"the density is zero at {100 * share:.3g} % of the draws ({what}; exp or softplus keep an "
            "argument above 0, sigmoid below 1)"
        )
    if found.overflowing:
        yield f"draws of site {found.overflowing[0]!r} are not finite"


def _of_moves(found: Findings) -> Iterator[str]:
    if not found.labels or found.overflowing:
        return
    if found.trusted:
        yield _moves_words("resampling moves", found, found.weights)
    if found.chains is None:
        return
    if found.mixed:
        which = "short chains from resampled draws" if found.restarted else "short chains"
        yield _moves_words(f"{which} move", found, found.chains)
    elif found.stuck > MAX_MISSED:
        yield (
            f"short chains could not leave draws that hold {100 * found.stuck:.0f} % of the weight, "
            "so that they prove nothing"
        )
    else:
        yield "short chains did not forget where they began, so that they prove nothing"


def _of_fit(status: Status) -> Iterator[str]:
    if status.missed is not None and status.missed > MAX_MISSED:
        yield (
            f"it leaves out modes that hold about {100 * status.missed:.0f} % of the mass by "
            "Laplace's estimate"
        )
    if not status.converged:
        yield f"the fit has not converged ({status.reason})"


def _moves_words(what: str, found: Findings, shifts: Shifts) -> str:
    noise = np.where(found.measured, 0.0, noise_of(len(found.labels)))
    i = int(shifts.at_least(noise).argmax())
    if found.units is not None and math.isfinite(found.units[i]):
        moved = abs(shifts.mean[i]) * found.units[i]
        return f"{what} the probability that {found.labels[i]} most: by {moved:.3f}"
    return (
        f"{what} {found.labels[i]!r} most: mean by {abs(shifts.mean[i]):.2f} sd, "
        f"sd by {100 * abs(math.expm1(shifts.sd[i])):.0f} %"
    )
