"""Named checks of a model: what works, what does not, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from pyro_vi_kit.core.errors import ModelError, ViError
from pyro_vi_kit.core.options import checks, flag
from pyro_vi_kit.core.runtime import a_dtype
from pyro_vi_kit.model.groups import require_names
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.examination import Examination
from pyro_vi_kit.model.log_density.problems import Problem
from pyro_vi_kit.model.model import Model, a_model

Outcome = Literal["pass", "fail", "note"]

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
    report = Report(model.name, tuple(_checks(Examination(model, dtype))))
    if verbose:
        print(report)
    return report


def _checks(found: Examination) -> Iterator[Check]:
    for name, make in _CHECKS.items():
        if name == "stream" and found.model.stream is None:
            continue
        if name == "names" and not (found.model.dims or found.model.coords):
            continue
        if name in _NEED_A_RUN and found.last is None:
            yield Check(name, "note", "not checked, since the model does not run")
        else:
            yield make(name, found)


def _runs(name: str, found: Examination) -> Check:
    if found.error is not None:
        remedy = "run it once in Pyro itself, MODEL(), and correct what the message says"
        return Check(name, "fail", found.error, remedy)
    kinds = [visit.kind for visit in found.visits.values()]
    counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
    return Check(name, "pass", f"{len(kinds)} sites ({', '.join(counts)})")


def _supports(name: str, found: Examination) -> Check:
    return _verdict(name, found.support_problems, "every latent can be unconstrained")


def _structure(name: str, found: Examination) -> Check:
    message = f"the same sites and shapes in {len(found.runs)} runs at different latents"
    return _verdict(name, found.structure_problems, message)


def _log_density(name: str, found: Examination) -> Check:
    finite, total, culprits = found.finite()
    if not total:
        return Check(name, "note", "not evaluated: see supports and discrete sites")
    message = f"finite with its gradient at {finite} of {total} starting points"
    if finite == total:
        # What differs from run to run has no slope either; that is another check.
        cut_off = found.slope() if found.chance is None else None
        if cut_off is not None:
            return _verdict(name, [cut_off], "")
        idle = found.without_influence
        if not idle:
            return Check(name, "pass", message)
        message += f"; site(s) {', '.join(idle)} have no influence on it"
        return Check(name, "note", message, "give them a prior or data, or leave them out")
    remedy = (
        "look at their arguments at extreme latents: bound scales away from 0 and use logits, not "
        "probabilities; start from a feasible point with init="
    )
    message += f"; not finite elsewhere at {', '.join(culprits) or 'no single site'}"
    return Check(name, "note" if finite else "fail", message, remedy)


def _shapes(name: str, found: Examination) -> Check:
    wrong = [*found.shape_problems, *found.minibatch_problems]
    if wrong:
        return _verdict(name, wrong, "")
    notes = [*found.minibatch_notes, *found.plateless]
    return _verdict(name, notes, "batch dims and plates agree", "note")


def _data(name: str, found: Examination) -> Check:
    if found.data_problems:
        return _verdict(name, found.data_problems, "")
    notes = [*found.data_notes, *found.argument_problems, *_data_notes(found)]
    return _verdict(name, notes, "no NaN, nothing infinite", "note")


def _data_notes(found: Examination) -> Iterator[Problem]:
    """Data that are not there, or that say nothing of their spread."""
    if found.forgotten:
        yield Problem(
            "nothing is observed, and the posterior is the prior: argument(s) "
            f"{', '.join(found.forgotten)} are None",
            "pass the data, vi.Model(fn, x, y), if they were forgotten",
        )
    if found.constant_data:
        yield Problem(
            f"the data at site(s) {', '.join(found.constant_data)} are one number again and again: "
            "where a scale is learned from them, its density has no bound at 0",
            "give the scale a floor, as in 0.01 + s, or a prior that vanishes at 0, as LogNormal does",
        )


def _randomness(name: str, found: Examination) -> Check:
    problem = found.chance
    if problem is not None:
        return _verdict(name, [problem], "")
    if found.draws_in_vain:
        message = "random numbers are drawn outside sample sites, without influence"
        return Check(
            name, "note", message, "give initial values as functions: lambda: torch.randn(3)"
        )
    return Check(name, "pass", "none is drawn outside sample sites")


def _priors(name: str, found: Examination) -> Check:
    if found.aimless:
        return _verdict(name, found.aimless, "")
    if found.masked_out:
        message = f"masked out at site(s) {', '.join(found.masked_out)}, and so improper"
        return Check(
            name, "note", message, "take the latent out of poutine.mask, or mask data alone"
        )
    if not found.improper:
        return Check(name, "pass", "every prior is proper")
    message = f"improper at site(s) {', '.join(found.improper)}"
    remedy = (
        "log evidence is defined up to their constant only; give proper priors to compare models"
    )
    return Check(name, "note", message, remedy)


def _discrete(name: str, found: Examination) -> Check:
    problems = found.discrete_problems
    sites = [] if problems else found.summed_out
    if not sites:
        return _verdict(name, problems, "no discrete latent")
    more = f"; and {len(sites) - _NAMED} more" if len(sites) > _NAMED else ""
    message = f"summed out exactly, and drawn afterwards: {'; '.join(sites[:_NAMED])}{more}"
    return Check(name, "pass", message)


def _length(name: str, found: Examination) -> Check:
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


def _parameters(name: str, found: Examination) -> Check:
    if not found.parameters:
        return Check(name, "pass", "none is learned beside the latents")
    return Check(name, "note", f"learned along with the guide: {', '.join(found.parameters)}")


def _stream(name: str, found: Examination) -> Check:
    rows = 0 if found.model.stream is None else found.model.stream.rows
    return _verdict(name, found.stream_problems, f"batches stand for {rows:,} rows")


def _names(name: str, found: Examination) -> Check:
    try:
        density = Density(found.model)
    except ModelError:
        return Check(name, "note", "not checked, since the model cannot be fitted")
    try:
        require_names(density)
    except ViError as error:
        return Check(name, "fail", str(error), "correct dims= and coords= of vi.Model")
    return Check(name, "pass", "dims and coords fit the model's sites and arguments")


def _verdict(
    name: str, problems: list[Problem], otherwise: str, outcome: Outcome = "fail"
) -> Check:
    """One check of several problems; each different remedy is said once."""
    if not problems:
        return Check(name, "pass", otherwise)
    message = "; ".join(problem.what for problem in problems)
    return Check(name, outcome, message, "; ".join(dict.fromkeys(p.remedy for p in problems)))


_CHECKS: dict[str, Callable[[str, Examination], Check]] = {
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
