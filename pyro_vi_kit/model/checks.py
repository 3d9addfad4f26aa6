"""Named checks of a model: what works, what does not, and what to do about it."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit.core.errors import ModelError, ViError
from pyro_vi_kit.core.options import checks, flag
from pyro_vi_kit.core.runtime import RandomStream, a_dtype
from pyro_vi_kit.model.groups import require_names
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.enumeration import StatesError
from pyro_vi_kit.model.log_density.problems import (
    PROBLEMS,
    chance_problems,
    minibatch_note,
    plateless_problems,
    sum_problem,
    unchecked_notes,
)
from pyro_vi_kit.model.log_density.raised import Problem, arguments, not_finite
from pyro_vi_kit.model.log_density.runner import Runner
from pyro_vi_kit.model.log_density.structure import FirstRuns, is_improper, parameters_of
from pyro_vi_kit.model.log_density.visits import Visit, constant_data, made_by_obs_mask
from pyro_vi_kit.model.model import Model, a_model

Outcome = Literal["pass", "fail", "note"]

# Points at which the log density is evaluated: the origin, and others in a box around it.
_POINTS, _RADIUS, _SEED = 10, 2.0, 20261
_MANY_SITES = 200
_NAMED = 5
_MARKS: dict[Outcome, str] = {"pass": "✓", "fail": "✗", "note": "!"}


@dataclass(frozen=True)
class Check:
    """One check and how it ended.

    Attributes:
        name: What was looked at.
        outcome: ``pass``, ``fail``, or ``note``: worth knowing, no obstacle.
        message: What was found, naming sites.
        remedy: What to do; empty where nothing is to be done.
    """

    name: str
    outcome: Outcome
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{_MARKS[self.outcome]} {self.name}: {self.message}"
        return f"{line}\n    → {self.remedy}" if self.remedy else line


@dataclass(frozen=True, repr=False)
class Report:
    """Every check of a model; printed, it is the list of marks.

    Attributes:
        model: The model's name.
        checks: In the order in which they were made.
    """

    model: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not any(check.outcome == "fail" for check in self.checks)

    def __str__(self) -> str:
        return "\n".join([self.model, *map(str, self.checks)])

    def __repr__(self) -> str:
        failed = [check.name for check in self.checks if check.outcome == "fail"]
        found = f"failed: {', '.join(failed)}" if failed else "ok"
        return f"Report({self.model!r}, {len(self.checks)} checks, {found})"


@checks(model=a_model, dtype=a_dtype, verbose=flag)
@torch.enable_grad()  # the caller may have gradients off
def check(model: Model, *, dtype: torch.dtype = torch.float64, verbose: bool = True) -> Report:
    """Look a model over before fitting it. Nothing of the user's state is changed.

    Args:
        model: The model and its data.
        dtype: Precision to run it in.
        verbose: Print the list, ✓ / ✗ / ! with the remedies.

    Returns:
        The checks; `Report.ok` says whether the model can be fitted.
    """
    try:
        runner = Runner(model, dtype)
    except ModelError as error:
        report = Report(model.name, (Check("model runs", "fail", str(error)),))
    else:
        with RandomStream(_SEED):
            report = Report(model.name, tuple(_checks(_Found(FirstRuns(runner)))))
    if verbose:
        print(report)
    return report


class _Found:
    """What a model's first runs show, and its density at starting points."""

    def __init__(self, first: FirstRuns) -> None:
        self.first = first
        self.model = first.runner.model
        self.visits = first.visits

    def problems(self, name: str) -> list[Problem]:
        """Those that a `Density` refuses too."""
        return list(PROBLEMS[name](self.first))

    @functools.cached_property
    def density(self) -> Density | None:
        """The model's density, where it can be evaluated at all."""
        hindered = self.problems("discrete sites") or self.problems("stream")
        if hindered or not self.first.unconstrained or not self.first.of_kind("latent"):
            return None
        return Density.unverified(self.first)

    @functools.cached_property
    def starting(self) -> _Starting | None:
        """How the density fares at starting points; None where there is none."""
        if self.density is None:
            return None
        blamed: dict[str, None] = {}
        finite, grads = 0, [torch.zeros(1, self.density.dim)]
        for z in _points(self.density, _RADIUS).split(1):
            try:
                culprits, grad = _culprits(self.density, z)
            except StatesError:  # told by `_discrete`
                return None
            finite += not culprits
            blamed.update(dict.fromkeys(culprits))
            grads.append(grad)
        parts = self.density.block.unpack(torch.cat([grad.cpu() for grad in grads])).items()
        idle = [name for name, part in parts if not bool((part != 0).any())]
        return _Starting(finite, list(blamed), idle)

    def evaluated(self, problem: Callable[[Density, Tensor], Problem | None]) -> list[Problem]:
        """What is wrong near the origin; nothing where an evaluation raises, which `starting` tells."""
        if self.starting is None or self.density is None:
            return []
        found = None
        with contextlib.suppress(Exception):
            found = problem(self.density, _points(self.density, 0.5)[1:4])
        return [] if found is None else [found]


