"""What a model is made of, as its first runs show: sites, plates, parameters, and where latents lie."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from pyro.distributions import ImproperUniform
from torch import Tensor, nn
from torch.distributions import transform_to

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.core.runtime import random_state, validation
from pyro_vi_kit.model.log_density.batching import agree
from pyro_vi_kit.model.log_density.handlers import Fill, Replay
from pyro_vi_kit.model.log_density.initial import SPREADS, InitFunction
from pyro_vi_kit.model.log_density.precision import Undone
from pyro_vi_kit.model.log_density.runner import Runner
from pyro_vi_kit.model.log_density.streamed import Streamed, streamed
from pyro_vi_kit.model.log_density.supports import bijector, innermost
from pyro_vi_kit.model.log_density.visits import Kind, Visit, nesting_of


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


def structure_of(replay: Replay, at_hand: frozenset[str] = frozenset()) -> Structure:
    """What a run met; plates whose rows are at hand are as long as these."""
    sites = {name: _site(visit, at_hand) for name, visit in replay.visits.items()}
    plates = {plate.name: plate for site in sites.values() for plate in site.plates}
    declared = {name: size for name, size in replay.declared.items() if name in plates}
    return Structure(sites, plates, parameters_of(replay), declared)


def _event_of(value: torch.Size, event: torch.Size) -> torch.Size:
    """The event shape of data: a hidden Markov model of no length of its own says 1 for any length."""
    own = torch.Size(value[len(value) - len(event) :])
    longer = len(own) == len(event) and all(n in (1, m) for n, m in zip(event, own, strict=True))
    return own if longer else event


def _site(visit: Visit, at_hand: frozenset[str]) -> Site:
    latent = visit.kind == "latent" and visit.choice is None
    batch_shape, event_shape, plates = _shapes(visit, at_hand)
    return Site(
        name=visit.name,
        kind=visit.kind,
        batch_shape=batch_shape,
        event_shape=event_shape,
        plates=plates,
        unconstrained_shape=torch.Size()
        if visit.unconstrained is None
        else visit.unconstrained.shape,
        transform=bijector(visit.name, visit.fn)
        if latent and _is_fixed(visit.fn.support)
        else None,
        improper=is_improper(visit.fn),
        states=0 if visit.choice is None else len(visit.choice.states),
    )


def _shapes(
    visit: Visit, at_hand: frozenset[str]
) -> tuple[torch.Size, torch.Size, tuple[Plate, ...]]:
    """Batch shape, event shape and plates of a site."""
    plates = tuple(
        Plate(
            frame.name,
            int(frame.dim or 0),
            int(frame.size if frame.name in at_hand else frame.full_size or frame.size),
        )
        for frame in visit.frames
    )
    shape = visit.value.shape
    # A user's own distribution may have lists.
    batch_shape, event_shape = torch.Size(visit.fn.batch_shape), torch.Size(visit.fn.event_shape)
    if visit.kind == "factor":
        event_shape = torch.Size()  # Pyro's value of a factor has no elements
    if visit.kind == "observed":
        event_shape = _event_of(shape, event_shape)
    if visit.kind == "deterministic" and shape != batch_shape + event_shape:
        # Without event_dim, Pyro counts every dim of a deterministic value as an event dim, plates
        # included; the value's own shape says where the plates are.
        plates = tuple(p for p in plates if len(shape) >= -p.dim and shape[p.dim] == p.size)
        batch_shape, event_shape = (shape, torch.Size()) if plates else (torch.Size(), shape)
    return batch_shape, event_shape, plates


def is_improper(fn: Any) -> bool:
    """Whether a distribution is an improper uniform."""
    return isinstance(innermost(fn), ImproperUniform)


def _is_fixed(support: Any) -> bool:
    """Whether a support is the same at every run: it holds no tensor but plain scalars."""
    if isinstance(support, Tensor):
        return not support.requires_grad and support.numel() == 1
    if isinstance(support, list | tuple):
        return all(_is_fixed(part) for part in support if hasattr(part, "check"))
    held = vars(support).values() if hasattr(support, "check") else ()
    return all(map(_is_fixed, held))


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


class FirstRuns:
    """Runs at the origin of unconstrained space, or where ``init`` says, and on either side of it.

    `Density` and `vi.check` both begin here; `problems` says what is wrong with what they met.

    Args:
        runner: Runs the model; it gets to know what the runs show of it.
        init: Where to run it, and around.

    Attributes:
        runs: Those that did not raise.
        error: What the first one that did has raised.
        drew: Whether a run beyond the first drew random numbers, of discrete latents or outside of
            sample sites.
        unconstrained: Whether latents had unconstrained values. Where no run at such values succeeds,
            one at draws of the prior is the last resort.
    """

    def __init__(self, runner: Runner, init: InitFunction | None = None) -> None:
        self.runner = runner
        self.runs: list[Replay] = []
        self.error: ModelError | None = None
        self.drew = False
        self.unconstrained = True
        with runner.first_runs():
            first, *others = [Replay(fill=fill) for fill in starts(runner.device)]
            first.init = init
            with Undone() as writes:
                self._try(first)
            if writes.found or (runner.precision is not None and runner.precision.written):
                runner.run_on_copies()
            before = random_state()
            if init is None:
                for run in others:
                    self._try(run)
            elif self.error is None:
                self._try_nearby(first)
            self.drew = random_state() != before
            if self.error is not None and init is None:
                self._try_prior(self.error)
            runner.nesting = nesting_of(self.visits)

    def _try(self, run: Replay) -> None:
        try:
            self.runner.try_run(run)
        except ModelError as error:
            self.error = self.error or error
        else:
            self.runs.append(run)

    def _try_nearby(self, first: Replay) -> None:
        """Runs on either side of a point, as near as the model needs; the runner notes both."""
        runner = self.runner
        runner.centre = {
            name: visit.unconstrained
            for name, visit in first.visits.items()
            if visit.kind == "latent" and visit.choice is None and visit.unconstrained is not None
        }
        runner.initial = {name: first.visits[name].value.detach() for name in runner.centre}
        for spread in SPREADS:
            runner.spread = spread
            self.runs, self.error = [first], None
            for fill in starts(runner.device)[1:]:
                point = {
                    name: (value + spread / 0.3 * fill(value.shape)).detach()
                    for name, value in runner.centre.items()
                }
                leaves = {name: value.requires_grad_() for name, value in point.items()}
                self._try(Replay(unconstrained=leaves, fill=fill))
            if self.error is None:
                return

    def _try_prior(self, error: ModelError) -> None:
        """Whether the model runs at draws of its prior: without a bijector, or where none was given."""
        run = Replay(sample_latents=True)
        try:
            self.runner.try_run(run)
        except ModelError:
            return
        if not self.runs:
            self.runs, self.unconstrained = [run], False
        if self.of_kind("latent") and not self.unmapped:
            self.error = ModelError(
                f"{error}. That is at or near the origin of unconstrained space, and at draws of its "
                "prior it runs: say where to start, init='median' or another function of the site, or "
                "a dict of site values"
            )
            self.error.__cause__ = error.__cause__

    @property
    def visits(self) -> Mapping[str, Visit]:
        """The sites of the last run that did not raise."""
        return self.runs[-1].visits if self.runs else {}

    @functools.cached_property
    def structure(self) -> Structure:
        """Sites, plates and parameters of that run."""
        return structure_of(self.runs[-1], self.runner.at_hand)

    @functools.cached_property
    def streamed(self) -> Streamed | None:
        """How a batch stands for all data, where they are streamed.

        Raises:
            ModelError: If it does not.
        """
        stream = self.runner.model.stream
        if stream is None or not self.unconstrained:
            return None
        return streamed(self.runner, stream)

    def of_kind(self, kind: str) -> list[Visit]:
        """The sites of a kind in that run."""
        return [visit for visit in self.visits.values() if visit.kind == kind]

    @functools.cached_property
    def unmapped(self) -> list[ModelError]:
        """Why latents have no map from unconstrained space, if that is why no run there succeeded."""
        found = []
        for visit in [] if self.unconstrained else self.of_kind("latent"):
            try:
                bijector(visit.name, visit.fn)
            except ModelError as error:
                found.append(error)
        return found

    @functools.cached_property
    def changing(self) -> str | None:
        """A site that changes when a run is repeated at the same latents, if one does.

        That a model draws random numbers proves nothing: the initial value of a parameter that is known
        already is drawn in vain.
        """
        if not self.runs or not self.unconstrained:
            return None
        one, other = self._repetition(), self._repetition()
        # Without validation, so that data outside a support is a number here and not an exception.
        with self.runner.first_runs(), validation(False):
            self.runner.try_run(one)
            self.runner.try_run(other)
            for name, visit in one.visits.items():
                if name not in other.visits or not _same(visit, other.visits[name]):
                    return name
        return None

    def _repetition(self) -> Replay:
        """A handler that gives every latent, also a discrete one, the value that it had last."""
        visits = self.visits.items()
        return Replay(
            unconstrained={n: v.unconstrained for n, v in visits if v.unconstrained is not None},
            constrained={n: v.value for n, v in visits if v.kind == "discrete"},
        )


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


def _same(one: Visit, other: Visit) -> bool:
    pairs = [(one.value, other.value)]
    # Data of a wrong shape have no density; that is another problem than this one.
    with contextlib.suppress(RuntimeError, ValueError):
        pairs.append((one.log_prob(), other.log_prob()))
    return all(agree(a, b, 0.0, 0.0) for a, b in pairs)


@dataclass(frozen=True)
class Block:
    """Latent sites that share one distribution of the guide.

    Attributes:
        name: What the guide calls it.
        sites: Its latents, in the model's order.
        plate: None for a global block of `D` numbers; else the data plate, for rows of `d` numbers,
            one per datum.
    """

    name: str
    sites: tuple[Site, ...]
    plate: Plate | None = None

    @property
    def dim(self) -> int:
        """Numbers in the block: D for all, or d for each datum."""
        return sum(prod(self.rest(site)) for site in self.sites)

    def unpack(self, flat: Tensor) -> dict[str, Tensor]:
        """Split `[K, D]`, or `[K, B, d]`, into `{site: [K, *batch, *event]}`, unconstrained."""
        values, start = {}, 0
        for site in self.sites:
            rest = self.rest(site)
            size = prod(rest)
            part = flat[..., start : start + size].reshape(*flat.shape[:-1], *rest)
            if self.plate is not None:
                part = torch.movedim(part, 1, 1 + self.axis(site))
            values[site.name] = part
            start += size
        return values

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `unpack`."""
        parts = []
        for site in self.sites:
            value = values[site.name]
            if self.plate is None:
                parts.append(value.reshape(value.shape[0], -1))
            else:
                rows = torch.movedim(value, 1 + self.axis(site), 1)
                parts.append(rows.reshape(*rows.shape[:2], -1))
        return torch.cat(parts, -1)

    def labels(self) -> list[tuple[str, int]]:
        """Site name and position in the flattened site, for each number of the block."""
        return [(site.name, i) for site in self.sites for i in range(prod(self.rest(site)))]

    def axis(self, site: Site) -> int:
        """Where the data plate lies among the site's dims, counted from the left."""
        return len(site.batch_shape) + (self.plate.dim if self.plate is not None else 0)

    def rest(self, site: Site) -> tuple[int, ...]:
        """Unconstrained shape of a site in the block: of all of it, or of one datum's part."""
        shape = list(site.unconstrained_shape)
        if self.plate is not None:
            del shape[self.axis(site)]
        return tuple(shape)


def global_block(sites: Sequence[Site]) -> Block:
    """One block for all these latents."""
    return Block("latent", tuple(sites))
