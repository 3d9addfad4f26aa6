"""Families over a model's unconstrained blocks, as one Pyro guide."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vi_kit.density import Block, Density, Site
from pyro_vi_kit.errors import OptionError
from pyro_vi_kit.guides.families import Family
from pyro_vi_kit.types import LogWeights

_SERIAL = itertools.count()


class Draw(NamedTuple):
    """K draws of a guide, and their log density.

    Attributes:
        z: Unconstrained values `[K, *batch, *event]` by site.
        shared: log q of the global block, `[K]`, nats.
        local: log q of each local block, `[K, B]` by plate, nats.
        flat: The same values before they were split into sites, by block: `[K, D]`, or `[1, D]` where
            all particles share them, or `[K, B, d]`.
    """

    z: dict[str, Tensor]
    shared: Tensor
    local: dict[str, Tensor]
    flat: Mapping[str, Tensor] = MappingProxyType({})


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
    ) -> None:
        super().__init__()
        self.name = name
        self.density = density
        self.blocks = list(blocks)
        self.families = nn.ModuleDict({block.name: family for block, family in blocks.items()})
        self.point = point
        self.batch_size: int | None = None
        self._contexts: dict[str, Tensor] = {}
        # Unique in the process: two guides in one parameter store must not share parameters.
        self._pyro_name = f"{name}_{next(_SERIAL)}"
        self.to(density.dtype)

    # -- batched draws, for the Density -------------------------------------------------------

    def draw(
        self,
        particles: int,
        index: Mapping[str, Tensor] | None = None,
        *,
        data: Sequence[Tensor] | None = None,
        share: bool = False,
        detached: bool = False,
        given: Draw | None = None,
    ) -> Draw:
        """K reparameterised draws, from torch's global random state.

        Args:
            particles: K.
            index: Rows `[B]` of each local plate; all by default.
            data: Tensors in the place of the density's own, for an encoder to read.
            share: Give all particles the same draw of the globals, as a bound per datum needs.
            detached: Take log q at constant parameters, so that its gradient flows through the draws
                alone.
            given: An earlier draw of as many particles, whose globals are taken again.
        """
        values: dict[str, Tensor] = {}
        local: dict[str, Tensor] = {}
        flats: dict[str, Tensor] = {}
        shared = torch.zeros(particles, dtype=self.density.dtype)
        for block in self.blocks:
            family: Any = self.families[block.name]
            count = 1 if share and block.plate is None else particles
            if given is not None and block.plate is None:
                flat, log_q = given.flat[block.name], given.shared
            else:
                context = self._rows(block, index, data)
                flat, log_q = family.draw((count,), context, detached=detached)
            flats[block.name] = flat
            if block.plate is None:
                shared = shared + log_q
            else:
                local[block.plate.name] = log_q
            values.update(block.unpack(flat if count == particles else flat.expand(particles, -1)))
        return Draw(values, shared, local, flats)

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
    ) -> LogWeights:
        """The log weights of these draws."""
        terms = self.density.terms(draw.z, params, data, index, jacobian=not self.point)
        shared, local, scale = terms.shared - draw.shared, {}, {}
        for plate, rows in terms.local.items():
            if plate in draw.local:
                local[plate], scale[plate] = rows - draw.local[plate], terms.scale[plate]
            else:
                shared = shared + terms.scale[plate] * rows.sum(-1)
        return LogWeights(shared, local, scale)

    def _rows(
        self,
        block: Block,
        index: Mapping[str, Tensor] | None,
        data: Sequence[Tensor] | None = None,
    ) -> Tensor | None:
        """What the encoder of a local block sees of these rows, `[B, F]`."""
        if block.plate is None:
            return None
        if data is not None:
            return encoder_inputs(self.density, block, self.density.observations(data))
        context = self.context(block)
        if index and block.plate.name in index:
            context = context[index[block.plate.name]]
        return context

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
        blocks = {
            Block(
                block.name,
                tuple(sites[site.name] for site in block.sites),
                plates[block.plate.name] if block.plate is not None else None,
            ): copy.deepcopy(self.families[block.name])
            for block in self.blocks
        }
        return Guide(self.name, density, blocks, point=self.point)  # type: ignore[arg-type]

    # -- the Pyro guide -----------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent; called like the model."""
        pyro.module(self._pyro_name, self)
        # Blocks first, then sites: a support may depend on latents of another block.
        unconstrained: dict[str, Tensor] = {}
        with contextlib.ExitStack() as stack:
            plates = self._plates(stack, args, kwargs)
            for block in self.blocks:
                unconstrained.update(self._sample_block(block, plates, args, kwargs))
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
        self, block: Block, plates: Mapping[str, pyro.plate], args: tuple, kwargs: dict
    ) -> dict[str, Tensor]:
        family = self.families[block.name]
        infer: Any = {"is_auxiliary": True}
        if block.plate is None:
            flat = pyro.sample(f"{self._pyro_name}_{block.name}", family(), infer=infer)
        else:
            context = self._context_for(block, args, kwargs)
            with plates[block.plate.name] as indices:
                index: Any = indices
                rows = context[index].reshape(len(index), *(1,) * (-block.plate.dim - 1), -1)
                flat = pyro.sample(f"{self._pyro_name}_{block.name}", family(rows), infer=infer)
        values, start = {}, 0
        for site in block.sites:
            event = site.unconstrained_shape[len(site.batch_shape) :]
            shape = event if block.plate is not None else site.unconstrained_shape
            part = flat[..., start : start + shape.numel()]
            start += shape.numel()
            # Batch dims of the draw (vectorised particles) broadcast with the site's own.
            lead = flat.shape[:-1] + (1,) * len(event)
            values[site.name] = part.reshape(torch.broadcast_shapes(lead, shape))
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
        """The encoder's input for the data this call was given."""
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
