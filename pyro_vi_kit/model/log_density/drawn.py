"""Discrete latents that keep values of their own, as weights over their states, and are not summed out.

A site's unconstrained value is one number for each state, `[..., S]`. The largest says which state it is
in; of a relaxed site the numbers are weights on the simplex, and the model is given the weighted mean of
the states (Jang, Gu & Poole 2017; Maddison, Mnih & Teh 2017).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Independent, OneHotCategorical

from pyro_vi_kit.core.errors import OptionError


@dataclass(frozen=True)
class Drawn:
    """Which discrete latents are not summed out, and what the model is given for them.

    Args:
        sites: By name, whether relaxed values are given to the model.
        others: The same for all discrete latents that are not named; None where these are summed out.
    """

    sites: Mapping[str, bool] = field(default_factory=dict)
    others: bool | None = None

    def of(self, name: str) -> bool | None:
        """Whether a site is given relaxed values; None where it is summed out."""
        return self.sites.get(name, self.others)

    def require_known(self, discrete: Iterable[str]) -> None:
        """Refuse names that are no discrete latents.

        Raises:
            OptionError: With those that are.
        """
        known = list(discrete)
        unknown = [name for name in self.sites if name not in known]
        if unknown or not known:
            what = f"names {unknown[0]!r}, and " if unknown else "is given, and "
            raise OptionError(
                f"discrete= {what}the discrete latents of this model are {', '.join(known) or 'none'}"
            )


@dataclass(frozen=True, eq=False)
class Choice:
    """The states of one site in one run.

    Args:
        base: Its distribution, without `to_event`: one choice for each number of the batch.
        inner: How many of that batch's dims are event dims of the site.
        states: The states, `[S, *event]`.
        relaxed: Whether the model is given their weighted mean.
    """

    base: Any
    inner: int
    states: Tensor
    relaxed: bool

    @classmethod
    def of(cls, name: str, fn: Any, relaxed: bool) -> Choice:
        """The states of a site.

        Raises:
            OptionError: If they are not finitely many, or a relaxed value would be none for the model.
        """
        base, inner = fn, 0
        while isinstance(base, Independent):
            inner += base.reinterpreted_batch_ndims
            base = base.base_dist
        kind = type(base).__name__
        if not base.has_enumerate_support:
            raise OptionError(
                f"discrete= takes sites of finitely many values, and site {name!r} is {kind}: truncate "
                "it to a dist.Categorical"
            )
        if relaxed and not isinstance(base, Bernoulli | OneHotCategorical):
            raise OptionError(
                f"discrete='relaxed' gives the model values between those of site {name!r}, which is "
                f"{kind}: write it as dist.OneHotCategorical or as a dist.Bernoulli that is used as a "
                f"number, or take discrete={{{name!r}: 'score'}}"
            )
        states = base.enumerate_support(expand=False)
        return cls(base, inner, states.reshape(len(states), *base.event_shape), relaxed)

    def shape(self) -> torch.Size:
        """Of the weights: `[*batch, S]`."""
        return torch.Size([*self.base.batch_shape, len(self.states)])

    def value(self, weights: Tensor) -> Tensor:
        """What the model is given, `[*batch, *event]`, for weights `[*batch, S]`."""
        shape = weights.shape[:-1] + self.states.shape[1:]
        if self.relaxed:
            states = self.states.reshape(len(self.states), -1).to(weights.dtype)
            return (weights @ states).reshape(shape)
        return self.states[weights.argmax(-1).reshape(-1)].reshape(shape)

    def weights(self, value: Tensor, like: Tensor) -> Tensor:
        """Ones at the states `[*batch, *event]`, zeros elsewhere: `[*batch, S]`, in another's dtype."""
        event = self.states.dim() - 1
        same = value.unsqueeze(-1 - event) == self.states
        return (same.flatten(-event).all(-1) if event else same).to(like.dtype)

    def log_prob(self, weights: Tensor) -> Tensor:
        """The mean over the states of their log density, `[*batch]` of the site, nats.

        At a single state it is the log density. It is linear in between, where a discrete density has
        no value.
        """
        event = self.states.shape[1:]
        batch = (1,) * len(self.base.batch_shape)
        each = self.base.log_prob(self.states.reshape(-1, *batch, *event)).movedim(0, -1)
        floor = -1e200 if each.dtype == torch.float64 else -1e30  # not 0 times -inf
        mean = (weights * each.clamp(min=floor)).sum(-1)
        return mean.flatten(-self.inner).sum(-1) if self.inner else mean


def hardened(weights: Tensor) -> Tensor:
    """One at the largest of the last dim, zeros elsewhere."""
    states = torch.arange(weights.shape[-1], device=weights.device)
    return (weights.argmax(-1, keepdim=True) == states).to(weights.dtype)
