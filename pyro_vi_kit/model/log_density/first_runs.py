"""The first runs of a model, before anything is known about it, and what they show of it.

`Density` and `vi.check` both begin here; `problems` says what is wrong with what they met.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_vi_kit.core.errors import ModelError
from pyro_vi_kit.core.runtime import random_state, validation
from pyro_vi_kit.model.log_density.batching import agree
from pyro_vi_kit.model.log_density.handlers import Fill, Replay
from pyro_vi_kit.model.log_density.initial import SPREADS, InitFunction
from pyro_vi_kit.model.log_density.precision import Undone
from pyro_vi_kit.model.log_density.runner import Runner
from pyro_vi_kit.model.log_density.streamed import Streamed, streamed
from pyro_vi_kit.model.log_density.structure import Structure, structure_of
from pyro_vi_kit.model.log_density.supports import bijector
from pyro_vi_kit.model.log_density.visits import Visit, nesting_of


class FirstRuns:
    """Runs at the origin of unconstrained space, or where ``init`` says, and on either side of it.

    Args:
        runner: Runs the model; it gets to know what the runs show of it.
        init: Where to run it, and around.

    Attributes:
        runs: Those that did not raise.
        error: What the first one that did has raised.
        drew: Whether a run beyond the first drew random numbers, of discrete latents or outside of
            sample sites.
        unconstrained: Whether latents had unconstrained values. Where no run at such values succeeds,
            one at draws of the prior is the last resort.
    """

    def __init__(self, runner: Runner, init: InitFunction | None = None) -> None:
        self.runner = runner
        self.runs: list[Replay] = []
        self.error: ModelError | None = None
        self.drew = False
        self.unconstrained = True
        with runner.first_runs():
            first, *others = [Replay(fill=fill) for fill in starts(runner.device)]
            first.init = init
            with Undone() as writes:
                self._try(first)
            if writes.found or (runner.precision is not None and runner.precision.written):
                runner.run_on_copies()
            before = random_state()
            if init is None:
                for run in others:
                    self._try(run)
            elif self.error is None:
                self._try_nearby(first)
            self.drew = random_state() != before
            if self.error is not None and init is None:
                self._try_prior(self.error)
            runner.nesting = nesting_of(self.visits)

    def _try(self, run: Replay) -> None:
        try:
            self.runner.try_run(run)
        except ModelError as error:
            self.error = self.error or error
        else:
            self.runs.append(run)

    def _try_nearby(self, first: Replay) -> None:
        """Runs on either side of a point, as near as the model needs; the runner notes both."""
        runner = self.runner
        runner.centre = {
            name: visit.unconstrained
            for name, visit in first.visits.items()
            if visit.kind == "latent" and visit.choice is None and visit.unconstrained is not None
        }
        runner.initial = {name: first.visits[name].value.detach() for name in runner.centre}
        for spread in SPREADS:
            runner.spread = spread
            self.runs, self.error = [first], None
            for fill in starts(runner.device)[1:]:
                point = {
                    name: (value + spread / 0.3 * fill(value.shape)).detach()
                    for name, value in runner.centre.items()
                }
                leaves = {name: value.requires_grad_() for name, value in point.items()}
                self._try(Replay(unconstrained=leaves, fill=fill))
            if self.error is None:
                return

    def _try_prior(self, error: ModelError) -> None:
        """Whether the model runs at draws of its prior: without a bijector, or where none was given."""
        run = Replay(sample_latents=True)
        try:
            self.runner.try_run(run)
        except ModelError:
            return
        if not self.runs:
            self.runs, self.unconstrained = [run], False
        if self.of_kind("latent") and not self.unmapped:
            self.error = ModelError(
                f"{error}. That is at or near the origin of unconstrained space, and at draws of its "
                "prior it runs: say where to start, init='median' or another function of the site, or "
                "a dict of site values"
            )
            self.error.__cause__ = error.__cause__

    @property
    def visits(self) -> Mapping[str, Visit]:
        """The sites of the last run that did not raise."""
        return self.runs[-1].visits if self.runs else {}

    @functools.cached_property
    def structure(self) -> Structure:
        """Sites, plates and parameters of that run."""
        return structure_of(self.runs[-1], self.runner.at_hand)

    @functools.cached_property
    def streamed(self) -> Streamed | None:
        """How a batch stands for all data, where they are streamed.

        Raises:
            ModelError: If it does not.
        """
        stream = self.runner.model.stream
        if stream is None or not self.unconstrained:
            return None
        return streamed(self.runner, stream)

    def of_kind(self, kind: str) -> list[Visit]:
        """The sites of a kind in that run."""
        return [visit for visit in self.visits.values() if visit.kind == kind]

    @functools.cached_property
    def unmapped(self) -> list[ModelError]:
        """Why latents have no map from unconstrained space, if that is why no run there succeeded."""
        found = []
        for visit in [] if self.unconstrained else self.of_kind("latent"):
            try:
                bijector(visit.name, visit.fn)
            except ModelError as error:
                found.append(error)
        return found

    @functools.cached_property
    def changing(self) -> str | None:
        """A site that changes when a run is repeated at the same latents, if one does.

        That a model draws random numbers proves nothing: the initial value of a parameter that is known
        already is drawn in vain.
        """
        if not self.runs or not self.unconstrained:
            return None
        one, other = self._repetition(), self._repetition()
        # Without validation, so that data outside a support is a number here and not an exception.
        with self.runner.first_runs(), validation(False):
            self.runner.try_run(one)
            self.runner.try_run(other)
            for name, visit in one.visits.items():
                if name not in other.visits or not _same(visit, other.visits[name]):
                    return name
        return None

    def _repetition(self) -> Replay:
        """A handler that gives every latent, also a discrete one, the value that it had last."""
        visits = self.visits.items()
        return Replay(
            unconstrained={n: v.unconstrained for n, v in visits if v.unconstrained is not None},
            constrained={n: v.value for n, v in visits if v.kind == "discrete"},
        )


def starts(device: torch.device) -> list[Fill]:
    """Values of the latents to run a model at: the origin, and two points on either side of it."""

    def leaf_normals(sign: float) -> Fill:
        generator = torch.Generator().manual_seed(20260)

        def fill(shape: torch.Size) -> Tensor:
            point = sign * 0.3 * torch.randn(shape, generator=generator, device="cpu")
            # A leaf that requires a gradient, so that what depends on latents can be told.
            return point.to(device).requires_grad_()

        return fill

    return [torch.zeros, leaf_normals(-1.0), leaf_normals(1.0)]


def _same(one: Visit, other: Visit) -> bool:
    pairs = [(one.value, other.value)]
    # Data of a wrong shape have no density; that is another problem than this one.
    with contextlib.suppress(RuntimeError, ValueError):
        pairs.append((one.log_prob(), other.log_prob()))
    return all(agree(a, b, 0.0, 0.0) for a, b in pairs)
