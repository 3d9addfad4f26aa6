"""Fits that see some rows at a time, of data in memory or of a stream: which, and where they start."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import ModelError, OptionError, in_words
from pyro_vi_kit.core.runtime import RandomStream, seed_of
from pyro_vi_kit.fitting.request import Request, Training
from pyro_vi_kit.guides import Guide, GuideSpec
from pyro_vi_kit.guides.families import GaussianFamily
from pyro_vi_kit.guides.local.local import LocalFamily
from pyro_vi_kit.model.gradients import gradient_of
from pyro_vi_kit.model.log_density import Density, Plate
from pyro_vi_kit.model.log_density.subsampling import require_subsamplable
from pyro_vi_kit.optimize.deterministic import fixed_draws
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian
from pyro_vi_kit.optimize.deterministic.search import Search
from pyro_vi_kit.optimize.engines import Batches, BatchSource, StreamedBatches
from pyro_vi_kit.optimize.engines.batches import streamed_parts
from pyro_vi_kit.optimize.result import Budget

BatchSize = int | Mapping[str, int]

# What a start looks at: enough rows for the globals, few enough dimensions for a dense Gaussian.
_START_ROWS = 10_000
_START_NUMBERS = 2_000_000
_START_DIM = 400
_TOLERANCE = 0.01
# Steps of an epoch above which a pass over all data is dearer than what it brings.
_STEPS_WORTH = 5_000
# Passes over all data that bring the mean of a Gaussian from the sample's to that of all data.
_PASSES = 6


def sizes_of(
    batch_size: BatchSize, density: Density, guide: Guide | None = None
) -> dict[Plate, int]:
    """Rows of a minibatch, for each plate that is subsampled.

    Args:
        batch_size: B of the data plate, or B by plate.
        density: The model.
        guide: The guide, where it is known: its local plate is meant then.

    Raises:
        OptionError: If there is no such plate, or no data plate at all.
    """
    known = density.structure.plates
    if isinstance(batch_size, Mapping):
        unknown = [name for name in batch_size if name not in known]
        if unknown:
            raise OptionError(
                f"batch_size= names plate {unknown[0]!r}; the model's plates are "
                f"{', '.join(known) or 'none'}"
            )
        sizes = {known[name]: size for name, size in batch_size.items()}
    else:
        sizes = {_data_plate(density, guide): batch_size}
    for plate, size in sizes.items():
        if not 1 <= size <= plate.size:
            raise OptionError(
                f"batch_size must be between 1 and the {plate.size} rows of plate {plate.name!r}, got "
                f"{size!r}"
            )
    return sizes


def _data_plate(density: Density, guide: Guide | None) -> Plate:
    """The plate that a number of rows is meant of: the guide's, the declared one, or the largest."""
    local = [b.plate for b in guide.blocks if b.plate is not None] if guide is not None else []
    observed = [s.plates[0] for s in density.structure.likelihood if s.plates]
    candidates = local or list(dict.fromkeys(observed))
    if not candidates:
        raise OptionError(
            "batch_size= needs a data plate, and nothing observed of this model lies in one: declare "
            "it, `with pyro.plate('row', len(y)) as i: pyro.sample('y', ..., obs=y[i])`, or leave "
            "batch_size= out and fit the full data"
        )
    declared = [p for p in candidates if p.name in density.structure.subsampled]
    return max(declared or candidates, key=lambda plate: plate.size)


def guide_for(spec: GuideSpec, density: Density, batch_size: BatchSize) -> Guide:
    """The guide for this model: with tables where latents lie in plates that come in minibatches.

    Draws from torch's random state.

    Raises:
        OptionError: If the guide cannot take minibatches of this model.
    """
    if density.streamed is not None or spec.encodes:
        return spec.build(density)
    outermost = {site.plates[0] for site in density.latents if site.plates}
    inside = [plate for plate in sizes_of(batch_size, density) if plate in outermost]
    return guides.per_datum(spec, density, inside) if inside else spec.build(density)


