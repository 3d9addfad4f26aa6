"""The log importance weights of each datum, some rows at a time: ELBO, evidence and k-hat row by row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from pyro_vi_kit.core.errors import ModelError, OptionError
from pyro_vi_kit.core.psis import psis_rows
from pyro_vi_kit.core.runtime import RandomStream, isolated
from pyro_vi_kit.guides import Guide, held_at_mean
from pyro_vi_kit.model.gradients import gradient_of
from pyro_vi_kit.model.groups import chunks_of, width_of
from pyro_vi_kit.model.log_density import Block, Plate
from pyro_vi_kit.model.log_density.subsampling import require_subsamplable

if TYPE_CHECKING:
    import pandas as pd

# Rows, and draws of each, that a verdict is based on: a share of 5 % has an s.e. of 1 %.
_LOOKED_AT = 500
_TRIED = 4
_SEED = 90_210


class RowWeights(NamedTuple):
    """Log weights of some rows.

    Attributes:
        rows: Which, `[B]`.
        log_w: log p(x_i, z_i) - log q(z_i) of S draws of each, `[S, B]`, float64, nats.
    """

    rows: np.ndarray
    log_w: np.ndarray


@dataclass(frozen=True)
class PerDatum:
    """A guide seen one datum at a time, the globals held at their mean in q.

    Attributes:
        guide: It, with its globals held.
        params: Unconstrained learned parameters of the model.
        block: The local block whose plate the rows are of.
        subsampled: Whether some rows can be evaluated without the others.
    """

    guide: Guide
    params: Mapping[str, Tensor]
    block: Block
    subsampled: bool

    @property
    def plate(self) -> Plate:
        """The plate whose rows are the data."""
        return cast("Plate", self.block.plate)

    @torch.no_grad()
    def weights(
        self, draws: int, seed: int, rows: np.ndarray | None = None
    ) -> Iterator[RowWeights]:
        """The log weights of all rows, or of these; the same noise for the same seed.

        Args:
            draws: S of each row.
            seed: Of the draws.
            rows: Indices `[B]`.
        """
        chosen = torch.arange(self.plate.size) if rows is None else torch.as_tensor(rows)
        density = self.guide.density
        stream = RandomStream(seed, "rows")
        width = max(1, width_of(self.guide.density) // self.plate.size)
        together = chunks_of(len(chosen), draws * width) if self.subsampled else [len(chosen)]
        for part in chosen.split(together):
            seen = len(part) if self.subsampled else self.plate.size
            sizes = chunks_of(draws, seen * width)
            with stream, isolated(density.dtype, density.device):
                found = torch.cat([self._drawn(number, density.cast(part)) for number in sizes])
            yield RowWeights(part.numpy(), found.double().cpu().numpy())

    def _drawn(self, draws: int, rows: Tensor) -> Tensor:
        """Log weights `[S, B]` of fresh draws."""
        index = index_of(self.guide, self.plate, rows) if self.subsampled else None
        weights = self.guide.log_weights(draws, self.params, index, share=True)
        found = weights.local[self.plate.name]
        return found if self.subsampled else found[:, rows]


def seen_per_datum(guide: Guide, params: Mapping[str, Tensor], plate: str | None) -> PerDatum:
    """A trained guide, one datum at a time.

    Args:
        guide: With local blocks.
        params: Unconstrained learned parameters of the model.
        plate: Whose rows; the only one with a local block when None.

    Raises:
        OptionError: If there is no such plate, or its rows have no evidence of their own.
    """
    block = _block_of(guide, plate)
    held = held_at_mean(guide)
    subsampled = _can_be_subsampled(held)
    made = PerDatum(held, params, block, subsampled)
    _require_own_rows(made)
    return made


def frame_of(
    columns: Mapping[str, np.ndarray], plate: Plate, coords: Mapping[str, Sequence[object]]
) -> pd.DataFrame:
    """One line per row of a plate, under the names that the model gives its rows."""
    import pandas as pd

    labels = list(coords.get(plate.name, range(plate.size)))
    return pd.DataFrame(dict(columns), index=pd.Index(labels, name=plate.name))


def table(
    seen: PerDatum, draws: int, seed: int, coords: Mapping[str, Sequence[object]]
) -> pd.DataFrame:
    """ELBO, log evidence, k-hat and effective draws of each row; see `Posterior.per_datum`."""
    columns = quality(seen, draws, seed)
    frame = frame_of(columns, seen.plate, coords)
    frame.attrs |= {
        "plate": seen.plate.name,
        "draws": draws,
        "globals": globals_words(seen.guide),
    }
    for name in ("elbo", "log_evidence"):
        frame.attrs[name] = float(columns[name].sum())
        frame.attrs[f"{name}_se"] = float(np.sqrt((columns[f"{name}_se"] ** 2).sum()))
    return frame


def quality(
    seen: PerDatum, draws: int, seed: int, rows: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """What the weights of each row say, `[B]` each.

    ``elbo`` and ``log_evidence`` in nats, with their standard errors ``..._se``; ``khat``; and ``ess``
    as a share of the draws.

    Args:
        seen: The guide, one datum at a time.
        draws: S of each row.
        seed: Of the draws.
        rows: Indices `[B]`; all when None.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    for _, log_w in seen.weights(draws, seed, rows):
        khat, ess, evidence, se = psis_rows(log_w)
        parts.append((*mean_and_se(log_w), evidence, se, khat, ess / draws))
    names = ("elbo", "elbo_se", "log_evidence", "log_evidence_se", "khat", "ess")
    return dict(zip(names, map(np.concatenate, zip(*parts, strict=True)), strict=True))


