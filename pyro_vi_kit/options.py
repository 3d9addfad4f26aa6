"""Options of the public functions, checked before any work."""

from __future__ import annotations

from pyro_vi_kit.errors import OptionError


def require_positive(option: str, value: object) -> None:
    """Refuse what is no positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise OptionError(f"{option}= must be a positive number, got {value!r}")


def require_integer(option: str, value: object, *, at_least: int, optional: bool = False) -> None:
    """Refuse what is no integer of this size; None is let through where it is ``optional``."""
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise OptionError(f"{option}= must be an integer of at least {at_least}, got {value!r}")
