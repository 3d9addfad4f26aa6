"""The log joint by part: what is shared, and one number per row of each data plate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log, pi, prod
from typing import NamedTuple

import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_vi_kit.model.log_density.enumeration import Enumerated
from pyro_vi_kit.model.log_density.handlers import Visit, scaled

Frames = tuple[CondIndepStackFrame, ...]


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


def add_up(
    visits: Mapping[str, Visit],
    jacobian: bool,
    dtype: torch.dtype,
    enumerated: Enumerated | None = None,
    power: float = 1.0,
) -> Terms:
    """Log densities and log determinants of one run, at one point.

    Args:
        visits: The run's sites.
        jacobian: Whether to add the log determinants.
        dtype: Precision of an empty sum.
        enumerated: The sites that depend on discrete latents, to be summed out.
        power: What the likelihood, observed sites and factors, is raised to.
    """
    total = _Sum(dtype)
    depends = {} if enumerated is None else enumerated.factors
    for visit in visits.values():
        factors = _factors(visit.frames)
        total.scale.update(factors)
        if not visit.counts:
            continue
        log_prob = None if visit.name in depends else visit.log_prob()
        if power != 1.0 and log_prob is not None and visit.kind in ("observed", "factor"):
            log_prob = power * log_prob
        log_det = _log_det(visit, jacobian, visits)
        if log_det is not None:
            # A guide is subsampled with the model, so its Jacobian is scaled with the plates;
            # `poutine.scale` and `poutine.mask` speak of the model alone.
            log_det = scaled(log_det, prod(factors.values()))
            log_prob = log_det if log_prob is None else log_prob + log_det
        if log_prob is not None:
            total.add(log_prob, visit.frames)
    for part in [] if enumerated is None else enumerated.marginals():
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


def _log_det(visit: Visit, jacobian: bool, visits: Mapping[str, Visit]) -> Tensor | None:
    """A latent's log determinant, where it is wanted; and a standard normal where it stands idle.

    ``pyro.sample(..., obs_mask=...)`` makes a latent also for rows that were observed. It has no
    influence there, and a flat density that no guide could fit. A normalised density in its place
    changes neither the posterior of anything else nor the evidence.
    """
    log_det = visit.log_det if jacobian else None
    point, mask = visit.unconstrained, visit.mask
    stem = visit.name.removesuffix("_unobserved")
    made_by_obs_mask = stem != visit.name and {stem, f"{stem}_observed"} <= set(visits)
    if not made_by_obs_mask or point is None or not isinstance(mask, Tensor):
        return log_det
    normal = -0.5 * point.square() - 0.5 * log(2 * pi)
    surplus = point.dim() - (visit.value.dim() - visit.fn.event_dim)
    normal = normal.flatten(-surplus).sum(-1) if surplus > 0 else normal
    return torch.where(mask, torch.zeros_like(normal) if log_det is None else log_det, normal)


def _factors(frames: Frames) -> dict[str, float]:
    """N / B of each of these plates."""
    return {f.name: (f.full_size or f.size) / f.size for f in frames}


def _rows(log_prob: Tensor, dim: int, size: int) -> Tensor:
    """Sum over all dims but the plate's: `[B]`."""
    shape = torch.broadcast_shapes(log_prob.shape, (size,) + (1,) * (-dim - 1))
    log_prob = log_prob.expand(shape)
    others = [d for d in range(log_prob.dim()) if d != log_prob.dim() + dim]
    return log_prob.sum(others) if others else log_prob
