"""Distributions of constrained values as they look in unconstrained space, one class each.

Each is a Gamma, Dirichlet or von Mises distribution pushed through the inverse of a site's bijector,
its log determinant in the density. A Beta is a Dirichlet of two. A draw is a function of standard
normals, so that a step can be recorded, with implicit gradients in the parameters (Figurnov, Mohamed &
Mnih 2018).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from pyro_vi_kit.guides.supports.gamma_draws import LOG_NOISE, log_gamma_draws
from pyro_vi_kit.guides.supports.von_mises_draws import NOISE, von_mises_draws

_LOG_ROOT = 0.5 * math.log(2.0 * math.pi)
_TURN = 2.0 * math.pi


class Part(ABC):
    """Independent distributions of one kind over `[n]` unconstrained numbers."""

    @property
    def like(self) -> Tensor:
        """One of its parameters, for dtype and device."""
        return next(iter(vars(self).values()))

    @property
    @abstractmethod
    def noise(self) -> int:
        """Standard normals that a draw needs."""

    @abstractmethod
    def draw(self, noise: Tensor) -> Tensor:
        """Reparameterised draws `[..., n]` from normals `[..., noise]`."""

    @abstractmethod
    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at `[..., n]`, summed over the numbers, nats: `[...]`."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """`[n]`."""

    @property
    @abstractmethod
    def variance(self) -> Tensor:
        """`[n]`."""


@dataclass
class Normals(Part):
    """Normals.

    Attributes:
        loc: `[n]`.
        scale: `[n]`.
    """

    loc: Tensor
    scale: Tensor

    @property
    def noise(self) -> int:
        """One for each number."""
        return len(self.loc)

    def draw(self, noise: Tensor) -> Tensor:
        """Draws `[..., n]`."""
        return self.loc + self.scale * noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, nats."""
        standard = (value - self.loc) / self.scale
        return (-0.5 * standard.square() - self.scale.log() - _LOG_ROOT).sum(-1)

    @property
    def mean(self) -> Tensor:
        """`[n]`."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """`[n]`."""
        return self.scale.square()


@dataclass
class LogGammas(Part):
    """Logarithms of Gamma variates.

    Attributes:
        shape: `[n]`.
        log_mean: Of the variate, `[n]`.
    """

    shape: Tensor
    log_mean: Tensor

    @property
    def noise(self) -> int:
        """17 for each number."""
        return LOG_NOISE * len(self.shape)

    def draw(self, noise: Tensor) -> Tensor:
        """Draws `[..., n]`."""
        drawn = log_gamma_draws(self.shape, noise.unflatten(-1, (-1, LOG_NOISE)))
        return drawn - self.shape.log() + self.log_mean

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, nats."""
        gap = value - self.log_mean
        constant = self.shape * self.shape.log() - torch.lgamma(self.shape)
        return (self.shape * (gap - gap.exp()) + constant).sum(-1)

    @property
    def mean(self) -> Tensor:
        """`[n]`."""
        return torch.digamma(self.shape) - self.shape.log() + self.log_mean

    @property
    def variance(self) -> Tensor:
        """`[n]`."""
        return torch.polygamma(1, self.shape)


@dataclass
class StickDirichlets(Part):
    """Dirichlets over K shares by the logits of their sticks, which are independent Betas.

    Attributes:
        log_alpha: `[n, K]`.
    """

    log_alpha: Tensor

    @property
    def offset(self) -> Tensor:
        """What torch's stick-breaking adds to the logits: zero is the uniform point; `[K - 1]`."""
        k = self.log_alpha.shape[-1]
        return torch.arange(k - 1, 0, -1, device=self.log_alpha.device).to(self.log_alpha).log()

    @property
    def noise(self) -> int:
        """17 for each share."""
        return LOG_NOISE * self.log_alpha.numel()

    def draw(self, noise: Tensor) -> Tensor:
        """Draws `[..., n (K - 1)]`: ratios of Gamma variates."""
        shape = self.log_alpha.shape
        drawn = log_gamma_draws(self.log_alpha.exp(), noise.unflatten(-1, (*shape, LOG_NOISE)))
        logits = drawn[..., :-1] - _log_rest(drawn) + self.offset
        return logits.flatten(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, nats."""
        stick = value.unflatten(-1, (len(self.log_alpha), -1)) - self.offset
        a, b = self._sticks()
        constant = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
        return (a * logsigmoid(stick) + b * logsigmoid(-stick) + constant).sum((-2, -1))

    @property
    def mean(self) -> Tensor:
        """`[n (K - 1)]`."""
        a, b = self._sticks()
        return (torch.digamma(a) - torch.digamma(b) + self.offset).flatten()

    @property
    def variance(self) -> Tensor:
        """`[n (K - 1)]`."""
        a, b = self._sticks()
        return (torch.polygamma(1, a) + torch.polygamma(1, b)).flatten()

    def _sticks(self) -> tuple[Tensor, Tensor]:
        """Parameters of the Beta of each stick, `[n, K - 1]` each."""
        return self.log_alpha[..., :-1].exp(), _log_rest(self.log_alpha).exp()


def _log_rest(logs: Tensor) -> Tensor:
    """The logarithm of the sum of what comes after each number but the last, `[..., K - 1]`."""
    return logs[..., 1:].flip(-1).logcumsumexp(-1).flip(-1)


@dataclass
class TurnVonMises(Part):
    """Von Mises angles within (-pi, pi), by the logit of the part of the turn that they are.

    Attributes:
        loc: Angle, any real number, `[n]`.
        concentration: `[n]`.
    """

    loc: Tensor
    concentration: Tensor

    # Neither mean nor variance of the logit has a closed form.
    _no_moments: ClassVar[str] = "the logit of a von Mises angle has no moments in closed form"

    @property
    def noise(self) -> int:
        """48 for each number."""
        return NOISE * len(self.loc)

    def draw(self, noise: Tensor) -> Tensor:
        """Draws `[..., n]`."""
        drawn = von_mises_draws(self.concentration, noise.unflatten(-1, (-1, NOISE)))
        share = (self.loc + drawn) / _TURN + 0.5
        share = share - share.detach().floor()
        eps = torch.finfo(share.dtype).eps
        return torch.logit(share.clamp(eps, 1.0 - eps))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, nats."""
        angle = _TURN * value.sigmoid() - math.pi
        constant = -torch.special.i0e(self.concentration).log()
        jacobian = logsigmoid(value) + logsigmoid(-value)
        bent = self.concentration * ((angle - self.loc).cos() - 1.0)
        return (bent + constant + jacobian).sum(-1)

    @property
    def mean(self) -> Tensor:
        """Not known.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(self._no_moments)

    @property
    def variance(self) -> Tensor:
        """Not known.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(self._no_moments)
