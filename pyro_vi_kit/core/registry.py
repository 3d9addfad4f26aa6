"""Making a configured part from its name: one literal table per kind of part, one way to read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from pyro_vi_kit.core.errors import OptionError, UnknownNameError, told

Part = TypeVar("Part")


class About(NamedTuple):
    """What a listing tells of a part, so that one can choose.

    Attributes:
        does: What it can represent, or what it bounds.
        cost: Of a step, in the number D of unconstrained dimensions (or K of particles).
        use: When to take it.
        paper: Where it is from.
    """

    does: str
    cost: str
    use: str
    paper: str


def build(
    kind: str, table: Mapping[str, type[Part]], name: object, options: Mapping[str, Any]
) -> Part:
    """The part that ``table`` holds under ``name``, configured.

    Args:
        kind: What the table holds, for messages: ``"guide"``.
        table: Dataclasses by name.
        name: The name asked for.
        options: Fields of the dataclass.

    Raises:
        UnknownNameError: If no entry has the name; lists the choices and the nearest one.
        OptionError: If an option is not one of the part's; lists those that are.
    """
    if not isinstance(name, str) or name not in table:
        raise UnknownNameError(kind, name, table)
    cls = table[name]
    known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            what = f"options: {', '.join(known)}" if known else "it takes none"
            raise OptionError(f"{kind} {name!r} has no option {option!r}; {what}.")
    return cls(**options)


def resolve(
    kind: str,
    table: Mapping[str, type[Part]],
    given: object,
    options: Mapping[str, Any],
    *,
    protocol: type[Part],
    example: str,
) -> Part:
    """A configured part from its name, or the configured instance that was given.

    Args:
        kind: What the table holds, and the option that names it: ``"guide"``.
        table: Dataclasses by name.
        given: A name or an instance.
        options: Fields of the dataclass, with a name.
        protocol: What an instance has to be.
        example: How an instance is written, for messages.

    Raises:
        UnknownNameError: If the name is not known.
        OptionError: If an option is wrong, options come with an instance, or it is neither.
    """
    if isinstance(given, str):
        return build(kind, table, given, options)
    if not isinstance(given, protocol) or isinstance(given, type):
        raise OptionError(
            f"{kind}= takes a name ({', '.join(table)}) or an instance such as {example}, "
            f"got {told(given)}"
        )
    if options:
        raise OptionError(f"options go into the {kind} itself: {example}")
    return given


def first_line(cls: type) -> str:
    """The first line of a part's docstring, for listings."""
    return (cls.__doc__ or "").strip().splitlines()[0]
