"""Where a fit starts: a point of the user's, or the best Gaussian that can be had quickly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.fitting import minibatches
from pyro_vi_kit.fitting.request import InitValues, Request, Training, starting_point
from pyro_vi_kit.guides import Guide, GuideSpec
from pyro_vi_kit.guides.families import GaussianFamily
from pyro_vi_kit.guides.flows.flows import Flow
from pyro_vi_kit.guides.mixtures.gaussian_mixture import GaussianMixture, Mixture
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.optimize.deterministic import fixed_draws, mixtures
from pyro_vi_kit.optimize.deterministic.modes import Found, Mode
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian
from pyro_vi_kit.optimize.deterministic.search import Search
from pyro_vi_kit.optimize.engines import Batches, BatchSource, StreamedBatches
from pyro_vi_kit.optimize.result import Budget


class Start(NamedTuple):
    """Where a fit of stochastic steps starts.

    Attributes:
        whitened: Whether parameters are measured in posterior sds.
        modes: Those of the log density that searches have found.
    """

    whitened: bool
    modes: tuple[Mode, ...] = ()

    def facts(self) -> dict[str, Any]:
        """The same in what a checkpoint holds."""
        modes = [(m.gaussian.loc, m.gaussian.scale_tril, m.log_evidence) for m in self.modes]
        return {"whitened": self.whitened, "peaks": modes}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Start:
        """The inverse; a checkpoint of an earlier version has no modes."""
        modes = (Mode(Gaussian(loc, tril), log) for loc, tril, log in facts.get("peaks", ()))
        return cls(facts["whitened"], tuple(modes))


def begin(training: Training, batches: BatchSource | None) -> Start:
    """Find a start unless there is one, and note it where there is a checkpoint.

    Args:
        training: Its guide is changed in place.
        batches: What steps see of the data; all of them when None.
    """
    checkpoint = training.checkpoint
    if checkpoint is not None and checkpoint.state is not None:
        with checkpoint.restoring():
            return Start.of(checkpoint.facts)
    resumed = training.request.resumed
    start = Start(whitened=True) if resumed else _initialise(training, batches)
    if checkpoint is not None:
        checkpoint.facts |= start.facts()
    return start


def gaussian_of(guide: Guide) -> Gaussian:
    """The Gaussian, or the point, that a single-block guide is now."""
    with torch.no_grad():
        found = guide.families[guide.blocks[0].name]()
        scale_tril = getattr(found, "scale_tril", None)
        return Gaussian(found.mean, found.stddev.diag() if scale_tril is None else scale_tril)


def components_of(guide: Guide) -> mixtures.Components:
    """The components that a mixture has now."""
    return mixtures.components_of(guide.families[guide.blocks[0].name])  # type: ignore[arg-type]


def choose_components(
    request: Request,
    spec: GuideSpec,
    density: Density,
    init: str | Mapping[str, Any],
    budget: Budget,
    found: Found | None = None,
) -> tuple[GuideSpec, Found | None]:
    """A mixture of as many components as there are modes, where their number was left open.

    Args:
        request: The fit.
        spec: Any guide.
        density: The model.
        init: Values by site, ``"auto"`` or ``"origin"``.
        budget: What may be spent.
        found: The modes, where they are known.

    Returns:
        The guide, and the modes that were found.
    """
    if not isinstance(spec, Mixture) or spec.components is not None:
        return spec, found
    if density.params or request.batch_size is not None or density.streamed is not None:
        return spec, found
    spec.require_room(density.dim)
    if found is None:
        search = Search(density, request.seed, budget)
        found = mixtures.find(search, starting_point(init, density))
    count = mixtures.number_of_components(found)
    return dataclasses.replace(spec, components=count), found


def _initialise(training: Training, batches: BatchSource | None) -> Start:
    """Start a single Gaussian-based block from the best Gaussian, or where ``init=`` says."""
    guide, init = training.guide, training.init
    if isinstance(batches, Batches) and init == "auto":
        return Start(minibatches.start_on_rows(training, batches.plates))
    family = guide.families[guide.blocks[0].name]
    if len(guide.blocks) > 1 or not isinstance(family, GaussianFamily):
        if isinstance(init, Mapping):
            _centre_globals(guide, init)
        return Start(False)
    below, found = training.warm_start, training.found
    if below is not None and family.take_over(below.family_of(below.blocks[0])):
        return Start(True, () if found is None else found.modes)
    point = training.point
    if not _is_searched(training, family):
        if point is not None:
            family.centre_on(point)
        return Start(False)
    if isinstance(family, GaussianMixture) and batches is None:
        found = found or mixtures.find(training.search(), point)
        mixtures.fit(guide, training.search(tolerance=0.1), point, found=found)
        return Start(True, found.modes)
    return _from_gaussian(training, family, batches)


def _is_searched(training: Training, family: GaussianFamily) -> bool:
    """Whether the best Gaussian is worth a search."""
    objective, density = training.request.objective, training.density
    if training.init == "origin" or density.dim > fixed_draws.MAX_DIM:
        return False
    needs_all = isinstance(family, GaussianMixture) or objective.first_power is not None
    return not (density.params and needs_all)


def _from_gaussian(
    training: Training, family: GaussianFamily, batches: BatchSource | None
) -> Start:
    """Start from the best Gaussian of the target as it is when a fit begins."""
    modes: tuple[Mode, ...] = ()
    if isinstance(batches, StreamedBatches):
        gaussian = minibatches.start_on_stream(training, batches)
    else:
        found = fixed_draws.prefit(training.search(), training.point)
        gaussian, modes = found.best, found.modes
    first = training.request.objective.first_power if batches is None else None
    if first is None:
        family.start_from(gaussian.loc, gaussian.scale_tril)
        return Start(True, modes)
    # The best one of the target itself sits on a single mode where there are several, and an annealed
    # fit that starts there has lost the others before it begins.
    search = dataclasses.replace(training.search(), power=first)
    wide = Gaussian(gaussian.loc, gaussian.scale_tril / first**0.5)
    gaussian = fixed_draws.prefit(search, wide).best
    family.start_from(gaussian.loc, gaussian.scale_tril)
    if isinstance(family, Flow):
        with RandomStream(training.request.seed, "symmetry"):
            family.break_symmetry()
    return Start(True, modes)


def _centre_globals(guide: Guide, init: Mapping[str, Any]) -> None:
    """Centre the Gaussian of the globals on the point that ``init=`` names."""
    block, density = guide.blocks[0], guide.density
    start = density.unconstrain(init)
    family = guide.families[block.name]
    if block.plate is not None or not isinstance(family, GaussianFamily):
        if isinstance(init, InitValues):
            return  # it starts from the data, or from numbers of its own
        raise OptionError(
            "init={site: value} needs a guide with one block for all latents, or for the global ones, "
            f"that is Gaussian, and guide {guide.name!r} has none: leave init= out, or use "
            "guide='full_rank' or guide='mean_field'"
        )
    names = [site.name for site in block.sites]
    for name in init:
        if name not in names and not isinstance(init, InitValues):
            raise OptionError(
                f"init= names {name!r}, which this guide holds row by row; it can start from values of "
                f"{', '.join(names)}"
            )
    family.centre_on(block.pack(density.block.unpack(start.unsqueeze(0)))[0])
