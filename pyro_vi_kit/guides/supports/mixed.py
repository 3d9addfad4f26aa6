"""Continuous latents of a datum beside discrete ones: a categorical for each of these.

While training, draws of a relaxed site are softened by Gumbel noise and a temperature (Jang, Gu & Poole
2017; Maddison, Mnih & Teh 2017). Log q is linear in the weights of the states: at a
single state it is the categorical's, and in between it has a derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.options import require_count, require_positive
from pyro_vi_kit.guides.families import drawn_from
from pyro_vi_kit.guides.local.heads import Head
from pyro_vi_kit.guides.mixtures.normal_mixture import gumbel
from pyro_vi_kit.model.log_density.drawn import hardened


@dataclass(frozen=True)
class Relaxed:
    """Relaxed draws of a discrete site: softmax((logits + Gumbel noise) / temperature).

    The lower the temperature, the smaller the bias of the gradient and the larger its noise.

    Args:
        temperature: At the end.
        first: At the first step, from where it falls geometrically; the same at all steps when None.
        steps: Steps until ``temperature`` is reached.
        straight_through: Give the model the discrete draw, with the relaxed one's derivative.

    Raises:
        OptionError: If a temperature is no positive number, or ``steps`` no positive integer.
    """

    temperature: float = 0.1
    first: float | None = 1.0
    steps: int = 1000
    straight_through: bool = False

    def __post_init__(self) -> None:
        require_positive("Relaxed", "temperature", self.temperature)
        if self.first is not None:
            require_positive("Relaxed", "first", self.first)
        require_count("Relaxed", "steps", self.steps)
        if not isinstance(self.straight_through, bool):
            raise OptionError(
                f"Relaxed: straight_through must be True or False, got {told(self.straight_through)}"
            )

    def at(self, updates: Tensor | None) -> float | Tensor:
        """The temperature behind so many steps; that at the end when None."""
        if updates is None or self.first is None:
            return self.temperature
        share = (updates / self.steps).clamp(0.0, 1.0)
        return self.first * torch.exp(share * math.log(self.temperature / self.first))


class Part(NamedTuple):
    """One site's choices in a row: so many, of so many states each, and how they are trained."""

    size: int
    states: int
    how: Relaxed | None


