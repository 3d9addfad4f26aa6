"""Mixtures of Gaussians by L-BFGS on fixed stratified draws.

With one set of draws z_ks held for each component, the ELBO is

    sum_k w_k mean_s [log p(z_ks) - log q(z_ks)],

an ordinary function of all components and of their weights (Morningstar et al. 2021): no component is
drawn at random, so that one of small weight is seen as well as the others. Components start from the
modes that searches from several points end in, with Laplace's evidence as their weights, or from parts
of the best Gaussian. As for one Gaussian, draws double until new ones have nothing to add.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.runtime import seed_of
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.mixtures.gaussian_mixture import GaussianMixture, conditional_sds, split
from pyro_vi_kit.guides.mixtures.normal_mixture import NormalMixture
from pyro_vi_kit.optimize.deterministic import fixed_draws
from pyro_vi_kit.optimize.deterministic.modes import Found, Mode, find_frame, with_modes
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian
from pyro_vi_kit.optimize.deterministic.search import Search, matched_normals
from pyro_vi_kit.optimize.result import Outcome

# More points than one Gaussian needs: it is the other modes that are looked for.
_STARTS = 16
_MAX_COMPONENTS = 8
_DEFAULT = 4
# A mode this many nats of evidence behind holds a thousandth of the mass.
_BEHIND = 7.0
_DRAWS = 64
# Of all components together, in one evaluation.
_MAX_DRAWS = 16_384
_MAX_EVALUATIONS = 200
_CHECK = 2048
# The same where time has run out.
_FEW = 256
# A component of less weight has no part in the fit, and the user hears of it.
_IDLE = 1e-3


@dataclass(frozen=True)
class Components:
    """A mixture as plain tensors.

    Attributes:
        logits: `[K]`.
        locs: `[K, D]`.
        scale_trils: `[K, D, D]`.
    """

    logits: Tensor
    locs: Tensor
    scale_trils: Tensor


def applies_to(guide: object) -> bool:
    """Whether a guide is one mixture over all latents of a model without learned parameters."""
    if not isinstance(guide, Guide) or guide.density.params or len(guide.blocks) > 1:
        return False
    return isinstance(guide.families[guide.blocks[0].name], GaussianMixture)


def find(search: Search, start: Tensor | None) -> Found:
    """Modes from several points.

    Args:
        search: Model, seed of the points, and budget.
        start: The only point `[D]` where it is given.

    Raises:
        ModelError: If the log density is finite nowhere.
        KeyboardInterrupt: If the user interrupts: nothing is done yet.
    """
    found = find_frame(search, start, _STARTS)
    search.require_whole()
    return found


def number_of_components(found: Found) -> int:
    """As many as modes that count, from 2 to 8; four where there is one mode or none."""
    count = len(_that_count(found))
    return min(count, _MAX_COMPONENTS) if count > 1 else _DEFAULT


def fit(
    guide: Guide,
    search: Search,
    start: Tensor | Components | None = None,
    *,
    found: Found | None = None,
    best: Gaussian | None = None,
) -> Outcome:
    """Fit a mixture to the ELBO, in place.

    Args:
        guide: One for which `applies_to` holds.
        search: Model, seed of the fixed draws, budget, and the nats that new draws may still add.
        start: Unconstrained starting point `[D]`, the only one then, or components to go on from.
        found: What searches for modes came to, where they are done.
        best: The best Gaussian, where it is known.

    Raises:
        ModelError: If no starting point has a finite log density.
    """
    family: GaussianMixture = guide.families[guide.blocks[0].name]  # type: ignore[assignment]
    single = None
    if not isinstance(start, Components):
        found = find_frame(search, start, _STARTS) if found is None else found
        single, start = _start(search, family, found, best)
        family.become(start.logits, start.locs, start.scale_trils)
    blend, x, gain = _grow(search, _Blend(start, diagonal=family.diagonal))
    end = blend.components(x)
    if single is not None and search.error is None:
        # Parts of a Gaussian may end as less than it, where draws or time were short; it is a mixture
        # too.
        same, draws = _copies(single, family), _FEW if search.stopped else _CHECK
        if _elbo(search, same, family, draws)[0] > _elbo(search, end, family, draws)[0]:
            end = same
    family.become(end.logits, end.locs, end.scale_trils)
    status = _status(search, end, family, gain)
    return search.outcome(
        fixed_draws.NAME, with_modes(status, () if found is None else found.modes, guide)
    )


def components_of(family: GaussianMixture) -> Components:
    """What a mixture is now."""
    with torch.no_grad():
        now = family()
        scales = now.scales if now.dense else now.scales.diag_embed()
        return Components(now.logits.clone(), now.locs.clone(), scales.clone())


# -- the start --------------------------------------------------------------------------------


def _that_count(found: Found) -> list[Mode]:
    """The modes that hold a thousandth of the mass, best first."""
    least = found.modes[0].log_evidence - _BEHIND if found.modes else math.inf
    return [mode for mode in found.modes if mode.log_evidence > least]


def _start(
    search: Search, family: GaussianMixture, found: Found, best: Gaussian | None
) -> tuple[Gaussian, Components]:
    """The best Gaussian, and the better of its parts and of the modes."""
    if best is None:
        best = fixed_draws.best_gaussian(search, found, diagonal=family.diagonal)
    count = family.components
    candidates = [_parts([best], best.loc.new_zeros(1), [count], search)]
    if search.stopped:
        return best, candidates[0]
    modes = _that_count(found)[:count]
    if len(modes) > 1:
        evidence = best.loc.new_tensor([mode.log_evidence for mode in modes])
        gaussians = [mode.gaussian for mode in modes]
        candidates.append(_parts(gaussians, evidence, _shared_out(evidence, count), search))
    elbos = [_elbo(search, candidate, family)[0] for candidate in candidates]
    return best, candidates[elbos.index(max(elbos))]


def _shared_out(evidence: Tensor, count: int) -> list[int]:
    """How many components each mode gets, `count` in all: one each, the rest by their mass."""
    parts = [1] * len(evidence)
    mass = evidence.softmax(0).tolist()
    for _ in range(count - len(parts)):
        heaviest = max(range(len(parts)), key=lambda i: mass[i] / parts[i])
        parts[heaviest] += 1
    return parts


def _parts(
    gaussians: list[Gaussian], evidence: Tensor, parts: list[int], search: Search
) -> Components:
    """Each Gaussian in so many parts, with weights by the evidence."""
    logits, locs, scales = [], [], []
    shares = evidence.log_softmax(0)
    for gaussian, share, count in zip(gaussians, shares.tolist(), parts, strict=True):
        directions = _bent(search, gaussian) if count > 1 and not search.stopped else None
        loc, scale_tril = split(gaussian.loc, gaussian.scale_tril, count, directions)
        locs.append(loc)
        scales.append(scale_tril)
        logits.append(loc.new_full((count,), share - math.log(count)))
    return Components(torch.cat(logits), torch.cat(locs), torch.cat(scales))


def _bent(search: Search, gaussian: Gaussian) -> Tensor | None:
    """Two directions, in units of a Gaussian, in which the posterior is least like it, `[D, 2]`.

    The leading eigenvectors of E[r r^T], r the difference of the two scores: the Fisher divergence,
    direction by direction. None where it is not finite.
    """
    dim = len(gaussian.loc)
    noise = search.density.cast(
        matched_normals(max(_DRAWS, 4 * dim), dim, seed_of(search.seed, "bends"))
    )
    _, gradient = search.evaluate(gaussian.loc + noise @ gaussian.scale_tril.T)
    rest = gradient @ gaussian.scale_tril + noise
    # Tails would decide alone: the directions matter, not the sizes.
    rest = rest / (1.0 + rest.norm(dim=-1, keepdim=True))
    if not bool(rest.isfinite().all()):
        return None
    return torch.linalg.eigh(rest.T @ rest)[1].flip(-1)[:, : min(dim, 2)]


def _copies(gaussian: Gaussian, family: GaussianMixture) -> Components:
    count = family.components
    tril = gaussian.scale_tril.expand(count, -1, -1)
    return Components(gaussian.loc.new_zeros(count), gaussian.loc.expand(count, -1), tril)


# -- the climb --------------------------------------------------------------------------------


class _Blend:
    """K Gaussians as one vector, each in units of what it started from; zero is the start.

    Args:
        frame: The start.
        diagonal: Whether covariances stay diagonal.
    """

    def __init__(self, frame: Components, *, diagonal: bool) -> None:
        self.frame, self.diagonal = frame, diagonal
        self.count, self.dim = frame.locs.shape
        self.units = (
            conditional_sds(frame.scale_trils).diag_embed() if diagonal else frame.scale_trils
        )
        self._below = torch.tril_indices(self.dim, self.dim, -1, device=frame.locs.device)
        weights = frame.logits.softmax(0)
        below = 0 if diagonal else self._below.shape[1]
        ones = weights.new_ones(self.dim)
        each = torch.cat([ones, 2.0 * ones, weights.new_ones(below)])
        # Of the ELBO where components are far apart and each fits: what L-BFGS begins with.
        own = weights.clamp_min(0.02)[:, None] * each
        self.curvature = torch.cat([(weights * (1 - weights)).clamp_min(0.02), own.reshape(-1)])

    def start(self) -> Tensor:
        """The frame itself, `[P]`."""
        return torch.zeros_like(self.curvature)

    def components(self, x: Tensor) -> Components:
        """What a vector `[P]` stands for."""
        rest = x[self.count :].reshape(self.count, -1)
        mean, logs, lower = rest.tensor_split([self.dim, 2 * self.dim], -1)
        factor = logs.exp().diag_embed()
        if not self.diagonal:
            row, column = self._below
            wide = factor.new_zeros(self.count, self.dim, self.dim)
            which = torch.arange(self.count, device=wide.device)[:, None]
            factor = factor + wide.index_put((which, row, column), lower)
        locs = self.frame.locs + (self.units @ mean.unsqueeze(-1))[..., 0]
        return Components(self.frame.logits + x[: self.count], locs, self.units @ factor)

    def loss(
        self, x: Tensor, noise: Tensor, log_p: Tensor, gradient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Minus the ELBO in nats and its gradient `[P]`.

        Args:
            x: `[P]`.
            noise: `[K, S, D]`.
            log_p: Log densities at the draws, `[K, S]`.
            gradient: Theirs, `[K, S, D]`.
        """
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            mixture = self.components(x)
            z = _placed(mixture, noise)
            # Of the value log p and of the slope its gradient at the draws.
            at = log_p + (gradient * (z - z.detach())).sum(-1)
            rest = at - _log_q(mixture, z)
            loss = -(mixture.logits.softmax(0) * rest.mean(-1)).sum()
            (slope,) = torch.autograd.grad(loss, x)
        return loss.detach(), slope


