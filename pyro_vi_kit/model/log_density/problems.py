"""What makes a model unusable, whatever the guide: each in words that name the site, with the remedy.

`vi.check` tells them all, and a `Density` refuses the first; both read the same first runs.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_vi_kit.core.errors import ModelError, ShapeError
from pyro_vi_kit.core.runtime import broadcast_shapes, validated_by_user, validation
from pyro_vi_kit.model.log_density.batching import agree
from pyro_vi_kit.model.log_density.raised import Problem, rows
from pyro_vi_kit.model.log_density.structure import FirstRuns
from pyro_vi_kit.model.log_density.supports import ends, innermost, of_one_number
from pyro_vi_kit.model.log_density.visits import Visit

Visits = Mapping[str, Visit]
Shape = tuple[int, ...]


def require(found: FirstRuns) -> None:
    """Refuse what no density can be of.

    Raises:
        ModelError: If the model raises, or has one of the `PROBLEMS`.
        OptionError: If discrete latents are named that it does not have.
    """
    if found.error is not None:
        raise found.error from found.error.__cause__
    if found.runner.drawn is not None:
        found.runner.drawn.require_known(v.name for v in found.visits.values() if v.has_states)
    for problems in PROBLEMS.values():
        _require_none(problems(found))


def require_usable(visits: Visits, unchecked: frozenset[str]) -> None:
    """Refuse sites of another run where a density cannot hold them; see `data_problems`.

    Raises:
        ModelError: If data are no numbers or cannot occur.
        ShapeError: If data count more than once.
    """
    _require_none(data_problems(visits, unchecked))
    _require_none(shape_problems(visits))


def _require_none(problems: Iterator[Problem]) -> None:
    for problem in problems:
        raise problem.error(str(problem))


# -- sites and their structure ----------------------------------------------------------------------


def structure_problems(found: FirstRuns) -> Iterator[Problem]:
    """How the sites of two runs at different latents differ."""
    second = found.visits
    for first in (run.visits for run in found.runs[:-1]):
        if list(first) != list(second):
            changed = sorted(set(first) ^ set(second)) or list(second)
            yield Problem(
                "the model's structure changes with its latents' values, site(s) "
                f"{', '.join(changed)} are not met in every run",
                "write the choice as a mixture, a mask or torch.where, or pass a Pyro guide of your "
                "own as guide= with engine='pyro'",
            )
            return
        for name, visit in second.items():
            if first[name].value.shape != visit.value.shape:
                yield Problem(
                    f"site {name!r} has shape {tuple(first[name].value.shape)} in one run and "
                    f"{tuple(visit.value.shape)} in the next",
                    "shapes must not depend on latents; use a fixed size and mask what is not needed",
                )
                return


def chance_problems(found: FirstRuns, *, thorough: bool = True) -> Iterator[Problem]:
    """A site that differs between two runs; looked for in any case, or only where numbers are drawn."""
    if (thorough or found.drew) and found.changing is not None:
        yield changing_problem(found.changing)


def changing_problem(name: str) -> Problem:
    """A site that is another one when the model is run again at the same latents."""
    return Problem(
        f"the model is not deterministic, site {name!r} differs between two runs at the "
        "same latents: it draws random numbers outside its sample sites (torch.randn, "
        "NumPy's or Python's random, dropout in training mode), or reads the time or what "
        "it has changed itself",
        "make each draw a pyro.sample site, call module.eval() first, and pass everything "
        "else as an argument",
    )


def support_problems(found: FirstRuns) -> Iterator[Problem]:
    """Nothing to infer, nothing that a guide can hold, or latents without a bijector."""
    kinds = {visit.kind for visit in found.visits.values()}
    if "latent" not in kinds and "discrete" in kinds:
        yield Problem(
            "every latent site of the model is discrete and would be summed out, so that nothing "
            "is left to fit",
            "their exact posterior needs no guide: pyro.infer.infer_discrete draws from it",
        )
    elif "latent" not in kinds:
        yield Problem(
            "the model has no latent sites, so there is nothing to infer",
            "every pyro.sample is observed or there is none; leave obs= out where a value is unknown",
        )
    for error in found.unmapped:
        what, _, remedy = str(error).partition(". ")
        yield Problem(what, remedy[:1].lower() + remedy[1:].rstrip("."))


def discrete_problems(found: FirstRuns) -> Iterator[Problem]:
    """Discrete latents that cannot be summed out."""
    discrete = [visit for visit in found.of_kind("discrete") if not _is_enumerable(visit)]
    names = ", ".join(visit.name for visit in discrete)
    if discrete and all(visit.fn.has_enumerate_support for visit in discrete):
        yield Problem(
            f"discrete latent site(s) {names} have batch dims that no plate made, and cannot be "
            "summed out one by one",
            "put them into a pyro.plate",
        )
    elif discrete:
        yield Problem(
            f"discrete latent site(s) {names}, whose values cannot be enumerated",
            "truncate to a dist.Categorical of finitely many values, write independent sites with a "
            "pyro.plate in the place of .to_event, sum them out in the model (a pyro.factor with "
            "logsumexp), or pass a Pyro guide of your own as guide=",
        )


def _is_enumerable(visit: Visit) -> bool:
    """Whether a discrete latent has finitely many values, each in its own plates."""
    return bool(visit.fn.has_enumerate_support) and not _stray(visit, tuple(visit.fn.batch_shape))


def stream_problems(found: FirstRuns) -> Iterator[Problem]:
    """Why the batches of a streamed model do not stand for all data."""
    try:
        _ = found.streamed
    except ModelError as error:
        yield Problem.of(error)


# -- data -----------------------------------------------------------------------------------------


def data_problems(visits: Visits, unchecked: frozenset[str] | None = None) -> Iterator[Problem]:
    """Observed values that are no numbers, or that cannot occur.

    Args:
        visits: The sites.
        unchecked: Those made with ``validate_args=False``; read off their distributions when None, which
            say it in first runs only.
    """
    for visit in visits.values():
        if visit.kind == "observed":
            found = is_unchecked(visit) if unchecked is None else visit.name in unchecked
            problem = _not_finite(visit) or _impossible(visit, found)
            if problem is not None:
                yield problem


def _not_finite(visit: Visit) -> Problem | None:
    value = visit.value
    if not value.is_floating_point():
        return None
    for word, found in (("NaN", value.isnan()), ("infinite value(s)", value.isinf())):
        if found.any():
            return Problem(
                f"the data at site {visit.name!r} hold {int(found.sum())} {word}, {rows(found)}",
                "drop the rows, or fill the values and hide them with poutine.mask or obs_mask=",
            )
    return None


def _impossible(visit: Visit, unchecked: bool) -> Problem | None:
    outside = _outside(visit)
    if outside is None or not bool(outside.any()):
        return None
    finite = _finite_at(visit, outside)
    if finite and unchecked:
        return None
    remedy = "correct the values, or choose a distribution that can produce them"
    if finite:
        remedy += (
            "; where its formula is meant all the same, as a loss of gray pixels is, make it with "
            "validate_args=False"
        )
    return Problem(
        f"{_data_outside(visit, outside)}, {visit.fn.support}, so that their density is zero "
        "everywhere",
        remedy,
    )


def unchecked_notes(visits: Visits) -> Iterator[str]:
    """What to say of data outside a support that the model asks not to check."""
    for visit in visits.values():
        outside = None
        if visit.kind == "observed" and is_unchecked(visit):
            outside = _outside(visit)
        if outside is not None and bool(outside.any()):
            yield (
                f"{_data_outside(visit, outside)}; with validate_args=False, or all checks off, its "
                "formula is taken as it is, though it is no density there: evidence and predictions "
                "are not those of such data"
            )


def _data_outside(visit: Visit, outside: Tensor) -> str:
    return (
        f"the data at site {visit.name!r} hold {int(outside.sum())} value(s) outside the support of its "
        f"{type(innermost(visit.fn)).__name__}"
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
    low, high = ends(of_one_number(support))
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
            log_prob = _unvalidated(visit.fn).log_prob(visit.value)
            return bool(log_prob.isfinite().expand(where.shape)[where].all())
        except (ValueError, RuntimeError):
            return False


def _unvalidated(fn: Any) -> Any:
    """A copy of a distribution that checks no value; what was expanded while checks were on does."""
    fn = copy.copy(fn)
    # First: an Independent hands the switch on to its base, which would be the original's.
    if isinstance(fn, TorchDistributionMixin) and hasattr(fn, "base_dist"):
        fn.base_dist = _unvalidated(fn.base_dist)
    fn._validate_args = False
    return fn


# -- shapes and plates: what broadcasts by mistake counts data repeatedly -----------------------------


def shape_problems(visits: Visits) -> Iterator[Problem]:
    """Data that do not fit or count more than once, or batch dims beyond the plates around a site.

    The latter is what Pyro's own SVI refuses, and a site in no plate is left to `plateless_problems`:
    whatever its batch dims mean, each of its numbers counts once.
    """
    for visit in visits.values():
        if visit.kind == "observed":
            problem = _data_shape_problem(visit)
        elif visit.kind in ("latent", "discrete"):
            problem = _wide_problem(visit, tuple(visit.fn.batch_shape), tuple(visit.fn.shape()))
        else:
            continue
        if problem is not None:
            yield problem._replace(error=ShapeError)


def _data_shape_problem(visit: Visit) -> Problem | None:
    try:
        with validation(False), torch.no_grad():
            terms = tuple(replace(visit, fn=_unvalidated(visit.fn)).log_prob().shape)
    except (RuntimeError, ValueError, IndexError):
        return _unequal_problem(visit)
    shape = tuple(broadcast_shapes(terms, visit.fn.batch_shape))
    return _repeated_problem(visit, terms) or _wide_problem(visit, terms, shape)


def plateless_problems(visits: Visits) -> Iterator[Problem]:
    """Batch dims that no plate made, of latents and then of data."""
    for visit in sorted(visits.values(), key=lambda visit: visit.kind):
        batch = tuple(visit.fn.batch_shape)
        stray = _stray(visit, batch) if visit.kind in ("latent", "observed") else []
        if stray:
            sizes = ", ".join(f"dim {d} of size {batch[d]}" for d in stray)
            yield Problem(
                f"site {visit.name!r} has batch dims that no plate made ({sizes})",
                "put the site into a pyro.plate if they are independent, or declare them .to_event(1)",
            )


def _stray(visit: Visit, shape: Shape) -> list[int]:
    """Dims of a batch that hold something and are no plate's, counted from the right."""
    plates = {frame.dim for frame in visit.frames}
    return [d for d in range(-len(shape), 0) if shape[d] != 1 and d not in plates]


