"""From log weights to a bound: what all objectives share."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_vi_kit.core.contracts import LogWeights, Objective


def evaluate(objective: Objective, weights: LogWeights) -> Tensor:
    """The objective's bound, a scalar in nats.

    With local latents this is the multi-sample bound of each datum and the ELBO in what the data
    share. The factor N / B of a minibatch multiplies after the logsumexp: inside, it would put the
    bound above the evidence.
    """
    return reduced(objective.bound, weights)


def reduced(reduce: Callable[[Tensor], Tensor], weights: LogWeights) -> Tensor:
    """As `evaluate`, for any function `[K, ...] -> [...]` of an objective."""
    if not weights.local:
        return reduce(weights.shared)
    total = weights.shared.mean()
    for plate, rows in weights.local.items():
        total = total + weights.scale[plate] * reduce(rows).sum()
    return total


def log_mean_exp(log_w: Tensor) -> Tensor:
    """Log of the mean over the first dimension of what these are the logs of."""
    return torch.logsumexp(log_w, 0) - math.log(log_w.shape[0])
