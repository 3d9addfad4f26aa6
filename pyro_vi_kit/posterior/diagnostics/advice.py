"""What to try next: a richer guide, another way to write a site, NUTS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.guides import REGISTRY


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


def advice(
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
    spec = REGISTRY.get(guide)
    steps = [] if status.converged else [status.advice]
    if level == "resample":
        steps.append("Use posterior.resample() instead of posterior.sample().")
    else:
        steps.append("Do not use it.")
    if missed:
        steps.append(
            "A guide with one mode cannot cover several: try "
            + ("more components=" if spec and spec.covers_modes else "guide='mixture'")
            + ", or a prior that says which mode is meant."
        )
        return " ".join(steps)
    # A wrong child shows in its parent as often as in itself.
    named = [cure for cure in cures if {cure.site, *cure.parents} & set(wrong)]
    if named:
        words = str(named[0])
        steps.append(f"{words[0].upper()}{words[1:]}.")
    if spec and spec.encodes:
        steps.append(
            "The weights are of all rows jointly, and many rows make them uneven: look at "
            "posterior.per_datum() for single rows, or try a larger encoder."
        )
    elif spec and spec.richer:
        steps.append(
            f"Try guide={spec.richer!r}" + ("." if level == "resample" else ", or vi.nuts(model).")
        )
    elif level == "reject":
        other = "" if named else "a reparameterisation of the model, or "
        steps.append(f"Try {other}vi.nuts(model).")
    return " ".join(steps)


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