class _Starting(NamedTuple):
    """How a density fares at starting points.

    Attributes:
        finite: At how many value and gradient are finite.
        blamed: What is not at the others, in words.
        idle: Latents whose gradient is exactly zero at all of them.
    """

    finite: int
    blamed: list[str]
    idle: list[str]


def _points(density: Density, radius: float) -> Tensor:
    """The origin of unconstrained space, and points `[K, D]` in a box around it."""
    generator = torch.Generator().manual_seed(_SEED)
    box = 2 * torch.rand(_POINTS, density.dim, generator=generator, device="cpu") - 1
    box[0] = 0.0
    return density.cast(radius * box)


def _culprits(density: Density, z: Tensor) -> tuple[list[str], Tensor]:
    """Sites whose value or gradient is not finite at a point `[1, D]`, and the gradient."""
    try:
        with density.watched():
            value, grad = density.log_prob_and_grad(z)
    except StatesError:
        raise
    except Exception as error:  # noqa: BLE001  whatever a model raises there, it is told
        return [f"(raised {type(error).__name__}: {error})"], torch.zeros_like(z)
    if bool(value.isfinite().all() and grad.isfinite().all()):
        return [], grad
    point = density.block.unpack(z)
    left = {site: what for (site, what), where in density.outside(point).items() if where.any()}
    culprits = [f"{n} ({left[n]})" if n in left else n for n in density.not_finite(point)]
    if not culprits and not bool(value.isfinite().all()):
        culprits = ["(the sum over discrete sites)"]
    parts = density.block.unpack(grad).items()
    return culprits + [f"{n} (gradient)" for n, g in parts if not bool(g.isfinite().all())], grad


# -- the checks -----------------------------------------------------------------------------------


def _checks(found: _Found) -> Iterator[Check]:
    for name, make in _CHECKS.items():
        if name == "stream" and found.model.stream is None:
            continue
        if name == "names" and not (found.model.dims or found.model.coords):
            continue
        if name in _NEED_A_RUN and not found.first.runs:
            yield Check(name, "note", "not checked, since the model does not run")
        else:
            yield make(name, found)


def _runs(name: str, found: _Found) -> Check:
    first = found.first
    # A latent without a bijector ends a run, and is told by `_supports`.
    if first.error is not None and not first.unmapped:
        remedy = "run it once in Pyro itself, MODEL(), and correct what the message says"
        return Check(name, "fail", str(first.error), remedy)
    kinds = [visit.kind for visit in found.visits.values()]
    counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
    return Check(name, "pass", f"{len(kinds)} sites ({', '.join(counts)})")


def _supports(name: str, found: _Found) -> Check:
    return _verdict(name, found.problems(name), "every latent can be unconstrained")


def _structure(name: str, found: _Found) -> Check:
    message = f"the same sites and shapes in {len(found.first.runs)} runs at different latents"
    return _verdict(name, found.problems(name), message)


