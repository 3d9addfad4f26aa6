"""What a guide is before it meets a model: a family with its options, and what can be done with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from pyro_vi_kit.core.errors import OptionError, told
from pyro_vi_kit.core.options import require_positive
from pyro_vi_kit.core.registry import Registered, Registry
from pyro_vi_kit.guides.discrete import (
    Discrete,
    arranged,
    by_plate,
    drawing,
    drawn,
    head_of,
    require_discrete,
)
from pyro_vi_kit.guides.families import Family
from pyro_vi_kit.guides.local.local import HeadSpec, LocalFamily, Table, local_name
from pyro_vi_kit.guides.pyro_guide import METHODS, Guide
from pyro_vi_kit.model.log_density import Block, Density, Drawn, Plate, Site

# Not a guide, but a choice among them that `vi.fit` makes: see `fitting/auto.py`.
AUTO = "auto"
# A dense factor, its gradient and Adam's two moments take 0.5 GB at 4,000 dimensions.
_MAX_DENSE = 4000


class GuideSpec(Registered):
    """A guide family with its options: subclasses are frozen dataclasses, whose fields are the options.

    A subclass has a `name`, an `about` and a `family`, or a `build` of its own where it has to know the
    sites. Whatever else the package wants to know of a guide, it asks here or of the family. See
    docs/EXTENDING.md for one of your own.

    Attributes:
        name: What ``guide=`` calls it.
        about: What listings say of it.
        methods: The training methods that can fit it, the preferred one first: of ``"lbfgs"``,
            ``"moments"``, ``"stochastic"`` and ``"cavi"``.
        after: The guide that ``guide="auto"`` tries before this one; None where it never tries it.
        richer: The guide to try where this one is not good enough; None where nothing is.
        extends: Whether a larger one goes on from what a smaller one came to.
        covers_modes: Whether it can cover several modes at once.
        per_datum: Its form for the latents of a single datum, as ``local=`` of `Amortized` takes it;
            None where there is none.
        encodes: Whether it reads each datum, so that minibatches of rows need nothing else.
        point: Whether it is a point estimate, whose density lives on the constrained scale.
        init_scale: Initial standard deviation, in unconstrained units.
        discrete: Discrete sites that are not summed out, and how they are trained.
    """

    methods: ClassVar[tuple[str, ...]] = ("stochastic",)
    after: ClassVar[str | None] = None
    richer: ClassVar[str | None] = None
    extends: ClassVar[bool] = False
    covers_modes: ClassVar[bool] = False
    per_datum: ClassVar[str | HeadSpec | None] = None
    encodes: ClassVar[bool] = False
    point: ClassVar[bool] = False

    init_scale: float = 0.1
    discrete: Discrete | None = None

    def __post_init__(self) -> None:
        require_positive(self.name, "init_scale", self.init_scale)
        if self.discrete is not None:
            require_discrete(self.name, self.discrete)

    @classmethod
    def candidates(cls, dim: int, modes: int) -> Sequence[GuideSpec]:
        """What ``guide="auto"`` tries of it, the cheapest first; by default the one with no options.

        Args:
            dim: D, unconstrained dimensions of the model.
            modes: Modes of the posterior that searches have found.
        """
        return (cls(),)

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

    @classmethod
    def flaw(cls) -> str | None:
        """See `Registered.flaw`."""
        if cls.family is GuideSpec.family and cls.build is GuideSpec.build:
            return f"{cls.__name__} needs a family(self, dim), or a build(self, density)"
        if not cls.methods or not set(cls.methods) <= set(METHODS):
            return (
                f"{cls.__name__}.methods are some of {', '.join(METHODS)}, got {told(cls.methods)}"
            )
        for option in ("after", "richer"):
            if not isinstance(getattr(cls, option), str | None):
                return (
                    f"{cls.__name__}.{option} is a guide's name, got {told(getattr(cls, option))}"
                )
        return None

    def drawn(self) -> Drawn | None:
        """The discrete latents that it holds itself; None where it holds none."""
        return None if self.discrete is None else drawn(self.discrete)


# What can be named as ``guide=``; the package's own are added in `guides/__init__.py`.
REGISTRY = Registry(
    "guide", GuideSpec, example="vi.guides.AffineCoupling(layers=4)", reserved=[AUTO]
)


def coming_after(name: str) -> list[type[GuideSpec]]:
    """The guides that ``guide="auto"`` tries after this one, those that come after them behind each."""
    found: list[type[GuideSpec]] = []
    # What was registered last is nearest to the guide that it names.
    for cls in reversed(list(REGISTRY.values())):
        if cls.after == name:
            found += [cls, *coming_after(cls.name)]
    return found


def require_dense(name: str, dim: int) -> None:
    """Refuse a dense covariance that would fill gigabytes."""
    if dim > _MAX_DENSE:
        raise OptionError(
            f"guide {name!r} holds a dense covariance, and this model has {dim:,} unconstrained "
            f"dimensions (at most {_MAX_DENSE:,}): use guide='mean_field', or guide='amortized' where "
            "the latents lie in a data plate"
        )
