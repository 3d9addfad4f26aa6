"""What an engine is: the thing that executes the steps of a stochastic fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_vi_kit.core.errors import OptionError, first_line, told


@dataclass(frozen=True)
class Window:
    """What a run of steps gave.

    Attributes:
        bounds: Each step's estimate of the bound, `[steps]`, nats; NaN where a step was skipped.
        average: Mean over the run of each parameter behind every step, by name.
    """

    bounds: Tensor
    average: dict[str, Tensor]


class Engine(Protocol):
    """Executes steps and holds the parameters they move."""

    @property
    def name(self) -> str:
        """How steps are executed now: one of `engines.NAMES`."""
        ...

    @property
    def skipped(self) -> int:
        """Steps whose bound or gradient was not finite, and which changed nothing."""
        ...

    @property
    def particles(self) -> int:
        """Draws per step, K."""
        ...

    def run(self, steps: int, rate: float) -> Window:
        """So many updates, at least one, at this learning rate.

        An interrupt goes through, and leaves the parameters as a finished step left them.
        """
        ...

    def parameters(self) -> dict[str, Tensor]:
        """The tensors that steps move, by name; writing into them is allowed."""
        ...

    def evaluate(self, replicates: int) -> Tensor:
        """Independent estimates of the bound at the current parameters, `[replicates]`, nats.

        Every call uses the same noise, so that two calls can be compared pair by pair.
        """
        ...


def torch_optimizer(factory: Callable[..., Any]) -> Callable[..., Any]:
    """What makes optimisers, with what it makes looked at.

    Args:
        factory: The user's: from parameters to a torch optimiser.
    """

    def make(parameters: Any, **options: Any) -> Any:
        remedy = "as functools.partial(torch.optim.Adam, lr=1e-3) does"
        try:
            made = factory(list(parameters), **options)
        except Exception as error:
            raise OptionError(
                f"optimizer= raised {type(error).__name__}: {first_line(error)}; it must make a torch "
                f"optimiser from a list of parameters, {remedy}"
            ) from error
        if not isinstance(made, torch.optim.Optimizer):
            raise OptionError(
                f"optimizer= must make a torch optimiser from a list of parameters, {remedy}, and made "
                f"{told(made)}"
            )
        return made

    return make


class Average:
    """The running mean of named tensors; those that are not numbers keep their last value."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._count = 0

    @torch.no_grad()
    def add(self, values: dict[str, Tensor]) -> None:
        """Take one more set of values into the mean."""
        self._count += 1
        for name, value in values.items():
            if name not in self.values or not value.is_floating_point():
                self.values[name] = value.detach().clone()
            else:
                self.values[name] += (value.detach() - self.values[name]) / self._count


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether all these numbers are finite, a boolean scalar; nothing here looks at a value."""
    return torch.stack([torch.isfinite(tensor).all() for tensor in tensors]).all()