def _log_density(name: str, found: _Found) -> Check:
    if found.starting is None:
        return Check(name, "note", "not evaluated: see supports and discrete sites")
    finite, culprits, idle = found.starting
    message = f"finite with its gradient at {finite} of {_POINTS} starting points"
    if finite < _POINTS:
        remedy = (
            "look at their arguments at extreme latents: bound scales away from 0 and use logits, not "
            "probabilities; start from a feasible point with init="
        )
        message += f"; not finite elsewhere at {', '.join(culprits) or 'no single site'}"
        return Check(name, "note" if finite else "fail", message, remedy)
    # What differs from run to run has no slope either; that is another check.
    cut_off = found.evaluated(_slope_problem) if found.first.changing is None else []
    if cut_off or not idle:
        return _verdict(name, cut_off, message)
    message += f"; site(s) {', '.join(idle)} have no influence on it"
    return Check(name, "note", message, "give them a prior or data, or leave them out")


def _slope_problem(density: Density, z: Tensor) -> Problem | None:
    _, grad = density.log_prob_and_grad(z)
    return density.slope_problem(z, grad)


def _shapes(name: str, found: _Found) -> Check:
    notes = list(plateless_problems(found.visits))
    at_hand = minibatch_note(found.visits, found.first.runner.at_hand)
    if at_hand is not None:
        remedy = "pass a Dataset, or all rows, where there are more of them"
        notes.insert(0, Problem(at_hand, remedy))
    return _verdict(name, found.problems(name), "batch dims and plates agree", notes)


def _data(name: str, found: _Found) -> Check:
    notes = list(_data_notes(found))
    return _verdict(name, found.problems(name), "no NaN, nothing infinite", notes)


def _data_notes(found: _Found) -> Iterator[Problem]:
    """Data outside a support, no numbers, data that are not there, or say nothing of their spread."""
    for note in unchecked_notes(found.visits):
        yield Problem(
            note, "a density on all that the data can be gives evidence and predictions a meaning"
        )
    for what in not_finite(found.model):
        yield Problem(what, "drop the rows, or fill the values; a mask alone leaves NaN gradients")
    forgotten = _forgotten(found)
    if forgotten:
        yield Problem(
            "nothing is observed, and the posterior is the prior: argument(s) "
            f"{', '.join(forgotten)} are None",
            "pass the data, vi.Model(fn, x, y), if they were forgotten",
        )
    constant = constant_data(found.visits)
    if constant:
        yield Problem(
            f"the data at site(s) {', '.join(constant)} are one number again and again: "
            "where a scale is learned from them, its density has no bound at 0",
            "give the scale a floor, as in 0.01 + s, or a prior that vanishes at 0, as LogNormal does",
        )


def _forgotten(found: _Found) -> list[str]:
    """Arguments that are None in a model that observes nothing."""
    if any(visit.kind in ("observed", "factor") for visit in found.visits.values()):
        return []
    given = arguments(found.model)
    try:
        defaults = inspect.signature(found.model.fn).parameters.values()
    except (TypeError, ValueError):
        defaults = ()
    missing = [p.name for p in defaults if p.default is None and p.name not in given]
    return [name for name, value in given.items() if value is None] + missing


def _randomness(name: str, found: _Found) -> Check:
    chance = list(chance_problems(found.first))
    if not chance and found.first.drew and not found.first.of_kind("discrete"):
        message = "random numbers are drawn outside sample sites, without influence"
        return Check(
            name, "note", message, "give initial values as functions: lambda: torch.randn(3)"
        )
    return _verdict(name, chance, "none is drawn outside sample sites")


def _priors(name: str, found: _Found) -> Check:
    aimless = found.evaluated(Density.aimless_problem)
    return _verdict(name, aimless, "every prior is proper", list(_prior_notes(found))[:1])


def _prior_notes(found: _Found) -> Iterator[Problem]:
    """Priors that are none, because a mask hides them wholly or they say so."""
    latents = found.first.of_kind("latent")
    masked_out = [
        visit.name
        for visit in latents
        if not made_by_obs_mask(visit.name, found.visits)
        and any(not torch.as_tensor(mask).any() for mask, _ in visit.masks())
    ]
    if masked_out:
        yield Problem(
            f"masked out at site(s) {', '.join(masked_out)}, and so improper",
            "take the latent out of poutine.mask, or mask data alone",
        )
    improper = [visit.name for visit in latents if is_improper(visit.fn)]
    if improper:
        yield Problem(
            f"improper at site(s) {', '.join(improper)}",
            "log evidence is defined up to their constant only; give proper priors to compare models",
        )


