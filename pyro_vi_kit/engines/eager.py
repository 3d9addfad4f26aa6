"""Steps on the Density: K particles in one vectorised pass of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

import torch
from torch import Tensor
from torch.optim import Adam, Optimizer

from pyro_vi_kit.engines.base import all_finite
from pyro_vi_kit.engines.batches import Batches
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.objectives import evaluate
from pyro_vi_kit.runtime import RandomStream, isolated
from pyro_vi_kit.types import Objective

OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]

_EVALUATION_ROWS = 2048


class EagerEngine:
    """Runs the bound on the model's Density, uncaptured.

    Args:
        guide: The guide to train; its density's learned parameters are trained with it.
        objective: The bound.
        seed: Of the noise.
        batches: Minibatches of the data plate; the full data when None.
        optimizer: Makes a torch optimiser from parameters; Adam when None.
    """

    name: ClassVar[str] = "eager"

    def __init__(
        self,
        guide: Guide,
        objective: Objective,
        *,
        seed: int,
        batches: Batches | None = None,
        optimizer: OptimizerFactory | None = None,
    ) -> None:
        self.guide = guide
        self.objective = objective
        self.params = {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in guide.density.params.items()
        }
        self.skipped = 0
        self.batches = batches
        self._stream = RandomStream(seed)
        self._evaluation_seed = seed + 1
        self._trained = [p for p in self.parameters().values() if p.requires_grad]
        self._optimizer = (optimizer or Adam)(self._trained)
        self._own_rate = optimizer is not None
        # A bound per datum holds for given globals, so all its particles share one draw of them.
        self._share = objective.multi_sample and any(b.plate for b in guide.blocks)

    @property
    def particles(self) -> int:
        """K."""
        return self.objective.particles

    def parameters(self) -> dict[str, Tensor]:
        """Guide parameters by their names, the model's under ``model.``."""
        guide = dict(self.guide.named_parameters())
        return guide | {f"model.{name}": value for name, value in self.params.items()}

    def step(self, rate: float) -> float:
        """One update at this learning rate; the step's estimate of the bound, nats."""
        self._optimizer.zero_grad()
        with self._stream, isolated(self.guide.density.dtype):
            bound = self._bound(self.batches.next() if self.batches else None)
        (-bound).backward()
        if not torch.isfinite(bound) or not all_finite(self._trained):
            self.skipped += 1
            return float("nan")
        if not self._own_rate:
            for group in self._optimizer.param_groups:
                group["lr"] = rate
        self._optimizer.step()
        return float(bound.detach())

    def _bound(self, index: dict[str, Tensor] | None) -> Tensor:
        weights = self.guide.log_weights(self.particles, self.params, index, share=self._share)
        return evaluate(self.objective, weights)

    @torch.no_grad()
    def evaluate(self, replicates: int) -> Tensor:
        """Independent estimates of the bound, `[replicates]`, nats, on the same noise at every call.

        Where a plate has more than 2,048 rows, they are of the bound on that many rows of it.
        """
        local = [b.plate for b in self.guide.blocks if b.plate is not None]
        with RandomStream(self._evaluation_seed), isolated(self.guide.density.dtype):
            if not local:
                weights = self.guide.log_weights(replicates * self.particles, self.params)
                return self.objective.bound(weights.shared.reshape(self.particles, replicates))
            index = {
                p.name: torch.randperm(p.size)[:_EVALUATION_ROWS]
                for p in local
                if p.size > _EVALUATION_ROWS
            }
            return torch.stack([self._bound(index or None) for _ in range(replicates)])