def _placed(mixture: Components, noise: Tensor) -> Tensor:
    """Draws of each component, `[K, S, D]`."""
    return mixture.locs[:, None] + noise @ mixture.scale_trils.mT


def _log_q(mixture: Components, z: Tensor) -> Tensor:
    """Log density of the mixture, nats."""
    normals = NormalMixture(mixture.logits, mixture.locs, mixture.scale_trils, validate_args=False)
    return normals.log_prob(z)


def _grow(search: Search, blend: _Blend) -> tuple[_Blend, Tensor, float]:
    """Optimise on few draws, then on twice as many new ones, until these gain next to nothing.

    Returns:
        The mixture, as a vector in units of a frame, and what the last draws gained on the mixture that
        the former ones had led to, nats.
    """
    tolerance = _reachable(search, blend.dim)
    draws, x, gain = 2 ** math.ceil(math.log2(max(_DRAWS, 4 * blend.dim))), blend.start(), math.inf
    first = True
    while True:
        end, gain = _optimise(search, blend, _noise(search, blend, draws), tolerance)
        if end is None:
            return blend, x, math.inf
        blend = _Blend(blend.components(end), diagonal=blend.diagonal)
        x = blend.start()
        enough = gain <= tolerance and not first
        if search.stopped or enough or 2 * draws * blend.count > _MAX_DRAWS:
            return blend, x, math.inf if first else gain
        draws, first = 2 * draws, False


