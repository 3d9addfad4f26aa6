"""Steps replayed from one recording: density, bound, gradient and update as a single graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.capture import CaptureError, Program, capture_holding
from pyro_vi_kit.core.errors import first_line
from pyro_vi_kit.core.runtime import RandomStream, isolated
from pyro_vi_kit.core.undefined import ERRORS
from pyro_vi_kit.optimize.engines import adam, tables
from pyro_vi_kit.optimize.engines.adam import AdamState
from pyro_vi_kit.optimize.engines.base import Window
from pyro_vi_kit.optimize.engines.batches import Batch
from pyro_vi_kit.optimize.engines.eager import EagerEngine, settle
from pyro_vi_kit.optimize.engines.tables import RowState


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

    def __init__(
        self, *args: Any, compiled: bool = False, steady: bool = False, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._compiled = compiled
        self._compiles = compiled or not steady
        self._was = "captured"
        self._program: Program | None = None
        self._data: list[Tensor] = []
        self._tried = False
        self.note = ""

    @property
    def name(self) -> str:
        """``captured``, ``compiled``, or ``eager`` where a recording was not possible."""
        if self._program is None:
            return "eager" if self._tried else self._was
        return "compiled" if self._program.how == "native" else "captured"

    def run(self, steps: int, rate: float) -> Window:
        """So many updates at this learning rate."""
        if not self._tried:
            self._tried = True
            self._capture()
        if self._program is None:
            return super().run(steps, rate)
        return self._replay(self._program, steps, rate)

    # -- replaying ----------------------------------------------------------------------------

    def _replay(self, program: Program, steps: int, rate: float) -> Window:
        average = torch.zeros_like(self.adam.x)
        step_rate = self.adam.x.new_tensor(rate)
        weights = torch.arange(1, steps + 1, dtype=torch.float64).reciprocal().to(average)
        bounds = []
        whole = self._optimizer is None
        state = self.adam
        try:
            with self._stream, torch.no_grad():
                for count, weight in enumerate(weights.unbind(), start=1):
                    batch = self.batches.next() if self.batches else Batch({})
                    picked = [part for table in self.tables for part in table.pick(batch.index)]
                    rows = [*self._changing(batch), *self._data]
                    if whole:
                        *new, average, bound = program(
                            *state, average, step_rate, weight, *picked, *rows
                        )
                        state = AdamState(*new[:4])
                        self._put(batch.index, new[4:])
                    else:
                        bound, gradient = program(self.adam.x, *rows)
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

    def _put(self, index: Mapping[str, Tensor], parts: Sequence[Tensor]) -> None:
        """Write the tables' rows back, of which each has five parts."""
        for table, moved in zip(self.tables, _rows_of(parts), strict=True):
            table.put(index, moved)

    def state(self) -> dict[str, Any]:
        """See `EagerEngine.state`."""
        return super().state() | {"note": self.note}

    def restore(self, state: dict[str, Any]) -> None:
        """See `EagerEngine.restore`."""
        super().restore(state)
        self._was, self.note = state["name"], state["note"]
        # Where it began uncaptured, it goes on uncaptured.
        self._tried = self._was == "eager"

    # -- recording ----------------------------------------------------------------------------

    def _capture(self) -> None:
        function = self._step if self._optimizer is None else self._gradient
        try:
            self._program = self._recorded(function)
        except CaptureError as error:
            self.note = str(error)
        except ERRORS as error:
            self.note = f"{type(error).__name__}: {first_line(error)}"
        if self._program is not None and self._compiled:
            self._program.compile([*self._example(function, 0), *self._data])
            self.note = self._program.note

    def _recorded(self, function: Callable[..., Sequence[Tensor]]) -> Program:
        first, *others = (self._example(function, seed) for seed in range(3))
        # Known by their memory, data become inputs of the recording wherever the model uses them.
        # Streamed ones are among the inputs already.
        density = self.guide.density
        own = density.data[0 if density.streamed is None else density.streamed.tensors :]
        data = [tensor for tensor in own if tensor.numel()]
        home = self.adam.x
        try:
            program, self._data = capture_holding(
                function, first, data, others, compiles=self._compiles
            )
        finally:
            settle(self.trained, home)
        return program

    def _example(self, function: Callable[..., Sequence[Tensor]], seed: int) -> list[Tensor]:
        """Inputs of a step: as they stand for seed 0, and somewhere near for others."""
        with RandomStream(seed, "example"), torch.no_grad():
            x, mean, square, updates = (value.clone() for value in self.adam)
            if seed:
                x += 0.05 * torch.randn_like(x)
                mean += 0.1 * torch.randn_like(mean)
                square += torch.rand_like(square)
                updates += seed
            batch = Batch({}) if self.batches is None else self.batches.example()
            rows = self._changing(batch)
            if function == self._gradient:
                return [x, *rows]
            rate, weight = x.new_tensor(0.01 * (1 + seed)), x.new_tensor(1.0 / (1 + seed))
            average = torch.randn_like(x)
            picked = [
                part for table in self.tables for part in _nearby(table.pick(batch.index), seed)
            ]
            return [x, mean, square, updates, average, rate, weight, *picked, *rows]

    def _changing(self, batch: Batch) -> list[Tensor]:
        """The tensors of a batch that are others in the next step."""
        streamed = self.guide.density.streamed
        data = batch.data[: streamed.tensors] if batch.data and streamed else []
        return [*batch.index.values(), *data]

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
        """One step as a pure function: new state, rows of the tables, average, and the bound."""
        picked = list(_rows_of(rest[: len(RowState._fields) * len(self.tables)]))
        rest = rest[len(RowState._fields) * len(self.tables) :]
        rows = [row.x for row in picked]
        bound, gradient, *slopes = self._gradient(x, *rest, rows=rows, updates=updates)
        with torch.no_grad():
            finite = adam.finite(bound, gradient, *slopes)
            state = adam.update(AdamState(x, mean, square, updates), gradient, finite, rate)
            moved = [
                part
                for row, slope in zip(picked, slopes, strict=True)
                for part in tables.update(row, slope, finite, rate)
            ]
            average = torch.lerp(average, state.x, weight)
            return *state, *moved, average, torch.where(finite, bound, torch.nan)

    def _gradient(
        self,
        x: Tensor,
        *rest: Tensor,
        rows: Sequence[Tensor] = (),
        updates: Tensor | None = None,
    ) -> Sequence[Tensor]:
        """The bound and the loss's gradients at parameters ``x`` and rows of the tables."""
        batch, density = None, self.guide.density
        if density.streamed is not None:
            tensors = density.streamed.tensors
            batch = Batch({}, density.streamed.completed(rest[:tensors], density.data))
        elif self.batches is not None:
            batch = Batch(dict(zip(self.batches.plates, rest, strict=False)))
        settle(self.trained, x)
        with isolated(density.dtype, density.device), torch.enable_grad():
            return self.gradient(batch, rows, updates)


def _rows_of(parts: Sequence[Tensor]) -> Iterator[RowState]:
    """Rows of each table, from a flat list of their parts."""
    width = len(RowState._fields)
    return (RowState(*parts[i : i + width]) for i in range(0, len(parts), width))


def _nearby(rows: RowState, seed: int) -> RowState:
    """The same for seed 0, and somewhere near for others."""
    if not seed:
        return rows
    near = [part + 0.05 * torch.rand_like(part) for part in rows]
    return RowState(*near)._replace(updates=rows.updates + seed)
