"""`calibrate`: whether a guide can be believed on data such as a model makes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.options import SEED, checks, flag, function, integer, names, optional
from pyro_vi_kit.core.progress import Progress
from pyro_vi_kit.core.runtime import RandomStream, default_dtype, fresh_seed
from pyro_vi_kit.core.stopping import terminable
from pyro_vi_kit.fitting.request import checked
from pyro_vi_kit.guides import GuideSpec
from pyro_vi_kit.model.groups import require_names
from pyro_vi_kit.model.log_density import Density
from pyro_vi_kit.model.model import Model, a_model
from pyro_vi_kit.objectives import Objective
from pyro_vi_kit.validation.calibrate.data_reuse import require_generative
from pyro_vi_kit.validation.calibrate.result import Calibration, collected
from pyro_vi_kit.validation.calibrate.simulation import Fitter, Simulation, simulate
from pyro_vi_kit.validation.calibrate.workers import Run

FEWEST = 20
FEWEST_DRAWS = 19
MOST_JOBS = 1000
MOST = 10_000_000  # of either; ranks of so many are 80 MB a number
_RANKED = ("latent", "deterministic", "discrete")


@terminable
@checks(
    model=a_model,
    simulations=integer(FEWEST, MOST),
    draws=integer(FEWEST_DRAWS, MOST),
    fitter=optional(function),
    sites=optional(names),
    seed=optional(SEED),
    jobs=optional(integer(1, MOST_JOBS)),
    progress=optional(flag),
)
def calibrate(
    model: Model,
    guide: str | GuideSpec | None = None,
    *,
    simulations: int = 200,
    draws: int = 999,
    fitter: Fitter | None = None,
    sites: Sequence[str] | None = None,
    objective: str | Objective | None = None,
    method: str = "auto",
    tol: float | None = None,
    budget: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    jobs: int | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Fit a guide to data simulated from the model itself, and see where the truth lies.

    Latents are drawn from the prior and data given them, again and again; where draws of the guide are
    draws of the posterior, the truth is one more of them, and its rank is uniform: simulation-based
    calibration (Talts et al. 2018; for variational fits Yao et al. 2018). It speaks of data as the prior
    makes them, on average; what it says of your own data is only as good as the prior.

    Args:
        model: The model. Of its data only the shapes count: observed sites are drawn anew.
        guide: A name (see `vi.guides.names()`) or a configured instance; ``"full_rank"`` by default.
        simulations: Data sets. 200 see an sd that is a sixth too small, or a mean that is a third of an
            sd off; 50 what is twice as bad.
        draws: Draws of the guide that each truth is ranked among.
        fitter: What gives the draws in the place of a guide's fit: a callable from a `vi.Model` on
            simulated data and a seed to ``{site: [S, *shape]}``, to a `vi.Posterior` or to ArviZ data,
            as in ``lambda model, seed: vi.nuts(model, seed=seed)``. Of more than ``draws`` draws evenly
            spaced ones are taken, which thins a chain.
        sites: Sites to rank; all latent, deterministic and discrete ones by default.
        objective: As for `vi.fit`, and so are those that follow.
        method: ``"auto"``, ``"lbfgs"`` or ``"stochastic"``.
        tol: Nats that the bound may fall short by.
        budget: Seconds of each fit, after which it stops with what there is.
        steps: The most stochastic steps.
        seed: The same seed gives the same numbers, whatever ``jobs``. (Long stochastic fits are compiled
            once the compiler is done, which shows in their last digits.)
        jobs: Processes; by default as many as there are cores, once there is enough to do for them.
        progress: Show progress on stderr; None shows it on a terminal only.

    Raises:
        ModelError: If data cannot be simulated from the model: a prior is improper, a factor or a
            learned parameter stands in it, its data are used elsewhere than at observed sites, they are
            streamed, a site is masked or scaled; or if all fits fail.
        OptionError: If an option cannot work.
        KeyboardInterrupt: If the user interrupts before 20 simulations are done; later, what is done is
            judged, and ``interrupted`` is true.
    """
    started = time.monotonic()
    spec = _spec(guide, fitter)
    options: dict[str, Any] = {
        "objective": "elbo" if objective is None else objective,
        "method": method,
        "tol": tol,
        "budget": budget,
        "steps": steps,
    }
    # All options are seen to be usable before anything is run.
    seed = checked(model, seed=fresh_seed() if seed is None else seed, **options).seed
    encodes = spec is not None and spec.encodes
    density = Density(model, dtype=default_dtype() if encodes else torch.float64)
    require_names(density)
    simulated = require_generative(density)
    if spec is not None:
        _require_spread(spec, density)
    ranked = _ranked(density, sites)
    data_sets, units = simulate(density, simulations, seed)
    simulation = Simulation(
        simulated, density.dtype, spec, fitter, options, draws, ranked, units, seed
    )
    name = spec.name if spec is not None else getattr(fitter, "__name__", type(fitter).__name__)
    with Progress(f"calibrating {name}", simulations, enabled=progress, unit="fits") as bar:
        run = Run(simulation, data_sets, bar)
        run.all(jobs)
    if run.interrupted and sum(r.ranks is not None for r in run.results.values()) < FEWEST:
        raise KeyboardInterrupt
    return collected(density, name, run, time.monotonic() - started)


def _spec(guide: object, fitter: object) -> GuideSpec | None:
    """What is fitted; None where a fitter does it."""
    if fitter is not None:
        if guide is not None:
            raise OptionError("guide= and fitter= both say what to fit: give one of them")
        return None
    if guide is not None and not isinstance(guide, str | GuideSpec):
        raise OptionError(
            "guide= takes a name or a configured instance, since each data set has a guide of its own: "
            "for a Pyro guide give fitter=lambda model, seed: vi.fit(model, make_guide(), seed=seed)"
        )
    return guides.specify("full_rank" if guide is None else guide)


def _require_spread(spec: GuideSpec, density: Density) -> None:
    """Refuse a guide that does not fit the model or has no spread, before anything is simulated."""
    if spec.point:
        raise OptionError(
            f"guide {spec.name!r} is a point and has no draws to rank the truth among: use a guide with "
            "spread, such as 'full_rank'"
        )
    with RandomStream(0):
        spec.build(density)


def _ranked(density: Density, sites: Sequence[str] | None) -> list[str]:
    """The sites that are ranked, in the model's order."""
    known = [site.name for site in density.structure.of_kind(*_RANKED)]
    if sites is None:
        return known
    wanted = [sites] if isinstance(sites, str) else list(sites)
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        what = f"site {unknown[0]!r}" if unknown else "no site"
        raise OptionError(f"sites= names {what}; what can be ranked: {', '.join(known)}")
    return [name for name in known if name in wanted]