def batches_for(request: Request, guide: Guide) -> BatchSource | None:
    """What steps see of the data; all of them when None.

    Raises:
        OptionError: If the guide, the bound or the engine cannot take minibatches of them.
    """
    density = guide.density
    if density.streamed is not None:
        _require_streamable_bound(request, guide)
        return StreamedBatches(density, request.batch_size, request.seed)  # type: ignore[arg-type]
    sizes: dict[Plate, int] = {}
    if request.batch_size is not None:
        sizes = sizes_of(request.batch_size, density, guide)
        require_subsamplable(density, sizes)
        if density.sliced and request.engine == "pyro":
            raise OptionError(
                "engine='pyro' tells the model which rows to take, and this one does not ask (plate "
                f"{next(iter(density.sliced))!r}): leave engine= out, or index in the model, "
                "obs=y[i] in `with pyro.plate(name, len(y)) as i`"
            )
    _require_local(guide, sizes)
    if request.objective.multi_sample:
        _require_bound_per_datum(guide, sizes)
    return Batches(sizes, device=density.device) if sizes else None


def _require_local(guide: Guide, sizes: Mapping[Plate, int]) -> None:
    """Refuse a global block with latents of a subsampled plate."""
    shared = (site for b in guide.blocks if b.plate is None for site in b.sites)
    for site in shared:
        within = [plate.name for plate in site.plates if plate in sizes]
        if within:
            raise OptionError(
                f"batch_size= takes some rows of plate {within[0]!r}, and this guide holds latent "
                f"{site.name!r} for all rows at once: name the guide (guide={guide.name!r}) "
                "instead of giving one that is built, or use guide='amortized'"
            )


def _require_bound_per_datum(guide: Guide, sizes: Mapping[Plate, int]) -> None:
    """Refuse a multi-sample bound that would have N / B inside its logsumexp."""
    local = {block.plate.name for block in guide.blocks if block.plate is not None}
    for plate in sizes:
        if plate.name not in local:
            raise OptionError(
                f"a multi-sample bound on minibatches of plate {plate.name!r} would have N / B inside "
                "its logsumexp and exceed the evidence, since no latent of the guide lies in that "
                "plate: use objective='elbo', or leave batch_size= out"
            )
    for site in guide.density.structure.likelihood:
        if len({plate.name for plate in site.plates} & local) > 1:
            raise OptionError(
                f"site {site.name!r} depends on the latents of two plates, so that there is no bound "
                "per datum: use objective='elbo'"
            )


# -- streamed data --------------------------------------------------------------------------------


def require_streamable(request: Request, guide: object) -> None:
    """Refuse what reads all data at each step, before any of them is read.

    Raises:
        OptionError: If the request is for such a fit.
    """
    if request.method == "lbfgs":
        raise OptionError(
            "method='lbfgs' reads all data at each step, and these are streamed: use "
            "method='stochastic', or pass tensors, vi.Model(fn, x, y)"
        )
    if request.engine == "pyro":
        raise OptionError(
            "engine='pyro' runs the model on all data, and these are streamed: leave engine= out, or "
            "pass tensors, vi.Model(fn, x, y)"
        )
    if guide is not None and not isinstance(guide, str | Guide | GuideSpec):
        raise OptionError(
            "a Pyro guide callable is run by pyro.infer.SVI on all data, and these are streamed: name a "
            "guide of vi.guides.names(), or pass tensors, vi.Model(fn, x, y)"
        )


def _require_streamable_bound(request: Request, guide: Guide) -> None:
    """Refuse combinations of guide and objective that a stream has no right bound for."""
    streamed: Any = guide.density.streamed
    local = [site.name for site in guide.density.latents if site.name in streamed.inside]
    encoded = any(block.plate for block in guide.blocks)
    if local and not encoded:
        raise OptionError(
            f"latent site(s) {', '.join(local)} lie in plate {streamed.plate!r}, whose rows are "
            f"streamed, and guide {guide.name!r} would need a place for each of {streamed.rows:,} rows: "
            "use guide='amortized', which reads them off the batch"
        )
    if request.objective.multi_sample and not encoded:
        raise OptionError(
            f"objective {request.objective.name!r} of a model without latents in plate "
            f"{streamed.plate!r} takes the logsumexp of all data's log weights, which a batch of them "
            "does not give: use objective='elbo', or pass tensors, vi.Model(fn, x, y)"
        )


