"""What both samplers share: the log density of one point, starting points, and what comes back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pyro_vi_kit.core.errors import ModelError, OptionError, ViError
from pyro_vi_kit.model.gradients import Gradients
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.initial import SPREADS

_TRIES = 100
_RADIUS = 2.0
_SHRINK = 0.95
# A hundred tries end at 5e-10 of the radius: points near a given one are feasible, however few.
_SHRINK_GIVEN = 0.8
# Gradients a draw at the least: trajectories of seven steps are short.
_GRADIENTS = 7
# Draws of a chain that R-hat can be computed of.
FEWEST = 4


@dataclass(frozen=True)
class Plan:
    """What was asked of a sampler.

    Attributes:
        chains: Independent chains.
        draws: Draws kept per chain.
        tune: Warm-up draws per chain, thrown away.
        seed: Of every random number.
        target_accept: Mean acceptance probability that the step size is tuned to.
        cores: Chains that run at once.
    """

    chains: int
    draws: int
    tune: int
    seed: int
    target_accept: float
    cores: int


@dataclass(frozen=True, eq=False)
class Draws:
    """What a sampler gives back.

    Attributes:
        z: Unconstrained draws `[chains, draws, D]`, float64.
        stats: Sampler statistics by ArviZ's names, each `[chains, draws]`.
        interrupted: Whether the user interrupted, so that there are fewer than were asked for.
    """

    z: np.ndarray
    stats: dict[str, np.ndarray]
    interrupted: bool = False

    def rectangle(self) -> Draws | None:
        """Most of the draws of chains that were interrupted at different lengths, NaN behind their ends.

        None where too few are left to be judged.
        """
        lengths = np.isfinite(self.z).all(-1).sum(1)
        length = max(lengths, key=lambda n: n * np.sum(lengths >= n))
        if length < FEWEST:
            return None
        chains = np.flatnonzero(lengths >= length)
        stats = {name: values[chains, :length] for name, values in self.stats.items()}
        return Draws(self.z[chains, :length], stats, interrupted=True)


class Target:
    """The unconstrained log density as a sampler calls it: one NumPy point in, never an exception.

    Where the density is not defined (a matrix without a Cholesky factor, an index out of range, an
    overflow) the value is NaN, which samplers count as a divergence. Any other error of the model is
    kept in ``error``, and from then on the density is a standard normal's: chains in other threads go
    on to their next stop, since nutpie survives neither an exception in one of them nor one that cannot
    start.

    Args:
        density: The model, in float64.
        params: Unconstrained learned parameters, held fixed; `density.params` where None.

    Attributes:
        counted: Draws that samplers written in Python have counted here.
        error: What the model raised, if it did.
        note: What a sampler has to say of how it is called.

    Raises:
        OptionError: If ``params`` names a parameter that the model does not have.
    """

    def __init__(self, density: Density, params: Mapping[str, Tensor] | None = None) -> None:
        unknown = sorted(set(params or {}) - set(density.params))
        if unknown:
            known = ", ".join(density.params) or "none"
            raise OptionError(
                f"params= names {unknown[0]!r}, which the model does not learn; it learns: {known}"
            )
        frozen = density.params | dict(params or {})
        self.density = density
        self.params = {name: density.cast(value) for name, value in frozen.items()}
        # A sampler needs thousands of gradients: captured with the first.
        self.gradients = Gradients(density, self.params, patience=0)
        self.counted = 0
        self.error: Exception | None = None
        self.note = ""
        self._stopped = False

    @property
    def evaluations(self) -> int:
        """Gradients computed so far."""
        return self.gradients.evaluations

    @property
    def engine(self) -> str:
        """How single points are evaluated, with reasons, as `Gradients.how` has it."""
        how = self.gradients.how(1)
        return f"{how} ({self.note})" if self.note else how

    @property
    def draws(self) -> int:
        """Draws made so far, warm-up included."""
        in_c = self.gradients.in_c
        return self.counted + (in_c.draws if in_c is not None else 0)

    def __call__(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """Log density in nats and its gradient `[D]` at an unconstrained point `[D]`."""
        if self._stopped:
            return -0.5 * float(point @ point), -point
        try:
            value, gradient = self.gradients.at(point)
        except Exception as error:  # noqa: BLE001 - raised again by `check`, in the caller's thread
            self.error = self.error or error
            self.stop()
            return self._undefined()
        # One number tells of all: what is not finite stays so in the sum of squares.
        return (value, gradient) if math.isfinite(gradient.dot(gradient)) else self._undefined()

    def _undefined(self) -> tuple[float, np.ndarray]:
        return float("nan"), np.zeros(self.density.dim)

    def stop(self) -> None:
        """Answer at once from now on, with a standard normal, so that running chains end soon."""
        self._stopped = True
        if self.gradients.in_c is not None:
            self.gradients.in_c.stop()

    def check(self) -> None:
        """Raise what the model raised, if it did."""
        if isinstance(self.error, ViError):
            raise self.error
        if self.error is not None:
            raise ModelError(
                f"the model raised {type(self.error).__name__} while it was sampled: {self.error}. "
                "It must have a density wherever its latents' supports allow."
            ) from self.error

    def threads(self, draws: int, processors: int) -> int:
        """How many of the processors had better run a chain at once, for so many draws in all.

        Captures gradients, at a point most densities like, and has them compiled where that pays.
        """
        point = np.full(self.density.dim, 0.1)
        if self.density.start is not None:
            point = self.density.start.numpy()
        self(point)
        if self.gradients.to_c(_GRADIENTS * draws, point):
            return processors
        compiling = self.gradients.expect(_GRADIENTS * draws, torch.from_numpy(point).view(1, -1))
        if self.gradients.engine != "captured":
            # Uncaptured, chains share Python's lock; compiled, hardly anything is left beside it.
            return 1
        return max(1, processors - 1) if compiling else processors

    def start(self, seed: int) -> np.ndarray:
        """A starting point `[D]` with finite log density.

        As in Stan, uniform within 2 of the origin of unconstrained space in every coordinate, so
        that chains start apart; each further try is 5 % closer to the origin. Where the density has a
        start of its own, it is around that, nearer where the model raises within reach, and each further
        try is 20 % closer.

        Raises:
            ModelError: If a hundred tries found none.
        """
        generator = np.random.default_rng(seed)
        given = self.density.start
        centre = 0.0 if given is None else given.numpy()
        shrink = _SHRINK if given is None else _SHRINK_GIVEN
        reach = _RADIUS * self.density.spread / SPREADS[0]
        for attempt in range(_TRIES):
            radius = reach * shrink**attempt
            point = centre + generator.uniform(-radius, radius, self.density.dim)
            if np.isfinite(self(point)[0]):
                return point
            self.check()
        raise ModelError(
            f"no starting point: the log density is not finite at any of {_TRIES} points around "
            f"{'the origin of unconstrained space' if given is None else 'what init= gives'}. Look for "
            "observations outside their distribution's support and for scales that underflow to 0, or "
            "give a point where it is finite, init={site: value}."
        )
