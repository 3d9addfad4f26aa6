"""The contracts between the parts: what a guide, an objective and a fit hand to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

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


@runtime_checkable
class Objective(Protocol):
    """A bound on the log evidence, as a pure function of log weights, and how it is trained.

    `objectives.Bound` has defaults for all but ``name``, ``particles``, ``multi_sample``, ``bound`` and
    ``stock_loss``.

    Attributes:
        name: What the registry calls it.
        particles: K, draws of the guide per step.
        multi_sample: Whether the bound depends on K, so that particles may not be averaged over.
        order: Its order alpha among the Rényi bounds; None for a bound that is none of them.
        upper: Whether it is an upper bound, and is brought down.
        is_elbo: Whether what is trained in the end is the ELBO.
        warmup: Steps before what is trained is the bound itself.
        carried: Whether the loss differentiates a `carrier` that is not the bound.
        estimators: Gradient estimators that are defined for it.
    """

    name: ClassVar[str]

    @property
    def particles(self) -> int:
        """Draws per step, K."""
        ...

    @property
    def multi_sample(self) -> bool:
        """Whether the bound depends on K."""
        ...

    @property
    def order(self) -> float | None:
        """Order among the Rényi bounds (ELBO 1, importance-weighted 0)."""
        ...

    def bound(self, log_w: Tensor) -> Tensor:
        """Reduce log weights over their first dimension: `[K, ...] -> [...]`, nats."""
        ...

    def stock_loss(self, *, vectorize: bool = False) -> Any:
        """The `pyro.infer` loss that is minus this bound.

        Raises:
            OptionError: If stock Pyro has none.
        """
        ...

    @property
    def upper(self) -> bool:
        """Whether it is an upper bound."""
        ...

    @property
    def is_elbo(self) -> bool:
        """Whether what is trained in the end is the ELBO."""
        ...

    @property
    def warmup(self) -> int:
        """Steps before what is trained is the bound itself."""
        ...

    @property
    def carried(self) -> bool:
        """Whether the loss differentiates something else than the bound."""
        ...

    @property
    def estimators(self) -> tuple[str, ...]:
        """Gradient estimators that are defined for it."""
        ...

    def carrier(self, log_w: Tensor) -> Tensor:
        """What the loss is minus of, and differentiates: `[K, ...] -> [...]`, nats."""
        ...

    def look(self, log_w: Tensor) -> Tensor:
        """What a comparison of two fits maximises: `[K, ...] -> [...]`, nats."""
        ...

    def path(self, log_w: Tensor) -> Tensor | None:
        """What ``dreg`` scales the gradient at each draw by, `[K, ...]`; None for 1."""
        ...

    def score(self, log_w: Tensor) -> Tensor:
        """What ``score`` multiplies the gradient of each log q by, `[K, ...]`."""
        ...

    def weights(
        self,
        guide: Any,
        draw: Any,
        params: Mapping[str, Tensor] | None = None,
        index: Mapping[str, Tensor] | None = None,
        *,
        data: Sequence[Tensor] | None = None,
        updates: Tensor | None = None,
    ) -> LogWeights:
        """The log weights that the bound is taken of, nats."""
        ...

    def require(self, guide: Any) -> None:
        """Refuse a guide that it is not defined for."""
        ...


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
