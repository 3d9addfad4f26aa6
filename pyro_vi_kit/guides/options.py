"""Options of guides, checked when a guide is configured or meets a model."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from pyro_vi_kit.errors import OptionError

# A dense factor, its gradient and Adam's two moments take 0.5 GB at 4,000 dimensions.
MAX_DENSE = 4000


def require_positive(name: str, option: str, value: object) -> None:
    """Refuse an option that is no positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        raise OptionError(f"{name}: {option} must be a positive number, got {value!r}")


def require_widths(name: str, hidden: object) -> tuple[int, ...]:
    """Layer widths as a tuple; one number stands for one layer.

    Raises:
        OptionError: If a width is no positive integer.
    """
    widths = tuple(hidden) if isinstance(hidden, Sequence) else (hidden,)
    if not widths or not all(is_count(width) for width in widths):
        raise OptionError(f"{name}: hidden must be positive layer widths, got {hidden!r}")
    return widths  # type: ignore[return-value]


def require_count(name: str, option: str, value: object) -> None:
    """Refuse an option that is no positive integer."""
    if not is_count(value):
        raise OptionError(f"{name}: {option} must be a positive integer, got {value!r}")


def is_count(value: object) -> bool:
    """Whether a value is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def require_dense(name: str, dim: int) -> None:
    """Refuse a dense covariance that would fill gigabytes."""
    if dim > MAX_DENSE:
        raise OptionError(
            f"guide {name!r} holds a dense covariance, and this model has {dim:,} unconstrained "
            f"dimensions (at most {MAX_DENSE:,}): use guide='mean_field', or guide='amortized' where "
            "the latents lie in a data plate"
        )
