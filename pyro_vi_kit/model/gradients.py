"""The log density and its gradient at K points, captured as soon as that pays."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from pyro_vi_kit.capture import CaptureError, CDensity, Program, SharedProgram, capture_holding
from pyro_vi_kit.capture.program import Function
from pyro_vi_kit.core.errors import first_line
from pyro_vi_kit.core.runtime import LOCK, RandomStream
from pyro_vi_kit.core.undefined import ERRORS, is_undefined
from pyro_vi_kit.model.log_density import Density, Recordings

# A capture costs about as much as 60 evaluations: rent for as long, then buy.
PATIENCE = 60
_ATTEMPTS = 5


@dataclass
class _Shape:
    """What is known about evaluating a certain number of points at once."""

    calls: int = 0
    failures: int = 0
    program: Program | SharedProgram | None = None
    rest: list[Tensor] = field(default_factory=list)
    note: str = ""


class Gradients:
    """A density's values and gradients, for whoever needs many: samplers, mode searches, L-BFGS.

    The first calls run the model. After ``patience`` calls with the same K the evaluation is captured,
    and checked at two other points; a model that cannot be captured goes on as before. Where the density
    is one of many on other data (`Density.with_data`), one recording serves them all, at once.

    Args:
        density: The model.
        params: Unconstrained learned parameters, held fixed; `density.params` by default.
        data: Tensors in the place of `density.data`.
        jacobian: Whether the density is that of unconstrained or of constrained values.
        patience: Calls with one K before a capture; 0 to capture at once, None for never.

    Attributes:
        in_c: The density at one point in C, once it is that.
    """

    def __init__(
        self,
        density: Density,
        params: Mapping[str, Tensor] | None = None,
        data: Sequence[Tensor] | None = None,
        *,
        jacobian: bool = True,
        patience: int | None = PATIENCE,
    ) -> None:
        self.density = density
        self.in_c: CDensity | None = None
        self._evaluations = 0
        self._names = list(density.params)
        held = density.params if params is None else params
        # Inputs of the recording, and no constants in it: other data take the same library.
        self._rest = _separate([*(held[name] for name in self._names), *(data or density.data)])
        self._jacobian = jacobian
        self._patience = patience
        self._shapes: dict[int, _Shape] = {}
        self._lock = threading.Lock()

    @property
    def evaluations(self) -> int:
        """Single points evaluated so far."""
        return self._evaluations + (self.in_c.evaluations if self.in_c is not None else 0)

    def __call__(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log density `[K]` in nats and its gradient `[K, D]` at unconstrained points `[K, D]`.

        Both are detached. Where the density is not defined (a matrix without a Cholesky factor, an index
        computed from latents that is out of range) they are NaN. Among several points such a one may
        raise instead, what `undefined.is_undefined` knows.
        """
        try:
            return self._evaluated(z)
        except ERRORS as error:
            if len(z) > 1 or not is_undefined(error):
                raise
            return z.new_full((1,), torch.nan), torch.full_like(z, torch.nan)

    def _evaluated(self, z: Tensor) -> tuple[Tensor, Tensor]:
        points = z.shape[0]
        self._evaluations += points
        shape = self._shapes.get(points)
        if shape is None:
            shape = self._shapes.setdefault(points, _Shape())
        z = z.detach().contiguous()
        if shape.program is None and not shape.note and self._patience is not None:
            if shape.calls == 0 and self.density.recordings is not None:
                self._take_shared(shape, points, self.density.recordings)
            shape.calls += 1
            if shape.program is None and shape.calls > self._patience:
                self._try_capture(shape, z)
        if shape.program is None:
            return self._eager(z, *self._rest)
        log_prob, gradient = shape.program(z, *shape.rest)
        return log_prob, gradient

    def at(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """The same at one point `[D]`, with little around it: a sampler's calls are short."""
        if self.in_c is not None:
            return self.in_c.at(point)
        shape = self._shapes.get(1)
        if shape is None or shape.program is None:
            log_prob, gradient = self(torch.from_numpy(point.copy()).view(1, -1))
            return log_prob.item(), gradient.numpy()[0]
        self._evaluations += 1
        try:
            # Without what autograd would want to know each operation takes a tenth less.
            with torch.inference_mode():
                z = torch.from_numpy(point.copy()).view(1, -1)
                log_prob, gradient = shape.program(z, *shape.rest)
                return log_prob.item(), gradient.numpy()[0]
        except ERRORS as error:
            if not is_undefined(error):
                raise
            return float("nan"), np.full_like(point, np.nan)

    def expect(self, evaluations: int, z: Tensor) -> bool:
        """Say how many evaluations of points like ``z``, `[K, D]`, are to come, if that is known.

        Returns:
            Whether a compiler is at work on them.
        """
        shape = self._shapes.get(len(z))
        if shape is None or shape.program is None:
            return False
        return shape.program.expect(evaluations, (z, *shape.rest))

    def to_c(self, evaluations: int, point: np.ndarray) -> bool:
        """Have single points evaluated in C from now on, if that pays and can be done.

        Args:
            evaluations: How many are to come.
            point: An example `[D]`, at which and around which the results are compared.

        Returns:
            Whether it is so; `how` has the reason where it is not.
        """
        shape = self._shapes.get(1)
        program = None if shape is None else shape.program
        # One that serves many data sets is not compiled for one of them.
        if shape is None or not isinstance(program, Program) or not program.worth_c(evaluations):
            return False
        z = torch.from_numpy(point.copy()).view(1, -1)
        # C reads memory without gaps.
        held = [tensor.contiguous() for tensor in shape.rest]
        points = [z, *_around(z), *self._far(z)]
        function = program.to_c([(z, *held) for z in points])
        if function is None:
            return False
        self.in_c, shape.rest = CDensity(function, held), held
        return True

    def stop(self) -> None:
        """Have no compiler at work on it any more."""
        for shape in self._shapes.values():
            if shape.program is not None:
                shape.program.stop()

    @property
    def engine(self) -> str:
        """``captured``, ``compiled`` or ``eager``, by what evaluates any number of points now."""
        programs = [shape.program for shape in self._shapes.values() if shape.program is not None]
        if not programs:
            return "eager"
        return "compiled" if any(p.how in ("native", "c") for p in programs) else "captured"

    @property
    def note(self) -> str:
        """Why some number of points is not captured that should be; empty otherwise."""
        return next((shape.note for shape in self._shapes.values() if shape.note), "")

    def how(self, points: int) -> str:
        """How K points are evaluated, as `Program.how` has it, or ``eager``; with reasons."""
        shape = self._shapes.get(points, _Shape())
        if shape.program is None:
            return f"eager: {shape.note}" if shape.note else "eager"
        note = shape.program.note
        return f"{shape.program.how} ({note})" if note else shape.program.how

    def _take_shared(self, shape: _Shape, points: int, recordings: Recordings) -> None:
        """Take the recording that serves all data, where there is one."""
        key = ("gradients", points, self._jacobian)
        program = recordings.get(
            key, lambda: _recorded_for_all(self._eager, points, self.density, self._rest)
        )
        if program is not None:
            shape.program, shape.rest = program, program.holding(self._rest)

    def _try_capture(self, shape: _Shape, z: Tensor) -> None:
        with self._lock:
            if shape.program is not None or shape.note:
                return
            try:
                others = [(other,) for other in (*_around(z), *self._far(z))]
                shape.program, shape.rest = capture_holding(
                    self._eager, (z.clone(),), self._rest, others
                )
            except CaptureError as error:
                shape.note = str(error)
            except ERRORS as error:
                # The density is not defined at some point nearby; elsewhere it may be.
                shape.failures += 1
                if shape.failures >= _ATTEMPTS:
                    shape.note = f"{type(error).__name__}: {first_line(error)}"

    def _far(self, z: Tensor) -> list[Tensor]:
        """Other points further away, where a branch may be another, if the density is defined there."""
        with RandomStream(21):
            point = z + 3.0 * torch.randn_like(z)
        try:
            self._eager(point, *self._rest)
        except RuntimeError:
            return []
        return [point]

    def _eager(self, z: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        params = dict(zip(self._names, rest, strict=False))
        data = rest[len(self._names) :]
        with LOCK, torch.enable_grad():
            z = z.detach().requires_grad_()
            log_prob = self.density.log_prob(z, params, data, jacobian=self._jacobian)
            (gradient,) = torch.autograd.grad(log_prob.sum(), z)
        return log_prob.detach(), gradient


def second_derivatives(density: Density, z: Tensor) -> Tensor:
    """Row i of the Hessian of the log density at row i of ``z``, `[D, D]`, detached.

    Replayed where the density is one of many on other data.

    Args:
        density: The model, whose learned parameters are held fixed.
        z: Unconstrained points `[D, D]`.
    """
    names = list(density.params)
    rest = _separate([*density.params.values(), *density.data])

    def rows(points: Tensor, *held: Tensor) -> tuple[Tensor]:
        params = dict(zip(names, held, strict=False))
        with LOCK, torch.enable_grad():
            points = points.detach().requires_grad_()
            log_prob = density.log_prob(points, params, held[len(names) :])
            (gradient,) = torch.autograd.grad(log_prob.sum(), points, create_graph=True)
            (found,) = torch.autograd.grad(gradient.diagonal().sum(), points)
        return (found.detach(),)

    program = None
    if density.recordings is not None:
        program = density.recordings.get(
            "hessian", lambda: _recorded_for_all(rows, len(z), density, rest)
        )
    if program is None:
        return rows(z, *rest)[0]
    return program(z.contiguous(), *program.holding(rest))[0]


def _recorded_for_all(
    function: Function, points: int, density: Density, rest: Sequence[Tensor]
) -> SharedProgram | None:
    """A recording with data as its inputs, or None where the model cannot be recorded so.

    Args:
        function: From points `[K, D]`, learned parameters and data.
        points: K.
        density: One of the densities that it is for.
        rest: That one's parameters and data.
    """
    recordings = density.recordings
    if recordings is None:
        return None
    # The same points at every call: a recording's last digits depend on them.
    generator = torch.Generator().manual_seed(20264)
    away = torch.randn(points, density.dim, generator=generator, dtype=torch.float64, device="cpu")
    z = density.cast(0.3 * away)
    params = rest[: len(rest) - len(recordings.data)]
    held = _separate([*params, *recordings.data])
    try:
        checks = [((1.5 * z + 0.1,), held), ((0.1 - z,), rest)]
        return SharedProgram(function, (z,), held, checks)
    except (CaptureError, *ERRORS):
        return None


def _around(z: Tensor) -> list[Tensor]:
    """Two other points nearby."""
    with RandomStream(20):
        return [z + 0.1 * torch.randn_like(z), z - 0.05 * torch.randn_like(z)]


def _separate(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous, detached, and none on another's memory; copied only where they are not so."""
    seen: set[int] = set()
    separate = []
    for tensor in tensors:
        own = tensor.detach().contiguous()
        if own.untyped_storage()._cdata in seen or own.storage_offset():
            own = own.clone()
        seen.add(own.untyped_storage()._cdata)
        separate.append(own)
    return separate


def gradient_of(value: Tensor, of: Tensor) -> Tensor:
    """The gradient of a number, in the shape of ``of``; zero where it does not depend on that.

    The graph is kept, for gradients of other numbers that share it.
    """
    if not value.requires_grad:
        return torch.zeros_like(of)
    (found,) = torch.autograd.grad(
        value, of, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return found
