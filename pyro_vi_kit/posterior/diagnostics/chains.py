"""Short Hamiltonian chains from draws of q: what importance weights cannot see.

Weights say how well q fits where q has draws. Chains that start there and leave p invariant go where
p has mass, weights or not: if they move away from q's means and sds, q has others than p (the idea of
Hoffman & Ma 2020, https://proceedings.mlr.press/v119/hoffman20a.html, and of the many short chains of
Margossian et al. 2024, https://arxiv.org/abs/2110.13017). Each chain is independent of the others, so
that averages over chains have honest standard errors.

They move in coordinates in which q is round: the base of a flow (Hoffman et al. 2019,
https://arxiv.org/abs/1903.03704), else units of q's covariance. Where q is near p, so is p, and a few
trajectories forget where they began; how much they forgot is measured, not assumed. What they cannot
see are modes with nothing between them.

From the tails of a q that is much too wide chains take long to come back, and they step over a needle
where q has few draws. Where importance weights say otherwise than chains, these start again from draws
under the weights, which are p's if the weights are right: then the chains stay where they are. And some
chains start from the heaviest draws: what these cannot leave the others have not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pyro_vi_kit.core.errors import in_words
from pyro_vi_kit.core.psis import psis, resample
from pyro_vi_kit.core.runtime import RandomStream, isolated
from pyro_vi_kit.core.undefined import ERRORS
from pyro_vi_kit.core.work import work_of
from pyro_vi_kit.model.gradients import Gradients
from pyro_vi_kit.posterior.approximation import GuideApproximation
from pyro_vi_kit.posterior.diagnostics.findings import MAX_MEMORY
from pyro_vi_kit.posterior.diagnostics.shifts import Shifts, by_chains, scale_of

_SEED = 46_368
_MAX_CHAINS, _MIN_CHAINS = 2000, 64
# Numbers that all chains together may put out: a second or two on one core.
_WORK = 300_000_000
# Numbers of one state of all chains.
_HELD = 20_000_000
_MAX_DIM = 1000
_TRAJECTORIES, _KEPT = 8, 5
# Draws for each chain: of those under weights few start more than one, and a needle is hit more often.
_POOL = 4
# Chains from the heaviest draws, as a share of the others.
_WATCHED = 1 / 16
# Chains that remember are given twice as long, and once more.
_ROUNDS = 3
_LENGTH = math.pi / 2  # a quarter turn of a round normal: ends where the start says nothing
_MAX_LEAPS = 8

Named = Callable[[Mapping[str, Tensor]], np.ndarray]
Point = tuple[Tensor, Tensor, Tensor]
"""Coordinates x `[C, D]`, log density there `[C]`, and its gradient `[C, D]`."""


@dataclass(frozen=True, eq=False)
class Chains:
    """What the chains came to.

    Attributes:
        shifts: How far they moved each number.
        chains: How many.
        memory: Largest correlation of any direction between their start and their end.
        stuck: Share of the weight of q's draws that is held by heavy ones which no chain could leave.
        acceptance: Share of trajectories that were accepted at last.
    """

    shifts: Shifts
    chains: int
    memory: float
    stuck: float
    acceptance: float


@dataclass
class _Run:
    """Chains under way, in coordinates x.

    Behind the ``count`` that are averaged over come some from the heaviest draws, only to be watched:
    ``shares`` is what these hold of the weight of all draws.
    """

    target: Callable[[Tensor], tuple[Tensor, Tensor]]
    at: Point
    step: float
    count: int
    shares: Tensor
    acceptance: float = 0.0
    moved: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.moved = torch.zeros_like(self.at[1], dtype=torch.bool)


def run_chains(
    approximation: GuideApproximation,
    plain: np.ndarray,
    named: Named,
    *,
    weighted: bool = False,
    indicator: np.ndarray | None = None,
) -> Chains | str:
    """Run them; where that would take too long, or is not possible, say why in one line.

    Args:
        approximation: The trained guide.
        plain: Draws of q of every reported number, `[S, n]`.
        named: Unconstrained values by site, `[C, ...]`, to the same numbers, `[C, n]`.
        weighted: Start from draws of q under importance weights, not from draws of q.
        indicator: Which numbers are indicators of states, `[n]`.
    """
    density = approximation.density
    if density.dim > _MAX_DIM:
        return f"No short chains in {density.dim:,} dimensions (at most {_MAX_DIM:,})"
    if density.streamed is not None:
        return "No short chains on streamed data"
    if density.drawn is not None:
        return "No short chains where discrete latents are drawn"
    try:
        count = _affordable(approximation, plain.shape[1])
        if count < _MIN_CHAINS:
            return (
                f"No short chains: there is time or memory for {count} of them, too few to tell "
                f"({_MIN_CHAINS})"
            )
        with RandomStream(_SEED), isolated(approximation.dtype, density.device):
            with torch.no_grad():
                into, pool, log_q = _coordinates(approximation, max(_POOL * count, 2 * density.dim))
            target = _pulled_back(into, Gradients(density, approximation.params, patience=None))
            # A piece is as large as what each trajectory evaluates.
            value, slope = map(torch.cat, zip(*map(target, pool.split(count)), strict=True))
            log_w = value - log_q
            heavy = log_w.topk(math.ceil(count * _WATCHED)).indices
            picks = _under_weights(log_w) if weighted else torch.arange(len(pool)).to(heavy)
            picks = torch.cat([picks[:count], heavy])
            shares = log_w.softmax(0)[heavy]
            at = pool[picks], value[picks], slope[picks]
            run = _Run(target, at, density.dim**-0.25, count, shares)
            return _measured(run, into, approximation, plain, named, indicator)
    except (*ERRORS, MemoryError) as error:
        # A point at which the density is not defined takes all chains with it.
        return f"Short chains were given up: {in_words(error)}"


def _affordable(approximation: GuideApproximation, numbers: int) -> int:
    """How many chains there is time and memory for."""
    density = approximation.density
    with torch.no_grad(), RandomStream(_SEED), isolated(approximation.dtype, density.device):
        z = density.block.pack(approximation.guide.draw(2).z)
    work = work_of(lambda: Gradients(density, approximation.params, patience=None)(z)) / 2
    gradients = _TRAJECTORIES * (1 + math.ceil(_LENGTH / density.dim**-0.25))
    return int(min(_MAX_CHAINS, _WORK / (work * gradients), _HELD / max(numbers, density.dim)))


def _coordinates(
    approximation: GuideApproximation, draws: int
) -> tuple[Callable[[Tensor], tuple[Tensor, Tensor]], Tensor, Tensor]:
    """A map from coordinates in which q is round to z, with its log determinant; and draws in them.

    Returns:
        The map, draws of q `[draws, D]`, and their log density up to a constant, `[draws]`.
    """
    guide, block = approximation.guide, approximation.density.block
    blocks = guide.blocks
    base, transforms = None, []
    if len(blocks) == 1 and blocks[0].plate is None:
        found = guide.families[blocks[0].name]()
        base, transforms = getattr(found, "base_dist", None), getattr(found, "transforms", [])
    if base is not None and transforms:

        def through(x: Tensor) -> tuple[Tensor, Tensor]:
            log_det = x.new_zeros(x.shape[:-1])
            for transform in transforms:
                y = transform(x)
                log_det = log_det + transform.log_abs_det_jacobian(x, y)
                x = y
            return x, log_det

        start = base.sample((draws,))
        return through, start, base.log_prob(start).reshape(draws, -1).sum(-1)
    drawn = guide.draw(draws)
    z = block.pack(drawn.z)
    log_q = drawn.shared + sum(rows.sum(-1) for rows in drawn.local.values())
    mean, covariance = z.mean(0), torch.cov(z.T).reshape(z.shape[1], -1)
    jitter = 1e-10 * covariance.diagonal().diag()
    tril = torch.linalg.cholesky(covariance + jitter)

    def affine(x: Tensor) -> tuple[Tensor, Tensor]:
        return mean + x @ tril.T, x.new_zeros(x.shape[:-1])

    return affine, torch.linalg.solve_triangular(tril, (z - mean).T, upper=False).T, log_q


def _under_weights(log_weights: Tensor) -> Tensor:
    """Which draws, each as often as its importance weight says, in random order: `[S] -> [S]`."""
    smoothed = psis(log_weights.cpu().numpy()).log_weights
    picks = resample(smoothed, len(smoothed), np.random.default_rng(_SEED))
    return torch.as_tensor(picks, device=log_weights.device)


def _pulled_back(
    into: Callable[[Tensor], tuple[Tensor, Tensor]], gradients: Gradients
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The log density of the coordinates, and its gradient; minus infinity where it is not finite."""

    def target(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            z, log_det = into(x)
            log_p, slope = gradients(z)
            (slope,) = torch.autograd.grad((z * slope).sum() + log_det.sum(), x)
        value = log_p + log_det.detach()
        bad = ~(value.isfinite() & slope.isfinite().all(-1))
        return value.masked_fill(bad, -math.inf), slope.masked_fill(bad[:, None], 0.0)

    return target


@torch.no_grad()
def _measured(
    run: _Run,
    into: Callable[[Tensor], tuple[Tensor, Tensor]],
    approximation: GuideApproximation,
    plain: np.ndarray,
    named: Named,
    indicator: np.ndarray | None,
) -> Chains:
    """Trajectories until the chains have forgotten, and the averages over the last ones."""
    start = run.at[0][: run.count]
    block = approximation.density.block
    mean, sd = scale_of(plain, indicator)
    unit = np.where(sd > 0, sd, 1.0)
    memory = 1.0
    first = second = np.zeros((len(start), plain.shape[1]))
    for i in range(_ROUNDS):
        before = _TRAJECTORIES - _KEPT if i == 0 else 2 ** (i - 1) * _TRAJECTORIES
        for _ in range(before):
            _move(run)
        first, second = np.zeros_like(first), np.zeros_like(second)
        for _ in range(_KEPT):
            _move(run)
            x = (named(block.unpack(into(run.at[0][: run.count])[0])) - mean) / unit
            first, second = first + x / _KEPT, second + x**2 / _KEPT
        memory = _memory(start, run.at[0][: run.count])
        if memory <= MAX_MEMORY:
            break
    stuck = float(run.shares[~run.moved[run.count :]].sum())
    shifts = by_chains(first, second, plain, indicator)
    return Chains(shifts, len(start), memory, stuck, run.acceptance)


def _move(run: _Run) -> None:
    """One trajectory of each chain, and a step size that most of them can be accepted with."""
    x, log_p, slope = run.at
    step = run.step * (0.8 + 0.4 * torch.rand_like(x[:, :1]))
    momentum = torch.randn_like(x)
    y, p, value, gradient = x, momentum, log_p, slope
    for _ in range(max(1, min(_MAX_LEAPS, math.ceil(_LENGTH / run.step)))):
        p = p + 0.5 * step * gradient
        y = y + step * p
        value, gradient = run.target(y)
        p = p + 0.5 * step * gradient
    gained = value - log_p - 0.5 * (p.square() - momentum.square()).sum(-1)
    # From where the density is zero there is nowhere to come back from.
    accept = gained.nan_to_num(nan=-math.inf).clamp(max=0.0).exp()
    taken = torch.rand_like(accept) < accept
    run.at = (
        torch.where(taken[:, None], y, x),
        torch.where(taken, value, log_p),
        torch.where(taken[:, None], gradient, slope),
    )
    run.moved |= taken
    run.acceptance = float(accept[: run.count].mean())
    run.step *= 1.25 if run.acceptance > 0.9 else 0.6 if run.acceptance < 0.6 else 1.0


def _memory(start: Tensor, end: Tensor) -> float:
    """The largest correlation between start and end of any direction's coordinate."""
    a, b = start - start.mean(0), end - end.mean(0)
    scale = (a.square().sum(0) * b.square().sum(0)).sqrt()
    found = (a * b).sum(0).abs() / scale.clamp_min(1e-300)
    return float(found.max())
