"""Coordinate-ascent VI: each factor in turn becomes the best one given the others.

The model offers the updates, in closed form (Bishop 2006, section 10.1; Blei, Kucukelbir & McAuliffe
2017). Here they are called until the ELBO stands still. It is estimated on the same draws each time, so
that a comparison of two states has next to no noise; a factor that lowers it, or that could be better
in the end, is no optimal one, and is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.errors import ModelError, ViError, first_line
from pyro_vi_kit.core.runtime import RandomStream, isolated
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.guides.gaussian.factors import Factors
from pyro_vi_kit.model.model import Update
from pyro_vi_kit.optimize.deterministic.search import Search
from pyro_vi_kit.optimize.result import Outcome, cut_short, stopped_by

NAME = "cavi"
_DRAWS = 1024
# Numbers that one evaluation may hold for each tensor of the model.
_MAX_NUMBERS = 2**24
_MAX_SWEEPS = 10_000
# Standard errors by which one update may lower the ELBO, and nats.
_SIGMAS, _SLACK = 6.0, 0.01
# What is tried in the end: slopes in each parameter, from so many sets of draws.
_BATCHES, _BATCH = 16, 128
# Nats by which another factor may be better before the updates are called wrong.
_WRONG = 0.05


@dataclass
class _Sweep:
    """A fit under way: the search has what is spent, `factors` the state."""

    guide: Guide
    search: Search
    factors: Factors
    updates: Mapping[str, Update]
    draws: int


def fit(
    guide: Guide, search: Search, updates: Mapping[str, Update], start: Tensor | None = None
) -> Outcome:
    """Sweep over the sites until the ELBO stands still; the guide is changed in place.

    Args:
        guide: A `mean_field` guide, where to start.
        search: Model, seed of the draws on which states are compared, budget, and the nats that further
            sweeps may still bring, going by the rate at which they fell.
        updates: The optimal factor of each latent given the others; see `Model`.
        start: Unconstrained point `[D]` to put the factors at first; where they are when None.

    Raises:
        OptionError: If the guide has no factor for a site.
        ModelError: If an update raises, gives no factor of its site, or one that is not optimal.
    """
    data = sum(tensor.numel() for tensor in guide.density.data)
    draws = max(64, min(_DRAWS, _MAX_NUMBERS // max(1, data)))
    run = _Sweep(guide, search, Factors(guide), updates, draws)
    if start is not None:
        run.factors.centre_on(start)
    left = math.inf
    try:
        left = _sweeps(run)
    except ViError:
        raise
    except (KeyboardInterrupt, Exception) as error:  # noqa: BLE001  told by `fit`
        search.stopped, search.error = stopped_by(error), error
    if not search.stopped and left < search.tolerance:
        _require_optimal(run, max(_WRONG, 10.0 * search.tolerance))
    return search.outcome(NAME, _status(search, left))


def _sweeps(run: _Sweep) -> float:
    """Sweep until further sweeps would bring less than the tolerance, nats: what they would."""
    known, search = _log_weights(run), run.search
    last, left = math.inf, math.inf
    for _ in range(_MAX_SWEEPS):
        before = float(known.mean())
        for site in run.factors.sites:
            known = _improve(run, site, known)
            search.check_budget()
            if search.stopped:
                return left
        elbo = float(known.mean())
        search.record(-elbo)
        gain = abs(elbo - before)
        # Sweeps converge linearly: the rest of a geometric series.
        rate = min(gain / last, 1.0) if last > 0.0 else 0.0
        left = gain * max(1.0, rate / (1.0 - rate) if rate < 1.0 else math.inf)
        if gain == 0.0 or (left < search.tolerance and math.isfinite(last)):
            return left if gain > 0.0 else 0.0
        last = gain
    return left


def _improve(run: _Sweep, site: str, known: Tensor) -> Tensor:
    """One update: log weights after it, from those before, `[S]` nats."""
    density = run.guide.density
    args, kwargs = density.arguments()
    with isolated(density.dtype, density.device), torch.no_grad():
        try:
            factor = run.updates[site](run.factors.read(), *args, **kwargs)
        except Exception as error:
            raise ModelError(
                f"updates[{site!r}] raised {type(error).__name__}: {first_line(error)}. It is called "
                "as update(q, *args, **kwargs), with q = {site: distribution}"
            ) from error
    run.factors.write(site, factor)
    found = _log_weights(run)
    moved = found - known
    fall, se = -float(moved.mean()), float(moved.std()) / math.sqrt(len(moved))
    if not math.isfinite(fall) or fall > _SIGMAS * se + _SLACK:
        raise ModelError(
            f"updates[{site!r}] lowered the ELBO by {fall:.3g} nats (s.e. {se:.2g}): it is not the "
            "optimal factor given the others, exp(E[log p(site | the rest)]) up to its constant"
        )
    return found


def _log_weights(run: _Sweep) -> Tensor:
    """Log weights of the same noise as ever, `[S]`, nats."""
    run.search.count(run.draws)
    with RandomStream(run.search.seed, "comparison"), torch.no_grad():
        return run.guide.log_weights(run.draws).joint()


def _require_optimal(run: _Sweep, tolerance: float) -> None:
    """Refuse factors that others near by are clearly better than."""
    family: Any = run.guide.families[run.guide.blocks[0].name]
    slopes = []
    with RandomStream(run.search.seed, "slopes"), torch.enable_grad():
        for _ in range(_BATCHES):
            # Log q at constant parameters: no variance where the factors are the posterior.
            draw = run.guide.draw(min(_BATCH, run.draws), detached=True)
            bound = run.guide.weigh(draw).joint().mean()
            slopes.append(torch.autograd.grad(bound, [family.loc, family.log_scale]))
            run.search.count(len(draw.shared))
    for site in run.factors.sites:
        where = run.factors.columns(site)
        for position, curvature in ((0, 1.0), (1, 2.0)):
            found = torch.stack([slope[position][where[position]] for slope in slopes])
            mean, se = found.mean(0), found.std(0) / math.sqrt(_BATCHES)
            gain = 0.5 * mean.square() / curvature
            clear = gain.masked_fill(mean.abs() < _SIGMAS * se, 0.0).sum()
            if float(clear) > tolerance:
                what = "mean" if position == 0 else "spread"
                raise ModelError(
                    f"updates[{site!r}] stand still where the ELBO does not: another {what} of the "
                    f"factor would raise it by about {float(clear):.2g} nats. An update gives the "
                    "optimal factor, exp(E[log p(site | the rest)]) up to its constant"
                )


def _status(search: Search, left: float) -> Status:
    sweeps = f"{len(search.losses):,} sweeps"
    if search.stopped == "budget":
        words = f"The budget was over after {sweeps}. Give more budget=, or go on with resume=."
        return Status(False, "budget", words)
    if search.error is not None:
        return cut_short(search.error, f" after {sweeps}. Go on with resume=.")
    if left < search.tolerance:
        words = f"After {sweeps} more would bring about {left:.2g} nats."
        return Status(True, "converged", words, gap=left)
    words = f"After {sweeps} more would still bring {left:.2g} nats: leave method= out."
    return Status(False, "not converged", words, gap=left)
