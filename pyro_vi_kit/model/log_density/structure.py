"""What a model is made of: its sites, plates and learned parameters, found by running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import ImproperUniform
from torch import Tensor, nn
from torch.distributions import transform_to

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.core.runtime import random_state
from pyro_vi_kit.model.log_density.handlers import Fill, Kind, Replay, Visit, innermost
from pyro_vi_kit.model.log_density.initial import SPREADS, InitFunction
from pyro_vi_kit.model.log_density.problems import chance_problem, change_problem
from pyro_vi_kit.model.log_density.runner import Runner
from pyro_vi_kit.model.log_density.supports import bijector
from pyro_vi_kit.model.log_density.writes import Undone


@dataclass(frozen=True)
class Plate:
    """A vectorised plate: `dim` counts from the right and is negative, `size` is the full size."""

    name: str
    dim: int
    size: int


@dataclass(frozen=True, eq=False)
class Site:
    """One sample site.

    Attributes:
        name: The site's name.
        kind: latent, observed, deterministic, factor or discrete.
        batch_shape: Batch shape on the full data.
        event_shape: Event shape.
        plates: The vectorised plates around it, the outermost first.
        unconstrained_shape: Shape in unconstrained space, batch dims first; empty for other kinds.
        transform: Unconstrained to constrained, or None where it changes with other latents or is
            made of data, and so has to be rebuilt at each run.
        improper: Whether the prior is an `ImproperUniform`.
        states: S of a discrete latent that is not summed out, whose unconstrained value is a weight for
            each state, `[..., S]`; 0 for any other site.
    """

    name: str
    kind: Kind
    batch_shape: torch.Size
    event_shape: torch.Size
    plates: tuple[Plate, ...]
    unconstrained_shape: torch.Size
    transform: Any
    improper: bool
    states: int = 0

    @property
    def data_plate(self) -> Plate | None:
        """The plate whose local term the site belongs to: the outermost one around it."""
        return self.plates[0] if self.plates else None

    @property
    def unconstrained_event_dim(self) -> int:
        """How many of the unconstrained dims, from the right, are not batch dims."""
        return len(self.unconstrained_shape) - len(self.batch_shape)


@dataclass(frozen=True)
class Parameter:
    """A learned parameter (`pyro.param`, `pyro.module`, `PyroModule`).

    Attributes:
        name: Pyro's name of it.
        value: Unconstrained value at the time of the first run, a copy.
        constraint: Its constraint.
        owner: The module that holds it, if one does.
        attribute: Its name in that module.
    """

    name: str
    value: Tensor
    constraint: Any
    owner: nn.Module | None
    attribute: str


@dataclass(frozen=True)
class Structure:
    """Sites in the model's order, plates by name, learned parameters by name.

    Attributes:
        sites: Sites by name.
        plates: Vectorised plates by name.
        parameters: Learned parameters by name.
        subsampled: The subsample size of each plate that declares one.
    """

    sites: dict[str, Site]
    plates: dict[str, Plate]
    parameters: dict[str, Parameter]
    subsampled: dict[str, int]

    def of_kind(self, *kinds: Kind) -> list[Site]:
        """The sites of these kinds, in the model's order."""
        return [site for site in self.sites.values() if site.kind in kinds]

    @property
    def likelihood(self) -> list[Site]:
        """Observed sites, and factors in plates, each of which is what the model says of some row."""
        seen = self.of_kind("observed", "factor")
        return [site for site in seen if site.kind == "observed" or site.plates]


def discover(
    runner: Runner, init: InitFunction | None = None
) -> tuple[Structure, dict[str, Visit]]:
    """Find a model's structure from runs at different values of its latents.

    Args:
        runner: Runs the model.
        init: Where to run it, and around; at the origin and around it when None.

    Returns:
        The structure, and the visits of the last run.

    Raises:
        ModelError: If the model raises, the runs meet different sites or shapes, a site's
            support cannot be unconstrained, or random numbers are drawn outside sample sites.
    """
    with runner.first_runs():
        runs = [Replay(fill=fill) for fill in starts(runner.device)]
        runs[0].init = init
        _first(runner, runs[0])
        before = random_state()
        if init is None:
            for run in runs[1:]:
                _try(runner, run)
        else:
            runs[1:] = _nearby(runner, runs[0])
        structure = structure_of(runs[-1], runner.at_hand)
        changes = (change_problem(run.visits, runs[-1].visits) for run in runs[:-1])
        problem = next((change for change in changes if change is not None), None)
        drew = random_state() != before
        if problem is None and drew:
            problem = chance_problem(runner, runs[-1])
    if problem is not None:
        raise ModelError(str(problem))
    return structure, runs[-1].visits


def _first(runner: Runner, run: Replay) -> None:
    """Run the model for the first time; notes if it writes into what is its own."""
    with Undone() as writes:
        _try(runner, run)
    if writes.found or (runner.precision is not None and runner.precision.written):
        runner.run_on_copies()


def _try(runner: Runner, run: Replay) -> None:
    """Run the model at or near the origin, or say where it might begin instead."""
    try:
        runner.try_run(run)
    except ModelError as error:
        hint = _hint(runner) if run.init is None else ""
        raise (ModelError(f"{error}{hint}") if hint else error) from error.__cause__