def _optimise(
    search: Search, blend: _Blend, noise: Tensor, tolerance: float
) -> tuple[Tensor | None, float]:
    """The best vector on this noise, None where the ELBO is finite nowhere, and what it gains."""

    def negative_elbo(points: Tensor) -> tuple[Tensor, Tensor]:
        mixture = blend.components(points[0])
        log_p, gradient = search.evaluate(_placed(mixture, noise).reshape(-1, blend.dim))
        shape = noise.shape
        value, slope = blend.loss(
            points[0], noise, log_p.reshape(shape[:2]), gradient.reshape(shape)
        )
        return value.unsqueeze(0), slope.unsqueeze(0)

    before = float(negative_elbo(blend.start().unsqueeze(0))[0])
    (found,) = search.minimise(
        negative_elbo,
        [blend.start()],
        tolerance=0.1 * tolerance,
        curvature=blend.curvature,
        max_evaluations=_MAX_EVALUATIONS,
        record=True,
    )
    if not math.isfinite(found.value):
        return None, math.inf
    return found.x, before - found.value if math.isfinite(before) else math.inf


def _noise(search: Search, blend: _Blend, draws: int) -> Tensor:
    """Fixed normals, others for each component, `[K, draws, D]`."""
    seeds = [seed_of(search.seed, "components", draws, k) for k in range(blend.count)]
    return search.density.cast(torch.stack([matched_normals(draws, blend.dim, s) for s in seeds]))


