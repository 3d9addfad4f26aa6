"""Guides by name. Each builds a Pyro guide that works in a stock `pyro.infer.SVI`."""

from __future__ import annotations

from typing import Any

import torch

from pyro_vi_kit.core.device import Device
from pyro_vi_kit.core.errors import UnknownNameError
from pyro_vi_kit.core.options import SEED, checks, optional
from pyro_vi_kit.core.registry import About
from pyro_vi_kit.core.runtime import RandomStream, a_dtype, default_dtype
from pyro_vi_kit.guides.families import Family, GaussianFamily
from pyro_vi_kit.guides.flows.affine_coupling import AffineCoupling
from pyro_vi_kit.guides.flows.autoregressive import Autoregressive
from pyro_vi_kit.guides.flows.neural_spline import NeuralSpline
from pyro_vi_kit.guides.flows.planar import Planar
from pyro_vi_kit.guides.flows.radial import Radial
from pyro_vi_kit.guides.gaussian.full_rank import FullRank
from pyro_vi_kit.guides.gaussian.laplace import Delta, Laplace
from pyro_vi_kit.guides.gaussian.low_rank import LowRank
from pyro_vi_kit.guides.gaussian.mean_field import MeanField
from pyro_vi_kit.guides.gaussian.pathfinder import Pathfinder
from pyro_vi_kit.guides.gaussian.structured import Structured
from pyro_vi_kit.guides.gaussian.student_t import StudentT
from pyro_vi_kit.guides.local.amortized import Amortized
from pyro_vi_kit.guides.local.local import LocalFlow, LocalMixture
from pyro_vi_kit.guides.local.per_datum import held_at_mean, mean_of_globals, per_datum, tabulated
from pyro_vi_kit.guides.mixtures.gaussian_mixture import Mixture
from pyro_vi_kit.guides.pyro_guide import Draw, Guide
from pyro_vi_kit.guides.spec import AUTO, REGISTRY, GuideSpec
from pyro_vi_kit.guides.supports.mixed import Relaxed
from pyro_vi_kit.model.log_density import Density, Drawn
from pyro_vi_kit.model.model import Model, a_model

REGISTRY.add(
    Delta,
    Laplace,
    Pathfinder,
    MeanField,
    Structured,
    LowRank,
    FullRank,
    StudentT,
    Planar,
    Radial,
    AffineCoupling,
    Autoregressive,
    NeuralSpline,
    Mixture,
    Amortized,
)

_ABOUT_AUTO = About(
    does="what the richest of the guides tried can",
    cost="work worth two minutes at most, unless budget= says otherwise",
    use="when nobody knows which guide",
    paper="none: see docs/BELIEVE.md",
)
_AUTO_LINE = (
    "Climbs from a Gaussian to flows and mixtures while the verdict asks for it (vi.fit only)."
)

__all__ = [
    "AUTO",
    "REGISTRY",
    "About",
    "AffineCoupling",
    "Amortized",
    "Autoregressive",
    "Delta",
    "Draw",
    "Family",
    "FullRank",
    "GaussianFamily",
    "Guide",
    "GuideSpec",
    "Laplace",
    "LocalFlow",
    "LocalMixture",
    "LowRank",
    "MeanField",
    "Mixture",
    "NeuralSpline",
    "Pathfinder",
    "Planar",
    "Radial",
    "Relaxed",
    "Structured",
    "StudentT",
    "about",
    "choices",
    "describe",
    "drawn_of",
    "held_at_mean",
    "make",
    "mean_of_globals",
    "names",
    "per_datum",
    "register",
    "require_choice",
    "specify",
    "tabulated",
]


def register(spec: type[GuideSpec]) -> type[GuideSpec]:
    """Make a guide of your own known by its name, as the package's are; see docs/EXTENDING.md.

    Args:
        spec: A frozen dataclass and subclass of `GuideSpec`. Also a decorator of it.

    Raises:
        OptionError: If it is none, lacks something, or its name is taken.
    """
    return REGISTRY.register(spec)


def names() -> list[str]:
    """What can be named as ``guide=``, and built; `vi.fit` takes ``"auto"`` too."""
    return list(REGISTRY)


def describe() -> dict[str, str]:
    """One line for each guide."""
    return REGISTRY.describe()


def choices() -> dict[str, str]:
    """One line for everything that `vi.fit` takes as a name: the guides, and ``auto``."""
    return describe() | {AUTO: _AUTO_LINE}


def about() -> dict[str, About]:
    """What each of `choices` can represent, what it costs, when to use it, and its paper."""
    return {name: cls.about for name, cls in REGISTRY.items()} | {AUTO: _ABOUT_AUTO}


def require_choice(guide: object) -> None:
    """Refuse a name that is none of `choices`.

    Raises:
        UnknownNameError: Names the nearest.
    """
    if isinstance(guide, str) and guide not in choices():
        raise UnknownNameError("guide", guide, choices())


def specify(guide: str | GuideSpec, **options: Any) -> GuideSpec:
    """A configured guide from its name, or the instance itself.

    Raises:
        UnknownNameError: If the name is not known.
        OptionError: If an option is wrong, or options come with an instance.
    """
    return REGISTRY.resolve(guide, options)


def drawn_of(spec: GuideSpec) -> Drawn | None:
    """The discrete latents that a configured guide holds; None where it holds none."""
    return spec.drawn()


def _fittable(option: str, value: Any) -> Model | Density:
    return value if isinstance(value, Density) else a_model(option, value)


@checks(model=_fittable, seed=SEED, dtype=optional(a_dtype))
def make(
    guide: str | GuideSpec,
    model: Model | Density,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: Device | None = None,
    **options: Any,
) -> Guide:
    """A Pyro guide for a stock SVI loop: ``SVI(model, vi.guides.make("full_rank", model), ...)``.

    Args:
        guide: A name or a configured instance.
        model: The model, with data of the shapes that the loop will use.
        seed: For initial weights and permutations; the user's random state is not touched.
        dtype: Precision of the guide's parameters; torch's default dtype when None.
        device: Where they are; where the model's data are when None.
        **options: Options of the named guide.

    Raises:
        UnknownNameError: If the name is not known.
        OptionError: If an option is wrong or the guide does not fit the model.
        ModelError: If the model cannot be used.
    """
    spec = specify(guide, **options)
    if isinstance(model, Model):
        model = Density(model, dtype=dtype or default_dtype(), device=device, drawn=spec.drawn())
    with RandomStream(seed, "initial weights"):
        return spec.build(model)