def _discrete(name: str, found: _Found) -> Check:
    problems = found.problems(name) or _sum_problems(found)
    sites = [] if problems else [_states(visit) for visit in found.first.of_kind("discrete")]
    if not sites:
        return _verdict(name, problems, "no discrete latent")
    more = f"; and {len(sites) - _NAMED} more" if len(sites) > _NAMED else ""
    message = f"summed out exactly, and drawn afterwards: {'; '.join(sites[:_NAMED])}{more}"
    return Check(name, "pass", message)


def _sum_problems(found: _Found) -> list[Problem]:
    """Discrete latents that the model does not sum out right."""
    density = found.density
    if density is None:
        return []
    try:
        with density.watched():
            problem = density.sum_problem(_points(density, 0.5)[1:2])
    except StatesError as error:
        problem = Problem.of(error)
    except Exception as error:  # noqa: BLE001  whatever a model raises there, it is told
        problem = sum_problem((site.name for site in density.discrete), error=error)
    return [] if problem is None else [problem]


def _states(visit: Visit) -> str:
    """A discrete latent with its number of values and its plates."""
    values = visit.fn.enumerate_support(expand=False).shape[0]
    plates = "".join(f", plate {f.name!r} of {f.size}" for f in visit.frames)
    return f"{visit.name} ({values} values{plates})"


def _length(name: str, found: _Found) -> Check:
    count = len(found.visits)
    if count <= _MANY_SITES:
        return Check(name, "pass", f"{count} sample sites")
    return Check(
        name,
        "note",
        f"{count} sample sites, which every evaluation visits one by one",
        "write a loop of observed sites as one vector site (stack the means, observe once); index "
        "latents as a[..., i]; use dist.DiscreteHMM or dist.GaussianHMM for long chains",
    )


def _parameters(name: str, found: _Found) -> Check:
    # Stores are private to the runs, modules are not: what was learned is read off the run.
    learned = parameters_of(found.first.runs[-1]).values()
    if not learned:
        return Check(name, "pass", "none is learned beside the latents")
    described = (f"{p.name} {tuple(p.value.shape)}" for p in learned)
    return Check(name, "note", f"learned along with the guide: {', '.join(described)}")


def _stream(name: str, found: _Found) -> Check:
    rows = 0 if found.model.stream is None else found.model.stream.rows
    return _verdict(name, found.problems(name), f"batches stand for {rows:,} rows")


def _names(name: str, found: _Found) -> Check:
    if found.density is None:
        return Check(name, "note", "not checked, since the model cannot be fitted")
    try:
        require_names(found.density)
    except ViError as error:
        return Check(name, "fail", str(error), "correct dims= and coords= of vi.Model")
    return Check(name, "pass", "dims and coords fit the model's sites and arguments")


def _verdict(
    name: str, problems: Sequence[Problem], otherwise: str, notes: Sequence[Problem] = ()
) -> Check:
    """One check of several problems, or else of what is worth knowing; each remedy is said once."""
    told = problems or notes
    if not told:
        return Check(name, "pass", otherwise)
    message = "; ".join(problem.what for problem in told)
    remedy = "; ".join(dict.fromkeys(problem.remedy for problem in told))
    return Check(name, "fail" if problems else "note", message, remedy)


_CHECKS: dict[str, Callable[[str, _Found], Check]] = {
    "model runs": _runs,
    "supports": _supports,
    "structure": _structure,
    "log density": _log_density,
    "shapes and plates": _shapes,
    "data": _data,
    "randomness": _randomness,
    "improper priors": _priors,
    "discrete sites": _discrete,
    "length": _length,
    "parameters": _parameters,
    "stream": _stream,
    "names": _names,
}
_NEED_A_RUN = frozenset(_CHECKS) - {"model runs", "data"}
