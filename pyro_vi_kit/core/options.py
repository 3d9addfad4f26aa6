"""Options of the public functions: a rule for each, and one decorator that applies them before any work.

A rule is given the option's name and its value, and gives the value to use or raises. What a function
takes stands in its decorator::

    @checks(draws=DRAWS, seed=optional(SEED), prob=SHARE)
    def ...
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from pyro_vi_kit.core.errors import OptionError, UnknownNameError, told

Rule = Callable[[str, Any], Any]
"""``rule(option, value)`` gives the value to use, or raises `OptionError`."""

P = ParamSpec("P")
R = TypeVar("R")

# torch's generators take 64 bits; seeds that are derived from a seed by adding to it need room.
_LARGEST_SEED = 2**63 - 1
# So many draws of a single number fill 8 GB; where a draw has many, memory is asked (`runtime`).
_MOST_DRAWS = 10**9
_MOST = 2**53
# Layers, widths, components and steps beyond which a guide is a slip of the pen.
_MOST_PARTS = 10**6


def checks(**rules: Rule) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: every parameter that is named here is given to its rule when it is passed.

    Args:
        **rules: By parameter. Defaults are not looked at.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)
        unknown = sorted(set(rules) - set(signature.parameters))
        if unknown:
            raise TypeError(f"{function.__qualname__} has no parameter {unknown[0]!r} to check")

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return function(*args, **kwargs)  # says itself what is missing or too much
            given = bound.arguments
            for option in given.keys() & rules.keys():
                given[option] = rules[option](option, given[option])
            return function(*bound.args, **bound.kwargs)

        return checked

    return decorate


def optional(rule: Rule) -> Rule:
    """The rule, with None let through."""
    return lambda option, value: None if value is None else rule(option, value)


def integer(at_least: int, at_most: int = _MOST) -> Rule:
    """An integer, of Python or NumPy, within these."""

    def rule(option: str, value: Any) -> int:
        wanted = f"{option}= must be an integer of at least {at_least}"
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise OptionError(f"{wanted}, got {told(value)}")
        plain = int(value)
        if plain < at_least:
            raise OptionError(f"{wanted}, got {told(value)}")
        if plain > at_most:
            raise OptionError(f"{wanted} and at most {at_most:,}, got {told(value)}")
        return plain

    return rule


def positive(option: str, value: Any) -> float:
    """A positive, finite number."""
    if not is_finite(value) or not value > 0:
        raise OptionError(f"{option}= must be a positive number, got {told(value)}")
    return float(value)


def share(option: str, value: Any) -> float:
    """A number between 0 and 1."""
    if not is_number(value) or not 0 < value < 1:
        raise OptionError(f"{option}= must lie between 0 and 1, got {told(value)}")
    return float(value)


def flag(option: str, value: Any) -> bool:
    """True or False."""
    if type(value).__name__ not in ("bool", "bool_"):
        raise OptionError(f"{option}= must be True or False, got {told(value)}")
    return bool(value)


def text(option: str, value: Any) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise OptionError(f"{option}= must be a name, got {told(value)}")
    return value


def path(option: str, value: Any) -> Any:
    """The path of a file."""
    try:
        plain = os.fspath(value)
    except TypeError:
        plain = None
    if not isinstance(plain, str) or not plain or "\0" in plain:
        raise OptionError(f"{option}= must be the path of a file, got {told(value)}")
    return value


def names(option: str, value: Any) -> Any:
    """A name, or several."""
    if isinstance(value, str):
        return value
    several = list(value) if isinstance(value, Iterable) and not is_array(value) else [None]
    if not several or not all(isinstance(name, str) for name in several):
        raise OptionError(f"{option}= must be a name or a list of names, got {told(value)}")
    return several


def function(option: str, value: Any) -> Any:
    """Something that can be called."""
    if not callable(value):
        raise OptionError(f"{option}= must be a function, got {told(value)}")
    return value


def mapping(option: str, value: Any) -> Any:
    """A dict by name."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise OptionError(f"{option}= must be a dict by name, got {told(value)}")
    return value


def one_of(kind: str, known: Iterable[str]) -> Rule:
    """One of these names."""
    choices = tuple(known)

    def rule(option: str, value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise UnknownNameError(kind, value, choices)
        return value

    return rule


def of_class(kind: type, remedy: str) -> Rule:
    """An instance of a class; ``remedy`` says how to make one."""

    def rule(option: str, value: Any) -> Any:
        if not isinstance(value, kind):
            raise OptionError(f"{option} must be a {kind.__name__}, got {told(value)}: {remedy}")
        return value

    return rule


def is_number(value: object) -> bool:
    """Whether a value is a real number, of Python or NumPy."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether a value is a real number that a float can hold."""
    return is_number(value) and abs(value) <= sys.float_info.max  # type: ignore[operator, arg-type]


def is_array(value: object) -> bool:
    """Whether a value is a whole of its own, text or an array, and not the list of several."""
    return isinstance(value, str | bytes) or hasattr(value, "dtype")


COUNT = integer(1)
DRAWS = integer(1, _MOST_DRAWS)
SEED = integer(0, _LARGEST_SEED)


# -- options of guides, which are checked where one is configured ----------------------------


def require_positive(name: str, option: str, value: object) -> None:
    """Refuse an option that is no positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
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
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST_PARTS
