"""The best Gaussian by forward KL: the posterior's own mean and covariance, by importance sampling.

KL(p || q) over all Gaussians q is smallest where q has the mean and covariance of p. Both are estimated
from weighted draws of the last estimate (adaptive importance sampling: Cappé et al. 2004; Bugallo et al.
2017). A quarter of the draws comes from three times the spread, so that weights stay bounded where p has
more tail than q, and all are weighed by the mixture (Owen & Zhou 2000). They are scrambled Sobol points,
whose error falls almost like 1 / N; the two last estimates come from different scramblings, so that what
lies between them says what the error is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.runtime import seed_of
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian
from pyro_vi_kit.optimize.deterministic.search import Search, normals_at
from pyro_vi_kit.optimize.result import Outcome

NAME = "moments"
MAX_DIM = 100

_FIRST, _LAST, _GROWTH = 2**12, 2**18, 4
_PIECE = 2**22
_WIDE, _WIDE_SHARE = 3.0, 0.25
_ROUNDS = 8
# Effective draws for each number to be estimated.
_DRAWS_EACH = 4.0
_KEPT = "the last estimate was kept. Go on with resume=."


@dataclass
class _Rounds:
    """Estimates under way: what the last one said."""

    search: Search
    diagonal: bool
    bound: float = math.nan
    ess: float = 0.0


def applies_to(guide: Guide) -> bool:
    """Whether a guide is one dense or diagonal Gaussian over all latents of a model that learns nothing.

    Above 100 dimensions few weighted draws say much of a covariance.
    """
    if guide.density.params or guide.density.streamed is not None or len(guide.blocks) > 1:
        return False
    family = guide.family_of(guide.blocks[0])
    return family.gaussian in ("diagonal", "dense") and guide.density.dim <= MAX_DIM


def fit(guide: Guide, search: Search, start: Gaussian) -> tuple[Outcome, float]:
    """Give a Gaussian guide the posterior's mean and covariance, or its standard deviations, in place.

    Args:
        guide: One for which `applies_to` holds.
        search: Model, seed of the draws, budget, and the nats of KL divergence that two estimates in a
            row may lie apart.
        start: Where to draw from first.

    Returns:
        How the fit went, and E_p[log p - log q] at its end in nats.
    """
    family: Any = guide.family
    rounds = _Rounds(search, family.gaussian == "diagonal")
    gaussian, status = _settle(rounds, start)
    best = _member(gaussian, rounds.diagonal)
    family.start_from(best.loc, best.scale_tril)
    return search.outcome(NAME, status), rounds.bound


def _settle(rounds: _Rounds, gaussian: Gaussian) -> tuple[Gaussian, Status]:
    """Rounds at one number of draws, then at four times as many, until two in a row agree."""
    search = rounds.search
    parameters = len(gaussian.loc) * (len(gaussian.loc) + 3) / 2
    draws, made = _FIRST, 0
    while draws <= _LAST:
        for _ in range(_ROUNDS):
            try:
                found = _matched(rounds, gaussian, draws, seed_of(search.seed, "moments", made))
            except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001  told by `fit`
                search.error = error
                return gaussian, search.stopped_status(_KEPT)
            made += 1
            apart = math.inf if found is None else _divergence(found, gaussian)
            gaussian = gaussian if found is None else found
            enough = rounds.ess >= _DRAWS_EACH * parameters
            if enough and apart <= search.tolerance:
                return gaussian, Status(True, "converged", _words(rounds, draws, apart))
            if search.budget.over:
                return gaussian, search.stopped_status(_KEPT)
            # More rounds of as many draws would show their noise alone.
            if not enough or apart <= 2.0 * parameters / rounds.ess:
                break
        draws *= _GROWTH
    return gaussian, Status(
        False,
        "not converged",
        f"Of {_LAST:,} weighted draws only {rounds.ess:,.0f} count, and estimates still move: give a "
        "larger tol=, take method='stochastic', or a guide that comes nearer, such as "
        "'affine_coupling'.",
    )


@torch.no_grad()
def _matched(rounds: _Rounds, gaussian: Gaussian, draws: int, seed: int) -> Gaussian | None:
    """The moments of the posterior as draws of this Gaussian say; None where none of them counts."""
    z, log_proposal = _proposed(gaussian, draws, seed)
    log_p = _log_prob(rounds.search.density, z)
    rounds.search.count(draws)
    log_w = log_p - log_proposal
    log_w = torch.where(log_w.isfinite(), log_w, -math.inf)
    if not bool(log_w.isfinite().any()):
        rounds.ess = 0.0
        return None
    weights = torch.softmax(log_w, 0)
    rounds.ess = float(1.0 / weights.square().sum())
    loc = weights @ z
    centred = (z - loc) * weights.sqrt().unsqueeze(-1)
    factor, failed = torch.linalg.cholesky_ex(centred.T @ centred)
    if bool(failed) or not bool(factor.isfinite().all()):
        return None
    found = Gaussian(loc, factor)
    log_q = _log_prob_of(_member(found, rounds.diagonal), z)
    gaps = torch.where(weights > 0.0, log_p - log_q, 0.0)
    rounds.bound = float(weights @ gaps)
    rounds.search.record(-rounds.bound)
    return found


def _member(gaussian: Gaussian, diagonal: bool) -> Gaussian:
    """What a guide makes of these moments: all of them, or means and standard deviations."""
    if not diagonal:
        return gaussian
    return Gaussian(gaussian.loc, gaussian.scale_tril.square().sum(-1).sqrt().diag())


def _proposed(gaussian: Gaussian, draws: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draws of the Gaussian and of its wide copy `[draws, D]`, and their log density `[draws]`."""
    dim = len(gaussian.loc)
    # A coordinate of their own says which points are wide: their order knows where they lie.
    sobol = SobolEngine(dim + 1, scramble=True, seed=seed).draw(draws, dtype=torch.float64)
    noise = normals_at(sobol[:, 1:])
    noise = torch.where(sobol[:, :1] < _WIDE_SHARE, _WIDE * noise, noise).to(gaussian.loc)
    z = gaussian.loc + noise @ gaussian.scale_tril.T
    narrow = _log_prob_of(gaussian, z) + math.log(1.0 - _WIDE_SHARE)
    copy = Gaussian(gaussian.loc, _WIDE * gaussian.scale_tril)
    return z, torch.logaddexp(narrow, _log_prob_of(copy, z) + math.log(_WIDE_SHARE))


