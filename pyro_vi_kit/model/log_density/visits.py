"""One site as one run of a model met it, and what the sites of a run add up to."""

from __future__ import annotations

import functools
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from pyro.distributions import Delta, MaskedDistribution, Unit
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vi_kit.core.runtime import broadcast_shapes
from pyro_vi_kit.model.log_density import supports
from pyro_vi_kit.model.log_density.drawn import Choice
from pyro_vi_kit.model.log_density.supports import innermost, layers

Kind = Literal["latent", "observed", "deterministic", "factor", "discrete"]
Frames = tuple[CondIndepStackFrame, ...]
# A site, and what leaves its constraint there, in words.
Key = tuple[str, str]


@dataclass
class Visit:
    """One site as one run met it."""

    name: str
    kind: Kind
    fn: Any
    value: Tensor
    frames: Frames
    scale: float | Tensor
    mask: bool | Tensor | None
    infer: Mapping[str, Any] = field(default_factory=dict)
    unconstrained: Tensor | None = None
    log_det: Tensor | None = None
    choice: Choice | None = None
    guarded: bool = False
    made: Sequence[Any] = ()

    @property
    def counts(self) -> bool:
        """Whether its log density is part of the model's.

        A `pyro.deterministic` has none; a `Delta` of something computed may be given one.
        """
        noted = self.infer.get("_deterministic") or _is_hidden_delta(self.fn)
        return self.kind != "deterministic" or not noted

    @property
    def width(self) -> int:
        """How many batch dims it has."""
        return max(len(self.fn.batch_shape), self.value.dim() - self.fn.event_dim)

    @property
    def has_states(self) -> bool:
        """Whether it is a discrete latent, summed out or not."""
        return self.kind == "discrete" or self.choice is not None

    def log_prob(self) -> Tensor:
        """The site's log density as in Pyro's traces, scale and mask applied: [*batch], nats."""
        return scaled(self.unscaled(), self.scale)

    def unscaled(self) -> Tensor:
        """The same without the scale."""
        relaxed = self.choice is not None and self.choice.relaxed
        if relaxed and self.choice is not None and self.unconstrained is not None:
            log_prob = self.choice.log_prob(self.unconstrained)
        else:
            log_prob = self.fn.log_prob(self.value)
        outside = self.outside() if self.guarded else None
        if outside is not None:
            log_prob = torch.where(outside, -torch.inf, log_prob)
        if self.mask is False:
            return torch.full_like(log_prob, self._hidden())
        if isinstance(self.mask, Tensor):
            log_prob = torch.where(self.mask, log_prob, self._hidden())
        return log_prob

    def summed(self, each: Tensor) -> Tensor:
        """One number for each number of the unconstrained value, added up to the site's batch."""
        # The value's own batch dims: under enumeration the distribution may have more of them.
        surplus = each.dim() - (self.value.dim() - self.fn.event_dim)
        return each.flatten(-surplus).sum(-1) if surplus > 0 else each

    def bounds(self) -> list[supports.Bound]:
        """How far inside their constraints its arguments are, and what was observed."""
        return supports.bounds(self.fn, self.value if self.kind == "observed" else None, self.made)

    def outside(self) -> Tensor | None:
        """Where, of its batch, an argument or what was observed leaves its constraint."""
        margins = [bound.margin for bound in self.bounds()]
        return functools.reduce(torch.minimum, margins) < 0 if margins else None

    def leaves(self) -> Iterator[tuple[str, Tensor]]:
        """What can leave its constraint, in words, and whether it does where nothing hides it."""
        for bound in [] if self.mask is False else self.bounds():
            outside = bound.margin < 0
            yield (
                bound.what,
                (outside & self.mask if isinstance(self.mask, Tensor) else outside).any(),
            )

    def masks(self) -> Iterator[tuple[bool | Tensor, int]]:
        """Each mask, of `poutine.mask` and in the distribution, with the event dims inside of it."""
        if self.mask is not None:
            yield self.mask, self.fn.event_dim
        for fn in layers(self.fn):
            if isinstance(fn, MaskedDistribution):
                yield fn._mask, fn.event_dim

    def shown(self, batch_shape: torch.Size, event_shape: torch.Size) -> Tensor:
        """What no mask hides, `[*batch, *event]`."""
        seen = torch.ones(batch_shape + event_shape, dtype=torch.bool, device=self.value.device)
        for mask, event_dim in self.masks():
            hides = torch.as_tensor(mask, device=seen.device)
            inner = (1,) * min(event_dim, len(event_shape))
            seen = seen & hides.reshape((*hides.shape, *inner))
        return seen

    def _hidden(self) -> float:
        """What stands where a mask hides: nothing, or for a discrete latent what sums to one."""
        if self.choice is not None:
            batch = self.choice.base.batch_shape
            cells = math.prod(batch[len(batch) - self.choice.inner :])
            return -cells * math.log(len(self.choice.states))
        if self.kind == "discrete" and self.fn.has_enumerate_support:
            return -math.log(self.fn.enumerate_support(expand=False).shape[0])
        return 0.0