def _unequal_problem(visit: Visit) -> Problem | None:
    """Data and distribution that do not broadcast; another error of a density is another problem's."""
    try:
        broadcast_shapes(tuple(visit.value.shape), tuple(visit.fn.shape()))
    except RuntimeError:
        return Problem(
            f"{_data_and_shape(visit)}, and they do not fit",
            "make the plate as long as the data, pyro.plate(name, len(y)), and check event dims",
        )
    return None


def _repeated_problem(visit: Visit, terms: Shape) -> Problem | None:
    """Whether there are more terms in the likelihood than numbers in the data.

    One number for all rows of a plate is meant: ``obs=torch.tensor(1.0)`` says that all were one.
    """
    used = math.prod(terms) * math.prod(visit.fn.event_shape)
    data = visit.value.numel()
    meant = data == 1 and not _stray(visit, terms) and used == math.prod(terms)
    if used <= data or meant:
        return None
    shape = (*terms, *visit.fn.event_shape)
    return Problem(
        f"{_data_and_shape(visit)}: they broadcast to {shape}, and data count more than once",
        f"{_SQUEEZE}; .expand() the data where each number was observed that often",
    )


def _wide_problem(visit: Visit, terms: Shape, shape: Shape) -> Problem | None:
    """Whether a site in plates has dims left of all of them, as Pyro's `check_site_shape` asks."""
    outermost = min((int(frame.dim or 0) for frame in visit.frames), default=0)
    if not outermost or all(dim >= outermost for dim in _stray(visit, terms)):
        return None
    kind = "data" if visit.kind == "observed" else "latents"
    return Problem(
        f"site {visit.name!r} ({_plates(visit)}) has {kind} of shape {shape}, with batch dims "
        "that its plates do not make",
        f"{_SQUEEZE}; or put a pyro.plate around those that are independent",
    )


