"""The errors a user can cause, each saying what is wrong and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

_SHOWN = 80


def told(value: object) -> str:
    """A value of the user's as messages show it: in a line, and cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001  a repr of the user's own
        text = f"an object of {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


class ViError(Exception):
    """Base of every error this package raises on purpose.

    The message names the site, shape or option at fault and the remedy; the command line prints it
    without a traceback.
    """


class ModelError(ViError, ValueError):
    """The model, its data or its structure cannot be used as asked."""


class ShapeError(ModelError):
    """Data, distributions and plates do not agree, and data would count more than once."""


class FitError(ModelError):
    """Something was raised in the middle of a fit, by the model as a rule; that is its ``__cause__``.

    Args:
        message: What was raised, and where.
        posterior: What the fit had come to, as after an interrupt; None where there was nothing yet.
    """

    def __init__(self, message: str, posterior: Any = None) -> None:
        super().__init__(message)
        self.posterior = posterior


class OptionError(ViError, ValueError):
    """An option's value or a combination of options cannot work."""


class UnknownNameError(OptionError, KeyError):
    """A name that no registry entry has.

    Args:
        kind: What was asked for, e.g. ``"guide"``.
        name: The name that is not known.
        choices: The names that are.
    """

    def __init__(self, kind: str, name: object, choices: Iterable[str]) -> None:
        known = sorted(choices)
        shown = told(name)
        folded = {choice.casefold(): choice for choice in known}
        wanted = name.casefold() if isinstance(name, str) else shown
        nearest = difflib.get_close_matches(wanted, folded, n=1, cutoff=0.4)
        hint = f" Did you mean {folded[nearest[0]]!r}?" if nearest else ""
        super().__init__(f"unknown {kind} {shown}.{hint} Known {kind}s: {', '.join(known)}.")
        self._init_args = (kind, name if isinstance(name, str) else shown, tuple(known))

    def __reduce__(self) -> tuple[type, tuple[str, str, tuple[str, ...]]]:
        # The default would call the class with the message alone, in whichever process unpickles it.
        return type(self), self._init_args

    def __str__(self) -> str:
        # KeyError would print the repr of the message.
        return str(self.args[0])


class ModelWarning(UserWarning):
    """How a model is read, where that is not what its words say; the numbers are as in Pyro."""


class FileError(ViError, OSError):
    """A file cannot be read or written as asked."""


class OtherDataWarning(UserWarning):
    """A posterior was read beside a model of other data than those it was fitted to."""


class RegistrationWarning(UserWarning):
    """An installed package offers a guide or an objective that cannot be used, and is left out."""


class MissingDependencyError(ViError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


def first_line(error: BaseException) -> str:
    """The first line of what an error says; torch's go on for pages."""
    return str(error).strip().partition("\n")[0]


# What torch's allocators say: the CPU's on Linux, on Windows, and CUDA's.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")


def in_words(error: BaseException) -> str:
    """What was raised, in one line, for a status: running out of memory as that."""
    name, said = type(error).__name__, first_line(error)
    torchs = isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)
    if isinstance(error, MemoryError) or torchs:
        return f"out of memory ({name}: {said})" if said else f"out of memory ({name})"
    return f"{name}: {said}"
