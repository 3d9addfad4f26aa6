"""Guides and objectives by name, the package's own and those of others, and how they are configured."""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from types import FunctionType
from typing import Any, ClassVar, NamedTuple, TypeVar

from pyro_vi_kit.core.errors import (
    OptionError,
    RegistrationWarning,
    UnknownNameError,
    first_line,
    told,
)


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


class Registered(ABC):
    """What a registry holds: a class whose configured instances are frozen dataclasses.

    Attributes:
        name: What it is called.
        about: What listings say of it.
    """

    name: ClassVar[str]
    about: ClassVar[About]

    @classmethod
    def flaw(cls) -> str | None:
        """What is wrong with a class that is to be registered, with the remedy, or None."""
        return None


Part = TypeVar("Part", bound=Registered)


class Registry(Mapping[str, type[Part]]):
    """The parts of one kind by name: the package's own, and those that were registered from outside.

    Entry points are looked for where a name is not known without them, and in listings.

    Args:
        kind: What it holds, and the option that names it: ``"guide"``. Entry points have the group
            ``pyro_vi_kit.guides``.
        base: What every part is a subclass of.
        example: How a configured part is written, for messages.
        reserved: Names that mean something else.
    """

    def __init__(
        self, kind: str, base: type[Part], example: str, reserved: Sequence[str] = ()
    ) -> None:
        self.kind, self.base, self.example, self.reserved = kind, base, example, reserved
        self.group = f"pyro_vi_kit.{kind}s"
        self._parts: dict[str, type[Part]] = {}
        self._own: set[str] = set()
        self._looked = False

    def __getitem__(self, name: str) -> type[Part]:
        if name not in self._parts:
            self._look_for_entry_points()
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        self._look_for_entry_points()
        return iter(list(self._parts))

    def __len__(self) -> int:
        self._look_for_entry_points()
        return len(self._parts)

    def add(self, *parts: type[Part]) -> None:
        """Add parts of the package's own."""
        for part in parts:
            self._parts[part.name] = part
            self._own.add(part.name)

    def register(self, part: type[Part]) -> type[Part]:
        """Add a part from outside; a decorator of its class, too.

        The same class may be registered again, as where a notebook's cell is run again.

        Args:
            part: A frozen dataclass and subclass of the registry's base; its fields are its options,
                each with a default.

        Raises:
            OptionError: If it is none, lacks something, or its name is taken.
        """
        flaw = self._flaw(part)
        if flaw is not None:
            raise OptionError(f"vi.{self.kind}s.register: {flaw}")
        self._parts[part.name] = part
        return part

    def remove(self, name: str) -> None:
        """Take a part away that was registered from outside.

        Raises:
            UnknownNameError: If there is none of this name.
        """
        others = [each for each in self if each not in self._own]
        if name not in others:
            raise UnknownNameError(f"registered {self.kind}", name, others)
        del self._parts[name]

    def _flaw(self, part: Any) -> str | None:
        """What is wrong with a part that is to be registered, with the remedy, or None."""
        base = f"vi.{self.kind}s.{self.base.__name__}"
        if not isinstance(part, type):
            return f"it takes the class, and options are given later; got {told(part)}"
        if not issubclass(part, self.base):
            return f"{part.__name__} is no {self.kind}: write class {part.__name__}({base})"
        frozen = "__dataclass_params__" in vars(part) and vars(part)["__dataclass_params__"].frozen
        if not frozen:
            return (
                f"{part.__name__} has to be decorated with @dataclass(frozen=True): its fields are its "
                "options, as files and checkpoints hold them"
            )
        name, about = getattr(part, "name", None), getattr(part, "about", None)
        if not isinstance(name, str) or not name.isidentifier():
            return f'{part.__name__} needs a name, one word such as name = "my_{self.kind}"'
        if not isinstance(about, About) or not all(isinstance(x, str) and x for x in about):
            return (
                f"{part.__name__} needs an about = vi.{self.kind}s.About(does=..., cost=..., use=..., "
                "paper=...), which listings show"
            )
        return self._taken(part) or _unmade(part) or part.flaw()

    def _taken(self, part: type[Part]) -> str | None:
        known = self._parts.get(part.name)
        free = known is None or (part.name not in self._own and _is_again(part, known))
        if part.name not in self.reserved and free:
            return None
        whose = (
            "of the package's own" if known is None else f"of {known.__module__}.{known.__name__}"
        )
        return f"the name {part.name!r} is taken, {whose}: give {part.__name__} another name"

    def _look_for_entry_points(self) -> None:
        """Register what installed packages offer; what cannot be is told, and left out."""
        if self._looked:
            return
        self._looked = True
        for point in entry_points(group=self.group):
            try:
                self.register(point.load())
            except Exception as error:  # noqa: BLE001  a package of somebody else's
                warnings.warn(
                    f"the entry point {point.name} = {point.value} of {self.group} is left out: "
                    f"{type(error).__name__}: {first_line(error)}",
                    RegistrationWarning,
                    stacklevel=3,
                )

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


def _is_again(part: type, known: type) -> bool:
    """Whether a class is another one of old: a cell, or a file, that was run again."""
    if part.__qualname__ != known.__qualname__:
        return False
    return part.__module__ == known.__module__ or _file_of(part) == _file_of(known)


def _file_of(cls: type) -> str:
    """The file that a class was written in, where it has a function that tells it."""
    codes = (each.__code__ for each in vars(cls).values() if isinstance(each, FunctionType))
    named = (code.co_filename for code in codes if not code.co_filename.startswith("<"))
    return next(named, cls.__module__)


def _unmade(part: type[Registered]) -> str | None:
    """Why a part cannot be had by its name alone."""
    missing = sorted(getattr(part, "__abstractmethods__", ()))
    if missing:
        return f"{part.__name__} lacks {', '.join(missing)}"
    try:
        part()
    except TypeError as error:
        return (
            f"{part.__name__}() has to work, with a default for each option ({first_line(error)})"
        )
    return None


def has_option(part: object, option: str) -> bool:
    """Whether a configured part has an option of this name."""
    return any(field.name == option for field in dataclasses.fields(part))  # type: ignore[arg-type]