@dataclass
class ParamVisit:
    """One learned parameter as one run met it, with the module that holds it if one does."""

    name: str
    constraint: constraints.Constraint
    owner: nn.Module | None
    attribute: str
    value: Tensor | None = None


def is_constant(value: Any) -> bool:
    """Whether several real numbers are all the same."""
    several = isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1
    return bool(several and (value == value.reshape(-1)[0]).all())


def constant_data(visits: Mapping[str, Visit]) -> list[str]:
    """Observed sites of real numbers that are all the same: a scale learned from them may go to 0."""
    seen = [visit for visit in visits.values() if visit.kind == "observed"]
    return [
        visit.name
        for visit in seen
        if is_constant(visit.value) and not getattr(visit.fn.support, "is_discrete", False)
    ]


def scaled(log_prob: Tensor, scale: float | Tensor) -> Tensor:
    """A log density times its scale, where that is not 1."""
    return log_prob if isinstance(scale, int | float) and scale == 1 else log_prob * scale


def sample_sites(trace: Any) -> dict[str, Any]:
    """The sample sites of a Pyro trace by name, without the bookkeeping sites of plates."""
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not isinstance(node["fn"], _Subsample)
    }


def nesting_of(visits: Mapping[str, Visit]) -> int:
    """How many batch dims a run without enumeration has, over all sites."""
    widths = [visit.width for visit in visits.values()]
    depths = [-int(frame.dim or 0) for visit in visits.values() for frame in visit.frames]
    return max([*widths, *depths], default=0)


def flags(visits: Mapping[str, Visit], exempt: Container[str]) -> dict[Key, Tensor]:
    """Whether, in one run, something leaves its constraint, by site and words.

    Args:
        visits: The run's sites.
        exempt: Those made with ``validate_args=False``.
    """
    found: dict[Key, Tensor] = {}
    for visit in visits.values():
        if visit.kind != "deterministic" and visit.name not in exempt:
            for what, outside in visit.leaves():
                key = (visit.name, what)
                found[key] = found[key] | outside if key in found else outside
    return found


def kind_of(msg: Any) -> Kind:
    """What a sample message stands for."""
    if msg["infer"].get("_deterministic"):
        return "deterministic"
    base = innermost(msg["fn"])
    if isinstance(base, Unit):
        # `pyro.factor`, whose value has no elements; `poutine.uncondition` calls it not observed.
        return "factor"
    if msg["is_observed"]:
        return "deterministic" if _is_hidden_delta(msg["fn"]) else "observed"
    if isinstance(base, Delta):
        return "deterministic"
    if getattr(msg["fn"].support, "is_discrete", False):
        return "discrete"
    return "latent"


def _is_hidden_delta(fn: Any) -> bool:
    """Whether this is the Delta, masked away, that a reparameterised site leaves under its name."""
    inside = [*layers(fn)]
    hidden = any(getattr(layer, "_mask", None) is False for layer in inside[:-1])
    return hidden and isinstance(inside[-1], Delta)


class Terms(NamedTuple):
    """The log joint by part, in nats.

    Attributes:
        shared: What lies outside data plates, `[K]`.
        local: For each data plate, one number per row of the minibatch, `[K, B]`, *without* the
            factor N / B: multi-sample bounds take their logsumexp first and scale afterwards.
        scale: N / B of each data plate.
    """

    shared: Tensor
    local: dict[str, Tensor]
    scale: dict[str, float]

    def total(self) -> Tensor:
        """The log joint `[K]`, an unbiased estimate of it where a plate is subsampled."""
        total = self.shared
        for plate, rows in self.local.items():
            total = total + self.scale[plate] * rows.sum(-1)
        return total


