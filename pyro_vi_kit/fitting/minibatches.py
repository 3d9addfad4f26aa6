"""Which plates are subsampled, the guide that takes it, and where it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pyro_vi_kit import guides
from pyro_vi_kit.core.errors import ModelError, OptionError
from pyro_vi_kit.core.runtime import RandomStream
from pyro_vi_kit.guides import Guide, GuideSpec
from pyro_vi_kit.guides.families import GaussianFamily
from pyro_vi_kit.guides.local.local import LocalFamily
from pyro_vi_kit.model.log_density import Density, Plate
from pyro_vi_kit.optimize.deterministic import fixed_draws
from pyro_vi_kit.optimize.deterministic.newton import moved
from pyro_vi_kit.optimize.deterministic.parametrisation import Gaussian
from pyro_vi_kit.optimize.result import Budget

BatchSize = int | Mapping[str, int]

# What a start looks at: enough rows for the globals, few enough dimensions for a dense Gaussian.
_START_ROWS = 10_000
_START_NUMBERS = 2_000_000
_START_DIM = 400
_TOLERANCE = 0.01


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


def guide_for(spec: GuideSpec, density: Density, batch_size: BatchSize | None) -> Guide:
    """The guide for this model: with tables where latents lie in plates that come in minibatches.

    Draws from torch's random state.

    Raises:
        OptionError: If the guide cannot take minibatches of this model.
    """
    whole = batch_size is None or density.streamed is not None
    if whole or isinstance(spec, guides.Amortized):
        return spec.build(density)
    sizes = sizes_of(batch_size, density)  # type: ignore[arg-type]
    inside = [
        plate
        for plate in sizes
        if any(site.plates and site.plates[0] == plate for site in density.latents)
    ]
    return guides.per_datum(spec, density, inside) if inside else spec.build(density)


def require_local(guide: Guide, sizes: Mapping[Plate, int], multi_sample: bool) -> None:
    """Refuse minibatches that the guide or the bound cannot take.

    Raises:
        OptionError: If latents of a subsampled plate lie in a global block, or a multi-sample bound
            would have N / B inside its logsumexp.
    """
    local = {block.plate.name for block in guide.blocks if block.plate is not None}
    for block in guide.blocks:
        for site in block.sites:
            within = [plate.name for plate in site.plates if plate in sizes]
            if block.plate is None and within:
                raise OptionError(
                    f"batch_size= takes some rows of plate {within[0]!r}, and this guide holds latent "
                    f"{site.name!r} for all rows at once: name the guide (guide={guide.name!r}) "
                    "instead of giving one that is built, or use guide='amortized'"
                )
    for plate in sizes:
        if multi_sample and plate.name not in local:
            raise OptionError(
                f"a multi-sample bound on minibatches of plate {plate.name!r} would have N / B inside "
                "its logsumexp and exceed the evidence, since no latent of the guide lies in that "
                "plate: use objective='elbo', or leave batch_size= out"
            )
    crossed = [
        site.name
        for site in guide.density.structure.likelihood
        if len({plate.name for plate in site.plates} & local) > 1
    ]
    if multi_sample and crossed:
        raise OptionError(
            f"site {crossed[0]!r} depends on the latents of two plates, so that there is no bound per "
            "datum: use objective='elbo'"
        )


def start_on_rows(
    guide: Guide,
    names: Sequence[str],
    seed: int,
    budget: Budget,
    start: Tensor | None,
) -> bool:
    """Start the globals and the tables from a Gaussian fit to some of the rows.

    Scaled to all rows, it has the right width for the globals, and is some of these widths off; latents
    of a datum are N / B times too certain in it, which is put right.

    Args:
        guide: The guide, untrained.
        names: The plates that come in minibatches.
        seed: Of the rows and of the fit.
        budget: What may be spent.
        start: Unconstrained point `[D]` of a model without latents in these plates; the search's own
            choice when None.

    Returns:
        Whether there was such a Gaussian, in whose sds parameters are measured from now on.
    """
    density = guide.density
    if density.params or not all(_startable(guide.families[b.name]) for b in guide.blocks):
        return False
    if all(block.plate is not None and guide.table(block) is None for block in guide.blocks):
        # Encoders alone: they read where to start off the data.
        return False
    inside = {b.plate.name: b.dim for b in guide.blocks if b.plate is not None}
    width = sum(_dim(guide, block.name) for block in guide.blocks if block.plate is None)
    if width > _START_DIM or any(name not in names for name in inside):
        return False
    plates = [density.structure.plates[name] for name in names]
    with RandomStream(seed, "rows to start from"):
        rows = {
            p.name: _some(density, p, inside.get(p.name, 0), width, len(plates)) for p in plates
        }
    part = density.subset(rows)
    try:
        gaussian = fixed_draws.prefit(part, seed, budget, None if inside else start).best
    except ModelError:
        return False
    if not inside and any(len(rows[p.name]) < p.size for p in plates):
        gaussian = moved(gaussian, lambda z: _whole(density, z, budget), _TOLERANCE)
    _hand_over(guide, part, gaussian, {p.name: p.size / len(rows[p.name]) for p in plates})
    return True


def _whole(density: Density, z: Tensor, budget: Budget) -> tuple[float, Tensor] | None:
    """The log density of all data at `[D]`, nats, and its gradient; None where the budget is spent."""
    if budget.over:
        return None
    value, gradient = density.log_prob_and_grad(z.unsqueeze(0))
    return float(value), gradient[0]


def _startable(family: object) -> bool:
    if isinstance(family, LocalFamily):
        return not (family.scored or family.relaxed)  # discrete sites have no Gaussian
    return isinstance(family, GaussianFamily)


def _dim(guide: Guide, name: str) -> int:
    return next(block.dim for block in guide.blocks if block.name == name)


def _some(density: Density, plate: Plate, inside: int, width: int, plates: int) -> Tensor:
    """Rows to start with: of tables as many as a dense Gaussian can hold."""
    numbers = sum(tensor.numel() for tensor in density.data) or plate.size
    rows = min(_START_ROWS, max(1, _START_NUMBERS * plate.size // numbers))
    if inside:
        rows = min(rows, max(2, (_START_DIM - width) // (inside * plates)))
    order = torch.randperm(plate.size, device="cpu")
    return density.cast(order[: min(rows, plate.size)])


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
