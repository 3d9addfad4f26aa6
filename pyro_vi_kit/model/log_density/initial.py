"""Where a model is first run: at points of its own, or near one that ``init=`` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vi_kit.core.errors import ModelError, OptionError, ViError, first_line, told

InitFunction = Callable[[Any], Any]
"""From a Pyro site to its constrained value, as Pyro's ``init_to_*``; None where it does not know it."""

PYROS = ("median", "mean", "sample", "feasible", "uniform")
"""Names of Pyro's own functions, without their ``init_to_``."""

# How far from a given point a model is tried, in unconstrained space: 0.3 as around the origin, and less
# where only points near it are feasible.
SPREADS = (0.3, 0.01, 1e-4)


def checked(init: Any, words: Sequence[str]) -> Any:
    """What ``init=`` stands for: one of some words, values by site, or a function of the site.

    Args:
        init: As it was given; ``"median"`` is Pyro's ``init_to_median``, and so on for all of `PYROS`.
        words: Words that mean something else.

    Raises:
        OptionError: If it is none of these.
    """
    if isinstance(init, str) and init in PYROS:
        from pyro.infer.autoguide import initialization  # loads what a fit can do without

        return getattr(initialization, f"init_to_{init}")
    if isinstance(init, Mapping) or callable(init) or (isinstance(init, str) and init in words):
        return init
    known = ", ".join(repr(word) for word in (*words, *PYROS))
    raise OptionError(
        f"init= must be {known}, a dict of site values, or a function of the site such as "
        f"pyro.infer.autoguide.init_to_value(values=...), got {told(init)}"
    )


def function_of(init: Mapping[str, Any] | InitFunction) -> InitFunction:
    """Values by site as a function of the site; a function is itself."""
    return (lambda site: init.get(site["name"])) if isinstance(init, Mapping) else init


def point_at(msg: Any, init: InitFunction, transform: Any, origin: Tensor) -> Tensor:
    """The unconstrained value of a site that ``init`` gives.

    Args:
        msg: The site's message.
        init: What gives the constrained value.
        transform: From unconstrained to constrained values.
        origin: What it is where ``init`` gives none; has the precision and the device.

    Raises:
        OptionError: If the function raises.
        ModelError: If the value has another shape than the site, or is outside its support.
    """
    name, fn = msg["name"], msg["fn"]
    try:
        with torch.no_grad():
            raw = init(msg)
    except ViError:
        raise
    except Exception as error:
        raise OptionError(
            f"init= raised {type(error).__name__} at site {name!r}: {first_line(error)}. It is called "
            "with a Pyro site, as init_to_median is, and gives its value, or None where it knows none"
        ) from error
    if raw is None:
        return origin
    try:
        value = torch.as_tensor(raw, dtype=origin.dtype, device=origin.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(
            f"init= gives site {name!r} a {type(raw).__name__}, which is no number or tensor: give its "
            "value, or None where there is none"
        ) from error
    shape = fn.shape()
    if value.numel() == shape.numel():
        value = value.reshape(shape)
    elif value.dim() == 0:
        value = value.expand(shape)
    else:
        raise ModelError(
            f"site {name!r} has shape {tuple(shape)}; the value given for it has {tuple(value.shape)}"
        )
    point = transform.inv(value)
    # Not the transform alone: a sigmoid's inverse clamps what lies outside.
    if not bool(fn.support.check(value).all() and point.isfinite().all()):
        raise ModelError(
            f"the value given for site {name!r} is not inside its support, {fn.support}"
        )
    return point


def require_latents(init: object, latents: list[str]) -> None:
    """Refuse values of what is no latent.

    Raises:
        ModelError: If there is one.
    """
    unknown = sorted(set(init) - set(latents)) if isinstance(init, Mapping) else []
    if unknown:
        raise ModelError(
            f"no latent site named {unknown[0]!r}; latents: {', '.join(latents) or 'none'}"
        )
