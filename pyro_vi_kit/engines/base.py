"""What an engine is: the thing that executes one step of a stochastic fit."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Engine(Protocol):
    """Executes steps and holds the parameters they move.

    Attributes:
        name: ``eager`` or ``pyro``.
    """

    name: ClassVar[str]

    @property
    def skipped(self) -> int:
        """Steps whose gradient was not finite, and which changed nothing."""
        ...

    @property
    def particles(self) -> int:
        """Draws per step, K."""
        ...

    def step(self, rate: float) -> float:
        """One update at this learning rate; the step's estimate of the bound, nats."""
        ...

    def parameters(self) -> dict[str, Tensor]:
        """The tensors that steps move, by name; writing into them is allowed."""
        ...

    def evaluate(self, replicates: int) -> Tensor:
        """Independent estimates of the bound at the current parameters, `[replicates]`, nats.

        Every call uses the same noise, so that two calls can be compared pair by pair.
        """
        ...


def all_finite(tensors: list[Tensor]) -> bool:
    """Whether every gradient that is there is finite."""
    return all(bool(torch.isfinite(t.grad).all()) for t in tensors if t.grad is not None)
