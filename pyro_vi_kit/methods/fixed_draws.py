"""Gaussian guides by fixed-draw L-BFGS (sample-average approximation).

With its noise held fixed the ELBO is an ordinary function, and L-BFGS needs tens of evaluations where
stochastic gradients need thousands (Giordano, Ingram & Broderick 2024; Burroni, Domke & Sheldon
2023). The search runs in coordinates in which the posterior is roughly round.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_kit.density import Density
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.families import DenseNormal, DiagonalNormal, PointMass
from pyro_vi_kit.methods.draws import matched_normals
from pyro_vi_kit.methods.laplace import find_mode, laplace, starting_point
from pyro_vi_kit.methods.minimise import Minimum, minimise
from pyro_vi_kit.methods.result import Outcome
from pyro_vi_kit.progress import Progress
from pyro_vi_kit.types import Status

NAME = "lbfgs"
_MAX_DRAWS = 8192
# The Hessian takes D points of D numbers, and draws have to outnumber dimensions.
MAX_DIM = 1000


@dataclass
class Gaussian:
    """A Gaussian over `[D]` as mean and Cholesky factor."""

    loc: Tensor
    scale_tril: Tensor


@dataclass
class _Search:
    """What the stages of one fit share."""

    density: Density
    seed: int
    deadline: float | None
    progress: Progress
    losses: list[float]
    evaluations: int = 0
    stopped: str = ""

    def minimise(self, function: Callable[[Tensor], Tensor], start: Tensor, draws: int) -> Minimum:
        def on_value(value: float) -> None:
            self.losses.append(value)
            self.progress.step(-value)

        found = minimise(function, start, deadline=self.deadline, on_value=on_value)
        self.evaluations += draws * found.evaluations
        self.stopped = self.stopped or found.stopped
        return found


def applies_to(guide: object) -> bool:
    """Whether a guide is one Gaussian, or a point, over all latents of a model without parameters.

    A Gaussian of more than 1,000 dimensions is left to stochastic steps.
    """
    if not isinstance(guide, Guide) or guide.density.params or len(guide.blocks) > 1:
        return False
    family = guide.families[guide.blocks[0].name]
    if isinstance(family, PointMass):
        return True
    return isinstance(family, DiagonalNormal | DenseNormal) and guide.density.dim <= MAX_DIM


def fit(
    guide: Guide,
    *,
    seed: int,
    tolerance: float,
    deadline: float | None,
    progress: Progress,
    start: Tensor | None = None,
) -> Outcome:
    """Fit a Gaussian or point guide to the ELBO, in place.

    Args:
        guide: One for which `applies_to` holds.
        seed: Of the fixed draws.
        tolerance: Nats by which the ELBO on fresh draws may differ from that on the fixed ones.
        deadline: `time.monotonic` second at which to stop.
        progress: Told each evaluation.
        start: Unconstrained starting point `[D]`.

    Raises:
        ModelError: If no starting point has a finite log density.
    """
    density = guide.density
    search = _Search(density, seed, deadline, progress, [])
    if start is None:
        start = starting_point(density, seed)
    family = guide.families[guide.blocks[0].name]
    if isinstance(family, PointMass):
        return _fit_point(family, search, start)
    dense = isinstance(family, DenseNormal)
    gaussian, status = fit_gaussian(search, start, dense=dense, tolerance=tolerance)
    family.start_from(gaussian.loc, gaussian.scale_tril)  # type: ignore[operator]
    return Outcome(NAME, status, search.losses, search.evaluations)


def _fit_point(family: PointMass, search: _Search, start: Tensor) -> Outcome:
    mode = find_mode(search.density, start, jacobian=False, deadline=search.deadline)
    with torch.no_grad():
        family.loc.copy_(mode.x)
    search.losses.append(mode.value)
    if mode.stopped:
        status = _stopped_status(mode.stopped)
    elif mode.converged:
        status = Status(True, "converged", "The mode of the constrained density was found.")
    else:
        status = Status(
            False,
            "not converged",
            f"The mode search gave up ({mode.message}): the density may have no mode (a hierarchical "
            "sd at 0 does this). Use guide='mean_field'.",
        )
    return Outcome(NAME, status, search.losses, mode.evaluations)


def fit_gaussian(
    search: _Search, start: Tensor, *, dense: bool, tolerance: float
) -> tuple[Gaussian, Status]:
    """The ELBO-optimal Gaussian, with dense or diagonal covariance, and how the search ended."""
    density = search.density
    frame = _frame(search, start)
    if search.stopped:
        return frame, _stopped_status(search.stopped)
    draws = 2 ** math.ceil(math.log2(max(128, 8 * density.dim)))
    while True:
        noise = matched_normals(draws, density.dim, search.seed + draws).to(density.dtype)
        frame, found = _optimise(search, frame, noise, dense)
        gap, se = _fresh_gap(search, frame, found.value, draws)
        if search.stopped or abs(gap) <= max(tolerance, 2.0 * se) or 2 * draws > _MAX_DRAWS:
            break
        draws *= 2
    return frame, _status(search, found, gap, se, draws, tolerance)


def _frame(search: _Search, start: Tensor) -> Gaussian:
    """A Gaussian to measure in: Laplace's if it can be trusted, else a diagonal one from ``start``."""
    density = search.density
    at_mode = laplace(density, start, search.deadline)
    search.evaluations += at_mode.evaluations
    search.stopped = at_mode.stopped
    if at_mode.trusted or search.stopped:
        return Gaussian(at_mode.loc, at_mode.scale_tril)
    unit = torch.eye(density.dim, dtype=density.dtype)
    noise = matched_normals(max(128, 2 * density.dim + 2), density.dim, search.seed).to(
        density.dtype
    )
    diagonal, _ = _optimise(search, Gaussian(start, unit), noise, dense=False)
    return diagonal


