"""A mixture of normals whose draws can be differentiated (Figurnov, Mohamed & Mnih 2018)."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor

from pyro_vi_kit.guides.local.heads import Head
from pyro_vi_kit.guides.mixtures.normal_mixture import ImplicitMixture, gumbel

_LOG_ROOT = 0.5 * math.log(2.0 * math.pi)


class MixtureNormal(ImplicitMixture):
    """A mixture of C normals with diagonal covariances over `[d]`.

    Draws carry implicit gradients: with the conditional distribution functions F_i of coordinate i
    given those before it, dz_i = -dF_i / f_i, coordinate by coordinate (Graves 2016). They are those of
    the mixture as a whole, its weights included, where draws of single components would have none.

    Args:
        logits: `[..., C]`.
        locs: `[..., C, d]`.
        scales: `[..., C, d]`.
    """

    def __init__(
        self, logits: Tensor, locs: Tensor, scales: Tensor, validate_args: bool | None = None
    ) -> None:
        self.logits, self.locs, self.scales = logits, locs, scales
        super().__init__(logits.shape[:-1], locs.shape[-1:], validate_args=validate_args)

    @property
    def arg_constraints(self) -> dict[str, Any]:
        """What the parameters may be."""
        real, positive = constraints.real, constraints.positive
        return {"logits": real, "locs": real, "scales": positive}

    def expand(self, batch_shape: Any, _instance: Any = None) -> MixtureNormal:
        """The same distribution for each of a batch."""
        shape = torch.Size(batch_shape)
        return MixtureNormal(
            self.logits.expand(shape + self.logits.shape[-1:]),
            self.locs.expand(shape + self.locs.shape[-2:]),
            self.scales.expand(shape + self.scales.shape[-2:]),
            validate_args=False,
        )

    @property
    def mean(self) -> Tensor:
        """`[..., d]`."""
        return (self._shares() * self.locs).sum(-2)

    @property
    def variance(self) -> Tensor:
        """`[..., d]`."""
        second = (self._shares() * (self.locs.square() + self.scales.square())).sum(-2)
        return second - self.mean.square()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density, nats."""
        standard = (value.unsqueeze(-2) - self.locs) / self.scales
        parts = -0.5 * standard.square() - self.scales.log() - _LOG_ROOT
        return torch.logsumexp(self.logits.log_softmax(-1) + parts.sum(-1), -1)

    def _shares(self) -> Tensor:
        return self.logits.softmax(-1).unsqueeze(-1)

    def _apart(self, draws: int) -> tuple[Tensor, Tensor]:
        locs, scales = self.locs.movedim(-2, 0), self.scales.movedim(-2, 0)
        noise = torch.randn((draws, *locs.shape), dtype=locs.dtype, device=locs.device)
        return locs, noise * scales

    def _drawn(self, sample_shape: torch.Size) -> Tensor:
        shape = sample_shape + self.batch_shape
        noise = gumbel(shape + self.logits.shape[-1:], self.logits)
        chosen = (self.logits + noise).argmax(-1)[..., None, None]
        chosen = chosen.expand((*shape, 1, *self.event_shape))
        locs, scales = (t.expand(shape + t.shape[-2:]) for t in (self.locs, self.scales))
        noise = torch.randn(shape + self.event_shape, dtype=locs.dtype, device=locs.device)
        return locs.gather(-2, chosen)[..., 0, :] + noise * scales.gather(-2, chosen)[..., 0, :]

    def _with_gradient(self, value: Tensor) -> Tensor:
        """The same draws, with their implicit gradients."""
        log_shares = self.logits.log_softmax(-1)
        parts: list[Tensor] = []
        for i in range(value.shape[-1]):
            loc, scale = self.locs[..., i], self.scales[..., i]
            fixed = value[..., i, None]
            shares = log_shares.softmax(-1)
            standard = (fixed - loc) / scale
            below = (shares * torch.special.ndtr(standard)).sum(-1)
            log_parts = -0.5 * standard.square() - scale.log() - _LOG_ROOT
            density = (shares * log_parts.exp()).sum(-1).detach()
            slope = -(below - below.detach()) / density.clamp_min(torch.finfo(density.dtype).tiny)
            parts.append(value[..., i] + slope)
            if i + 1 < value.shape[-1]:
                # What is known of the component so far, which moves with the draw itself.
                moved = (parts[-1].unsqueeze(-1) - loc) / scale
                log_shares = log_shares - 0.5 * moved.square() - scale.log()
        return torch.stack(parts, -1)


class MixtureHead(Head):
    """A mixture of normals: logits, means, log standard deviations.

    Args:
        dim: d.
        components: C.
    """

    def __init__(self, dim: int, components: int) -> None:
        super().__init__(dim)
        self.strata = components
        self.size = components * (1 + 2 * dim)

    def forward(self, numbers: Tensor) -> TorchDistribution:
        """The mixture of each datum."""
        count, dim = self.strata, self.dim
        logits, locs, log_scales = numbers.split([count, count * dim, count * dim], -1)
        locs = self.centre + self.unit * locs.unflatten(-1, (count, dim))
        scales = self.unit * log_scales.unflatten(-1, (count, dim)).exp()
        return MixtureNormal(logits, locs, scales)

    def initial(self, scale: float) -> Tensor:
        """Equal shares of components that lie apart: alike, they would stay alike."""
        count, dim = self.strata, self.dim
        spread = scale * torch.randn(count * dim, dtype=self.centre.dtype, device="cpu")
        spread = spread.to(self.centre.device)
        log_scales = torch.full_like(spread, scale).log()
        return torch.cat([spread.new_zeros(count), spread, log_scales])

    def _converted(self, numbers: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
        count, dim = self.strata, self.dim
        logits, locs, log_scales = numbers.split([count, count * dim, count * dim], -1)
        locs = shift.repeat(count) + factor.repeat(count) * locs
        return torch.cat([logits, locs, log_scales + factor.log().repeat(count)], -1)
