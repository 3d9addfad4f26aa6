"""What makes a model unusable: each in words that name the site, with the remedy, or None."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from pyro_vi_kit.density.enumeration import Enumerated, is_enumerable, log_total
from pyro_vi_kit.density.handlers import Replay, Visit, innermost
from pyro_vi_kit.density.runner import Runner
from pyro_vi_kit.errors import ModelError


class Problem(NamedTuple):
    """What is wrong, and what to do about it."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what}: {self.remedy}"


def change_problem(first: Mapping[str, Visit], second: Mapping[str, Visit]) -> Problem | None:
    """How the sites of two runs at different latents differ."""
    if list(first) != list(second):
        changed = sorted(set(first) ^ set(second)) or list(second)
        return Problem(
            "the model's structure changes with its latents' values, site(s) "
            f"{', '.join(changed)} are not met in every run",
            "write the choice as a mixture, a mask or torch.where, or pass a Pyro guide of your "
            "own as guide= with engine='pyro'",
        )
    for name, visit in second.items():
        if first[name].value.shape != visit.value.shape:
            return Problem(
                f"site {name!r} has shape {tuple(first[name].value.shape)} in one run and "
                f"{tuple(visit.value.shape)} in the next",
                "shapes must not depend on latents; use a fixed size and mask what is not needed",
            )
    return None


def chance_problem(runner: Runner, run: Replay) -> Problem | None:
    """Which site changes when a run is repeated at the same latents; inside `Runner.first_runs`.

    That a model draws random numbers proves nothing: the initial value of a parameter that is known
    already is drawn in vain.
    """
    one, other = repetition(run), repetition(run)
    # Without validation, so that data outside a support is a number here and not an exception.
    with pyro.validation_enabled(False):
        runner.try_run(one)
        runner.try_run(other)
        for name, visit in one.visits.items():
            if name not in other.visits or not _same(visit, other.visits[name]):
                return Problem(
                    f"the model draws random numbers outside its sample sites, site {name!r} "
                    "differs between two runs at the same latents (torch.randn, dropout in "
                    "training mode, ...)",
                    "make each draw a pyro.sample site, or call module.eval() first",
                )
    return None


def repetition(run: Replay) -> Replay:
    """A handler that gives every latent, also a discrete one, the value that it had in a run."""
    visits = run.visits
    return Replay(
        unconstrained={
            n: v.unconstrained for n, v in visits.items() if v.unconstrained is not None
        },
        constrained={n: v.value for n, v in visits.items() if v.kind == "discrete"},
    )


def _same(one: Visit, other: Visit) -> bool:
    pairs = [(one.value, other.value)]
    # Data of a wrong shape have no density; that is another problem than this one.
    with contextlib.suppress(RuntimeError, ValueError):
        pairs.append((one.log_prob(), other.log_prob()))
    return all(a.shape == b.shape and _equal(a, b) for a, b in pairs)


def _equal(one: Tensor, other: Tensor) -> bool:
    return bool(torch.isclose(one, other, rtol=0.0, atol=0.0, equal_nan=True).all())


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


def sums(runner: Runner, point: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> Tensor:
    """The log joint at one point, discrete sites summed out, in two ways `[2]`, nats; unscaled.

    By elimination; and by the chain rule, log p(z) = log p(z, d) - log p(d | z) for any values d of
    the discrete sites. They are drawn, and p(z, d) is that of a plain run. The two differ where a
    model computes something else for discrete sites that hold all their values at once.
    """
    replay = Replay(unconstrained=point, enumerate=True)
    runner.run(replay, params)
    enumerated = Enumerated(replay.visits, runner.nesting)
    drawn, log_q = enumerated.draw()
    total = (
        enumerated.total()
    )  # before the next run, which writes anew into what a model closes over
    plain = Replay(unconstrained=point, constrained=drawn)
    runner.run(plain, params)
    return torch.stack([total, log_total(plain.visits) - log_q])


def sum_problem(
    discrete: Iterable[str], pairs: Tensor | None = None, error: Exception | None = None
) -> Problem | None:
    """Whether a model is right where its discrete sites hold all their values at once.

    Args:
        discrete: Those sites.
        pairs: What `sums` says, `[K, 2]`.
        error: What the model raised instead.
    """
    tolerance = 1e-8 if pairs is not None and pairs.dtype == torch.float64 else 1e-3
    if pairs is not None and torch.allclose(
        pairs[:, 0], pairs[:, 1], rtol=tolerance, atol=tolerance, equal_nan=True
    ):
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
                    f"the data at site {visit.name!r} hold {int(found.sum())} {word}",
                    "drop the rows, or fill the values and hide them with poutine.mask or obs_mask=",
                )
    outside = _outside(visit)
    if outside is None or not bool(outside.any()):
        return None
    finite = _finite_at(visit, outside)
    if finite and (is_unchecked(fn) if unchecked is None else unchecked):
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


