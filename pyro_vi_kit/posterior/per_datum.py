"""A distribution for each datum: of new data, refined, and judged row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import torch

from pyro_vi_kit.core.errors import ModelError, OptionError, ViError, first_line
from pyro_vi_kit.core.options import COUNT, DRAWS, SEED, checks, flag, optional, positive, text
from pyro_vi_kit.core.runtime import fresh_seed
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model
from pyro_vi_kit.posterior import refinement
from pyro_vi_kit.posterior.approximation import GuideApproximation
from pyro_vi_kit.posterior.base import Fitted
from pyro_vi_kit.posterior.diagnostics import pointwise

if TYPE_CHECKING:
    import pandas as pd


class ByRow(Fitted):
    """The part of a posterior that speaks of single data."""

    def infer(self, *args: Any, **kwargs: Any) -> Self:
        """The posterior of new data in one pass of the encoder, nothing trained.

        Args:
            *args: The model's arguments on the new data.
            **kwargs: Its keyword arguments.

        Raises:
            OptionError: If the guide is not amortized.
        """
        if not self._encodes:
            raise OptionError(
                f"guide {self.guide!r} has no encoder to infer new data with: fit with "
                "guide='amortized', or fit the new data"
            )
        own = self._of_this_package()
        try:
            moved = own.moved_to(self.model.with_args(*args, **kwargs))
        except ViError:
            raise
        except Exception as error:
            raise ModelError(
                "the model and the encoder cannot take these arguments "
                f"({type(error).__name__}: {first_line(error)}): give data of the kind that it was "
                "fitted to"
            ) from error
        model = _named_as_far_as_known(moved.density)
        return self._of(model, moved, self.record, self.spec)

    @property
    def _encodes(self) -> bool:
        """Whether an encoder gives each datum its distribution."""
        if not isinstance(self.approximation, GuideApproximation):
            return False
        guide = self.approximation.guide
        local = [block for block in guide.blocks if block.plate is not None]
        return bool(local) and all(guide.table(block) is None for block in local)

    @checks(
        steps=optional(COUNT),
        tol=positive,
        seed=optional(SEED),
        batch_size=optional(COUNT),
        progress=optional(flag),
    )
    def refine(
        self,
        *args: Any,
        steps: int | None = None,
        tol: float = refinement.TOLERANCE,
        seed: int | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """Go on from the encoder's answer with numbers for each row (semi-amortized inference).

        Only the rows' own numbers are trained: the globals' distribution, what rows share (the layers of
        a flow) and the model's learned parameters stay as they are. An encoder that sees the globals is
        asked at their mean. The result has no encoder, and is saved and loaded like any posterior.

        Args:
            *args: The model's arguments on new data; its own data when none are given.
            steps: The most steps.
            tol: Nats a datum that the bound may fall short by, on average.
            seed: The same seed gives the same numbers on the same machine.
            batch_size: Rows in a step; all, or as many as memory has room for, when None.
            progress: Show progress on stderr; None shows it on a terminal only.
            **kwargs: The model's keyword arguments on new data.

        Raises:
            OptionError: If the guide has no distribution for each datum, or an option is wrong.
        """
        target = self._on(args, kwargs)
        seed = fresh_seed() if seed is None else seed
        with target._few_threads(), torch.enable_grad():
            refined, record = refinement.refine(
                target._of_this_package(),
                self.record.objective,
                steps=steps,
                tol=tol,
                seed=seed,
                batch_size=batch_size,
                progress=progress,
            )
        return self._of(target.model, refined, record, self.spec)

    @checks(draws=DRAWS, seed=SEED, plate=optional(text))
    def per_datum(
        self,
        *args: Any,
        draws: int = 1000,
        seed: int = 0,
        plate: str | None = None,
        **kwargs: Any,
    ) -> pd.DataFrame:
        """ELBO, log evidence, k-hat and effective draws of each row of the data plate.

        Columns: ``elbo``, the single-sample bound; ``log_evidence``, log p(x_i) by importance weights
        (the bound of `draws` samples in expectation); ``elbo_se`` and ``log_evidence_se``, all in nats;
        ``khat``; and ``ess``, the share of draws that the weights are worth. Sums are in ``attrs``. The
        index is named like the plate, so that ``.to_xarray()`` has it as its dimension.

        Where the model has global latents, everything is given them: they are held at the mean of q,
        unconstrained, and ``attrs["globals"]`` says so.

        Args:
            *args: The model's arguments on new data; its own data when none are given.
            draws: Draws of each row.
            seed: The same seed gives the same numbers.
            plate: Whose rows, where the guide has local latents in several.
            **kwargs: The model's keyword arguments on new data.

        Raises:
            OptionError: If the guide has no distribution for each datum, or the rows of the plate depend
                on each other's latents.
        """
        self._require_spread()
        target = self._on(args, kwargs)
        approximation = target._of_this_package()
        with target._few_threads():
            seen = pointwise.seen_per_datum(approximation.guide, approximation.params, plate)
            return pointwise.table(seen, draws, seed, target.model.coords)

    @checks(
        draws=DRAWS,
        seed=SEED,
        plate=optional(text),
        steps=optional(COUNT),
        tol=positive,
        progress=optional(flag),
    )
    def amortization_gap(
        self,
        *args: Any,
        draws: int = 1000,
        seed: int = 0,
        plate: str | None = None,
        steps: int | None = None,
        tol: float = refinement.TOLERANCE,
        progress: bool | None = None,
        **kwargs: Any,
    ) -> pd.DataFrame:
        """What the encoder loses for each row, and what its family loses, in nats.

        Columns: ``elbo`` of the encoder's answer, ``elbo_refined`` of the best member of the family
        that `refine` finds, ``log_evidence`` by its importance weights; ``amortization``, what the
        second has over the first, and ``approximation``, what the third has over the second; with
        standard errors. Means over rows are in ``attrs``, and ``attrs["summary"]`` says them. Globals
        are held at the mean of q, as in `per_datum`.

        Args:
            *args: The model's arguments on new data; its own data when none are given.
            draws: Draws of each row.
            seed: The same seed gives the same numbers.
            plate: Whose rows, where the guide has encoders for several.
            steps: The most steps of the refinement.
            tol: Nats a datum that the refinement may fall short by, on average.
            progress: Show progress on stderr; None shows it on a terminal only.
            **kwargs: The model's keyword arguments on new data.

        Raises:
            OptionError: If the guide has no encoder, or an option is wrong.
        """
        target = self._on(args, kwargs)
        with target._few_threads(), torch.enable_grad():
            return refinement.gaps(
                target._of_this_package(),
                target.model.coords,
                plate=plate,
                draws=draws,
                seed=seed,
                steps=steps,
                tol=tol,
                progress=progress,
            )

    def _on(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Self:
        """This posterior, or what the encoder infers of new data."""
        return self.infer(*args, **kwargs) if args or kwargs else self


def _named_as_far_as_known(density: Density) -> Model:
    """The density's model without the names of a plate's rows where it has another number of them."""
    plates, model = density.structure.plates, density.model
    coords = {
        dim: names
        for dim, names in model.coords.items()
        if dim not in plates or len(names) == plates[dim].size
    }
    return Model(
        model.fn, *model.args, kwargs=model.kwargs, coords=coords, dims=model.dims, name=model.name
    )