# -- where they start -----------------------------------------------------------------------------


def start_on_stream(training: Training, batches: StreamedBatches) -> Gaussian:
    """A Gaussian near the posterior: fitted on a sample of rows, and moved to where all data put it."""
    density, request = training.density, training.request
    stream, streamed = streamed_parts(density)
    rows = max(batches.size, min(_START_ROWS, _START_NUMBERS // stream.numbers))
    sample = stream.sample(rows, seed_of(request.seed, "rows to start from"), density.dtype)
    held = density.held(streamed.completed(sample, density.data))
    search = Search(held, request.seed, training.budget)
    gaussian = fixed_draws.prefit(search, training.point).best
    if streamed.rows <= len(sample[0]) or batches.epoch > _STEPS_WORTH:
        return gaussian

    def evaluate(z: Tensor) -> tuple[float, Tensor] | None:
        return _log_prob_of_stream(density, z, batches.all(), training.budget)

    return _moved(gaussian, evaluate, request.tolerance)


def start_on_rows(training: Training, names: Sequence[str]) -> bool:
    """Start the globals and the tables from a Gaussian fit to some of the rows.

    Scaled to all rows, it has the right width for the globals, and is some of these widths off; latents
    of a datum are N / B times too certain in it, which is put right.

    Args:
        training: Its guide is changed in place.
        names: The plates that come in minibatches.

    Returns:
        Whether there was such a Gaussian, in whose sds parameters are measured from now on.
    """
    guide, density, seed = training.guide, training.density, training.request.seed
    inside, width = _sizes_of_blocks(guide)
    if not _startable(guide) or width > _START_DIM or not inside.keys() <= set(names):
        return False
    plates = [density.structure.plates[name] for name in names]
    with RandomStream(seed, "rows to start from"):
        rows = {
            p.name: _some(density, p, inside.get(p.name, 0), width, len(plates)) for p in plates
        }
    part = density.subset(rows)
    search = Search(part, seed, training.budget)
    try:
        gaussian = fixed_draws.prefit(search, None if inside else training.point).best
    except ModelError as error:
        density.give_up(f"No start from a Gaussian fitted to some rows: {in_words(error)}")
        return False
    if not inside and any(len(rows[p.name]) < p.size for p in plates):
        evaluate = functools.partial(_log_prob, density, budget=training.budget)
        gaussian = _moved(gaussian, evaluate, _TOLERANCE)
    _hand_over(guide, part, gaussian, {p.name: p.size / len(rows[p.name]) for p in plates})
    return True


def _sizes_of_blocks(guide: Guide) -> tuple[dict[str, int], int]:
    """Dimensions of a row of each local plate, by its name, and of the globals."""
    inside = {b.plate.name: b.dim for b in guide.blocks if b.plate is not None}
    return inside, sum(block.dim for block in guide.blocks if block.plate is None)


def _log_prob(density: Density, z: Tensor, budget: Budget) -> tuple[float, Tensor] | None:
    """The log density of all data at `[D]`, nats, and its gradient; None where the budget is spent."""
    if budget.over:
        return None
    value, gradient = density.log_prob_and_grad(z.unsqueeze(0))
    return float(value), gradient[0]


def _startable(guide: Guide) -> bool:
    """Whether a Gaussian says where to start; encoders alone read that off the data."""
    if guide.density.params or not all(map(_is_gaussian, guide.families.values())):
        return False
    return any(block.plate is None or guide.table(block) is not None for block in guide.blocks)


def _is_gaussian(family: object) -> bool:
    if isinstance(family, LocalFamily):
        return not (family.scored or family.relaxed)  # discrete sites have no Gaussian
    return isinstance(family, GaussianFamily)


def _some(density: Density, plate: Plate, inside: int, width: int, plates: int) -> Tensor:
    """Rows to start with: of tables as many as a dense Gaussian can hold."""
    numbers = sum(tensor.numel() for tensor in density.data) or plate.size
    rows = min(_START_ROWS, max(1, _START_NUMBERS * plate.size // numbers))
    if inside:
        rows = min(rows, max(2, (_START_DIM - width) // (inside * plates)))
    order = torch.randperm(plate.size, device="cpu")
    return density.cast(order[: min(rows, plate.size)])


def _moved(
    gaussian: Gaussian, evaluate: Callable[[Tensor], tuple[float, Tensor] | None], tolerance: float
) -> Gaussian:
    """A Gaussian fitted to M of N rows, moved to the mode of all: Newton's method in its own metric.

    The sample's mode is sqrt(N / M) posterior sds away. Each pass leaves about sqrt(D / M) of what was
    missing. A step after which the density is lower is taken back, and ends it.

    Args:
        gaussian: From M rows.
        evaluate: The log density of all data at `[D]`, nats, and its gradient; None once time ran out.
        tolerance: Nats that may be missing.
    """
    best, value = gaussian, -torch.inf
    at = gaussian.loc
    for _ in range(_PASSES):
        found = evaluate(at)
        if found is None or not found[0] > value:
            break
        value, gradient = found
        best = Gaussian(at, gaussian.scale_tril)
        pulled = gaussian.scale_tril.T @ gradient
        at = at + gaussian.scale_tril @ pulled
        if 0.5 * float(pulled @ pulled) <= tolerance:
            # So short a step needs no pass to see that it was right.
            return Gaussian(at, gaussian.scale_tril)
    return best


def _log_prob_of_stream(
    density: Density, z: Tensor, batches: Iterable[list[Tensor]], budget: Budget
) -> tuple[float, Tensor] | None:
    """The log density of all data at `[D]`, nats, and its gradient; None where the budget is spent."""
    streamed: Any = density.streamed
    z = z.detach().requires_grad_()
    value, gradient, shared, seen = 0.0, torch.zeros_like(z), torch.zeros(()), 0
    for data in batches:
        if budget.over:
            return None
        terms = density.terms(density.block.unpack(z.unsqueeze(0)), data=data)
        shared, rows = (part.sum() for part in streamed.split(terms))
        gradient += gradient_of(rows, z)
        value, seen = value + float(rows.detach()), seen + len(data[0])
    scale = streamed.rows / seen
    return float(shared.detach()) + scale * value, gradient_of(shared, z) + scale * gradient


@torch.no_grad()
def _hand_over(guide: Guide, part: Density, gaussian: Gaussian, scale: Mapping[str, float]) -> None:
    """Give each block its share of a Gaussian over the latents of some rows."""
    covariance = gaussian.scale_tril @ gaussian.scale_tril.T
    # Where each site's numbers lie in the flat vector.
    places = part.block.unpack(torch.arange(part.dim, device=part.device).unsqueeze(0))
    for block in guide.blocks:
        family = guide.families[block.name]
        if block.plate is None and isinstance(family, GaussianFamily):
            mine = block.pack(places)[0]
            own = covariance[mine][:, mine]
            family.start_from(gaussian.loc[mine], torch.linalg.cholesky(own))
        elif block.plate is not None and isinstance(family, LocalFamily):
            table = family.table
            if table is not None:
                rows = block.pack(places)[0]
                loc, sd = gaussian.loc[rows], covariance.diagonal()[rows].sqrt()
                unit = sd.median(0).values * scale[block.plate.name] ** 0.5
                family.head.frame(loc.mean(0), unit)
                table.rows.copy_(family.head.initial(1.0).expand_as(table.rows))