def is_unchecked(fn: Any) -> bool:
    """Whether a distribution was made with ``validate_args=False``; of one that a first run met."""
    return vars(innermost(fn)).get("_validate_args") is False


def unchecked_note(visit: Visit) -> str | None:
    """What to say of data outside a support that the model asks not to check."""
    outside = _outside(visit) if is_unchecked(visit.fn) else None
    if outside is None or not bool(outside.any()):
        return None
    return (
        f"the data at site {visit.name!r} hold {int(outside.sum())} value(s) outside the support of its "
        f"{type(innermost(visit.fn)).__name__}; with validate_args=False its formula is taken as it is, "
        "though it is no density there: evidence and predictions are not those of such data"
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


def _outside(visit: Visit) -> Tensor | None:
    """Which observations are outside the support; None where a mask may hide them."""
    masked = isinstance(visit.mask, Tensor) or visit.mask is False
    if masked or type(visit.fn).__name__ == "MaskedDistribution":
        return None
    try:
        return ~visit.fn.support.check(visit.value)
    except (NotImplementedError, AttributeError):
        return None


def _finite_at(visit: Visit, where: Tensor) -> bool:
    """Whether the log density is finite at these observations, without validation."""
    with pyro.validation_enabled(False), torch.no_grad():
        try:
            log_prob = _unvalidated(visit.fn).log_prob(visit.value)
            return bool(log_prob.isfinite().expand(where.shape)[where].all())
        except (ValueError, RuntimeError):
            return False


def _unvalidated(fn: Any) -> Any:
    """A copy of a distribution that checks no value; what was expanded while checks were on does."""
    fn = copy.copy(fn)
    fn._validate_args = False
    if isinstance(fn, TorchDistributionMixin) and hasattr(fn, "base_dist"):
        fn.base_dist = _unvalidated(fn.base_dist)
    return fn


def broadcast_problem(visit: Visit) -> Problem | None:
    """Whether data and distribution have different shapes: one of them is then repeated."""
    data, own = tuple(visit.value.shape), tuple(visit.fn.shape())
    plates = ", ".join(f"{f.name!r} of size {f.size}" for f in visit.frames) or "no plate"
    what = (
        f"site {visit.name!r} ({plates}) has data of shape {data} for a distribution of shape {own}"
    )
    try:
        together = tuple(torch.broadcast_shapes(data, own))
    except RuntimeError:
        remedy = (
            "make the plate as long as the data, pyro.plate(name, len(y)), and check event dims"
        )
        return Problem(what, remedy)
    if data == own:
        return None
    return Problem(
        f"{what}: they broadcast to {together}, and data count more than once",
        "give both one shape: y.squeeze(-1), or .to_event(1) for dims of one observation",
    )


def plateless_problem(visit: Visit) -> Problem | None:
    """Batch dims that no plate made."""
    batch = visit.fn.batch_shape
    plates = {frame.dim for frame in visit.frames}
    stray = [d for d in range(-len(batch), 0) if batch[d] != 1 and d not in plates]
    if not stray:
        return None
    sizes = ", ".join(f"dim {d} of size {batch[d]}" for d in stray)
    return Problem(
        f"site {visit.name!r} has batch dims that no plate made ({sizes})",
        "put the site into a pyro.plate if they are independent, or declare them .to_event(1)",
    )


def require_inside(visit: Visit, value: Tensor) -> None:
    """Refuse a value outside a latent's support.

    Raises:
        ModelError: If it is.
    """
    point = visit.unconstrained
    inside = point is not None and bool(point.isfinite().all())
    # Not the transform alone: a sigmoid's inverse clamps what lies outside.
    if not inside or not bool(visit.fn.support.check(value).all()):
        raise ModelError(
            f"the value given for site {visit.name!r} is not inside its support, {visit.fn.support}"
        )


def require_usable(visits: Mapping[str, Visit], unchecked: frozenset[str] | None = None) -> None:
    """Refuse a run's sites where a density cannot hold them.

    Args:
        visits: The sites.
        unchecked: Those made with ``validate_args=False``; read off the visits of a first run when None.

    Raises:
        ModelError: If there is nothing to infer, a discrete latent cannot be summed out, or data are
            no numbers or cannot occur.
    """
    problem = discrete_problem(visits) or latents_problem(visits)
    if problem is not None:
        raise ModelError(str(problem))
    for visit in visits.values():
        known = None if unchecked is None else visit.name in unchecked
        problem = data_problem(visit, known) if visit.kind == "observed" else None
        if problem is not None:
            raise ModelError(str(problem))


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
                "own. Pass all data as a torch.utils.data.Dataset, vi.Model(fn, dataset), which is read in "
                "minibatches, or write the plate as long as what it is given, "
                f"pyro.plate({frame.name!r}, len(x))"
            )