def _log_prob(density: Density, z: Tensor) -> Tensor:
    """Log density `[K]` in pieces that fit into memory."""
    width = sum(t.numel() for t in density.data) + density.dim
    size = max(1, _PIECE // max(width, 1))
    return torch.cat([density.log_prob(part) for part in z.split(size)])


def _log_prob_of(gaussian: Gaussian, z: Tensor) -> Tensor:
    """Log density of a Gaussian at `[K, D]`: `[K]`, nats."""
    white = torch.linalg.solve_triangular(gaussian.scale_tril, (z - gaussian.loc).T, upper=False)
    constant = gaussian.scale_tril.diagonal().log().sum() + 0.5 * len(white) * math.log(2 * math.pi)
    return -0.5 * white.square().sum(0) - constant


def _divergence(p: Gaussian, q: Gaussian) -> float:
    """KL(p || q) of two Gaussians, nats."""
    ratio = torch.linalg.solve_triangular(q.scale_tril, p.scale_tril, upper=False)
    gap = torch.linalg.solve_triangular(q.scale_tril, (p.loc - q.loc)[:, None], upper=False)
    log_det = q.scale_tril.diagonal().log().sum() - p.scale_tril.diagonal().log().sum()
    square = ratio.square().sum() + gap.square().sum() - len(p.loc)
    return float(0.5 * square + log_det)


def _words(rounds: _Rounds, draws: int, apart: float) -> str:
    return (
        f"Two estimates of the posterior's moments, from {draws:,} weighted draws each "
        f"({rounds.ess:,.0f} of them count), lie {max(apart, 0.0):.1g} nats apart. "
        f"Bound {rounds.bound:.3f} nats."
    )