def _optimise(
    search: _Search, frame: Gaussian, noise: Tensor, dense: bool
) -> tuple[Gaussian, Minimum]:
    """Minimise the negative ELBO on this noise `[S, D]`, in units of the frame."""
    dim = search.density.dim
    if not dense:
        precision = torch.cholesky_inverse(frame.scale_tril)
        frame = Gaussian(frame.loc, precision.diagonal().rsqrt().diag())
    below = torch.tril_indices(dim, dim, -1) if dense else torch.zeros(2, 0, dtype=torch.long)
    log_unit = frame.scale_tril.diagonal().log().sum()
    constant = 0.5 * dim * (1.0 + math.log(2.0 * math.pi))

    def unpack(x: Tensor) -> tuple[Tensor, Tensor]:
        factor = torch.diag(x[dim : 2 * dim].exp())
        return x[:dim], factor.index_put((below[0], below[1]), x[2 * dim :])

    def negative_elbo(x: Tensor) -> Tensor:
        loc, factor = unpack(x)
        z = frame.loc + (loc + noise @ factor.T) @ frame.scale_tril.T
        entropy = x[dim : 2 * dim].sum() + log_unit + constant
        return -(search.density.log_prob(z).mean() + entropy)

    start = torch.zeros(2 * dim + below.shape[1], dtype=search.density.dtype)
    found = search.minimise(negative_elbo, start, len(noise))
    loc, factor = unpack(found.x)
    return (
        Gaussian(frame.loc + frame.scale_tril @ loc, frame.scale_tril @ factor),
        found,
    )


@torch.no_grad()
def _fresh_gap(search: _Search, gaussian: Gaussian, loss: float, draws: int) -> tuple[float, float]:
    """How far the ELBO on fresh draws lies below that on the fixed ones, and its standard error."""
    dim = search.density.dim
    noise = matched_normals(2 * draws, dim, search.seed + 7919 + draws).to(search.density.dtype)
    z = gaussian.loc + noise @ gaussian.scale_tril.T
    log_q = -0.5 * noise.square().sum(-1) - gaussian.scale_tril.diagonal().log().sum()
    log_w = search.density.log_prob(z) - (log_q - 0.5 * dim * math.log(2.0 * math.pi))
    search.evaluations += len(noise)
    # A draw and its mirror image are not independent; their means are.
    pairs = (log_w[:draws] + log_w[draws:]) / 2
    se = float(pairs.std()) / math.sqrt(draws)
    return -loss - float(log_w.mean()), se


def _status(
    search: _Search, found: Minimum, gap: float, se: float, draws: int, tolerance: float
) -> Status:
    if search.stopped:
        return _stopped_status(search.stopped)
    if not math.isfinite(gap):
        return Status(
            False,
            "diverged",
            "The ELBO is not finite on fresh draws: the guide reaches where the model's density is "
            "zero or overflows. Look at vi.check(model), or give init={site: value}.",
        )
    # In the frame's units the ELBO's curvature is near 1, so this is what a Newton step would gain.
    promised = 0.5 * found.slope**2
    if promised > tolerance:
        return Status(
            False,
            "not converged",
            f"L-BFGS stopped ({found.message}) where a step still promises {promised:.3g} nats: the "
            "posterior may have no end in some direction. Look at vi.check(model) for improper "
            "priors, or try method='stochastic'.",
        )
    said = f"ELBO on {2 * draws} fresh draws within {abs(gap):.3f} nats (s.e. {se:.3f})"
    if abs(gap) > max(tolerance, 2.0 * se):
        return Status(
            False,
            "not converged",
            f"{said}, tolerance {tolerance:g}: the draws held fixed are too few for this posterior. "
            "Try guide='affine_coupling', or method='stochastic'.",
        )
    if not found.converged and "ABNORMAL" not in found.message:
        return Status(False, "not converged", f"L-BFGS stopped early ({found.message}); {said}.")
    return Status(True, "converged", f"{said}.")


def _stopped_status(stopped: str) -> Status:
    if stopped == "budget":
        return Status(False, "budget", "The budget ran out; the best point so far was kept.")
    return Status(False, "interrupted", "Interrupted; the best point so far was kept.")


def prefit(density: Density, seed: int, deadline: float | None, start: Tensor | None) -> Gaussian:
    """A good Gaussian for a flow or a multi-sample fit to start from.

    Raises:
        KeyboardInterrupt: If the user interrupts: of the fit that it is for, nothing is done yet.
    """
    search = _Search(density, seed, deadline, Progress("start", enabled=False), [])
    if start is None:
        start = starting_point(density, seed)
    gaussian, _ = fit_gaussian(search, start, dense=density.dim <= 200, tolerance=0.1)
    if search.stopped == "interrupted":
        raise KeyboardInterrupt
    return gaussian