class DiscreteHead(Head):
    """A distribution over one datum's continuous latents, and a categorical for each discrete one.

    Its numbers are those of the first, then logits.

    Args:
        inner: Of the continuous latents; None where there are none.
        parts: The discrete ones.
    """

    def __init__(self, inner: Head | None, parts: Sequence[Part]) -> None:
        logits = sum(part.size * part.states for part in parts)
        super().__init__(logits + (0 if inner is None else inner.dim))
        self.parts, self.logits, self.inner = tuple(parts), logits, inner
        self.size = self.logits + (0 if inner is None else inner.size)
        self.scored = any(part.how is None for part in parts)
        self.relaxed = any(part.how is not None for part in parts)

    def forward(self, numbers: Tensor) -> TorchDistribution:
        """The distributions of each datum."""
        own, logits = self._split(numbers, self.size)
        return Mixed(None if self.inner is None else self.inner(own), logits, self.parts)

    def initial(self, scale: float) -> Tensor:
        """The continuous latents as their head has them; all states equally likely."""
        zeros = self.centre.new_zeros(self.logits)
        return zeros if self.inner is None else torch.cat([self.inner.initial(scale), zeros])

    @torch.no_grad()
    def frame(self, centre: Tensor, unit: Tensor) -> None:
        """Measure the continuous latents in these units; logits have none."""
        if self.inner is not None:
            self.inner.frame(*(self._split(part, self.dim)[0] for part in (centre, unit)))

    @torch.no_grad()
    def reframe(self, numbers: Tensor, centre: Tensor, unit: Tensor) -> Tensor:
        """The same distributions' numbers in these units of the continuous latents."""
        if self.inner is None:
            return numbers
        own, logits = self._split(numbers, self.size)
        parts = (self._split(part, self.dim)[0] for part in (centre, unit))
        return torch.cat([self.inner.reframe(own, *parts), logits], -1)

    def _converted(self, numbers: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
        if self.inner is None:
            return numbers
        own, logits = self._split(numbers, self.size)
        parts = (self._split(part, self.dim)[0] for part in (shift, factor))
        return torch.cat([self.inner._converted(own, *parts), logits], -1)

    def _split(self, numbers: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """What belongs to the continuous latents, and what to the discrete ones."""
        return numbers[..., : size - self.logits], numbers[..., size - self.logits :]


class Mixed(TorchDistribution):
    """Continuous latents beside discrete ones, as one vector: numbers, then ones at the states drawn.

    Args:
        continuous: Of the former, event shape `[c]`; None where there are none.
        logits: Of the latter, one for each state, `[*batch, s]`.
        parts: What these are.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleMethodOverride]
    has_rsample = False

    def __init__(
        self, continuous: TorchDistribution | None, logits: Tensor, parts: Sequence[Part]
    ) -> None:
        self.continuous, self.logits, self.parts = continuous, logits, parts
        self.numbers = 0 if continuous is None else continuous.event_shape[0]
        event = torch.Size([self.numbers + logits.shape[-1]])
        super().__init__(logits.shape[:-1], event, validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All vectors: states are read off the largest of their numbers."""
        return constraints.real_vector

    def expand(self, batch_shape: Any, _instance: Any = None) -> Mixed:
        """The same distribution with another batch shape."""
        batch = torch.Size(batch_shape)
        own = None if self.continuous is None else self.continuous.expand(batch)
        return Mixed(own, self.logits.expand(batch + self.logits.shape[-1:]), self.parts)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws `[*sample, *batch, d]`, the discrete ones exact."""
        shape = torch.Size(sample_shape)
        own = [] if self.continuous is None else [self.continuous.sample(shape)]
        return torch.cat([*own, *(_flat(hardened(noisy)) for noisy in self._noisy(shape))], -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density at vectors `[..., d]`: `[...]`, nats; linear between states."""
        own = self._log_probs(value[..., self.numbers :])
        total = torch.stack(torch.broadcast_tensors(*own)).sum(0)
        if self.continuous is None:
            return total
        return total + self.continuous.log_prob(value[..., : self.numbers])

    def draw(
        self,
        shape: tuple[int, ...],
        *,
        detached: bool,
        mirrored: bool,
        relaxed: bool,
        updates: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Draws with a derivative where there is one, and log q at them, nats.

        Args:
            shape: Of the draws, before the batch.
            detached: Take log q at constant parameters.
            mirrored: Draw continuous latents in pairs of mirror images, where they are symmetric.
            relaxed: Soften the draws of sites that are trained so.
            updates: Steps taken so far, for their temperature.

        Returns:
            Draws `[*shape, *batch, d]`; their log q, in which that of sites without a derivative is a
            constant; and the log q of these sites at the draws held fixed, None where there are none.
        """
        values, total, scored = [], torch.zeros(()).to(self.logits), None
        if self.continuous is not None:
            own, total = drawn_from(self.continuous, shape, detached=detached, mirrored=mirrored)
            values.append(own)
        soft = [relaxed and part.how is not None for part in self.parts]
        for part, is_soft, noisy in zip(self.parts, soft, self._noisy(shape), strict=True):
            hard = hardened(noisy.detach())
            how = part.how if is_soft else None
            values.append(_flat(hard if how is None else _softened(noisy, hard, how, updates)))
        flat = torch.cat(values, -1)
        choices = flat[..., self.numbers :]
        for i, is_soft in enumerate(soft):
            log_q = self._log_probs(choices, detached=detached and is_soft)[i]
            total = total + (log_q if is_soft else log_q.detach())
            if self.parts[i].how is None:
                scored = log_q if scored is None else scored + log_q
        return flat, total, scored

    def _noisy(self, shape: tuple[int, ...]) -> list[Tensor]:
        """Logits with Gumbel noise by part, `[*shape, *batch, size, states]`: the largest is drawn."""
        logits = self.logits.expand(torch.Size(shape) + self.logits.shape)
        return self._parted(logits + gumbel(logits.shape, logits))

    def _log_probs(self, choices: Tensor, *, detached: bool = False) -> list[Tensor]:
        """Log q of each part."""
        logits = self.logits.detach() if detached else self.logits
        pairs = zip(self._parted(logits), self._parted(choices), strict=True)
        return [(weights * own.log_softmax(-1)).sum((-2, -1)) for own, weights in pairs]

    def _parted(self, flat: Tensor) -> list[Tensor]:
        pieces = flat.split([part.size * part.states for part in self.parts], -1)
        pairs = zip(pieces, self.parts, strict=True)
        return [piece.unflatten(-1, (part.size, part.states)) for piece, part in pairs]


def _flat(parted: Tensor) -> Tensor:
    return parted.flatten(-2)


def _softened(noisy: Tensor, hard: Tensor, how: Relaxed, updates: Tensor | None) -> Tensor:
    """A relaxed draw: on the simplex, or the discrete one with the derivative of that."""
    soft = torch.softmax(noisy / how.at(updates), -1)
    return hard + (soft - soft.detach()) if how.straight_through else soft
