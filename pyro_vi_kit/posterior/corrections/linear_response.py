"""Covariances of a Gaussian fit by linear response.

Tilt the posterior a little, `log p + t g(z)`, and the optimum moves; how far it takes `E_q[h]` along is
an estimate of the posterior covariance of g and h (Giordano, Broderick & Jordan 2018,
https://www.jmlr.org/papers/v19/17-670.html): `J_g H^-1 J_h^T`, with H the Hessian of minus the ELBO in
the parameters of q and J the derivative of `E_q[g]`. On draws that are held fixed both are exact
(Giordano, Ingram & Broderick 2024, https://www.jmlr.org/papers/v25/23-1015.html). Where the posterior
is Gaussian and q independent normals, whose sds are too small, the covariances are the posterior's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.runtime import seed_of
from pyro_vi_kit.guides import FullRank
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.optimize.deterministic.curvature import entries, hessian
from pyro_vi_kit.optimize.deterministic.parametrisation import (
    Dense,
    Diagonal,
    Gaussian,
    GaussianParametrisation,
)
from pyro_vi_kit.optimize.deterministic.search import Search, matched_normals
from pyro_vi_kit.optimize.result import Budget
from pyro_vi_kit.posterior.approximation import GuideApproximation
from pyro_vi_kit.posterior.labels import labels
from pyro_vi_kit.posterior.record import Record

if TYPE_CHECKING:
    import pandas as pd

Named = Callable[[Mapping[str, Tensor]], dict[str, np.ndarray]]

# The Hessian has 2 D rows for independent normals, and D (D + 3) / 2 for a dense covariance.
MAX_DIM = {"mean_field": 1000, "full_rank": 50}
_DRAWS = 2048
# For moments of constrained values, in each of two sets.
_VALUES = 8192
# Of these the metric of the search is made, so that it is the search that takes steps, not Hessians.
_FEW = 256
# Nats that the ELBO on the fixed draws may be below its maximum.
_TOLERANCE = 1e-10
_MAX_EVALUATIONS = 500
# What may be missing for the optimum to count as one, nats.
_CONVERGED = 1e-4
# Eigenvalues of the Hessian, relative to the largest, that are not told from zero.
_FLAT = 1e-10


@dataclass(frozen=True, eq=False)
class Response:
    """How the optimum of a Gaussian fit answers to a tilt of the posterior.

    Attributes:
        shape: The Gaussian family, framed by its optimum on the fixed draws.
        inverse: Inverse Hessian of minus the ELBO there, `[P, P]`.
        draws: Fixed draws.
        left: Nats that the ELBO on them may still be below its maximum.
        evaluations: Gradients of the log density, a product with its Hessian counting as two.
        seconds: Wall time.
    """

    shape: GaussianParametrisation
    inverse: Tensor
    draws: int
    left: float
    evaluations: int
    seconds: float

    @property
    def gaussian(self) -> Gaussian:
        """The optimum's mean with the corrected covariance, unconstrained."""
        dim = self.shape.noise
        inner = torch.linalg.cholesky(self.inverse[:dim, :dim]).to(self.shape.frame.loc.dtype)
        return Gaussian(self.shape.frame.loc, self.shape.frame.scale_tril @ inner)


