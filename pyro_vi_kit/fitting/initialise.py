"""Where a fit starts: a point of the user's, or the best Gaussian that can be had quickly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vi_kit.core.checkpoint import Checkpoint
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.fitting import minibatches, streaming
from pyro_vi_kit.fitting.request import InitValues, Request
from pyro_vi_kit.guides import Guide, GuideSpec
from pyro_vi_kit.guides.families import DenseNormal, DiagonalNormal, GaussianFamily
from pyro_vi_kit.guides.flows.coupling import CouplingFlow
from pyro_vi_kit.guides.flows.flows import Flow
from pyro_vi_kit.guides.gaussian.low_rank import LowRankNormal
from pyro_vi_kit.guides.mixtures.gaussian_mixture import GaussianMixture, Mixture
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.log_density.initial import InitFunction
from pyro_vi_kit.objectives import Annealed
from pyro_vi_kit.optimize.deterministic import fixed_draws, mixtures
from pyro_vi_kit.optimize.deterministic.modes import Peak
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian
from pyro_vi_kit.optimize.engines import Batches, BatchSource, StreamedBatches


class Start(NamedTuple):
    """Where a fit of stochastic steps starts.

    Attributes:
        whitened: Whether parameters are measured in posterior sds.
        peaks: Modes of the log density that searches have found.
    """

    whitened: bool
    peaks: tuple[Peak, ...] = ()

    def facts(self) -> dict[str, Any]:
        """The same in what a checkpoint holds."""
        peaks = [(p.gaussian.loc, p.gaussian.scale_tril, p.log_evidence) for p in self.peaks]
        return {"whitened": self.whitened, "peaks": peaks}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Start:
        """The inverse; a checkpoint of an earlier version has no peaks."""
        peaks = (Peak(Gaussian(loc, tril), log) for loc, tril, log in facts.get("peaks", ()))
        return cls(facts["whitened"], tuple(peaks))


def begin(
    request: Request,
    guide: Guide,
    density: Density,
    batches: BatchSource | None,
    checkpoint: Checkpoint | None,
) -> Start:
    """Find a start unless there is one.

    Args:
        request: The fit.
        guide: The guide, changed in place.
        density: The model.
        batches: What steps see of the data; all of them when None.
        checkpoint: Where the start is noted, or found where the fit goes on.

    Returns:
        Whether parameters are measured in posterior sds, and the modes that the searches have found.
    """
    if checkpoint is None or checkpoint.state is None:
        nothing = Start(whitened=True)
        found = nothing if request.resumed else _initialise(request, guide, density, batches)
        if checkpoint is not None:
            checkpoint.facts |= found.facts()
        return found
    with checkpoint.restoring():
        return Start.of(checkpoint.facts)


def site_values(request: Request) -> Mapping[str, Any] | InitFunction | None:
    """Values by site, or the function that gives them; None where ``init=`` is a word."""
    return None if isinstance(request.init, str) else request.init


def located(request: Request, density: Density) -> Request:
    """The request with the values that its ``init`` gives, where that is a function: called once."""
    if isinstance(request.init, str | Mapping):
        return request
    with RandomStream(request.seed, "initial values"):
        point = density.unconstrain(request.init) if density.start is None else density.start
        values = density.constrain(point.unsqueeze(0))
    sites = [site.name for site in density.latents if not site.states]
    return dataclasses.replace(request, init=InitValues({n: values[n][0] for n in sites}))


def starting_point(request: Request, density: Density) -> Tensor | None:
    """The unconstrained point that ``init=`` names, `[D]`."""
    if isinstance(request.init, Mapping):
        return density.unconstrain(request.init)
    if request.init == "origin":
        return torch.zeros(density.dim, dtype=density.dtype, device=density.device)
    return None


def gaussian_of(guide: Guide) -> Gaussian:
    """The Gaussian, or the point, that a single-block guide is now."""
    with torch.no_grad():
        found = guide.families[guide.blocks[0].name]()
        scale_tril = getattr(found, "scale_tril", None)
        return Gaussian(found.mean, found.stddev.diag() if scale_tril is None else scale_tril)


def _flattened(request: Request, density: Density, best: Gaussian, first: float) -> Gaussian:
    """The best Gaussian of the target raised to ``first``, as an annealed fit begins.

    The best one of the target itself sits on a single mode where there are several, and an annealed fit
    that starts there has lost the others before it begins.
    """
    wide = Gaussian(best.loc, best.scale_tril / first**0.5)
    return fixed_draws.prefit(density, request.seed, request.budget, wide, power=first).best


def _taken_over(family: GaussianFamily, below: Guide) -> bool:
    """Become what a simpler guide is, where that can be said."""
    known = below.families[below.blocks[0].name]
    if isinstance(family, CouplingFlow) and isinstance(known, CouplingFlow):
        family.extend(known)
    elif isinstance(family, LowRankNormal) and isinstance(known, DiagonalNormal):
        with torch.no_grad():
            now = known().base_dist
            # Not zero, which is a saddle: the columns have to part.
            columns = 0.1 * torch.randn_like(family.factor) / family.factor.shape[1] ** 0.5
            family.become(now.loc, now.scale, now.scale[:, None] * columns)
    elif isinstance(known, DenseNormal):
        family.start_from(*(part.detach() for part in known.moments()))
    else:
        return False
    return True


def components_of(guide: Guide) -> mixtures.Components:
    """The components that a mixture has now."""
    return mixtures.components_of(guide.families[guide.blocks[0].name])  # type: ignore[arg-type]


def settled(request: Request, spec: GuideSpec, density: Density) -> tuple[Request, GuideSpec]:
    """A mixture of as many components as there are modes, where their number was left open.

    Returns:
        The request, with the modes that were found, and the guide.
    """
    if not isinstance(spec, Mixture) or spec.components is not None:
        return request, spec
    if density.params or request.batch_size is not None or density.streamed is not None:
        return request, spec
    spec.require_room(density.dim)
    found = request.found
    if found is None:
        point = starting_point(request, density)
        found = mixtures.find(density, request.seed, request.budget, point)
    count = mixtures.number_of_components(found)
    return dataclasses.replace(request, found=found), dataclasses.replace(spec, components=count)


def _initialise(
    request: Request, guide: Guide, density: Density, batches: BatchSource | None
) -> Start:
    """Start a single Gaussian-based block from the best Gaussian, or where ``init=`` says.

    Returns:
        Whether it was the best Gaussian, in whose sds parameters are measured from now on, and modes.
    """
    start = starting_point(request, density)
    if isinstance(batches, Batches) and request.init == "auto":
        seed, budget = request.seed, request.budget
        return Start(minibatches.start_on_rows(guide, batches.plates, seed, budget, start))
    family = guide.families[guide.blocks[0].name]
    if len(guide.blocks) > 1 or not isinstance(family, GaussianFamily):
        if start is not None and isinstance(request.init, Mapping):
            _centre_globals(guide, start, request.init)
        return Start(False)
    if request.below is not None and _taken_over(family, request.below):
        return Start(True, () if request.found is None else request.found.peaks)
    searched = not density.params or not (
        isinstance(family, GaussianMixture) or isinstance(request.objective, Annealed)
    )
    if request.init == "origin" or not searched or density.dim > fixed_draws.MAX_DIM:
        if start is not None:
            family.centre_on(start)
        return Start(False)
    if isinstance(family, GaussianMixture) and batches is None:
        found = request.found or mixtures.find(density, request.seed, request.budget, start)
        mixtures.fit(
            guide,
            seed=request.seed,
            tolerance=0.1,
            budget=request.budget,
            progress=Progress("start", enabled=False),
            start=start,
            found=found,
        )
        return Start(True, found.peaks)
    if isinstance(batches, StreamedBatches):
        gaussian, peaks = streaming.start(request, batches, density, start), ()
    else:
        found = fixed_draws.prefit(density, request.seed, request.budget, start)
        gaussian, peaks = found.best, found.peaks
    objective = request.objective
    first = objective.first if isinstance(objective, Annealed) and batches is None else None
    if first is not None:
        gaussian = _flattened(request, density, gaussian, first)
    family.start_from(gaussian.loc, gaussian.scale_tril)
    if first is not None and isinstance(family, Flow):
        with RandomStream(request.seed, "symmetry"):
            family.break_symmetry()
    return Start(True, peaks)


def _centre_globals(guide: Guide, start: Tensor, init: Mapping[str, Any]) -> None:
    """Centre the Gaussian of the globals on the point that ``init=`` names."""
    block, density = guide.blocks[0], guide.density
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
