"""What a guide is before it meets a model: a family with its options, and what can be done with it."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import ClassVar

from pyro_vi_kit.core.errors import OptionError
from pyro_vi_kit.core.registry import About, Registry
from pyro_vi_kit.guides.discrete import Discrete, arranged, by_plate, drawing, drawn, head_of
from pyro_vi_kit.guides.families import Family
from pyro_vi_kit.guides.local.local import HeadSpec, LocalFamily, Table, local_name
from pyro_vi_kit.guides.pyro_guide import Guide
from pyro_vi_kit.model.log_density import Block, Density, Drawn, Plate, Site


class GuideSpec(ABC):
    """A guide family with its options: subclasses are frozen dataclasses, whose fields are the options.

    A subclass has a `name`, an `about` and a `family`, or a `build` of its own where it has to know the
    sites. Whatever else the package wants to know of a guide, it asks here or of the family.

    Attributes:
        name: What ``guide=`` calls it.
        about: What listings say of it.
        methods: The training methods that can fit it, the preferred one first: of ``"lbfgs"``,
            ``"moments"``, ``"stochastic"`` and ``"cavi"``.
        after: The guide that ``guide="auto"`` tries before this one; None where it never tries it.
        richer: The guide to try where this one is not good enough; None where nothing is.
        covers_modes: Whether it can cover several modes at once.
        per_datum: Its form for the latents of a single datum, as ``local=`` of `Amortized` takes it;
            None where there is none.
        encodes: Whether it reads each datum, so that minibatches of rows need nothing else.
        point: Whether it is a point estimate, whose density lives on the constrained scale.
        init_scale: Initial standard deviation, in unconstrained units.
        discrete: Discrete sites that are not summed out, and how they are trained.
    """

    name: ClassVar[str]
    about: ClassVar[About]
    methods: ClassVar[tuple[str, ...]] = ("stochastic",)
    after: ClassVar[str | None] = None
    richer: ClassVar[str | None] = None
    covers_modes: ClassVar[bool] = False
    per_datum: ClassVar[str | HeadSpec | None] = None
    encodes: ClassVar[bool] = False
    point: ClassVar[bool] = False

    init_scale: float = 0.1
    discrete: Discrete | None = None

    def family(self, dim: int) -> Family:
        """The family over `[D]`; weights from torch's random state.

        Raises:
            OptionError: If D is too large, or the guide has to know the sites.
        """
        raise OptionError(
            f"guide {self.name!r} is made of the sites of a whole model, and is none for some of them"
        )

    def build(self, density: Density) -> Guide:
        """The guide for this model, untrained; what is random in it, from torch's random state.

        Raises:
            OptionError: If the guide cannot be had for this model.
        """
        if self.discrete is None:
            return self.of_families(density, {density.block: self.family(density.dim)})
        density = drawing(density, self.discrete)
        # There is nothing but discrete sites in these tables.
        return self.with_tables(density, by_plate(density), "mean_field")

    def of_families(self, density: Density, blocks: Mapping[Block, Family]) -> Guide:
        """The guide that has these families."""
        return Guide(self.name, density, blocks, point=self.point, methods=self.methods)

    def with_tables(
        self, density: Density, inside: Mapping[Plate, Sequence[Site]], local: str | HeadSpec
    ) -> Guide:
        """The guide that holds the sites inside these plates row by row, and the others as usual.

        Args:
            density: The model.
            inside: Sites by the plate whose rows have numbers of their own.
            local: The form of a row's continuous latents.
        """
        held = {site.name for sites in inside.values() for site in sites}
        outside = tuple(site for site in density.latents if site.name not in held)
        blocks: dict[Block, Family] = {}
        if outside:
            shared = Block("global", outside)
            blocks[shared] = self.family(shared.dim)
        for plate, sites in inside.items():
            block = Block(local_name(plate, len(inside)), arranged(sites), plate)
            head = head_of(local, block, self.discrete)
            numbers = head.initial(self.init_scale).expand(plate.size, -1)
            blocks[block] = LocalFamily(Table(numbers), head)
        return self.of_families(density, blocks)

    def drawn(self) -> Drawn | None:
        """The discrete latents that it holds itself; None where it holds none."""
        return drawn(self.discrete)


# What can be named as ``guide=``; the package's own are added in `guides/__init__.py`.
REGISTRY = Registry("guide", GuideSpec, example="vi.guides.AffineCoupling(layers=4)")
