"""Making a configured part from its name: one literal table per kind of part, one way to read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from pyro_vi_kit.errors import OptionError, UnknownNameError

Part = TypeVar("Part")


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


def first_line(cls: type) -> str:
    """The first line of a part's docstring, for listings."""
    return (cls.__doc__ or "").strip().splitlines()[0]
