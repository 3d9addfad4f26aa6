"""When a compiler may work beside a fit: one at a time, and where the machine has time for it.

It takes 400 MB and up to a minute of a processor, which other fits may need more.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from pyro_vi_kit.capture import cache

SIDE_BY_SIDE = "PYRO_VI_KIT_SIDE_BY_SIDE"
"""Set in the environment of processes that fit at the same time as others: no compiler is started."""

_LOCK_FILE = "compiling.lock"


class Stopping(Protocol):
    """What can be told to stop."""

    def stop(self) -> None:
        """Stop, if it is at work."""
        ...


_started: ContextVar[list[Stopping] | None] = ContextVar("compilers", default=None)


def busy() -> str:
    """Why no compiler is started beside a fit now; empty where it may be.

    Nothing is started where on average over the last minute more processes wanted a processor than there
    are: a compiler would take the time of another's work then.
    """
    if os.environ.get(SIDE_BY_SIDE):
        return f"fits run side by side ({SIDE_BY_SIDE})"
    count = processors()
    with contextlib.suppress(OSError, AttributeError):  # no such thing on Windows
        load = os.getloadavg()[0]
        if load > count:
            return f"the machine is busy (a load of {load:.1f} on {count} processors)"
    return ""


def take() -> int | None:
    """A file descriptor that is the turn, as long as a process holds it; None where another has it.

    Raises:
        OSError: If there is no folder for it.
    """
    path = cache.folder() / _LOCK_FILE
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    held = os.open(path, flags, 0o600)
    if _locked(held):
        return held
    os.close(held)
    return None


def _locked(held: int) -> bool:
    try:
        import fcntl
    except ImportError:  # on Windows, where each has its turn
        return True
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def ending_here() -> Iterator[None]:
    """Compilers that are started inside are stopped at its end, whether they are done or not."""
    started: list[Stopping] = []
    token = _started.set(started)
    try:
        yield
    finally:
        _started.reset(token)
        for one in started:
            one.stop()


def note_started(one: Stopping) -> None:
    """Have a compiler stopped at the end of `ending_here`."""
    started = _started.get()
    if started is not None:
        started.append(one)


def processors() -> int:
    """How many processors this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
