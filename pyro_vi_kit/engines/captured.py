"""Steps replayed from one recording: density, bound, gradient and update as a single graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.capture import CaptureError, Program, capture_holding
from pyro_vi_kit.engines import adam
from pyro_vi_kit.engines.adam import AdamState
from pyro_vi_kit.engines.base import Stretch
from pyro_vi_kit.engines.eager import EagerEngine, settle
from pyro_vi_kit.errors import first_line
from pyro_vi_kit.runtime import RandomStream, isolated


class CapturedEngine(EagerEngine):
    """An `EagerEngine` that records its first step and replays it from then on.

    Noise, minibatch indices, data and the learning rate are inputs of the recording. It is checked
    against the uncaptured step at other parameters, noises and rows before it is used; a model that
    cannot be recorded goes on uncaptured, and ``note`` says why. With a torch optimiser of the user's
    only the gradient is replayed.

    Args:
        compiled: Wait for the compiler before the first step, in the place of having it take over when
            it is done.
        **options: Those of `EagerEngine`.

    Attributes:
        note: Why steps are not captured, or not compiled; empty otherwise.
    """

    def __init__(self, *args: Any, compiled: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)
        self._compiled = compiled
        self._program: Program | None = None
        self._data: list[Tensor] = []
        self._tried = False
        self.note = ""

    @property
    def name(self) -> str:
        """``captured``, ``compiled``, or ``eager`` where a recording was not possible."""
        if self._program is None:
            return "eager" if self._tried else "captured"
        return "compiled" if self._program.how == "native" else "captured"

    def run(self, steps: int, rate: float) -> Stretch:
        """So many updates at this learning rate."""
        if not self._tried:
            self._tried = True
            self._capture()
        if self._program is None:
            return super().run(steps, rate)
        return self._replay(self._program, steps, rate)

    # -- replaying ----------------------------------------------------------------------------

    def _replay(self, program: Program, steps: int, rate: float) -> Stretch:
        average = torch.zeros_like(self.adam.x)
        step_rate = self.adam.x.new_tensor(rate)
        weights = torch.arange(1, steps + 1, dtype=torch.float64).reciprocal().to(average)
        bounds = []
        whole = self._optimizer is None
        state = self.adam
        try:
            with self._stream, torch.no_grad():
                for count, weight in enumerate(weights.unbind(), start=1):
                    rows = list(self.batches.next().values()) if self.batches else []
                    if whole:
                        *new, average, bound = program(
                            *state, average, step_rate, weight, *rows, *self._data
                        )
                        state = AdamState(*new)
                    else:
                        bound, gradient = program(self.adam.x, *rows, *self._data)
                        finite = adam.finite(bound, gradient)
                        self._move(gradient, finite, rate)
                        bound = torch.where(finite, bound, torch.nan)
                        average += (self.adam.x - average) / count
                    bounds.append(bound)
        finally:
            # Also when interrupted: parameters are views of x, so x itself has to stay.
            if whole:
                self.adam = state._replace(x=self.adam.x.copy_(state.x))
        self.note = program.note
        return self._told(bounds, average)

    # -- recording ----------------------------------------------------------------------------

    def _capture(self) -> None:
        function = self._step if self._optimizer is None else self._gradient
        try:
            self._program = self._recorded(function)
        except CaptureError as error:
            self.note = str(error)
        except RuntimeError as error:
            self.note = f"{type(error).__name__}: {first_line(error)}"
        if self._program is not None and self._compiled:
            self._program.compile([*self._example(function, 0), *self._data])
            self.note = self._program.note

    def _recorded(self, function: Callable[..., Sequence[Tensor]]) -> Program:
        first, *others = (self._example(function, seed) for seed in range(3))
        # Known by their memory, data become inputs of the recording wherever the model uses them.
        data = [tensor for tensor in self.guide.density.data if tensor.numel()]
        home = self.adam.x
        try:
            program, self._data = capture_holding(function, first, data, others)
        finally:
            settle(self.trained, home)
        return program

    def _example(self, function: Callable[..., Sequence[Tensor]], seed: int) -> list[Tensor]:
        """Inputs of a step: as they stand for seed 0, and somewhere near for others."""
        with RandomStream(1000 + seed), torch.no_grad():
            x, mean, square, updates = (value.clone() for value in self.adam)
            if seed:
                x += 0.05 * torch.randn_like(x)
                mean += 0.1 * torch.randn_like(mean)
                square += torch.rand_like(square)
                updates += seed
            rows = self._rows()
            if function == self._gradient:
                return [x, *rows]
            rate, weight = x.new_tensor(0.01 * (1 + seed)), x.new_tensor(1.0 / (1 + seed))
            average = torch.randn_like(x)
            return [x, mean, square, updates, average, rate, weight, *rows]

    def _rows(self) -> list[Tensor]:
        if self.batches is None:
            return []
        return [torch.randperm(self.batches.plate.size)[: self.batches.size]]

    def _step(
        self,
        x: Tensor,
        mean: Tensor,
        square: Tensor,
        updates: Tensor,
        average: Tensor,
        rate: Tensor,
        weight: Tensor,
        *rest: Tensor,
    ) -> Sequence[Tensor]:
        """One step as a pure function: the new state, the new average and the bound."""
        bound, gradient = self._gradient(x, *rest)
        with torch.no_grad():
            finite = adam.finite(bound, gradient)
            state = adam.update(AdamState(x, mean, square, updates), gradient, finite, rate)
            average = torch.lerp(average, state.x, weight)
            return *state, average, torch.where(finite, bound, torch.nan)

    def _gradient(self, x: Tensor, *rest: Tensor) -> Sequence[Tensor]:
        """The bound and the loss's gradient at parameters ``x``."""
        index = None
        if self.batches is not None:
            index = {self.batches.plate.name: rest[0]}
        settle(self.trained, x)
        with isolated(self.guide.density.dtype), torch.enable_grad():
            return self.gradient(index)
