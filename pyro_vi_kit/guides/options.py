"""Options of guides, checked when a guide is configured or meets a model."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from pyro_vi_kit.core.errors import OptionError, told

# A dense factor, its gradient and Adam's two moments take 0.5 GB at 4,000 dimensions.
MAX_DENSE = 4000
# Layers, widths, components and steps beyond which a guide is a slip of the pen.
MOST = 10**6


def require_positive(name: str, option: str, value: object) -> None:
    """Refuse an option that is no positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
        raise OptionError(f"{name}: {option} must be a positive number, got {told(value)}")


def require_one_of(name: str, option: str, value: object, known: Sequence[str]) -> None:
    """Refuse an option that is none of these words."""
    if not isinstance(value, str) or value not in known:
        raise OptionError(f"{name}: {option} must be one of {', '.join(known)}, got {told(value)}")


def require_widths(name: str, hidden: object) -> tuple[int, ...]:
    """Layer widths as a tuple; one number stands for one layer.

    Raises:
        OptionError: If a width is no positive integer.
    """
    widths = tuple(hidden) if isinstance(hidden, Sequence) else (hidden,)
    if not widths or not all(is_count(width) for width in widths):
        raise OptionError(f"{name}: hidden must be positive layer widths, got {told(hidden)}")
    return widths  # type: ignore[return-value]


def require_count(name: str, option: str, value: object) -> None:
    """Refuse an option that is no positive integer."""
    if not is_count(value):
        raise OptionError(f"{name}: {option} must be a positive integer, got {told(value)}")


def is_count(value: object) -> bool:
    """Whether a value is a positive integer, and not so large that nothing could hold so many."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MOST


def require_dense(name: str, dim: int) -> None:
    """Refuse a dense covariance that would fill gigabytes."""
    if dim > MAX_DENSE:
        raise OptionError(
            f"guide {name!r} holds a dense covariance, and this model has {dim:,} unconstrained "
            f"dimensions (at most {MAX_DENSE:,}): use guide='mean_field', or guide='amortized' where "
            "the latents lie in a data plate"
        )
