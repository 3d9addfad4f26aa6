"""The stratified estimator of mixtures: draws of every component, their weights as exact factors.

Of q = sum_c pi_c q_c no component is picked at random (Morningstar, Vikram, Ham, Gallagher & Dillon
2021; Roeder, Wu & Duvenaud 2017). With T draws z_tc of each, the bound of Rényi order alpha is

    1 / (1 - alpha) log 1/T sum_t sum_c pi_c (p(x, z_tc) / q(z_tc))^(1 - alpha),

the ELBO for order 1, and for order 0 the SIWAE: the log of a mean that is unbiased as before and has
less noise, so that it lies between the importance-weighted bound of T draws and the log evidence. The
weights have slopes of their own in it, and no draw needs an implicit gradient.

Log q's own parameters enter by the factor s_tc - pi_c / T, where s_tc is the bound's slope in log w_tc:
what is taken away is sum_c pi_c E_c[grad log q] = 0. For order 1 nothing is left of it, which is
stick-the-landing; for all orders there is no noise where q is the posterior.

A component of small weight is seen as often as a large one. For as many draws in all, ``dreg`` can have
less noise in the means of large components, and in those of multi-sample bounds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import Batch, LogWeights
from pyro_vi_kit.guides.pyro_guide import Guide
from pyro_vi_kit.objectives.base import Objective


def gain_of(
    guide: Guide,
    objective: Objective,
    particles: int,
    batch: Batch,
    *,
    share: bool,
    mirrored: bool = False,
) -> tuple[LogWeights, Tensor | float]:
    """Log weights that the bound is taken of, and what is added to it for its gradient alone.

    Args:
        guide: One for which there is no `obstacle`.
        objective: A bound of the Rényi family.
        particles: T, draws of each component.
        batch: What draws are weighed on.
        share: Give all particles the same draw of the globals.
        mirrored: Draw each component in pairs of mirror images.

    Returns:
        Log weights `[T]`, `[T, B]` by plate, nats; and a scalar of mean zero.
    """
    draw = guide.draw(
        particles,
        batch.index,
        data=batch.data,
        share=share,
        detached=True,
        mirrored=mirrored,
        stratified=True,
    )
    weights = objective.weights(guide, draw, batch)
    strata: Any = draw.strata
    if not objective.multi_sample:
        return combined(objective, weights, strata), 0.0
    own = strata.q.log_prob(draw.flat[strata.block].detach())
    control = _strata_means(own, strata.log_shares.detach()).mean(0)
    less, plate = own - own.detach(), strata.plate
    if plate is None:
        weights = weights._replace(shared=weights.shared - less)
        return combined(objective, weights, strata), control
    local = weights.local | {plate: weights.local[plate] - less}
    weights = weights._replace(local=local)
    return combined(objective, weights, strata), weights.scale[plate] * control.sum()


def combined(objective: Objective, weights: LogWeights, strata: Any) -> LogWeights:
    """Log weights of T draws, each a mean over the components, from those of all, `[T C, ...]`.

    Power means compose: the bound of these is the stratified bound.
    """
    order, shares = objective.order, strata.log_shares
    if strata.plate is None:
        shared = _strata_means(weights.shared, shares, order)
        local = {name: _strata_means(w, shares[:, None]) for name, w in weights.local.items()}
        return LogWeights(shared, local, weights.scale)
    # What is not of these rows has as many equal draws beside them.
    count = len(shares)
    local = {name: w.unflatten(0, (-1, count)).mean(1) for name, w in weights.local.items()}
    local[strata.plate] = _strata_means(weights.local[strata.plate], shares, order)
    return LogWeights(weights.shared.unflatten(0, (-1, count)).mean(1), local, weights.scale)


def obstacle(guide: Guide, objective: Objective) -> str | None:
    """Why it is not defined for this guide and objective, with the remedy, or None."""
    mixtures = sum(guide.family_of(block).strata > 0 for block in guide.blocks)
    if mixtures != 1:
        found = (
            "no mixture"
            if not mixtures
            else f"{mixtures} mixtures, whose components it would cross"
        )
        return f"the guide has {found}: use guide='mixture', or leave estimator= out"
    if guide.scored or guide.relaxed:
        return "the guide draws discrete sites too: leave estimator= out"
    block: Any = guide.mixture()
    if block.plate is None:
        if objective.multi_sample and len(guide.blocks) > 1:
            return (
                "all particles share one draw of the globals, which are the mixture: use "
                "objective='elbo', or leave estimator= out"
            )
        return None
    if guide.family_of(block).conditioned:
        return (
            "each draw of the globals has a mixture of its own for each datum: leave conditioned= out, "
            "or estimator="
        )
    # Asked before steps are recorded, for which it is a constant.
    if not guide.rows_apart():
        return (
            "what is drawn for one row of a data plate changes the terms of others, so that components "
            "of all rows would be crossed: leave estimator= out"
        )
    return None


def _strata_means(log_w: Tensor, log_shares: Tensor, order: float | None = 1.0) -> Tensor:
    """Power means over the components, `[T C, ...] -> [T, ...]`, with weights `[C, ...]`.

    ``order`` alpha is that of the mean of w^(1 - alpha); for order 1 it is the mean of log w.
    """
    apart = log_w.unflatten(0, (-1, len(log_shares)))
    if order is None or order == 1.0:
        return (log_shares.exp() * apart).sum(1)
    power = 1.0 - order
    return torch.logsumexp(log_shares + power * apart, 1) / power