def _hint(runner: Runner) -> str:
    """What to do about a model that raises at the origin, if it does not at draws of its prior."""
    try:
        runner.try_run(Replay(sample_latents=True))
    except ModelError:
        return ""
    return (
        ". That is at or near the origin of unconstrained space, and at draws of its prior it runs: say "
        "where to start, init='median' or another function of the site, or a dict of site values"
    )


def _nearby(runner: Runner, first: Replay) -> list[Replay]:
    """Runs on either side of a point, as near as the model needs; notes point and distance."""
    runner.centre = {
        name: visit.unconstrained
        for name, visit in first.visits.items()
        if visit.kind == "latent" and visit.choice is None and visit.unconstrained is not None
    }
    runner.initial = {name: first.visits[name].value.detach() for name in runner.centre}
    for spread in SPREADS:
        runner.spread = spread
        runs = [Replay(fill=fill) for fill in starts(runner.device)[1:]]
        try:
            for run in runs:
                away = {name: run.fill(value.shape) for name, value in runner.centre.items()}
                run.unconstrained = {
                    name: (value + spread / 0.3 * away[name]).detach().requires_grad_()
                    for name, value in runner.centre.items()
                }
                runner.try_run(run)
        except ModelError:
            if spread == SPREADS[-1]:
                raise
        else:
            return runs
    return []


def structure_of(replay: Replay, at_hand: frozenset[str] = frozenset()) -> Structure:
    """What a run met; plates whose rows are at hand are as long as these."""
    sites = {name: _site(visit, at_hand) for name, visit in replay.visits.items()}
    plates = {plate.name: plate for site in sites.values() for plate in site.plates}
    declared = {name: size for name, size in replay.declared.items() if name in plates}
    return Structure(sites, plates, parameters_of(replay), declared)


def starts(device: torch.device) -> list[Fill]:
    """Values of the latents to run a model at: the origin, and two points on either side of it."""

    def leaf_normals(sign: float) -> Fill:
        generator = torch.Generator().manual_seed(20260)

        def fill(shape: torch.Size) -> Tensor:
            point = sign * 0.3 * torch.randn(shape, generator=generator, device="cpu")
            # A leaf that requires a gradient, so that what depends on latents can be told.
            return point.to(device).requires_grad_()

        return fill

    return [torch.zeros, leaf_normals(-1.0), leaf_normals(1.0)]


def _event_of(value: torch.Size, event: torch.Size) -> torch.Size:
    """The event shape of data: a hidden Markov model of no length of its own says 1 for any length."""
    own = value[len(value) - len(event) :]
    longer = len(own) == len(event) and all(n in (1, m) for n, m in zip(event, own, strict=True))
    return own if longer else event


def _site(visit: Visit, at_hand: frozenset[str]) -> Site:
    latent = visit.kind == "latent" and visit.choice is None
    plates = tuple(
        Plate(
            frame.name,
            int(frame.dim or 0),
            int(frame.size if frame.name in at_hand else frame.full_size or frame.size),
        )
        for frame in visit.frames
    )
    batch_shape, event_shape = visit.fn.batch_shape, visit.fn.event_shape
    if visit.kind == "factor":
        event_shape = event_shape[:0]  # Pyro's value of a factor has no elements
    if visit.kind == "observed":
        event_shape = _event_of(visit.value.shape, event_shape)
    if visit.kind == "deterministic" and visit.value.shape != batch_shape + event_shape:
        # Without event_dim, Pyro counts every dim of a deterministic value as an event dim, plates
        # included; the value's own shape says where the plates are.
        shape = visit.value.shape
        plates = tuple(p for p in plates if len(shape) >= -p.dim and shape[p.dim] == p.size)
        batch_shape, event_shape = (shape, shape[:0]) if plates else (shape[:0], shape)
    unconstrained_shape = torch.Size() if visit.unconstrained is None else visit.unconstrained.shape
    return Site(
        name=visit.name,
        kind=visit.kind,
        batch_shape=torch.Size(batch_shape),
        event_shape=torch.Size(event_shape),
        plates=plates,
        unconstrained_shape=unconstrained_shape,
        transform=bijector(visit.name, visit.fn)
        if latent and _is_fixed(visit.fn.support)
        else None,
        improper=is_improper(visit.fn),
        states=0 if visit.choice is None else len(visit.choice.states),
    )


def is_improper(fn: Any) -> bool:
    """Whether a distribution is an improper uniform."""
    return isinstance(innermost(fn), ImproperUniform)


def _is_fixed(support: Any) -> bool:
    """Whether a support is the same at every run: it holds no tensor but plain scalars."""
    for value in vars(support).values():
        if isinstance(value, Tensor):
            if value.requires_grad or value.numel() != 1:
                return False
        elif hasattr(value, "check"):
            if not _is_fixed(value):
                return False
        elif isinstance(value, list | tuple) and any(
            hasattr(part, "check") and not _is_fixed(part) for part in value
        ):
            return False
    return True


def parameters_of(replay: Replay) -> dict[str, Parameter]:
    """Copies of the learned parameters; the user's own are never trained in place."""
    found = {}
    for name, visit in replay.param_visits.items():
        tensor = visit.owner._parameters[visit.attribute] if visit.owner is not None else None
        if tensor is None and visit.value is not None:
            tensor = transform_to(visit.constraint).inv(visit.value)
        if tensor is not None:
            value = tensor.detach().clone()
            found[name] = Parameter(name, value, visit.constraint, visit.owner, visit.attribute)
    return found