@torch.enable_grad()  # the caller may have gradients off
def respond(
    approximation: object,
    record: Record,
    *,
    draws: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Response:
    """Refine a fit to its optimum on fixed draws, and invert the Hessian there.

    The arguments are those of `Posterior.linear_response`.

    Raises:
        OptionError: If this fit has no linear response, or the Hessian is not positive definite.
    """
    started = time.monotonic()
    approximation = _require_gaussian(approximation, record)
    density = approximation.density.holding(approximation.params)
    draws = _draws(density.dim, draws)
    with Progress("linear response", enabled=progress) as bar:
        search = Search(density, seed, Budget(), bar)
        shape = _refined(search, _framed(approximation), draws)
        noise = density.cast(matched_normals(draws, density.dim, seed_of(seed, "response")))
        curvature = hessian(density, shape, noise, bar)
        inverse = _inverse(curvature, shape, density)
        slope = _loss(search, shape, shape.start(), noise)[1].double()
    left = 0.5 * float(slope @ inverse @ slope)
    evaluations = search.evaluations + 2 * density.dim * (draws + _few(density.dim, draws))
    return Response(shape, inverse, draws, left, evaluations, time.monotonic() - started)


@torch.enable_grad()
def corrected(
    response: Response, approximation: GuideApproximation, record: Record, seed: int
) -> tuple[GuideApproximation, Record]:
    """The Gaussian of the corrected covariance as a full_rank fit, and how it was made."""
    guide = FullRank().build(approximation.density)
    family: Any = guide.families[guide.blocks[0].name]
    gaussian = response.gaussian
    family.start_from(gaussian.loc, gaussian.scale_tril)
    converged = response.left <= _CONVERGED
    said = (
        f"Covariances by linear response from {approximation.name} at its optimum on {response.draws:,} "
        f"fixed draws, whose ELBO is within {max(response.left, 1e-6):.2g} nats of the best"
    )
    advice = f"{said}." if converged else f"{said}: fit with a smaller tol= first."
    status = Status(
        converged,
        "converged" if converged else "not converged",
        advice,
        modes=record.status.modes,
        notes=record.status.notes,
    )
    made = Record(
        objective=record.objective,
        method=record.method,
        engine=record.engine,
        note=record.note,
        status=status,
        losses=record.losses,
        evaluations=record.evaluations + response.evaluations,
        seconds=record.seconds + response.seconds,
        seed=seed,
        correction=f"linear response of {approximation.name}",
    )
    return GuideApproximation("full_rank", guide, approximation.params), made


def summarise(
    response: Response,
    approximation: GuideApproximation,
    named: Named,
    *,
    dims: Mapping[str, Sequence[str]],
    coords: Mapping[str, Sequence[Any]],
    seed: int,
) -> pd.DataFrame:
    """Mean, corrected sd and sd of q of each number.

    The derivatives of `E_q[g]` come from g's covariance with the score of q, on two sets of draws that
    are independent of each other: their product has no bias by the noise in either. For what is linear
    in the unconstrained values they are exact. ``named`` brings values into each site's own shape.
    """
    import pandas as pd

    halves = [_scored(response, approximation, named, seed_of(seed, "scores", i)) for i in (1, 2)]
    rows: dict[str, dict[str, float]] = {}
    for name, example in halves[0][1].items():
        columns = _moments(response, [(score, values[name]) for score, values in halves])
        shape = example.shape[1:]
        for index, label in labels(name, shape, dims.get(name, ()), coords):
            rows[label] = {
                key: float(column.reshape(shape)[index]) for key, column in columns.items()
            }
    return pd.DataFrame.from_dict(rows, orient="index")


def _moments(
    response: Response, halves: Sequence[tuple[Tensor, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Columns of the table `[G]`, from scores `[S, P]` and values `[S, *shape]` of two sets of draws."""
    flat = [torch.from_numpy(values.reshape(len(values), -1).astype(float)) for _, values in halves]
    means = [values.mean(0) for values in flat]
    centred = [values - mean for values, mean in zip(flat, means, strict=True)]
    first, second = (
        values.T @ score / len(score) for values, (score, _) in zip(centred, halves, strict=True)
    )
    variance = ((first @ response.inverse.cpu()) * second).sum(-1)
    return {
        "mean": ((means[0] + means[1]) / 2).numpy(),
        "sd": variance.clamp_min(0.0).sqrt().numpy(),
        "sd_q": torch.cat(centred).square().mean(0).sqrt().numpy(),
    }


@torch.no_grad()
def _scored(
    response: Response, approximation: GuideApproximation, named: Named, seed: int
) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Scores of q at draws of it, `[S, P]`, in the shape's parameters, and values there by site."""
    density, shape = approximation.density, response.shape
    draws = max(_VALUES, 8 * shape.noise)
    noise = density.cast(matched_normals(draws, shape.noise, seed))
    z = density.block.unpack(shape.reparameterise(shape.start(), noise))
    values = approximation.constrained(z, seed)
    rows, columns = entries(shape)
    score = noise[:, rows] * noise[:, columns] - (rows == columns).to(noise.dtype)
    return torch.cat([noise, score], 1).double().cpu(), named(values)


def _refined(search: Search, shape: GaussianParametrisation, draws: int) -> GaussianParametrisation:
    """The family's best on the fixed draws, as its own frame.

    Raises:
        KeyboardInterrupt: If the user interrupts.
    """
    density, dim = search.density, shape.noise
    few = density.cast(matched_normals(_few(dim, draws), dim, seed_of(search.seed, "metric")))
    values, vectors = torch.linalg.eigh(hessian(density, shape, few, search.progress))
    # Downhill whatever the signs; a rough metric makes the search longer, not wrong.
    metric = (vectors * values.abs().clamp_min(1e-3 * float(values.abs().max())).rsqrt()).to(
        few.dtype
    )
    noise = density.cast(matched_normals(draws, dim, seed_of(search.seed, "response")))

    def negative_elbo(points: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = _loss(search, shape, metric @ points[0], noise)
        return value.unsqueeze(0), (slope @ metric).unsqueeze(0)

    start = torch.zeros_like(shape.curvature)
    (found,) = search.minimise(
        negative_elbo,
        [start],
        tolerance=_TOLERANCE,
        curvature=torch.ones_like(start),
        max_evaluations=_MAX_EVALUATIONS,
    )
    search.require_whole()
    if not math.isfinite(found.value):
        raise OptionError(
            "the ELBO is not finite on the fixed draws: the guide reaches where the model's density is "
            "zero or overflows, and there is no linear response. Look at vi.check(model)"
        )
    return _own_frame(shape.gaussian(metric @ found.x), dense=isinstance(shape, Dense))


def _loss(
    search: Search, shape: GaussianParametrisation, x: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    log_p, gradient = search.evaluate(shape.reparameterise(x, noise))
    return shape.loss(x, noise, log_p, gradient)


def _own_frame(gaussian: Gaussian, *, dense: bool) -> GaussianParametrisation:
    """The family that a Gaussian is of, with it as its own frame."""
    return Dense(gaussian) if dense else Diagonal(gaussian, gaussian.scale_tril.diagonal())


@torch.no_grad()
def _framed(approximation: GuideApproximation) -> GaussianParametrisation:
    """The fitted Gaussian as its own frame."""
    family: Any = approximation.guide.family
    return _own_frame(Gaussian(*family.moments()), dense=family.gaussian == "dense")


def _inverse(curvature: Tensor, shape: GaussianParametrisation, density: Density) -> Tensor:
    """The inverse of a Hessian `[P, P]`.

    Raises:
        OptionError: If it is not positive definite.
    """
    values, vectors = torch.linalg.eigh(curvature)
    if not bool(values[0] > _FLAT * values[-1]):
        rows, _ = entries(shape)
        dims = torch.cat([torch.arange(shape.noise, device=rows.device), rows])
        site, index = density.block.labels()[int(dims[vectors[:, 0].abs().argmax()])]
        raise OptionError(
            f"no linear response: minus the ELBO is not curved upwards at site {site!r}, number {index} "
            f"(eigenvalues {float(values[0]):.2g} to {float(values[-1]):.2g}), so the fit is at no "
            "optimum there: the data say nothing in some direction (see vi.check(model)), or more fixed "
            "draws= are needed. posterior.resample() needs no optimum"
        )
    return (vectors / values) @ vectors.T


def _few(dim: int, draws: int) -> int:
    return min(draws, max(_FEW, 4 * dim))


def _draws(dim: int, draws: int | None) -> int:
    """The number of fixed draws.

    Raises:
        OptionError: If it is odd, or too small for the dimensions.
    """
    least = max(64, 4 * dim)
    if draws is None:
        return max(_DRAWS, 8 * dim)
    if draws % 2 or draws < least:
        raise OptionError(
            f"draws= of a linear response must be an even number of at least {least:,} (four for each "
            f"of {dim} unconstrained dimensions, and 64), got {draws:,}"
        )
    return draws


def _require_gaussian(approximation: object, record: Record) -> GuideApproximation:
    """Refuse what has no linear response, or needs too large a Hessian."""
    if record.correction:
        raise OptionError(
            f"this posterior is corrected already ({record.correction}): ask the fit that it came from"
        )
    if not isinstance(approximation, GuideApproximation):
        raise OptionError(_only("a Pyro guide"))
    guide = approximation.guide
    if guide.density.streamed is not None:
        raise OptionError(_only("a fit to streamed data") + " on data in memory")
    if len(guide.blocks) != 1 or guide.blocks[0].plate is not None:
        raise OptionError(
            _only(f"guide {approximation.name!r} with latents row by row") + " without batch_size="
        )
    family = guide.family_of(guide.blocks[0])
    if family.gaussian not in ("diagonal", "dense"):
        raise OptionError(_only(f"guide {approximation.name!r}"))
    if record.objective.multi_sample:
        raise OptionError(_only(f"objective {record.objective.name!r}") + ", objective='elbo'")
    kind = "full_rank" if family.gaussian == "dense" else "mean_field"
    if guide.density.dim > MAX_DIM[kind]:
        remedy = (
            "fit guide='mean_field', whose linear response goes up to "
            f"{MAX_DIM['mean_field']:,} dimensions"
            if guide.density.dim <= MAX_DIM["mean_field"]
            else "use posterior.resample(), or vi.nuts(model)"
        )
        raise OptionError(
            f"the linear response of {kind} takes a Hessian over all its parameters, for at most "
            f"{MAX_DIM[kind]:,} unconstrained dimensions, and this model has {guide.density.dim:,}: "
            f"{remedy}"
        )
    return approximation


def _only(what: str) -> str:
    return (
        f"{what} has no linear response here, which is that of a Gaussian at the optimum of its ELBO: "
        "fit guide='mean_field' or 'full_rank'"
    )
