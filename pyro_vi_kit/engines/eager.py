"""Steps on the Density: K particles in one vectorised pass of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from pyro_vi_kit.engines import adam
from pyro_vi_kit.engines.base import Average, Stretch
from pyro_vi_kit.engines.batches import Batches
from pyro_vi_kit.guides import Guide
from pyro_vi_kit.objectives import evaluate, surrogate
from pyro_vi_kit.runtime import RandomStream, isolated
from pyro_vi_kit.types import Objective

OptimizerFactory = Callable[[Iterable[Tensor]], Optimizer]

_EVALUATION_ROWS = 2048


class EagerEngine:
    """Runs the bound on the model's Density, uncaptured.

    What is trained lies in one flat vector, and the parameters of the guide and of the model are views
    of it: an update is a few operations, whatever the number of parameters.

    Args:
        guide: The guide to train; its density's learned parameters are trained with it.
        objective: The bound.
        seed: Of the noise.
        batches: Minibatches of the data plate; the full data when None.
        optimizer: Makes a torch optimiser from parameters; Adam when None.
        estimator: Of the gradient: ``pathwise`` or ``dreg``.
    """

    def __init__(
        self,
        guide: Guide,
        objective: Objective,
        *,
        seed: int,
        batches: Batches | None = None,
        optimizer: OptimizerFactory | None = None,
        estimator: str = "pathwise",
    ) -> None:
        self.guide = guide
        self.objective = objective
        self.estimator = estimator
        self.params = {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in guide.density.params.items()
        }
        self.skipped = 0
        self.batches = batches
        self._stream = RandomStream(seed)
        self._evaluation_seed = seed + 1
        self.trained = {n: p for n, p in self.parameters().items() if p.requires_grad}
        self.adam = adam.start(_flattened(self.trained, guide.density.dtype))
        self._optimizer = optimizer(self.trained.values()) if optimizer is not None else None
        # A bound per datum holds for given globals, so all its particles share one draw of them.
        self.share = objective.multi_sample and any(b.plate for b in guide.blocks)

    @property
    def name(self) -> str:
        """What the engine is called."""
        return "eager"

    @property
    def particles(self) -> int:
        """K."""
        return self.objective.particles

    def parameters(self) -> dict[str, Tensor]:
        """Guide parameters by their names, the model's under ``model.``."""
        guide = dict(self.guide.named_parameters())
        return guide | {f"model.{name}": value for name, value in self.params.items()}

    def run(self, steps: int, rate: float) -> Stretch:
        """So many updates at this learning rate."""
        bounds, average = [], Average()
        for _ in range(steps):
            with self._stream, isolated(self.guide.density.dtype):
                index = self.batches.next() if self.batches else None
                bound, gradient = self.gradient(index)
            finite = adam.finite(bound, gradient)
            self._move(gradient, finite, rate)
            bounds.append(torch.where(finite, bound, torch.nan))
            average.add({"": self.adam.x})
        return self._told(bounds, average.values[""])

    def _told(self, bounds: list[Tensor], average: Tensor) -> Stretch:
        """What a run gave: the bound of each step, and the mean of the trained parameters `[P]`."""
        found = torch.stack(bounds).double()
        self.skipped += int(found.isnan().sum())
        means = split(average, self.trained)
        constants = {n: p.detach().clone() for n, p in self.parameters().items() if n not in means}
        return Stretch(found, means | constants)

    def gradient(self, index: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
        """The bound, nats, and the loss's gradient `[P]`, on the noise that comes next."""
        bound, loss = surrogate(
            self.guide,
            self.objective,
            self.particles,
            self.params,
            index,
            share=self.share,
            estimator=self.estimator,
        )
        trained = list(self.trained.values())
        gradients = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
        return bound, torch.cat([gradient.reshape(-1) for gradient in gradients])

    @torch.no_grad()
    def _move(self, gradient: Tensor, finite: Tensor, rate: float) -> None:
        """One update, in place."""
        if self._optimizer is None:
            state = adam.update(self.adam, gradient, finite, rate)
            # Parameters are views of x, so x itself has to stay.
            self.adam = state._replace(x=self.adam.x.copy_(state.x))
        elif finite:
            for name, part in split(gradient, self.trained).items():
                self.trained[name].grad = part
            self._optimizer.step()

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

    def _bound(self, index: dict[str, Tensor] | None) -> Tensor:
        weights = self.guide.log_weights(self.particles, self.params, index, share=self.share)
        return evaluate(self.objective, weights)


def _flattened(parameters: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The parameters as one vector `[P]`, of which they become views."""
    parts = [p.detach().reshape(-1) for p in parameters.values()]
    flat = torch.cat(parts or [torch.zeros(0, dtype=dtype)])
    settle(parameters, flat)
    return flat


def settle(parameters: Mapping[str, Tensor], flat: Tensor) -> None:
    """Make the parameters views of a vector `[P]`."""
    for name, part in split(flat, parameters).items():
        parameters[name].data = part


def split(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of a vector `[P]` in the shapes of these parameters."""
    parts = flat.split([value.numel() for value in like.values()])
    return {
        name: part.view(value.shape)
        for part, (name, value) in zip(parts, like.items(), strict=True)
    }