def sample_of_rows(guide: Guide, params: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """`quality` of some rows of every local plate, few enough for a verdict to wait for.

    Raises:
        OptionError: As `seen_per_datum`.
    """
    plates = [block.plate for block in guide.blocks if block.plate is not None]
    found = []
    for plate in plates:
        seen = seen_per_datum(guide, params, plate.name)
        order = np.random.default_rng(_SEED).permutation(plate.size)
        rows = np.sort(order[: _LOOKED_AT // len(plates)])
        found.append(quality(seen, _LOOKED_AT, _SEED, rows))
    return {name: np.concatenate([part[name] for part in found]) for name in found[0]}


def mean_and_se(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over draws `[S, B]`, and its standard error: `[B]` each."""
    draws = len(values)
    if draws < 2:
        return values.mean(0), np.full(values.shape[1:], np.inf)
    with np.errstate(invalid="ignore"):  # a refused draw makes its row's ELBO minus infinity
        return values.mean(0), values.std(0, ddof=1) / np.sqrt(draws)


def globals_words(guide: Guide) -> str:
    """What becomes of the globals, for the attrs of a table."""
    held = any(block.plate is None for block in guide.blocks)
    return "held at the mean of q" if held else "none"


def index_of(guide: Guide, plate: Plate, rows: Tensor) -> dict[str, Tensor]:
    """These rows of a plate, and of each other plate of the guide a single one, which does not count."""
    others = [b.plate.name for b in guide.blocks if b.plate is not None and b.plate != plate]
    return {name: rows.new_zeros(1) for name in others} | {plate.name: rows}


def _block_of(guide: Guide, plate: str | None) -> Block:
    local = {block.plate.name: block for block in guide.blocks if block.plate is not None}
    if not local:
        raise OptionError(
            f"guide {guide.name!r} has no distribution for each datum: fit with guide='amortized', or "
            "with batch_size= where the model has latents inside its data plate"
        )
    if plate is None and len(local) > 1:
        raise OptionError(f"the guide has data of several plates: plate= one of {', '.join(local)}")
    if plate is not None and plate not in local:
        raise OptionError(f"no plate {plate!r} with local latents; there are {', '.join(local)}")
    return next(iter(local.values())) if plate is None else local[plate]


def _can_be_subsampled(guide: Guide) -> bool:
    plates = [block.plate for block in guide.blocks if block.plate is not None]
    try:
        require_subsamplable(guide.density, {p: min(_TRIED, p.size) for p in plates})
    except ModelError:
        return False
    return True


def _require_own_rows(seen: PerDatum) -> None:
    """Refuse a plate whose rows depend on latents of other rows, or whose latents act elsewhere."""
    guide, plate = seen.guide, seen.plate
    count = min(_TRIED, plate.size)
    density = guide.density
    index = None
    if seen.subsampled:
        index = index_of(guide, plate, density.cast(torch.arange(count)))
    with RandomStream(_SEED), isolated(density.dtype, density.device), torch.enable_grad():
        draw = guide.draw(1, index, share=True)
        flat = {name: value.detach().requires_grad_() for name, value in draw.flat.items()}
        z: dict[str, Tensor] = {}
        for block in guide.blocks:
            z |= block.unpack(flat[block.name])
        terms = density.terms(z, seen.params, index=index, jacobian=not guide.point)
        own = terms.local[plate.name]
        rest = terms.total().sum() - terms.scale[plate.name] * own.sum()
        elsewhere = gradient_of(rest, flat[seen.block.name])
        first = gradient_of(own[0, 0], flat[seen.block.name])[:, 1:]
        local = [b.name for b in guide.blocks if b.plate is not None and b is not seen.block]
        others = [gradient_of(own.sum(), flat[name]) for name in local]
    if any(bool(slope.any()) for slope in (elsewhere, first, *others)):
        raise OptionError(
            f"the rows of plate {plate.name!r} have no evidence of their own: what is observed of one "
            "depends on latents of other rows or plates too. posterior.elbo and posterior.log_evidence "
            "are those of all data"
        )
