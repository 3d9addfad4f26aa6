"""Making a configured part from its name: one literal table per kind of part, one way to read it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
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


class Registry(Mapping[str, type[Part]]):
    """The parts of one kind by name: the package's own, and those that were registered from outside.

    Args:
        kind: What it holds, and the option that names it: ``"guide"``.
        base: What every part is a subclass of.
        example: How a configured part is written, for messages.
    """

    def __init__(self, kind: str, base: type[Part], example: str) -> None:
        self.kind, self.base, self.example = kind, base, example
        self._parts: dict[str, type[Part]] = {}

    def __getitem__(self, name: str) -> type[Part]:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, *parts: type[Part]) -> None:
        """Add parts of the package's own, each under its name."""
        for part in parts:
            self._parts[part.name] = part  # type: ignore[attr-defined]

    def describe(self) -> dict[str, str]:
        """The first line of each part's docstring."""
        return {name: (cls.__doc__ or "").strip().splitlines()[0] for name, cls in self.items()}

    def build(self, name: object, options: Mapping[str, Any]) -> Part:
        """The part of this name, configured.

        Args:
            name: The name asked for.
            options: Fields of the dataclass.

        Raises:
            UnknownNameError: If no entry has the name; lists the choices and the nearest one.
            OptionError: If an option is not one of the part's; lists those that are.
        """
        if not isinstance(name, str) or name not in self:
            raise UnknownNameError(self.kind, name, self)
        cls = self[name]
        known = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
        for option in options:
            if option not in known:
                what = f"options: {', '.join(known)}" if known else "it takes none"
                raise OptionError(f"{self.kind} {name!r} has no option {option!r}; {what}.")
        return cls(**options)

    def resolve(self, given: object, options: Mapping[str, Any]) -> Part:
        """A configured part from its name, or the configured instance that was given.

        Raises:
            UnknownNameError: If the name is not known.
            OptionError: If an option is wrong, options come with an instance, or it is neither.
        """
        if isinstance(given, str):
            return self.build(given, options)
        if not isinstance(given, self.base):
            raise OptionError(
                f"{self.kind}= takes a name ({', '.join(self)}) or an instance such as "
                f"{self.example}, got {told(given)}"
            )
        if options:
            raise OptionError(f"options go into the {self.kind} itself: {self.example}")
        return given


def has_option(part: object, option: str) -> bool:
    """Whether a configured part has an option of this name."""
    return any(field.name == option for field in dataclasses.fields(part))  # type: ignore[arg-type]