_SQUEEZE = (
    "give data, predictors and plates one shape: y.squeeze(-1) or x.squeeze(-1) for what has a last "
    "dim of size 1, .to_event(1) for dims of one observation"
)


def _data_and_shape(visit: Visit) -> str:
    data, own = tuple(visit.value.shape), tuple(visit.fn.shape())
    return (
        f"site {visit.name!r} ({_plates(visit)}) has data of shape {data} for a distribution of shape "
        f"{own}"
    )


def _plates(visit: Visit) -> str:
    return ", ".join(f"{f.name!r} of size {f.size}" for f in visit.frames) or "no plate"


def minibatch_note(visits: Visits, at_hand: frozenset[str]) -> str | None:
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


def row_problems(found: FirstRuns) -> Iterator[Problem]:
    """Latents of rows of which the arguments hold some: scaled, their own posteriors are none."""
    for visit in found.of_kind("latent"):
        frame = next((f for f in visit.frames if f.name in found.runner.at_hand), None)
        if frame is not None:
            yield Problem(
                f"latent {visit.name!r} lies in plate {frame.name!r}, of whose {frame.full_size} rows "
                f"the arguments hold {frame.size}: scaled to all of them it has no posterior of its "
                "own",
                "pass all data as a torch.utils.data.Dataset, vi.Model(fn, dataset), read in "
                "minibatches, or write the plate as long as what it is given, "
                f"pyro.plate({frame.name!r}, len(x))",
            )


