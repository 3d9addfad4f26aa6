"""Options that several methods of a posterior take, checked before any work."""

from __future__ import annotations

from pyro_vi_kit.errors import OptionError


def require_tolerance(tol: object) -> None:
    """Refuse what is no positive number of nats."""
    if isinstance(tol, bool) or not isinstance(tol, int | float) or not tol > 0:
        raise OptionError(f"tol= must be a positive number of nats, got {tol!r}")


def require_draws(draws: int) -> None:
    """Refuse what is no positive number of draws."""
    if not isinstance(draws, int) or isinstance(draws, bool) or draws < 1:
        raise OptionError(f"draws must be a positive integer, got {draws!r}")