# -- how good it is ---------------------------------------------------------------------------


@torch.no_grad()
def _elbo(
    search: Search, mixture: Components, family: GaussianMixture, draws: int = _CHECK
) -> tuple[float, float]:
    """ELBO on fresh draws and its standard error, nats; minus infinity where it is not finite."""
    blend = _Blend(mixture, diagonal=family.diagonal)
    draws = max(draws // blend.count, 4 * blend.dim) // 2 * 2
    noise = _noise(search, blend, draws)
    mixture = blend.components(blend.start())
    z = _placed(mixture, noise)
    log_p, _ = search.evaluate(z.reshape(-1, blend.dim))
    rest = log_p.reshape(z.shape[:2]) - _log_q(mixture, z)
    weights = mixture.logits.softmax(0)
    elbo = float(weights @ rest.mean(-1))
    # A draw and its mirror image are not independent; their means are.
    pairs = (rest[:, : draws // 2] + rest[:, draws // 2 :]) / 2
    se = float((weights.square() * pairs.var(-1) / (draws // 2)).sum().sqrt())
    return (elbo, se) if math.isfinite(elbo) else (-math.inf, math.inf)


def _reachable(search: Search, dim: int) -> float:
    """What can be asked for in so many dimensions, nats."""
    return max(search.tolerance, 1e-4 * dim)


def _status(search: Search, mixture: Components, family: GaussianMixture, gain: float) -> Status:
    if search.stopped:
        return search.stopped_status()
    elbo, se = _elbo(search, mixture, family)
    if not math.isfinite(elbo):
        return Status(
            False,
            "diverged",
            "The ELBO is not finite on fresh draws: the guide reaches where the model's density is "
            "zero or overflows. Look at vi.check(model), or give init={site: value}.",
        )
    weights = sorted(mixture.logits.softmax(0).tolist(), reverse=True)
    said = (
        f"ELBO {elbo:.3f} nats (s.e. {se:.3f}); weights of the {len(weights)} components "
        f"{', '.join(f'{w:.3f}' for w in weights)}"
    )
    idle = sum(weight < _IDLE for weight in weights)
    if idle:
        said += f", {idle} of them idle: components={len(weights) - idle} would do"
    if gain <= _reachable(search, len(mixture.locs[0])):
        return Status(True, "converged", f"{said}. New draws gained {gain:.2g} nats.", gain)
    return Status(
        False,
        "not converged",
        f"{said}. New draws still gained {gain:.2g} nats, tolerance {search.tolerance:g}: give a "
        "larger tol=, fewer components=, or try guide='affine_coupling'.",
        gain if math.isfinite(gain) else None,
    )
