"""The modes that the searches for a start ended in, and those of them that a fit leaves out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.runtime import RandomStream, isolated
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian

_DRAWS = 2000
_SEED = 17_711
# A mode that draws come near this much less often than they should is left out. Laplace's shares are
# rough, and a guide that is merely off by a factor of a few is a matter of weights.
_FAINT = 0.1


class Peak(NamedTuple):
    """A mode of the log density.

    Attributes:
        gaussian: Laplace's approximation there.
        log_evidence: Its estimate of the integral of the density, nats.
    """

    gaussian: Gaussian
    log_evidence: float


def left_out(peaks: Sequence[Peak], draws: Tensor) -> float | None:
    """The share of the mass in modes that draws leave out; None where fewer than two are known.

    Each draw is shared out among the modes by their Laplace densities, and what each gets in total is
    held against its share of the evidence.

    Args:
        peaks: The modes.
        draws: Of q, unconstrained, `[S, D]`.
    """
    if len(peaks) < 2:
        return None
    evidence = torch.tensor([peak.log_evidence for peak in peaks], dtype=torch.float64)
    shares = evidence.softmax(0)
    z = draws.double().cpu()
    densities = torch.stack([_log_density(peak.gaussian, z) for peak in peaks], -1)
    visited = (densities + shares.log()).nan_to_num(nan=-math.inf).softmax(-1).nanmean(0)
    return float(shares[visited < _FAINT * shares].sum())


def with_peaks(status: Status, peaks: Sequence[Peak], guide: Guide) -> Status:
    """A fit's status with what the searches before it have found.

    Args:
        status: How the fit ended.
        peaks: Modes that the searches ended in; none where there were no searches.
        guide: The trained guide.
    """
    if not peaks:
        return status
    density = guide.density
    missed = None
    if not guide.point and len(peaks) > 1:
        with torch.no_grad(), RandomStream(_SEED), isolated(density.dtype, density.device):
            missed = left_out(peaks, density.block.pack(guide.draw(_DRAWS).z))
    return dataclasses.replace(status, modes=len(peaks), missed=missed)


def _log_density(gaussian: Gaussian, z: Tensor) -> Tensor:
    """Log density at `[S, D]`, up to what all Gaussians have in common: `[S]`."""
    loc, tril = gaussian.loc.double().cpu(), gaussian.scale_tril.double().cpu()
    unit = torch.linalg.solve_triangular(tril, (z - loc).T, upper=False)
    return -0.5 * unit.square().sum(0) - tril.diagonal().log().sum()
