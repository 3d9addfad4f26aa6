"""What ends a call from outside or in its middle: SIGTERM as an exception, and a model that raises.

An interrupt (Ctrl-C) keeps what there is wherever something is. SIGTERM, which would end the process on
the spot and leave its workers and temporary files behind, is made one more interrupt; and what a model
raises in the middle of a fit is told as an error of this package, behind the same keeping.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

from pyro_vi_kit.core.errors import FitError, ModelError, OptionError, ViError, first_line

TERMINATED = 128 + signal.SIGTERM

_P = ParamSpec("_P")
_R = TypeVar("_R")


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM)."""


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[list[int]]:
    """Raise `Terminated` where SIGTERM would end the process; yields the signals that came.

    Nothing is changed outside of the main thread, where Python handles no signals, and where somebody
    else handles this one.
    """
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        received.append(number)
        raise Terminated

    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield received
        return
    signal.signal(signal.SIGTERM, handle)
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def terminable(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have a call end in order on SIGTERM: what an interrupt keeps is kept, and the exit code is 143."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with sigterm_as_interrupt() as received:
            try:
                result = function(*args, **kwargs)
                if not received:
                    return result
            except Terminated:
                if not received:  # it is for a call around this one
                    raise
        print(
            f"{function.__name__}: terminated (SIGTERM); what is in files is whole, and a fit with "
            "checkpoint= goes on from there",
            file=sys.stderr,
            flush=True,
        )
        # Not by the signal: with this, exit handlers run, which stop workers and take files away.
        raise SystemExit(TERMINATED)

    return call


def failing_in_words(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Tell whatever else is raised in a call as a `FitError`: most of it comes from the user's model."""
    return _told_as(fit_error, function)


def model_errors(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Tell what is raised where a fitted model is run again as a `ModelError`."""
    return _told_as(_model_error, function)


def _told_as(told: Callable[[Exception], ViError], function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Have what is raised in a call, but for errors of the kit's own, told as one of these."""

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except ViError:
            raise
        except Exception as error:
            # Before the call's own body nothing of a model has run.
            misused = isinstance(error, TypeError) and _misuse(function, args, kwargs)
            raise (OptionError(misused) if misused else told(error)) from error

    return call


def _misuse(function: Callable[..., Any], args: Any, kwargs: Any) -> str:
    """What is wrong with the arguments of a call, and what it takes; empty where they fit."""
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        takes = ", ".join(name for name in signature.parameters if name != "self")
        return f"{function.__name__}: {error}; it takes {takes}"
    return ""


def _model_error(error: Exception) -> ModelError:
    return ModelError(f"the model or guide raised {_told(error)}")


def fit_error(error: Exception, posterior: Any = None, more: str = "") -> FitError:
    """What a fit says that could not go on.

    Args:
        error: What was raised.
        posterior: What the fit had come to.
        more: What else is to be said.
    """
    kept = "" if posterior is None else " What it had come to is the error's .posterior."
    return FitError(f"the fit stopped: the model raised {_told(error)}.{kept}{more}", posterior)


def _told(error: Exception) -> str:
    """What was raised, and where."""
    frame = (traceback.extract_tb(error.__traceback__) or [None])[-1]
    where = "" if frame is None else f" (at {frame.filename}:{frame.lineno}, in {frame.name})"
    return f"{type(error).__name__}: {first_line(error)}{where}"
