"""The ELBO of a density that is flat at first (Rezende & Mohamed 2015, eq. 20; Mandt et al. 2016)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pyro.infer import ELBO
from torch import Tensor

from pyro_vi_kit.core.contracts import ALL_DATA, Batch, LogWeights
from pyro_vi_kit.core.errors import OptionError, UnknownNameError, told
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.guides.pyro_guide import Draw, Guide
from pyro_vi_kit.objectives.base import no_stock_loss
from pyro_vi_kit.objectives.elbo import Elbo

# From the share of the warm-up that is over, a tensor in [0, 1], and the first power to the power now.
SCHEDULES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "linear": lambda u, first: first + (1.0 - first) * u,
    "geometric": lambda u, first: torch.exp((1.0 - u) * math.log(first)),
    "cosine": lambda u, first: first + (1.0 - first) * 0.5 * (1.0 - torch.cos(math.pi * u)),
    "sigmoid": lambda u, first: first + (1.0 - first) * _sigmoid(u),
}


@dataclass(frozen=True)
class Annealed(Elbo):
    """ELBO at a falling temperature: the guide sees all modes while they are still one.

    E_q[t log p(x, z) - log q(z)] in unconstrained space, where t rises from ``first`` to 1 in ``steps``
    steps and stays there: it ends as the ELBO. No look at the bound is taken before. Guides that start
    from a Gaussian start from the best one of the target at the first t, which covers all modes where
    ``first`` is small enough; the learning rate falls while t rises. Behind these steps a small flow
    over few data is improved by rounds of forward and reverse KL on fixed draws.

    Args:
        schedule: How t rises: ``linear``, ``geometric``, ``cosine`` or ``sigmoid``.
        first: t at the first step, in (0, 1].
        steps: Steps until t is 1.
        particles: K, draws per step; their mean is taken, so K changes the noise and not the bound.

    Raises:
        UnknownNameError: If there is no such schedule.
        OptionError: If ``first`` is not in (0, 1], or a count not positive.
    """

    name = "annealed"
    about = About(
        does="as elbo, reached from a flattened target",
        cost="K, and the steps of the schedule",
        use="several modes, with a guide that can hold them",
        paper="Rezende & Mohamed 2015",
    )

    particles: int = 10
    schedule: str = "geometric"
    first: float = 0.02
    steps: int = 8000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.schedule, str) or self.schedule not in SCHEDULES:
            raise UnknownNameError("schedule", self.schedule, list(SCHEDULES))
        number = isinstance(self.first, int | float) and not isinstance(self.first, bool)
        if not number or not 0.0 < self.first <= 1.0:
            raise OptionError(f"annealed: first must be in (0, 1], got {told(self.first)}")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or self.steps < 1:
            raise OptionError(f"annealed: steps must be a positive integer, got {told(self.steps)}")

    @property
    def warmup(self) -> int:
        """Steps until t is 1."""
        return self.steps

    @property
    def first_power(self) -> float:
        """T at the first step."""
        return float(self.first)

    def power(self, updates: Tensor) -> Tensor:
        """T behind so many steps: scalars."""
        share = (updates / self.steps).clamp(0.0, 1.0)
        return SCHEDULES[self.schedule](share, float(self.first))

    def weights(self, guide: Guide, draw: Draw, batch: Batch = ALL_DATA) -> LogWeights:
        """T log p(x, z) - log q(z), nats; ordinary log weights without ``updates``."""
        found = guide.weigh(draw, batch.params, batch.index, data=batch.data)
        if batch.updates is None:
            return found
        t = self.power(batch.updates)
        local = {
            plate: t * rows - (1.0 - t) * draw.local[plate] for plate, rows in found.local.items()
        }
        return LogWeights(t * found.shared - (1.0 - t) * draw.shared, local, found.scale)

    def stock_loss(self, *, vectorize: bool = False) -> ELBO:
        """There is none.

        Raises:
            OptionError: Always.
        """
        raise no_stock_loss(self.name, "objective='elbo'")


def _sigmoid(u: Tensor) -> Tensor:
    """A logistic curve from exactly 0 at 0 to exactly 1 at 1."""
    edge = 1.0 / (1.0 + math.exp(6.0))
    return (torch.sigmoid(12.0 * u - 6.0) - edge) / (1.0 - 2.0 * edge)
