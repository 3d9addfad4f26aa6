"""What stands in the way of a density, whatever the guide: `vi.check` tells it, and a fit refuses it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_vi_kit.core.errors import ModelError, ShapeError
from pyro_vi_kit.core.runtime import validated_by_user, validation
from pyro_vi_kit.model.log_density.domain import ends
from pyro_vi_kit.model.log_density.enumeration import is_enumerable
from pyro_vi_kit.model.log_density.handlers import Visit, innermost
from pyro_vi_kit.model.log_density.problems import Problem
from pyro_vi_kit.model.log_density.raised import is_constant, rows
from pyro_vi_kit.model.log_density.shapes import shape_problem, unvalidated


def discrete_problem(visits: Mapping[str, Visit]) -> Problem | None:
    """Discrete latents that cannot be summed out."""
    discrete = [v for v in visits.values() if v.kind == "discrete" and not is_enumerable(v)]
    if not discrete:
        return None
    names = ", ".join(visit.name for visit in discrete)
    if all(visit.fn.has_enumerate_support for visit in discrete):
        return Problem(
            f"discrete latent site(s) {names} have batch dims that no plate made, and cannot be "
            "summed out one by one",
            "put them into a pyro.plate",
        )
    return Problem(
        f"discrete latent site(s) {names}, whose values cannot be enumerated",
        "truncate to a dist.Categorical of finitely many values, write independent sites with a "
        "pyro.plate in the place of .to_event, sum them out in the model (a pyro.factor with "
        "logsumexp), or pass a Pyro guide of your own as guide=",
    )


def latents_problem(visits: Mapping[str, Visit]) -> Problem | None:
    """Nothing to infer, or nothing that a guide can hold."""
    kinds = {visit.kind for visit in visits.values()}
    if "latent" in kinds:
        return None
    if "discrete" in kinds:
        return Problem(
            "every latent site of the model is discrete and would be summed out, so that nothing "
            "is left to fit",
            "their exact posterior needs no guide: pyro.infer.infer_discrete draws from it",
        )
    return Problem(
        "the model has no latent sites, so there is nothing to infer",
        "every pyro.sample is observed or there is none; leave obs= out where a value is unknown",
    )


def data_problem(visit: Visit, unchecked: bool | None = None) -> Problem | None:
    """NaN at an observed site, or values that its distribution cannot produce.

    Args:
        visit: The site.
        unchecked: Whether its distribution was made with ``validate_args=False``; read off it when None,
            which it says in first runs only.
    """
    value, fn = visit.value, visit.fn
    if value.is_floating_point():
        for word, found in (("NaN", value.isnan()), ("infinite value(s)", value.isinf())):
            if found.any():
                return Problem(
                    f"the data at site {visit.name!r} hold {int(found.sum())} {word}, {rows(found)}",
                    "drop the rows, or fill the values and hide them with poutine.mask or obs_mask=",
                )
    outside = _outside(visit)
    if outside is None or not bool(outside.any()):
        return None
    finite = _finite_at(visit, outside)
    if finite and (is_unchecked(visit) if unchecked is None else unchecked):
        return None
    remedy = "correct the values, or choose a distribution that can produce them"
    if finite:
        remedy += (
            "; where its formula is meant all the same, as a loss of gray pixels is, make it with "
        )
        remedy += "validate_args=False"
    return Problem(
        f"the data at site {visit.name!r} hold {int(outside.sum())} value(s) outside the support of its "
        f"{type(innermost(fn)).__name__}, {fn.support}, so that their density is zero everywhere",
        remedy,
    )


def is_unchecked(visit: Visit) -> bool:
    """Whether the user has a site unchecked, of which one of first runs is asked.

    Its distribution was made with ``validate_args=False``, or it has data outside of its support where
    the checks of all distributions are off, ``pyro.distributions.enable_validation(False)``.
    """
    if made_unchecked(visit.fn):
        return True
    outside = None if validated_by_user() or visit.kind != "observed" else _outside(visit)
    return outside is not None and bool(outside.any())


def made_unchecked(fn: Any) -> bool:
    """Whether a distribution was made with ``validate_args=False``; of one that a first run met."""
    return vars(innermost(fn)).get("_validate_args") is False


def unchecked_note(visit: Visit) -> str | None:
    """What to say of data outside a support that the model asks not to check."""
    outside = _outside(visit) if is_unchecked(visit) else None
    if outside is None or not bool(outside.any()):
        return None
    return (
        f"the data at site {visit.name!r} hold {int(outside.sum())} value(s) outside the support of its "
        f"{type(innermost(visit.fn)).__name__}; with validate_args=False, or all checks off, its "
        "formula is taken as it is, though it is no density there: evidence and predictions are not "
        "those of such data"
    )


def _outside(visit: Visit) -> Tensor | None:
    """Which observations are outside the support at any latents; None where a mask may hide them."""
    masked = isinstance(visit.mask, Tensor) or visit.mask is False
    if masked or type(visit.fn).__name__ == "MaskedDistribution":
        return None
    try:
        if _moves(visit.fn.support):
            return _beyond(visit.fn.support, visit.value)
        return ~visit.fn.support.check(visit.value)
    except (NotImplementedError, AttributeError, RuntimeError, ValueError):
        # A support that cannot say, or data of a wrong shape: that is another problem than this one.
        return None


def _beyond(support: Any, value: Tensor) -> Tensor:
    """Which values are outside of those bounds of a support that do not follow latents."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    low, high = ends(support)
    found = torch.zeros_like(value, dtype=torch.bool)
    if low is not None and not _moves(low):
        found = found | (value < low)
    return found if high is None or _moves(high) else found | (value > high)


