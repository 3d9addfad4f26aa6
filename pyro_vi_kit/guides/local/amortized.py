"""An encoder from each datum to the posterior of its own latents (Kingma & Welling 2014)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from pyro_vi_kit.core.errors import OptionError, UnknownNameError, told
from pyro_vi_kit.core.options import require_widths
from pyro_vi_kit.core.registry import About, has_option
from pyro_vi_kit.guides.discrete import Discrete, arranged, drawing, head_of
from pyro_vi_kit.guides.families import Family
from pyro_vi_kit.guides.local.encoder import Standardised, custom_encoder
from pyro_vi_kit.guides.local.local import HeadSpec, LocalFamily, head_for, local_name
from pyro_vi_kit.guides.pyro_guide import Guide, encoder_inputs
from pyro_vi_kit.guides.spec import REGISTRY, GuideSpec
from pyro_vi_kit.model.log_density import Block, Density, Plate, Site


@dataclass(frozen=True)
class Amortized(GuideSpec):
    """An encoder reads each datum and gives its latents a distribution of their own.

    The model needs a data plate with latents inside it, or several. What is observed in a plate is the
    input of its encoder; all other latents are global. Latents of nested plates belong to the outermost
    one: its row is their datum.

    Args:
        encoder: A module from `[B, F]` (the plate's observations, flattened) to `[B, p]`: for normals
            2 d numbers (means, then log sds), or a pair `[B, d]` (means, sds). It is copied. Several
            plates take a dict by plate. By default an MLP on standardised inputs.
        hidden: Widths of the default MLP.
        local: Family of each datum: ``"mean_field"``, ``"full_rank"``, ``"mixture"``,
            ``"affine_coupling"``, or `LocalMixture` and `LocalFlow` with options.
        globals: Family of the global latents: ``"mean_field"``, ``"low_rank"``, ``"full_rank"``,
            ``"student_t"``, a flow (``"affine_coupling"`` and others), or a configured one.
        conditioned: Let encoders see the draws of the global latents, so that a datum's latents are
            correlated with them.
        init_scale: Initial standard deviation of the global latents.
        discrete: Discrete sites in a data plate that are not summed out: ``"score"`` or ``"relaxed"``
            for all, or a dict by site; see `MeanField`. The encoder's numbers for them are logits, one
            for each state, behind those of the continuous latents.

    Raises:
        OptionError: If an option is out of its range.
    """

    name = "amortized"
    about = About(
        does="a distribution for each datum, read off it by a network",
        cost="batch x network; does not grow with N",
        use="latents in a data plate, new data to come",
        paper="Kingma & Welling 2014",
    )
    encodes = True

    encoder: nn.Module | Mapping[str, nn.Module] | None = None
    hidden: tuple[int, ...] = (64,)
    local: str | HeadSpec = "mean_field"
    globals: str | GuideSpec = "mean_field"
    conditioned: bool = False
    init_scale: float = 0.1
    discrete: Discrete | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.discrete is not None and self.conditioned:
            raise OptionError(
                f"{self.name}: discrete= draws each datum's sites by what is known of the datum alone: "
                "leave conditioned= out"
            )
        object.__setattr__(self, "hidden", require_widths(self.name, self.hidden))
        modules = self.encoder.values() if isinstance(self.encoder, Mapping) else [self.encoder]
        for encoder in modules:
            if encoder is not None and not isinstance(encoder, nn.Module):
                raise OptionError(
                    f"{self.name}: encoder must be a torch.nn.Module, or a dict of them by plate, got "
                    f"{type(encoder).__name__}"
                )
        if head_for(self.local, 1).size == 1:
            raise OptionError(f"{self.name}: local='delta' has no spread for an encoder to give")
        self._global_spec()

    def build(self, density: Density) -> Guide:
        """The guide for this model; weights from torch's random state.

        Raises:
            OptionError: If the model has no data plate with latents and observations, or an encoder's
                output has the wrong shape.
        """
        if self.discrete is not None:
            density = drawing(density, self.discrete)
        inside = self._by_plate(density)
        local = {site.name for sites in inside.values() for site in sites}
        outside = tuple(site for site in density.latents if site.name not in local)
        self._require_read(outside)
        blocks: dict[Block, Family] = {}
        extra = 0
        if outside:
            shared = Block("global", outside)
            blocks[shared] = self._global_spec().family(shared.dim)
            extra = shared.dim if self.conditioned else 0
        for plate, sites in inside.items():
            block = Block(local_name(plate, len(inside)), arranged(sites), plate)
            inputs = encoder_inputs(density, block, density.observations())
            blocks[block] = self._local(block, inputs, extra)
        return self.of_families(density, blocks)

    def _local(self, block: Block, inputs: Tensor, extra: int) -> LocalFamily:
        head = head_of(self.local, block, self.discrete)
        encoder = self.encoder
        if isinstance(encoder, Mapping):
            encoder = encoder.get(block.plate.name if block.plate else "")
        if encoder is None:
            source: nn.Module = Standardised(inputs, self.hidden, head.initial(1.0), extra)
            source = source.to(inputs.dtype)
        else:
            wide = inputs.new_zeros(len(inputs[:2]), inputs.shape[-1] + extra)
            wide[:, : inputs.shape[-1]] = inputs[:2]
            source = custom_encoder(encoder, wide, head)
        return LocalFamily(source, head, conditioned=extra > 0)

    def _global_spec(self) -> GuideSpec:
        """The guide of the globals: one that has a form for some of the latents, and spread."""
        given = self.globals
        if isinstance(given, GuideSpec):
            return given
        known = [name for name, cls in REGISTRY.items() if cls.per_datum and not cls.point]
        if not isinstance(given, str):
            raise OptionError(
                f"globals= takes a name ({', '.join(known)}) or an instance such as "
                f"vi.guides.FullRank(), got {told(given)}"
            )
        if given not in known:
            raise UnknownNameError("globals", given, known)
        made = REGISTRY[given]()
        if not has_option(made, "init_scale"):
            return made
        return replace(made, init_scale=self.init_scale)  # type: ignore[type-var]

    def _by_plate(self, density: Density) -> dict[Plate, tuple[Site, ...]]:
        """Latents by the outermost plate around them, of the plates that an encoder can read."""
        around: dict[str, list[Site]] = {}
        for site in density.latents:
            if site.plates:
                around.setdefault(site.plates[0].name, []).append(site)
        if not around:
            raise OptionError(
                "guide 'amortized' needs a data plate with latents inside it, and every latent of "
                f"this model is global ({', '.join(s.name for s in density.latents)}): use "
                "guide='full_rank' or guide='affine_coupling'"
            )
        seen = {
            plate.name for site in density.structure.of_kind("observed") for plate in site.plates
        }
        read = {name: tuple(sites) for name, sites in around.items() if name in seen}
        if not read:
            raise OptionError(
                f"plate {next(iter(around))!r} has local latents but no observed site for an encoder "
                "to read: use a guide without an encoder, e.g. guide='mean_field'"
            )
        self._require_known(read)
        return {density.structure.plates[name]: sites for name, sites in read.items()}

    def _require_read(self, outside: tuple[Site, ...]) -> None:
        for site in outside:
            if site.states:
                raise OptionError(
                    f"{self.name}: discrete site {site.name!r} lies in plate {site.plates[0].name!r}, "
                    "where an encoder has nothing to read: use vi.guides.MeanField(discrete=...)"
                )

    def _require_known(self, plates: Mapping[str, object]) -> None:
        given = self.encoder
        if isinstance(given, Mapping):
            unknown = [name for name in given if name not in plates]
            if unknown:
                raise OptionError(
                    f"{self.name}: encoder= names plate {unknown[0]!r}; the plates with latents and "
                    f"observations are {', '.join(plates)}"
                )
        elif given is not None and len(plates) > 1:
            raise OptionError(
                f"{self.name}: plates {', '.join(plates)} need an encoder each: give encoder= a dict "
                "by plate, or leave it out"
            )
