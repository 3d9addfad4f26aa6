"""The log joint by part: what is shared, and one number per row of each data plate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit.density.handlers import Visit


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


def add_up(visits: Mapping[str, Visit], jacobian: bool, dtype: torch.dtype) -> Terms:
    """Log densities and log determinants of one run, at one point.

    Args:
        visits: The run's sites.
        jacobian: Whether to add the log determinants.
        dtype: Precision of an empty sum.
    """
    shared = torch.zeros((), dtype=dtype)
    local: dict[str, Tensor] = {}
    scale: dict[str, float] = {}
    for visit in visits.values():
        factors = {f.name: (f.full_size or f.size) / f.size for f in visit.frames}
        scale.update(factors)
        if visit.kind == "deterministic":
            continue
        log_prob = visit.log_prob()
        if jacobian and visit.log_det is not None:
            log_det = visit.log_det
            for factor in factors.values():
                # A guide is subsampled with the model, so its Jacobian is scaled with the plates;
                # `poutine.scale` and `poutine.mask` speak of the model alone.
                log_det = log_det * factor
            log_prob = log_prob + log_det
        if not visit.frames:
            shared = shared + log_prob.sum()
            continue
        frame = visit.frames[0]
        rows = _rows(log_prob, int(frame.dim or 0), frame.size) / factors[frame.name]
        local[frame.name] = local[frame.name] + rows if frame.name in local else rows
    return Terms(shared, local, scale)


def _rows(log_prob: Tensor, dim: int, size: int) -> Tensor:
    """Sum over all dims but the plate's: `[B]`."""
    shape = torch.broadcast_shapes(log_prob.shape, (size,) + (1,) * (-dim - 1))
    log_prob = log_prob.expand(shape)
    others = [d for d in range(log_prob.dim()) if d != log_prob.dim() + dim]
    return log_prob.sum(others) if others else log_prob
