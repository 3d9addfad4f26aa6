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
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_vi_kit.objectives.bounds import evaluate
from pyro_vi_kit.types import LogWeights, Objective

NAMES = ("auto", "pathwise", "dreg")


class Drawable(Protocol):
    """What an estimator needs of a guide; see `guides.Guide`."""

    blocks: list[Any]
    point: bool

    def draw(
        self,
        particles: int,
        index: Mapping[str, Tensor] | None = None,
        *,
        data: Sequence[Tensor] | None = None,
        share: bool = False,
        detached: bool = False,
        mirrored: bool = False,
    ) -> Any:
        """K reparameterised draws and their log density."""
        ...

    def weigh(
        self,
        draw: Any,
        params: Mapping[str, Tensor] | None = None,
        index: Mapping[str, Tensor] | None = None,
        *,
        data: Sequence[Tensor] | None = None,
    ) -> LogWeights:
        """The log weights of these draws."""
        ...


def surrogate(
    guide: Drawable,
    objective: Objective,
    particles: int,
    params: Mapping[str, Tensor] | None,
    index: Mapping[str, Tensor] | None,
    *,
    share: bool,
    estimator: str,
    mirrored: bool = False,
    data: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """One estimate of the bound, and a loss whose gradient estimates minus the bound's gradient.

    Draws from torch's global random state. Nothing here looks at a value, so that a step can be
    captured as a graph.

    Args:
        guide: What is trained.
        objective: The bound.
        particles: K.
        params: Unconstrained learned parameters of the model.
        index: Rows of each local plate; all when None.
        share: Give all particles the same draw of the globals, as a bound per datum needs.
        estimator: ``pathwise`` or ``dreg``; the latter only where `valid` says so.
        mirrored: Draw in pairs of mirror images; for bounds that are means over particles.
        data: Tensors in the place of the density's own, where data are streamed.

    Returns:
        The bound, detached, and the loss: scalars in nats, the loss for its gradient only.
    """
    detached = estimator == "dreg"
    draw = guide.draw(
        particles, index, data=data, share=share, detached=detached, mirrored=mirrored
    )
    weights = guide.weigh(draw, params, index, data=data)
    bound = evaluate(objective, weights)
    if detached and objective.order != 1.0:
        for block in guide.blocks:
            # Given the globals, the bound is per datum: of its particles' common globals it is the
            # ELBO, order 1, and their gradient needs no factor.
            if block.plate is None and not weights.local:
                _scale_gradient(draw.flat[block.name], objective, weights.shared)
            elif block.plate is not None:
                _scale_gradient(draw.flat[block.name], objective, weights.local[block.plate.name])
    return bound.detach(), -bound


def valid(guide: Drawable, objective: Objective) -> bool:
    """Whether ``dreg`` is defined: draws with a density, and a bound of the Rényi family."""
    return not guide.point and objective.order is not None


def _scale_gradient(flat: Tensor, objective: Objective, log_w: Tensor) -> None:
    """Scale the gradient that arrives at each draw by alpha + (1 - alpha) w~.

    Args:
        flat: Draws `[K, D]` or `[K, B, d]`.
        objective: A bound of the Rényi family.
        log_w: Their log weights, `[K]` or `[K, B]`.
    """
    alpha: Any = objective.order
    shares = torch.softmax((1.0 - alpha) * log_w.detach(), 0)
    factor = (alpha + (1.0 - alpha) * shares).unsqueeze(-1)
    if flat.requires_grad:
        flat.register_hook(_times(factor))


def _times(factor: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient * factor
