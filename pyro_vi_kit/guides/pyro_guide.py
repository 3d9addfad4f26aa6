"""Families over a model's unconstrained blocks, as one Pyro guide."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import detach
from torch import Tensor, nn

from pyro_vi_kit.core.contracts import LogWeights
from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.guides.families import Family, Table
from pyro_vi_kit.model.log_density import Block, Density, Plate, Site, rows_apart

# Of training, in the order in which a fit prefers them.
METHODS = ("lbfgs", "moments", "stochastic", "cavi")
_SERIAL = itertools.count()


class Strata(NamedTuple):
    """What draws of each component of a mixture need, to be averaged.

    Attributes:
        block: The name of the block that is the mixture.
        plate: Its plate; None for the globals.
        q: The mixture.
        log_shares: Logs of its weights, `[C]`, or `[C, B]` for one mixture a row.
    """

    block: str
    plate: str | None
    q: Any
    log_shares: Tensor


class Draw(NamedTuple):
    """K draws of a guide, and their log density.

    Attributes:
        z: Unconstrained values `[K, *batch, *event]` by site.
        shared: log q of the global block, `[K]`, nats.
        local: log q of each local block, `[K, B]` by plate, nats.
        flat: The same values before they were split into sites, by block: `[K, D]`, or `[1, D]` where
            all particles share them, or `[K, B, d]`.
        scored: The part of `local` that is of discrete sites trained by the score function, at these
            draws held fixed: it is a constant in `local`, and differentiable here.
        strata: Where K stands for T of each component, T C in all, draw by draw.
    """

    z: dict[str, Tensor]
    shared: Tensor
    local: dict[str, Tensor]
    flat: Mapping[str, Tensor] = MappingProxyType({})
    scored: Mapping[str, Tensor] = MappingProxyType({})
    strata: Strata | None = None


class Guide(nn.Module):
    """A Pyro guide made of one family per block of latents.

    In a stock `pyro.infer.SVI` it is called like the model. Each block is one auxiliary site in
    unconstrained space, and each latent a `Delta` at its constrained value whose log density is
    minus the log determinant of the transform; plates stay visible.

    Args:
        name: The registry's name, prefix of its parameters in Pyro's store.
        density: The model.
        blocks: Families by block.
        point: Whether it is a point estimate, whose density lives on the constrained scale.
        methods: The training methods that can fit it, the preferred one first, as far as nothing else
            stands in their way; all of them by default.

    Attributes:
        batch_size: Rows of each local plate that a stock `SVI` step sees; all when None.
    """

    def __init__(
        self,
        name: str,
        density: Density,
        blocks: Mapping[Block, Family],
        *,
        point: bool = False,
        methods: tuple[str, ...] = METHODS,
    ) -> None:
        super().__init__()
        self.name = name
        self.methods = methods
        self.density = density
        self.blocks = list(blocks)
        self.families = nn.ModuleDict({block.name: family for block, family in blocks.items()})
        self.point = point
        self.batch_size: int | None = None
        self._contexts: dict[str, Tensor] = {}
        self._apart: bool | None = None
        # Unique in the process: two guides in one parameter store must not share parameters.
        self._pyro_name = f"{name}_{next(_SERIAL)}"
        self.to(density.device, density.dtype)

    # -- what it is made of -------------------------------------------------------------------

    @property
    def family(self) -> Family | None:
        """The family of all latents, where they are one block; None where there are several."""
        single = len(self.blocks) == 1 and self.blocks[0].plate is None
        return self.family_of(self.blocks[0]) if single else None

    @property
    def shared_block(self) -> Block | None:
        """The block of the latents that all data share; None where there are none."""
        return next((block for block in self.blocks if block.plate is None), None)

    @property
    def local_blocks(self) -> list[tuple[Block, Plate]]:
        """The blocks that hold a distribution for each row of a plate, with that plate."""
        return [(block, block.plate) for block in self.blocks if block.plate is not None]

    def family_of(self, block: Block) -> Family:
        """The family of a block."""
        return self.families[block.name]  # type: ignore[return-value]

    @property
    def reparameterised(self) -> bool:
        """Whether all draws are differentiable in the parameters."""
        return all(self.family_of(block).reparameterised for block in self.blocks)

    @property
    def scored(self) -> bool:
        """Whether it draws discrete sites that are trained by the score function."""
        return any(self.family_of(block).scored for block in self.blocks)

    @property
    def relaxed(self) -> bool:
        """Whether it draws discrete sites that are softened while training."""
        return any(self.family_of(block).relaxed for block in self.blocks)

    def mixture(self) -> Block | None:
        """The one block whose family is a mixture; None where there is none, or more than one."""
        found = [block for block in self.blocks if self.family_of(block).strata]
        return found[0] if len(found) == 1 else None

    # -- batched draws, for the Density -------------------------------------------------------

    def draw(
        self,
        particles: int,
        index: Mapping[str, Tensor] | None = None,
        *,
        data: Sequence[Tensor] | None = None,
        share: bool = False,
        detached: bool = False,
        mirrored: bool = False,
        given: Draw | None = None,
        relaxed: bool = False,
        updates: Tensor | None = None,
        stratified: bool = False,
    ) -> Draw:
        """K reparameterised draws, from torch's global random state; discrete sites as they are.

        Args:
            particles: K.
            index: Rows `[B]` of each local plate; all by default.
            data: Tensors in the place of the density's own, for an encoder to read.
            share: Give all particles the same draw of the globals, as a bound per datum needs.
            detached: Take log q at constant parameters, so that its gradient flows through the draws
                alone.
            mirrored: Let an even number of draws come in pairs, mirror images about the mean where a
                family is symmetric: what is odd in them then cancels.
            given: An earlier draw of as many particles, whose globals are taken again.
            relaxed: Soften the draws of discrete sites that are trained so.
            updates: Steps taken so far, a scalar, for their temperature.
            stratified: Take K draws of each component of the guide's one `mixture`, and as many of all
                else.
        """
        mixture = self.mixture() if stratified else None
        strata: Strata | None = None
        apart: Any = None
        if mixture is not None:
            strata, apart = self._stratified(
                mixture, particles, index, data, detached=detached, mirrored=mirrored
            )
            particles = len(apart[0])
        values: dict[str, Tensor] = {}
        local: dict[str, Tensor] = {}
        flats: dict[str, Tensor] = {}
        scored: dict[str, Tensor] = {}
        shared = torch.zeros(particles, dtype=self.density.dtype, device=self.density.device)
        for block in self.blocks:
            family: Any = self.families[block.name]
            if block.plate is None:
                count = 1 if share else particles
                if block is mixture:
                    flat, log_q = apart
                elif given is not None:
                    flat, log_q = given.flat[block.name], given.shared
                else:
                    flat, log_q = family.draw((count,), detached=detached, mirrored=mirrored)
                shared = shared + log_q
                values.update(block.unpack(flat.expand(particles, -1)))
            else:
                rows = None if block is mixture else self.rows(block, index, data)
                if rows is None:
                    flat, log_q = apart
                elif family.conditioned:
                    shape, rows = self._beside(self._global(flats), rows, particles)
                    # Given shared globals log q is of the local draws alone.
                    flat, log_q = family.draw_given(shape, rows, detached=detached, live=not share)
                elif family.scored or family.relaxed:
                    flat, log_q, own = family(rows).draw(
                        (particles,),
                        detached=detached,
                        mirrored=mirrored,
                        relaxed=relaxed,
                        updates=updates,
                    )
                    scored |= {} if own is None else {block.plate.name: own}
                else:
                    flat, log_q = family.draw(
                        (particles,), rows, detached=detached, mirrored=mirrored
                    )
                local[block.plate.name] = log_q
                values.update(block.unpack(flat))
            flats[block.name] = flat
        return Draw(values, shared, local, flats, scored, strata)

    def _stratified(
        self,
        block: Block,
        draws: int,
        index: Mapping[str, Tensor] | None,
        data: Sequence[Tensor] | None,
        *,
        detached: bool,
        mirrored: bool,
    ) -> tuple[Strata, tuple[Tensor, Tensor]]:
        """Draws of each component of a block, `[draws C, ...]`, and log q at them, nats; see `draw`."""
        rows = None if block.plate is None else self.rows(block, index, data)
        q: Any = self.families[block.name](rows)
        flat = q.rsample_each(draws, mirrored=mirrored).flatten(0, 1)
        density: Any = detach(q) if detached else q
        plate = None if block.plate is None else block.plate.name
        return Strata(block.name, plate, q, q.log_shares), (flat, density.log_prob(flat))

    def _global(self, flats: Mapping[str, Tensor]) -> Tensor:
        """What was drawn of the globals, `[K, D]`."""
        return flats[self.shared_block.name]  # type: ignore[union-attr]

    @staticmethod
    def _beside(common: Tensor, rows: Tensor, particles: int) -> tuple[tuple[int, ...], Tensor]:
        """Rows `[B, F]` with the globals' draws behind them, and the shape of draws that is left."""
        if len(common) != particles:
            return (particles,), torch.cat([rows, common[0].expand(len(rows), -1)], -1)
        shape = (particles, len(rows), -1)
        return (), torch.cat([rows.expand(shape), common[:, None].expand(shape)], -1)

    def log_weights(
        self,
        particles: int,
        params: Mapping[str, Tensor] | None = None,
        index: Mapping[str, Tensor] | None = None,
        *,
        data: Sequence[Tensor] | None = None,
        share: bool = False,
    ) -> LogWeights:
        """Log p(x, z) - log q(z) at K fresh draws, differentiable in guide and model parameters."""
        draw = self.draw(particles, index, data=data, share=share)
        return self.weigh(draw, params, index, data=data)

    def weigh(
        self,
        draw: Draw,
        params: Mapping[str, Tensor] | None = None,
        index: Mapping[str, Tensor] | None = None,
        *,
        data: Sequence[Tensor] | None = None,
        power: float = 1.0,
    ) -> LogWeights:
        """The log weights of these draws, the likelihood raised to ``power``."""
        terms = self.density.terms(
            draw.z, params, data, index, jacobian=not self.point, power=power
        )
        shared, local, scale = terms.shared - draw.shared, {}, {}
        for plate, rows in terms.local.items():
            if plate in draw.local:
                local[plate], scale[plate] = rows - draw.local[plate], terms.scale[plate]
            else:
                shared = shared + terms.scale[plate] * rows.sum(-1)
        return LogWeights(shared, local, scale)

    def log_q(
        self,
        draw: Draw,
        index: Mapping[str, Tensor] | None = None,
        *,
        data: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Log q at draws that are held fixed, differentiable in the guide's parameters alone.

        An encoder is run once more, with a dropout of its own.

        Args:
            draw: K draws.
            index: Rows `[B]` of each local plate; all by default.
            data: Tensors in the place of the density's own, for an encoder to read.

        Returns:
            Log q of the globals, `[K]` (`[1]` where all share them), and of each local block, `[K, B]`
            by plate, nats.
        """
        shared, local = torch.zeros_like(draw.shared), {}
        for block in self.blocks:
            family: Any = self.families[block.name]
            flat = draw.flat[block.name].detach()
            if block.plate is None:
                shared = shared + family().log_prob(flat)
                continue
            rows = self.rows(block, index, data)
            if family.conditioned:
                common = self._global(draw.flat).detach()
                _, rows = self._beside(common, rows, len(flat))
            local[block.plate.name] = family(rows).log_prob(flat)
        return shared, local

    def rows_apart(self) -> bool:
        """Whether, given the globals, each row's latents enter the terms of that row alone."""
        if self._apart is None:
            self._apart = rows_apart(self.density, self.blocks)
        return self._apart

    def rows(
        self,
        block: Block,
        index: Mapping[str, Tensor] | None = None,
        data: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """What a local block knows of these rows: their table, or what an encoder sees, `[B, F]`.

        Args:
            block: A local one.
            index: Rows `[B]` of each local plate; all by default.
            data: Tensors in the place of the density's own, for an encoder to read.
        """
        chosen = (index or {}).get(block.plate.name) if block.plate is not None else None
        table = self.table(block)
        if table is not None:
            return table.pick(chosen)
        if data is not None:
            return encoder_inputs(self.density, block, self.density.observations(data))
        context = self.context(block)
        return context if chosen is None else context[chosen]

    def table(self, block: Block) -> Table | None:
        """The table of a block, where each datum has numbers of its own."""
        return self.family_of(block).table

    def context(self, block: Block) -> Tensor:
        """What the encoder of a local block sees: its plate's observations, `[N, F]`."""
        if block.name not in self._contexts:
            self._contexts[block.name] = encoder_inputs(
                self.density, block, self.density.observations()
            )
        return self._contexts[block.name]

    def moved_to(self, density: Density) -> Guide:
        """The same trained families over the same model on other data.

        Local blocks take the new data's rows; whatever is global stays.
        """
        plates = density.structure.plates
        sites = {site.name: site for site in density.latents}
        for block in self.blocks:
            self._require_rows(block, plates)
        blocks = {
            Block(
                block.name,
                tuple(sites[site.name] for site in block.sites),
                plates[block.plate.name] if block.plate is not None else None,
            ): copy.deepcopy(self.families[block.name])
            for block in self.blocks
        }
        return self.of_families(blocks, density)  # type: ignore[arg-type]

    def of_families(self, blocks: Mapping[Block, Family], density: Density | None = None) -> Guide:
        """The same guide with these families, over this density or its own."""
        density = density or self.density
        return Guide(self.name, density, blocks, point=self.point, methods=self.methods)

    def _require_rows(self, block: Block, plates: Mapping[str, Plate]) -> None:
        """Refuse data of another length where each row has numbers of its own."""
        table = self.table(block)
        if table is None or block.plate is None:
            return
        rows = plates[block.plate.name].size
        if rows != len(table.rows):
            raise OptionError(
                f"the guide holds numbers for each of the {len(table.rows)} rows of plate "
                f"{block.plate.name!r}, and these data have {rows}: fit with guide='amortized', whose "
                "encoder reads any rows, or fit the new data"
            )

    # -- the Pyro guide -----------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent; called like the model."""
        pyro.module(self._pyro_name, self)
        # Blocks first, then sites: a support may depend on latents of another block.
        unconstrained: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            plates = self._plates(stack, args, kwargs)
            common: Tensor | None = None
            for block in self.blocks:
                flat = self._sample_block(block, plates, common, args, kwargs)
                common = flat if block.plate is None else common
                unconstrained.update(self._by_site(block, flat))
            pairs = self._transformed(unconstrained, args, kwargs)
            return {
                site.name: self._sample_site(site, *pairs[site.name], plates)
                for site in self.density.latents
            }

    def _plates(
        self, stack: contextlib.ExitStack, args: tuple, kwargs: dict
    ) -> dict[str, pyro.plate]:
        """The plates around latents: local ones may be subsampled, the others are whole."""
        local = {block.plate.name: block for block in self.blocks if block.plate is not None}
        plates = {}
        for plate in {p.name: p for site in self.density.latents for p in site.plates}.values():
            size, subsample_size = plate.size, None
            declared = self.density.structure.subsampled.get(plate.name)
            if plate.name in local:
                size = len(self._context_for(local[plate.name], args, kwargs))
                subsample_size = self.batch_size or declared
            elif declared is not None:
                raise OptionError(
                    f"plate {plate.name!r} is subsampled and holds latents that this guide keeps for "
                    "all rows at once: use guide='amortized', or remove subsample_size"
                )
            plates[plate.name] = pyro.plate(
                plate.name, size, subsample_size=subsample_size, dim=plate.dim
            )
        return plates

    def _sample_block(
        self,
        block: Block,
        plates: Mapping[str, pyro.plate],
        common: Tensor | None,
        args: tuple,
        kwargs: dict,
    ) -> Tensor:
        """The block's auxiliary site, `[*batch, D]` or `[*batch, B, ..., d]`."""
        family: Any = self.families[block.name]
        infer: Any = {"is_auxiliary": True}
        name = f"{self._pyro_name}_{block.name}"
        if block.plate is None:
            return pyro.sample(name, family(), infer=infer)
        context = self._context_for(block, args, kwargs)
        with plates[block.plate.name] as indices:
            index: Any = indices
            rows = context[index].reshape(len(index), *(1,) * (-block.plate.dim - 1), -1)
            if family.conditioned and common is not None:
                lead = torch.broadcast_shapes(rows.shape[:-1], common.shape[:-1])
                rows = torch.cat([rows.expand(*lead, -1), common.expand(*lead, -1)], -1)
            return pyro.sample(name, family(rows), infer=infer)

    @staticmethod
    def _by_site(block: Block, flat: Tensor) -> dict[str, Tensor]:
        """Unconstrained values of a block's sites."""
        values, start = {}, 0
        for site in block.sites:
            rest = block.rest(site)
            part = flat[..., start : start + math.prod(rest)]
            start += math.prod(rest)
            # Dims of the draw left of the site's own (vectorised particles) come before them.
            if block.plate is None:
                lead = flat.shape[:-1] + (1,) * site.unconstrained_event_dim
                shape = torch.broadcast_shapes(lead, rest)
                values[site.name] = part.reshape(shape)
                continue
            axis = block.axis(site)
            lead = flat.shape[: flat.dim() - 1 + block.plate.dim]
            lead = lead[: max(len(lead) - axis, 0)]
            rows = part.reshape(*lead, flat.shape[block.plate.dim - 1], *rest)
            values[site.name] = rows.movedim(len(lead), len(lead) + axis)
        return values

    def _sample_site(
        self, site: Site, value: Tensor, log_det: Tensor, plates: Mapping[str, pyro.plate]
    ) -> Tensor:
        log_density: Any = 0.0 if self.point else -log_det
        delta = dist.Delta(value, log_density=log_density, event_dim=len(site.event_shape))
        with contextlib.ExitStack() as stack:
            for plate in site.plates:
                stack.enter_context(plates[plate.name])
            return pyro.sample(site.name, delta)

    def _transformed(
        self, unconstrained: Mapping[str, Tensor], args: tuple, kwargs: dict
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Constrained value and log determinant of each site."""
        if any(site.transform is None for site in self.density.latents):
            with poutine.block():
                return self.density.transform(unconstrained, args, kwargs)
        pairs = {}
        for site in self.density.latents:
            u = unconstrained[site.name]
            value = site.transform(u)
            log_det = site.transform.log_abs_det_jacobian(u, value)
            surplus = log_det.dim() - (value.dim() - len(site.event_shape))
            pairs[site.name] = (
                value,
                log_det.flatten(-surplus).sum(-1) if surplus > 0 else log_det,
            )
        return pairs

    def _context_for(self, block: Block, args: tuple, kwargs: dict) -> Tensor:
        """What the block knows of the data this call was given, one row each."""
        table = self.table(block)
        if table is not None:
            return table.rows
        if self._own_data(args, kwargs):
            return self.context(block)
        model = self.density.model.with_args(*args, **kwargs)
        with poutine.block():
            return encoder_inputs(self.density, block, self.density.observations(model))

    def _own_data(self, args: tuple, kwargs: dict) -> bool:
        own, own_kwargs = self.density.arguments()
        model = self.density.model
        return all(
            a is b or a is c for a, b, c in itertools.zip_longest(args, own, model.args)
        ) and all(
            value is own_kwargs.get(key) or value is model.kwargs.get(key)
            for key, value in kwargs.items()
        )


def encoder_inputs(density: Density, block: Block, observed: Mapping[str, Tensor]) -> Tensor:
    """The observations of a plate as one row per datum, `[N, F]`.

    Raises:
        OptionError: If nothing is observed inside the plate.
    """
    plate = block.plate
    rows = []
    for name, value in observed.items():
        site = density.structure.sites.get(name)
        if plate is None or site is None or plate not in site.plates:
            continue
        batch = value.dim() - len(site.event_shape)
        row = torch.movedim(value, batch + plate.dim, 0)
        rows.append(row.reshape(len(row), -1).to(density.dtype))
    if not rows:
        name = plate.name if plate else block.name
        raise OptionError(
            f"plate {name!r} has local latents but no observed site for an encoder to read: use a "
            "guide without an encoder, e.g. guide='mean_field'"
        )
    return torch.cat(rows, -1)