def _moves(support: Any) -> bool:
    """Whether a support follows latents, which are leaves that require a gradient here."""
    if isinstance(support, Tensor):
        return support.requires_grad
    if isinstance(support, list | tuple):
        return any(map(_moves, support))
    return hasattr(support, "check") and any(map(_moves, vars(support).values()))


def _finite_at(visit: Visit, where: Tensor) -> bool:
    """Whether the log density is finite at these observations, without validation."""
    with validation(False), torch.no_grad():
        try:
            log_prob = unvalidated(visit.fn).log_prob(visit.value)
            return bool(log_prob.isfinite().expand(where.shape)[where].all())
        except (ValueError, RuntimeError):
            return False


def data_problems(
    visits: Mapping[str, Visit], unchecked: frozenset[str] | None = None
) -> Iterator[Problem]:
    """Observed values that are no numbers, or that cannot occur.

    Args:
        visits: The sites.
        unchecked: Those made with ``validate_args=False``; read off the visits of a first run when None.
    """
    for visit in visits.values():
        known = None if unchecked is None else visit.name in unchecked
        problem = data_problem(visit, known) if visit.kind == "observed" else None
        if problem is not None:
            yield problem


def constant_data(visits: Mapping[str, Visit]) -> list[str]:
    """Observed sites of real numbers that are all the same: a scale learned from them may go to 0."""
    return [
        visit.name
        for visit in visits.values()
        if visit.kind == "observed"
        and is_constant(visit.value)
        and not getattr(visit.fn.support, "is_discrete", False)
    ]


def shape_problems(visits: Mapping[str, Visit]) -> Iterator[Problem]:
    """Data, distributions and plates that do not agree."""
    for visit in visits.values():
        problem = shape_problem(visit)
        if problem is not None:
            yield problem


def require_usable(visits: Mapping[str, Visit], unchecked: frozenset[str] | None = None) -> None:
    """Refuse a run's sites where a density cannot hold them.

    Args:
        visits: The sites.
        unchecked: As in `data_problems`.

    Raises:
        ModelError: If there is nothing to infer, a discrete latent cannot be summed out, or data are
            no numbers or cannot occur.
        ShapeError: If data count more than once, or a site has dims that its plates do not make.
    """
    problem = discrete_problem(visits) or latents_problem(visits)
    problem = problem or next(data_problems(visits, unchecked), None)
    if problem is not None:
        raise ModelError(str(problem))
    problem = next(shape_problems(visits), None)
    if problem is not None:
        raise ShapeError(str(problem))


def minibatch_note(visits: Mapping[str, Visit], at_hand: frozenset[str]) -> str | None:
    """What to say of plates of which the arguments hold some rows."""
    frames = {f.name: f for v in visits.values() for f in v.frames if f.name in at_hand}
    if not frames:
        return None
    parts = [
        f"{f.size} of the {f.full_size} rows of plate {name!r}, which count "
        f"{(f.full_size or f.size) / f.size:g} times each"
        for name, f in frames.items()
    ]
    return f"the arguments hold {', '.join(parts)}, as in Pyro, and stand for all of them"


def require_whole_rows(visits: Mapping[str, Visit], at_hand: frozenset[str]) -> None:
    """Refuse latents of rows of which the arguments hold some: scaled, their own posteriors are none.

    Raises:
        ModelError: If there is one.
    """
    for visit in visits.values():
        frame = next((f for f in visit.frames if f.name in at_hand), None)
        if visit.kind == "latent" and frame is not None:
            raise ModelError(
                f"latent {visit.name!r} lies in plate {frame.name!r}, of whose {frame.full_size} rows "
                f"the arguments hold {frame.size}: scaled to all of them it has no posterior of its "
                "own. Pass all data as a torch.utils.data.Dataset, vi.Model(fn, dataset), read in "
                "minibatches, or write the plate as long as what it is given, "
                f"pyro.plate({frame.name!r}, len(x))"
            )