class Marginal(NamedTuple):
    """What one group of connected sites adds to the log joint, its discrete sites summed out.

    Attributes:
        value: One number per row of the plates around it, the outermost first, unscaled, nats.
        frames: Those plates, the outermost first.
        scale: The one scale that all its sites have.
        sources: Those sites.
    """

    value: Tensor
    frames: Frames
    scale: Any
    sources: frozenset[str]


def add_up(
    visits: Mapping[str, Visit],
    dtype: torch.dtype,
    *,
    jacobian: bool,
    power: float = 1.0,
    without: Container[str] = (),
    marginals: Sequence[Marginal] = (),
) -> Terms:
    """Log densities and log determinants of one run, at one point.

    Args:
        visits: The run's sites.
        dtype: Precision of an empty sum.
        jacobian: Whether to add the log determinants.
        power: What the likelihood, observed sites and factors, is raised to.
        without: Sites whose log densities depend on discrete latents.
        marginals: What stands in their place.
    """
    total = _Sum(dtype)
    for visit in visits.values():
        factors = {f.name: (f.full_size or f.size) / f.size for f in visit.frames}  # N / B
        total.scale.update(factors)
        if not visit.counts:
            continue
        log_prob = None if visit.name in without else visit.log_prob()
        if power != 1.0 and log_prob is not None and visit.kind in ("observed", "factor"):
            log_prob = power * log_prob
        log_det = _log_det(visit, jacobian, visits)
        if log_det is not None:
            # A guide is subsampled with the model, so its Jacobian is scaled with the plates;
            # `poutine.scale` and `poutine.mask` speak of the model alone.
            log_det = scaled(log_det, math.prod(factors.values()))
            log_prob = log_det if log_prob is None else log_prob + log_det
        if log_prob is not None:
            total.add(log_prob, visit.frames)
    for part in marginals:
        total.add_rows(scaled(part.value, part.scale), part.frames)
    return Terms(total.shared, total.local, total.scale)


@dataclass
class _Sum:
    """Log densities as they are added up, by plate."""

    dtype: torch.dtype
    scale: dict[str, float] = field(default_factory=dict)
    local: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.shared = torch.zeros((), dtype=self.dtype)

    def add(self, log_prob: Tensor, frames: Frames) -> None:
        """Add `[*batch]`, scaled."""
        if not frames:
            self.shared = self.shared + log_prob.sum()
        else:
            self.add_rows(_rows(log_prob, int(frames[0].dim or 0), frames[0].size), frames)

    def add_rows(self, rows: Tensor, frames: Frames) -> None:
        """Add a scaled number, or one row per number of the outermost plate and more dims."""
        if not frames:
            self.shared = self.shared + rows
            return
        name = frames[0].name
        rows = rows.flatten(1).sum(-1) if rows.dim() > 1 else rows
        rows = scaled(rows, 1.0 / self.scale[name])
        self.local[name] = self.local[name] + rows if name in self.local else rows


def made_by_obs_mask(name: str, visits: Mapping[str, Visit]) -> bool:
    """Whether a site is the latent that ``pyro.sample(..., obs_mask=...)`` makes."""
    stem = name.removesuffix("_unobserved")
    return stem != name and {stem, f"{stem}_observed"} <= set(visits)


def _log_det(visit: Visit, jacobian: bool, visits: Mapping[str, Visit]) -> Tensor | None:
    """A latent's log determinant, where it is wanted; and a standard normal where it stands idle.

    ``pyro.sample(..., obs_mask=...)`` makes a latent also for rows that were observed. It has no
    influence there, and a flat density that no guide could fit. A normalised density in its place
    changes neither the posterior of anything else nor the evidence.
    """
    log_det = visit.log_det if jacobian else None
    point, mask = visit.unconstrained, visit.mask
    made = made_by_obs_mask(visit.name, visits)
    if not made or point is None or not isinstance(mask, Tensor):
        return log_det
    normal = visit.summed(-0.5 * point.square() - 0.5 * math.log(2 * math.pi))
    return torch.where(mask, torch.zeros_like(normal) if log_det is None else log_det, normal)


def _rows(log_prob: Tensor, dim: int, size: int) -> Tensor:
    """Sum over all dims but the plate's: `[B]`."""
    shape = broadcast_shapes(log_prob.shape, (size,) + (1,) * (-dim - 1))
    log_prob = log_prob.expand(shape)
    others = [d for d in range(log_prob.dim()) if d != log_prob.dim() + dim]
    return log_prob.sum(others) if others else log_prob
