"""A fit: the guide that was trained, and how that went."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from pyro_vi_kit.core.contracts import Status
from pyro_vi_kit.core.errors import ModelError, OptionError
from pyro_vi_kit.core.runtime import one_thread
from pyro_vi_kit.guides import GuideSpec
from pyro_vi_kit.model import fingerprint
from pyro_vi_kit.model.groups import dims_of, squeeze
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.optimize.result import HISTORY
from pyro_vi_kit.posterior.approximation import Approximation, GuideApproximation
from pyro_vi_kit.posterior.record import Record, ladder_frame

if TYPE_CHECKING:
    import pandas as pd


class Fitted:
    """What a fit leaves behind, and what every other part of a posterior builds on.

    Args:
        model: The model.
        approximation: The trained guide.
        record: How it was trained.
        density: The model's Density; None where the model has none.
        spec: The guide's options, where it was named or configured.
    """

    def __init__(
        self,
        model: Model,
        approximation: Approximation,
        record: Record,
        density: Density | None,
        spec: GuideSpec | None = None,
    ) -> None:
        self.model = model
        self.approximation = approximation
        self.record = record
        self.density = density
        self.spec = spec

    @property
    def guide(self) -> str:
        """Name of the guide."""
        return self.approximation.name

    @property
    def status(self) -> Status:
        """How the fit ended, what to do about it, and what was tried and given up."""
        return self.record.status.noting(*self._given_up())

    @property
    def losses(self) -> np.ndarray:
        """Minus the bound at each step, `[steps]`, nats; NaN where a step was skipped."""
        return self.record.losses

    @property
    def history(self) -> pd.DataFrame:
        """A row for each epoch; none where steps did not go by epochs.

        Columns: ``epoch``; ``seconds`` since training began; ``rate``, the learning rate at its end;
        ``bound``, mean training bound, and ``validation``, bound on data held out, both in nats per row
        of the data (where these have a plate).
        """
        import pandas as pd

        frame = pd.DataFrame(
            {name: self.record.history.get(name, []) for name in HISTORY}, dtype=float
        )
        return frame.astype({"epoch": int})

    @property
    def evaluations(self) -> int:
        """Per-sample gradient evaluations of the log density."""
        return self.record.evaluations

    @property
    def seconds(self) -> float:
        """Wall time of the fit."""
        return self.record.seconds

    @property
    def method(self) -> str:
        """How parameters moved: ``lbfgs``, ``moments`` or ``stochastic``."""
        return self.record.method

    @property
    def engine(self) -> str:
        """How steps were executed: ``captured``, ``compiled``, ``eager`` or ``pyro``."""
        return self.record.engine

    @property
    def ladder(self) -> pd.DataFrame:
        """A row for each guide that ``guide="auto"`` tried; none where the guide was named.

        Columns: ``rung``, from 1; ``guide``; ``elbo`` (nats); ``khat``; ``verdict``; ``seconds``, the
        verdict's included; ``chosen``; ``ended``, how its fit ended, or why it was left out.
        """
        return ladder_frame(self.record.ladder)

    @property
    def parameters(self) -> dict[str, np.ndarray]:
        """Learned parameters of the model (`pyro.param`, `pyro.module`), constrained, by name."""
        return {n: v.cpu().numpy() for n, v in self.approximation.parameters().items()}

    # -- for the other parts ------------------------------------------------------------------

    def _given_up(self) -> Iterator[str]:
        """What was tried and given up other than by the method of the fit, one line each."""
        if self.record.note:
            yield f"Steps were not captured: {self.record.note}"
        yield from self.approximation.given_up

    def __reduce__(self) -> Any:
        """Refuse to be pickled, and to be copied by `copy`, with what there is in their place.

        Raises:
            OptionError: Always.
        """
        raise OptionError(
            "a posterior holds its model, whose function and recordings no pickle or copy can hold: "
            "posterior.save(path) writes it, and vi.load(path, model) reads it, in another process too. "
            "Nothing that is done with a posterior changes it, so that it needs no copy"
        )

    def _of(
        self,
        model: Model,
        approximation: GuideApproximation,
        record: Record,
        spec: GuideSpec | None,
    ) -> Self:
        """A posterior of this kind."""
        density = approximation.density
        record = dataclasses.replace(record, fingerprint=fingerprint.of(density))
        return type(self)(model, approximation, record, density, spec)

    def _named(self, values: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
        """Values in each site's own shape."""
        sites = {} if self.density is None else self.density.structure.sites
        return {
            name: squeeze(sites[name], value) if name in sites else value.detach().cpu().numpy()
            for name, value in values.items()
        }

    def _dims(self) -> dict[str, list[str]]:
        if self.density is None:
            return {}
        return {
            site.name: dims_of(self.model, site)
            for site in self.density.structure.of_kind("latent", "discrete", "deterministic")
        }

    def _few_threads(self) -> Any:
        return one_thread(self.density is None or is_small(self.density))

    def _require_spread(self) -> None:
        if self.approximation.point:
            raise OptionError(
                f"{self._point_words()} has no log weights: fit a guide with spread, e.g. "
                "guide='mean_field'"
            )

    def _point_words(self) -> str:
        """What a point estimate is one of."""
        if isinstance(self.approximation, GuideApproximation):
            return f"a point estimate (guide {self.guide!r})"
        if not self.approximation.points:
            return f"a point estimate (guide {self.guide!r} has no latents)"
        held = ", ".join(map(repr, self.approximation.points))
        return f"a point estimate (guide {self.guide!r} holds {held} at one value)"

    def _known_density(self) -> Density:
        if self.density is None:
            raise ModelError(
                "the plates and masks of this model are not known, since it has no batched density: "
                "vi.check(model) says what stands in the way"
            )
        return self.density

    def _of_this_package(self) -> GuideApproximation:
        if not isinstance(self.approximation, GuideApproximation):
            raise OptionError(
                f"guide {self.guide!r} is a Pyro guide, whose parts for each datum are not known: fit "
                "with guide='amortized'"
            )
        return self.approximation


def is_small(density: Density) -> bool:
    """Whether more than one thread would only wait: under a million numbers of data."""
    return sum(t.numel() for t in density.data) < 1_000_000
