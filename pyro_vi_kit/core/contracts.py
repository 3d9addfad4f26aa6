"""The contracts between the parts: what a guide, an objective and a fit hand to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from torch import Tensor


class LogWeights(NamedTuple):
    """log p(x, z) - log q(z) of K particles, in nats, by part.

    Attributes:
        shared: What belongs to no data plate that has a local block of the guide, `[K]`.
        local: For each plate with a local block, one number per row, `[K, B]`, unscaled.
        scale: N / B of each of those plates.
    """

    shared: Tensor
    local: dict[str, Tensor]
    scale: dict[str, float]

    def joint(self) -> Tensor:
        """The log weight of each particle as a whole, `[K]`."""
        total = self.shared
        for plate, rows in self.local.items():
            total = total + self.scale[plate] * rows.sum(-1)
        return total


class Batch(NamedTuple):
    """What an evaluation sees beside the latents.

    Attributes:
        index: Rows `[B]` by plate, of data in memory; all rows of a plate that is not named.
        data: Tensors in the place of the density's own, where data are streamed.
        params: Unconstrained learned parameters of the model; its first values when None.
        updates: Steps taken so far, a scalar, for what changes with them; None where nothing is trained.
    """

    index: Mapping[str, Tensor] = MappingProxyType({})  # pyright: ignore[reportIncompatibleMethodOverride]
    data: Sequence[Tensor] | None = None
    params: Mapping[str, Tensor] | None = None
    updates: Tensor | None = None


ALL_DATA = Batch()


Reason = Literal["converged", "budget", "interrupted", "failed", "diverged", "not converged"]


@dataclass(frozen=True)
class Status:
    """How a fit ended.

    Attributes:
        converged: Whether the stopping rule was met.
        reason: ``converged``; ``budget``, time or steps ran out; ``interrupted`` by the user;
            ``failed``, something was raised; ``diverged``, the bound became NaN or infinite;
            ``not converged``, the optimiser could not go on.
        advice: What happened and what to try, one or two sentences.
        gap: Nats by which the ELBO is estimated to fall short of the guide's best, on draws that the
            guide was not fitted to; None where that was not measured.
        modes: Distinct modes of the log density that searches from several points ended in, those more
            than 30 nats below the highest left out; None where none was found, or none looked for.
        missed: Share of the mass, by Laplace's estimate, in those of them that the guide has next to no
            draws near; None where fewer than two are known.
        notes: What was tried on the way and given up, a sentence each with its reason.
    """

    converged: bool
    reason: Reason
    advice: str
    gap: float | None = None
    modes: int | None = None
    missed: float | None = None
    notes: tuple[str, ...] = ()

    def noting(self, *notes: str) -> Status:
        """The same with more notes, those that are empty or there already left out."""
        known = dict.fromkeys((*self.notes, *filter(None, notes)))
        return replace(self, notes=tuple(known))

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Status:
        """The inverse of `dataclasses.asdict`, also where a file made lists of tuples."""
        return cls(**{**facts, "notes": tuple(facts.get("notes", ()))})