PROBLEMS: dict[str, Callable[[FirstRuns], Iterator[Problem]]] = {
    "structure": structure_problems,
    "randomness": functools.partial(chance_problems, thorough=False),
    "discrete sites": discrete_problems,
    "supports": support_problems,
    "data": lambda found: data_problems(found.visits),
    "shapes and plates": lambda found: itertools.chain(
        shape_problems(found.visits), row_problems(found)
    ),
    "stream": stream_problems,
}
"""What a density refuses, by the check that `vi.check` tells it in."""


# -- what evaluations show --------------------------------------------------------------------------


def sum_problem(
    discrete: Iterable[str], pairs: Tensor | None = None, error: Exception | None = None
) -> Problem | None:
    """Whether a model is right where its discrete sites hold all their values at once.

    Args:
        discrete: Those sites.
        pairs: The log joint in two ways, `[K, 2]`; see `Density.problems`.
        error: What the model raised instead.
    """
    if pairs is not None and agree(pairs[:, 0], pairs[:, 1], 1e-8, 1e-3):
        return None
    names = ", ".join(discrete)
    what = (
        "gives other log densities" if error is None else f"raised {type(error).__name__} ({error})"
    )
    return Problem(
        f"the model {what} where the discrete latent site(s) {names} hold all their values at "
        "once, as summing them out needs",
        "use them as indices, a[..., z] or Vindex(a)[..., z], or in elementwise operations and "
        "torch.where; no Python if on them, no sums over their dims, and only sites of the same "
        "plates may depend on them; or sum them out in the model",
    )


def aimless_problem(names: Iterable[str]) -> Problem:
    """Improper priors on latents that nothing else depends on, whose posterior is as improper."""
    return Problem(
        f"site(s) {', '.join(names)} have an improper prior and no influence on anything else, so that "
        "their posterior is improper",
        "give them a proper prior, or leave them out",
    )


def slope_problem(ahead: Tensor, behind: Tensor, slope: Tensor, step: float) -> Problem | None:
    """Whether gradients are those of the values.

    Args:
        ahead: Log densities `[K]` a step ahead of K points in float64, along some direction.
        behind: The same a step behind.
        slope: What autograd says about the direction, `[K]`.
        step: The step's length.
    """
    measured = (ahead - behind) / (2 * step)
    rounding = 1e-13 * (ahead.abs() + behind.abs()) / step
    # A loose bound, for badly scaled models; what is cut off from autograd is far outside of it.
    wrong = (measured - slope).abs() > 0.01 * (measured.abs() + slope.abs()) + rounding + 1e-6
    if not bool((wrong & measured.isfinite() & slope.isfinite()).all()):
        return None
    return Problem(
        "the gradient of the log density is not that of its values, some latent is cut off from it",
        "do not pass latents through NumPy, .detach(), .item() or torch.tensor([latent]); use "
        "torch functions, and torch.stack for vectors of latents",
    )
