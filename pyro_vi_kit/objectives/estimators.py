"""Estimators of a bound's gradient: the one place where something is detached.

``pathwise`` differentiates the bound as it stands. Its part through log q's own parameters has mean zero
given the draws, but is noise even where q is the posterior.

``dreg``, doubly reparameterised, leaves that part out and puts back what it had in the mean (Tucker,
Lawson, Gu & Maddison 2019). With weights w~ = softmax((1 - alpha) log w) over the particles, the
gradient of the Rényi bound of order alpha is the mean of

    sum_k w~_k (alpha + (1 - alpha) w~_k) d log w_k / dz_k dz_k / dphi,    log q at constant parameters.

Order 1 is stick-the-landing for the ELBO (Roeder, Wu & Duvenaud 2017), order 0 is DReG for the
importance-weighted bound. Both have no variance where q equals the posterior. The model's own
parameters keep the ordinary weights w~_k.

``score`` needs no way through the draws: they are held fixed, and log q is moved up where they
turned out well, compared with the other draws of the same step (Williams 1992; for the ELBO with
the leave-one-out baseline of Kool, van Hoof & Welling 2019, for multi-sample bounds VIMCO, Mnih &
Rezende 2016). It is for guides whose draws have no derivative; elsewhere it is by far the noisiest.
What an objective multiplies log q by is its own business: `Objective.score`.

``stratified`` is for mixtures, and draws from each component: see `objectives.stratified`.

Discrete sites that a guide holds itself (``discrete=``) are trained by the score function, or relaxed,
beside any of these: ``pathwise`` and ``dreg`` are then of the other latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import ALL_DATA, Batch, LogWeights
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.pyro_guide import Guide
from pyro_vi_kit.objectives import stratified
from pyro_vi_kit.objectives.base import Objective, evaluate, reduced

ABOUT = {
    "pathwise": About(
        does="the derivative of the bound as it stands, through the draws",
        cost="K",
        use="where dreg is not defined: elbo_analytic, VR-max, a point",
        paper="Kingma & Welling 2014",
    ),
    "dreg": About(
        does="the same less what log q's own parameters add: no noise where q is exact",
        cost="K",
        use="the default; for the ELBO it is stick-the-landing (Roeder, Wu & Duvenaud 2017)",
        paper="Tucker, Lawson, Gu & Maddison 2019",
    ),
    "score": About(
        does="log q moved up at draws that are better than the others (RLOO, VIMCO)",
        cost="K, at least 2; by far the noisiest",
        use="draws without a derivative",
        paper="Mnih & Rezende 2016; Kool, van Hoof & Welling 2019",
    ),
    "stratified": About(
        does="draws of every component of a mixture, the weights as exact factors",
        cost="K x components",
        use="mixtures with small components, or whose weights matter",
        paper="Morningstar et al. 2021",
    ),
}
NAMES = ("auto", *ABOUT)


def surrogate(
    guide: Guide,
    objective: Objective,
    particles: int,
    batch: Batch = ALL_DATA,
    *,
    share: bool,
    estimator: str,
    mirrored: bool = False,
) -> tuple[Tensor, Tensor]:
    """One estimate of the bound, and a loss whose gradient estimates minus the bound's gradient.

    Draws from torch's global random state. Nothing here looks at a value, so that a step can be
    captured as a graph.

    Args:
        guide: What is trained.
        objective: The bound; an upper one is brought down.
        particles: K; of each component where ``stratified``.
        batch: What draws are weighed on.
        share: Give all particles the same draw of the globals, as a bound per datum needs.
        estimator: One of `NAMES` but ``auto``, for which there is no `obstacle`.
        mirrored: Draw in pairs of mirror images; for bounds that are means over particles.

    Returns:
        The bound, detached, and the loss: scalars in nats, the loss for its gradient only.
    """
    if estimator == "score":
        return _score(guide, objective, particles, batch, share)
    if estimator == "stratified":
        weights, control = stratified.gain_of(
            guide, objective, particles, batch, share=share, mirrored=mirrored
        )
        bound = evaluate(objective, weights)
        return bound.detach(), -(bound + control)
    detached = estimator == "dreg"
    draw = guide.draw(
        particles,
        batch.index,
        data=batch.data,
        share=share,
        detached=detached,
        mirrored=mirrored,
        relaxed=True,
        updates=batch.updates,
    )
    weights = objective.weights(guide, draw, batch)
    bound = evaluate(objective, weights)
    surrogate_bound = (
        reduced(objective.surrogate_bound, weights) if objective.has_surrogate else bound
    )
    if detached:
        for block in guide.blocks:
            # Given the globals, the bound is per datum: of its particles' common globals it is the
            # ELBO, order 1, and their gradient needs no factor.
            if block.plate is None and not weights.local:
                _scale_gradient(draw.flat[block.name], objective, weights.shared)
            elif block.plate is not None:
                _scale_gradient(draw.flat[block.name], objective, weights.local[block.plate.name])
    return bound.detach(), -_with_scores(surrogate_bound, guide, objective, weights, draw.scored)


def obstacle(guide: Guide, objective: Objective, estimator: str) -> str | None:
    """Why an estimator is not defined for this guide and objective, with the remedy, or None."""
    defined = objective.estimators
    if estimator not in defined:
        return f"objective {objective.name!r} is trained by {_either(defined)}"
    if estimator == "stratified":
        return stratified.obstacle(guide, objective)
    found = _of_discrete_sites(guide, objective, estimator) or _of_rows(guide, objective, estimator)
    if found is not None:
        return found
    if not guide.reparameterised and estimator != "score":
        return "draws of this guide have no derivative in its parameters: use estimator='score'"
    if guide.point and estimator != "pathwise":
        return "a point has no log density: use estimator='pathwise'"
    return _of_scores(guide, objective) if estimator == "score" else None


def chosen(guide: Guide, objective: Objective) -> str:
    """The estimator of the least variance that is defined: ``dreg``, ``pathwise`` or ``score``."""
    for name in ("dreg", "pathwise"):
        if obstacle(guide, objective, name) is None:
            return name
    return "score"


def _score(
    guide: Guide,
    objective: Objective,
    particles: int,
    batch: Batch,
    share: bool,
) -> tuple[Tensor, Tensor]:
    """The bound and the loss of the score function: see `surrogate`."""
    with torch.no_grad():
        draw = guide.draw(particles, batch.index, data=batch.data, share=share)
    shared, local = guide.log_q(draw, batch.index, data=batch.data)
    weights = objective.weights(guide, draw, batch)
    gain = reduced(objective.surrogate_bound, weights)
    joint = objective.score(weights.joint().detach())
    if guide.shared_block is not None:
        gain = gain + (joint * shared).sum()
    gain = _with_scores(gain, guide, objective, weights, local)
    return evaluate(objective, weights).detach(), -gain


def _with_scores(
    gain: Tensor,
    guide: Guide,
    objective: Objective,
    weights: LogWeights,
    local: Mapping[str, Tensor],
) -> Tensor:
    """What is to rise, and the score function's part of local latents.

    Args:
        gain: The rest.
        guide: What is trained.
        objective: The bound.
        weights: Log weights of the draws.
        local: Log q of the latents at the draws held fixed, `[K, B]` by plate.
    """
    for plate, log_q in local.items():
        if guide.rows_apart():
            # Given the globals no other row depends on what was drawn for this one.
            own = objective.score(weights.local[plate].detach())
            gain = gain + weights.scale[plate] * (own * log_q).sum()
        else:
            joint = objective.score(weights.joint().detach())
            gain = gain + (joint.unsqueeze(-1) * log_q).sum()
    return gain


def _of_discrete_sites(guide: Guide, objective: Objective, estimator: str) -> str | None:
    """What discrete sites that the guide draws itself stand in the way of."""
    if guide.relaxed and estimator == "score":
        return "relaxed draws have a derivative, which it does not use: give discrete='score'"
    if guide.relaxed and estimator == "dreg" and objective.order != 1.0:
        pathwise = "pathwise" in objective.estimators
        remedy = "estimator='pathwise'" if pathwise else "discrete='score'"
        return f"relaxed draws are those of no density, and have no weights to correct by: use {remedy}"
    if guide.scored and objective.particles < 2:
        return "discrete='score' compares draws of the same step: give the objective particles=2"
    return None


def _of_rows(guide: Guide, objective: Objective, estimator: str) -> str | None:
    """What rows that depend on each other stand in the way of: a score row by row."""
    by_row = guide.scored or (estimator == "score" and guide.local_blocks)
    # Asked before steps are recorded, for which it is a constant.
    if by_row and not guide.rows_apart() and objective.multi_sample:
        return (
            "what is drawn for one row of a data plate changes the terms of others, so that there is no "
            "bound per datum: use objective='elbo'"
        )
    return None


def _of_scores(guide: Guide, objective: Objective) -> str | None:
    """What stands in the way of comparing draws."""
    if objective.particles < 2:
        return "draws are compared with others of the same step: give the objective particles=2"
    if objective.multi_sample and guide.shared_block is not None and guide.local_blocks:
        others = tuple(name for name in objective.estimators if name != "score")
        return (
            "all particles share one draw of the globals, which has no other to be compared with: use "
            f"objective='elbo', or {_either(others)}"
        )
    return None


def _either(names: Sequence[str]) -> str:
    return " or ".join(f"estimator={name!r}" for name in names)


def _scale_gradient(flat: Tensor, objective: Objective, log_w: Tensor) -> None:
    """Scale the gradient that arrives at each draw as the objective asks.

    Args:
        flat: Draws `[K, D]` or `[K, B, d]`.
        objective: The bound.
        log_w: Their log weights, `[K]` or `[K, B]`.
    """
    factor = objective.path(log_w.detach())
    if factor is not None and flat.requires_grad:
        flat.register_hook(_times(factor.unsqueeze(-1)))


def _times(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * factor
